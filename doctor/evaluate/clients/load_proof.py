"""The load proof: a checkpoint goes through the loading code of the client that will read it, before it is called
finished.

Our own reading of names and packed words proves nothing about a client: the file counts as loadable when transformers,
asked for the class that config.json names, reports no parameter missing, none unexpected and none of another shape, and
when the packed linears that its own library unpacks are ours bit for bit. The client runs in a process of its own
(transformers_child.py), on the meta device, so the proof takes seconds whatever the model's size.
"""

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from doctor.checkpoint.directory import Checkpoint
from doctor.checkpoint.gguf import GgufModel
from doctor.core.messages import _
from doctor.core.records import LoadProof
from doctor.evaluate.clients import llama_cpp_child
from doctor.evaluate.clients.transformers_child import EXPERT
from doctor.formats.base import Format
from doctor.formats.registry import KNOWN
from doctor.model.quantization_config import quantization_of
from doctor.quant.client import Linears

SECONDS = 600  # enough for the headers of a model of a terabyte on a busy machine; a client that hangs must end
SAMPLED = 3  # packed linears whose weights are compared


def prove_loading(
    folder: Path, *, sample: int = SAMPLED, seconds: float = SECONDS, python: str | None = None
) -> LoadProof:
    """What transformers does with the checkpoint in `folder`, or llama.cpp with the GGUF model there. What the client
    says is in the record, never raised. python: the interpreter that has llama.cpp; None takes doctor's own.
    """
    opened = Checkpoint.open(folder)
    models, unread = opened.gguf, format_without_client(opened)
    if models:
        root = Path(folder) if Path(folder).is_dir() else Path(folder).parent
        return _prove_by_llama_cpp(root / models[0].files[0].name, models[0], python, seconds)
    if unread:
        reason = _("no program here reads {label}; doctor's own reader alone read it", label=unread.label)
        return LoadProof("doctor", reason=reason)
    with tempfile.TemporaryDirectory(prefix="doctor-load-") as place:
        out = Path(place) / "sample.safetensors"
        answer = _ask(folder, place, ["--sample", str(sample), "--out", str(out)], seconds)
        if isinstance(answer, str):
            return LoadProof("transformers", reason=answer)
        differing, compared = _compare(Path(folder), out) if out.exists() else ((), 0)
    return as_record(answer, differing, compared)


def format_without_client(checkpoint: Checkpoint) -> Format | None:
    """The format of a quantized checkpoint that no client of a processor reads; None for the others."""
    block = quantization_of(checkpoint)
    return next((form for form in KNOWN.values() if block and not form.client and form.claims(block[0])), None)


def _prove_by_llama_cpp(path: Path, model: GgufModel, python: str | None, seconds: float) -> LoadProof:
    """llama.cpp refuses a file of which a tensor is missing, is too many or is of another shape."""
    command = [python or sys.executable, "-P", str(llama_cpp_child.__file__), str(path.resolve())]
    answer = _answer_of(command, str(path.parent), seconds, "llama.cpp")
    if isinstance(answer, str):
        return LoadProof("llama.cpp", reason=answer)
    if "error" in answer:
        return as_record(answer, (), 0)
    packed = sum(t.type is not None and not t.type.is_float for t in model.tensors.values())
    return LoadProof(answer["client"], answer["architecture"], packed=packed)


def linears_of_class(folder: Path, modules: Iterable[str], *, seconds: float = SECONDS) -> Linears:
    """The Linear modules of the class that config.json names, each with those of `modules`, by the files' names, that
    transformers loads into it; {} where it cannot build the class.
    """
    with tempfile.TemporaryDirectory(prefix="doctor-load-") as place:
        names = Path(place) / "modules.json"
        names.write_text(json.dumps(list(modules)))
        answer = _ask(folder, place, ["--linears", str(names)], seconds)
    found = {} if isinstance(answer, str) else answer.get("linears", {})
    return {name: tuple(sources) for name, sources in found.items()}


def _ask(folder: Path, place: str, options: list[str], seconds: float) -> dict | str:
    """The answer of a child process, or why there is none."""
    return ask_child("transformers_child", [str(Path(folder).resolve()), *options], place, seconds)


def ask_child(module: str, options: list[str], place: str, seconds: float = SECONDS) -> dict | str:
    """The JSON that a module of this package prints in a process of its own, or why there is none."""
    for name in ("torch", "transformers"):
        if importlib.util.find_spec(name) is None:
            return _("{name} is not installed; `pip install 'checkpoint-doctor[quantize]'` brings it", name=name)
    command = [sys.executable, "-P", "-m", f"doctor.evaluate.clients.{module}", *options]
    return _answer_of(command, place, seconds, "transformers")


def _answer_of(command: list[str], place: str, seconds: float, client: str) -> dict | str:
    try:
        run = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, cwd=place, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return _("{client} had not loaded it after {n:.0f} s", client=client, n=seconds)
    except OSError as error:
        return _("{python} cannot be started: {error}", python=command[0], error=error.strerror or str(error))
    try:
        return json.loads(run.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        last = (run.stderr.strip().splitlines() or [""])[-1][:300]
        return _("{client} ended without an answer: {error}", client=client, error=last)


def as_record(answer: dict, differing: tuple[str, ...], compared: int) -> LoadProof:
    client, architecture, error = answer["client"], answer.get("class", ""), answer.get("error", "")
    kind = answer.get("kind")
    if kind == "refused":
        return LoadProof(client, architecture, refused=error)
    if kind == "machine":
        reason = _("this machine does not let {client} open the files: {error}", client=client, error=error)
        return LoadProof(client, architecture, reason=reason)
    if kind == "library":
        return LoadProof(
            client,
            architecture,
            reason=_("{client} lacks a library for this format: {error}", client=client, error=error),
        )
    if kind == "no class":
        reason = (
            _("{client} has no class {name}", client=client, name=error) if error else _("config.json names no class")
        )
        return LoadProof(client, reason=reason)
    return LoadProof(
        client,
        architecture,
        missing=tuple(answer["missing"]),
        unexpected=tuple(answer["unexpected"]),
        mismatched=tuple(answer["mismatched"]),
        packed=answer["packed"],
        compared=compared,
        differing=tuple(name for name in differing if not EXPERT.search(name)),
        misread=tuple(name for name in differing if EXPERT.search(name)),
        library=", ".join(f"{name} {version}" for name, version in answer.get("libraries", {}).items()),
    )


def _compare(folder: Path, out: Path) -> tuple[tuple[str, ...], int]:
    """(linears whose weights the client unpacks to other values than doctor, how many were compared)."""
    import torch
    from safetensors.torch import load_file

    from doctor.quant.dequantize import as_float
    from doctor.quant.forward.skeleton import load_tensor

    theirs = load_file(out)
    ours = as_float(Checkpoint.open(folder))
    differing = [
        name for name, weight in theirs.items()
        if not torch.equal(load_tensor(ours, f"{name}.weight").to(weight.dtype), weight)
    ]  # fmt: skip
    return tuple(differing), len(theirs)
