"""Which model classes go from `check` to an output that loads in its own class: a table, one row a class.

    python tests/coverage.py [--families | --all] [--rows NAME,…] [--json FILE [--again]] [--seconds N] [--for N]
                             [--keep DIR] [--verify]

A run can be made in pieces: rows that FILE has are not run again, but for those that ran out of time, which come last.
Each row builds a tiny random checkpoint by transformers' own config and save_pretrained (helpers/tiny_classes.py; with
--families of each text family that the rules' tests call healthy, helpers/healthy_models.py), checks it, quantizes it
(GPTQ, 4 bits, groups of 32, compressed-tensors; to FP8_DYNAMIC where `check` refuses that and takes this, and a model
of an encoder and a decoder), loads the output in the class that config.json names, and correlates its outputs with the
source's on the same ids: 0.8 in 4 bits; where rounding costs a tiny random model more, 0.99 in 8 bits. Each runs in a
process of its own, with a limit.

outcome         what happened
works           written, loads whole in its class, computes what the source does, no linear is left without a word
refusal         `check` says that it cannot be quantized, or that its class would not load the copy, before any work
other client    written for an engine that reads it; transformers does not, which `check` says before. Where it loads
                no packed linears of the family, a GPTQ file is written instead, decoded, and compared in its own class
not built       transformers builds the class only with a library that is absent here
silent partial  written and loads, but a linear of a decoder layer is in 16 bits and nothing says so
unloadable      written, but its class does not load it whole, or computes something else
false refusal   `check` says ready and `quantize` refuses; or `check` finds an error in a checkpoint that is healthy
crash           an exception that is no message of doctor's
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent / "helpers"), str(Path(__file__).resolve().parent.parent)]

ROWS, LENGTH, VOCABULARY = 12, 32, 88  # ids above 88 stand for images in some configs
CLOSE = 0.8  # a healthy 4-bit Llama of this size: 0.96 and more
CLOSER = 0.99  # in 8 bits
REFUSED = ("G321", "G322", "G323", "G335")  # what another scheme may not meet
NARROWEST = 32
LATE = "no answer after"
_WALL = 10  # seconds by the clock for one of the processor, on a machine that does other work too
# Matrices that are no linear or are left in 16 bits by design: norms, routers, embeddings, small gates of recurrences.
MEANT = re.compile(
    r"norm|embed|router|rotary|indexer|(?:^|\.)(?:gate|shared_expert_gate|in_proj_[ab]|in_proj_ba|x_proj|dt_proj|b_proj|weights_proj)"
    r"\.weight$|(?:conv1d|A_log|bias|D|conv\.weight|scale\w*|table|ape)$"
)
LAYER = re.compile(r"(?:layers|h|blocks|block|layer)\.\d+\.(.+)$")


def outputs(folder: Path, ids: Any) -> Any:
    """(loading info, logits or hidden states) of the class that config.json names: in float32, or in bfloat16 where its
    loader unpacks experts to that and nothing else.
    """
    import torch

    try:
        return _outputs(folder, ids, torch.float32)
    except RuntimeError as error:
        if "same dtype" not in str(error):
            raise
        return _outputs(folder, ids, torch.bfloat16)


def _outputs(folder: Path, ids: Any, dtype: Any) -> Any:
    import torch
    import transformers

    config = json.loads((folder / "config.json").read_text())
    known = getattr(transformers, config["architectures"][0])
    model, info = known.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    kwargs = {"input_ids": ids}
    if model.main_input_name == "input_features":  # it hears: noise, the same for both
        torch.manual_seed(0)
        size = (len(ids), model.config.num_mel_bins, 2 * getattr(model.config, "max_source_positions", 0))
        kwargs = {"input_features": torch.randn(size).to(dtype)}
    if getattr(model.config, "is_encoder_decoder", False):
        kwargs["decoder_input_ids"] = ids
    with torch.no_grad():
        out = model.eval()(**kwargs)
    found = getattr(out, "logits", None)
    return info, (out.last_hidden_state if found is None else found).float()


def correlation(left: Any, right: Any) -> float:
    """Of two outputs, each token's mean taken off."""
    import torch

    pair = [
        x.double() - (x.double().mean(-1, keepdim=True) if x.shape[-1] > 1 else x.double().mean())
        for x in (left, right)
    ]
    return float((pair[0] * pair[1]).sum() / torch.clamp(pair[0].norm() * pair[1].norm(), min=1e-30))


def unnamed(folder: Path, said: set[str]) -> list[str]:
    """2-D weights of decoder layers that are plain in the output, and that no record or finding names."""
    from doctor.checkpoint.directory import Checkpoint

    found = []
    tensors = Checkpoint.open(folder).tensors
    decoder = {LAYER.sub("", name) for name in tensors if name.endswith(".weight_packed")}
    for name, info in tensors.items():
        inner = LAYER.search(name)
        if inner is None or LAYER.sub("", name) not in decoder or not info.dtype.is_float or len(info.shape) != 2:
            continue
        if (
            min(info.shape) >= NARROWEST
            and not MEANT.search(inner[1])
            and not any(part in said for part in (name, name.removesuffix(".weight")))
        ):
            found.append(name)
    return found


def calibration_file(folder: Path) -> Path:
    rng = random.Random(0)
    path = folder / "rows.jsonl"
    rows = [{"input_ids": [1] + [rng.randrange(3, VOCABULARY) for _ in range(LENGTH - 1)]} for _ in range(ROWS)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def ask_here(module: str, options: list[str], place: str, seconds: float = 0) -> dict[str, Any]:
    """What doctor asks transformers in a process of its own, by the same code in this one: importing takes seconds."""
    from doctor.evaluate.clients import rehearsal_child, transformers_child

    if module == "rehearsal_child":
        root, recipe, folder = options
        return rehearsal_child.answer_of(Path(root), json.loads(recipe), Path(folder))
    if "--linears" in options:
        return transformers_child.linears(Path(options[0]), json.loads(Path(options[-1]).read_text()))
    sample, out = (options[options.index(name) + 1] for name in ("--sample", "--out"))
    return transformers_child.ask(Path(options[0]), int(sample), Path(out))


def judge(name: str, folder: Path, verify: bool) -> dict[str, Any]:
    """One row, in this process."""
    import torch
    from healthy_models import save
    from stored_sources import store_as
    from tiny_classes import CLASSES, save_class

    from doctor import api
    from doctor.core.errors import DoctorError
    from doctor.core.recipe import Recipe
    from doctor.evaluate.clients import load_proof, rehearsal
    from doctor.formats.schemes import fields_of

    load_proof.ask_child = rehearsal.ask_child = ask_here
    torch.set_num_threads(1)
    row = CLASSES.get(name)
    plain = source = save_class(row, folder / "m") if row else save(name, folder / "m")
    if row and row.stored:
        source = store_as(row.stored, plain, folder / "codes")
    architecture = json.loads((source / "config.json").read_text())["architectures"][0]
    answer: dict[str, Any] = {"name": name, "class": architecture}
    bits = 8 if row and row.stored in ("nvfp4", "modelopt") else 4  # their groups of 16 are finer than any plan's
    recipe = Recipe(bits=bits, group_size=32, format="compressed-tensors", goal="quantize")
    rounded = Recipe(**fields_of("FP8_DYNAMIC", {}), goal="quantize")
    if json.loads((source / "config.json").read_text()).get("is_encoder_decoder"):  # two halves, which doctor rounds
        recipe, answer["scheme"] = rounded, "FP8_DYNAMIC"
    report = api.check(source, recipe)
    errors = [f"{f.code} {f.message}" for f in report.findings if f.severity == "error"]
    if errors and errors[0].startswith(REFUSED) and not (row and row.stored) and recipe != rounded:
        other = api.check(source, rounded)
        if other.ok:
            answer |= {"refused": errors[0], "scheme": "FP8_DYNAMIC"}
            report, recipe, errors = other, rounded, []
    warnings = [f"{f.code} {f.message}" for f in report.findings if f.severity == "warning"]
    answer |= {"check": errors, "warnings": warnings}
    if errors and errors[0].startswith(("G322", "G323")) and not (row and row.stored):
        return answer | in_gptq(source, folder, errors[0])
    if errors:
        honest = errors[0].startswith((*REFUSED, "G330", "G336"))
        return answer | {"outcome": "refusal" if honest else "false refusal", "why": errors[0]}
    try:
        done = api.quantize(source, folder / "q", recipe, calibration=calibration_file(folder), max_seq_length=LENGTH)
    except DoctorError as error:
        return answer | {"outcome": "false refusal", "why": f"{type(error).__name__}: {error}"}
    found = [f for f in done.report.findings if f.severity in ("error", "warning")]
    answer["findings"] = [f"{f.code} {f.message}" for f in found]
    if done.output is None:
        return answer | {"outcome": "false refusal", "why": "; ".join(answer["findings"])}
    packed = sum(line["outcome"] not in ("kept", "failed") for line in done.linears)
    answer |= {"packed": packed, "kept": len(done.linears) - packed, "notes": list(map(str, done.notes))}
    said = {line["name"] for line in done.linears}
    said |= {word.strip(",:;.") for f in done.report.findings for word in f"{f.subject} {f.message}".split()}
    answer["unnamed"] = unnamed(done.output, said)
    rng = random.Random(1)
    ids = torch.tensor([[1] + [rng.randrange(3, VOCABULARY) for _ in range(LENGTH - 1)] for _row in range(8)])
    unloadable = [f"{f.code} {f.message}" for f in found if f.code == "O617"]
    if unloadable and done.report.ok:
        return answer | {"outcome": "other client", "why": unloadable[0]}
    if not unloadable:
        try:
            _info, theirs = outputs(plain, ids)
        except (AttributeError, TypeError, RuntimeError, ValueError) as error:
            answer["no_outputs"] = f"the source's class fails on text alone: {type(error).__name__}: {error}"
        else:
            info, ours = outputs(done.output, ids)
            answer |= {"missing": len(info["missing_keys"]), "unexpected": len(info["unexpected_keys"])}
            answer["correlation"] = round(correlation(ours, theirs), 3)
            if not answer["correlation"] >= CLOSE and not answer.get("scheme"):
                finer = api.quantize(
                    source,
                    folder / "q8",
                    replace(recipe, bits=8),
                    calibration=calibration_file(folder),
                    max_seq_length=LENGTH,
                )
                close = round(correlation(outputs(finer.output, ids)[1], theirs), 3) if finer.output else float("nan")
                if close >= CLOSER:
                    answer |= {"four_bits": answer["correlation"], "correlation": close, "scheme": "W8A16"}
            if not answer["correlation"] >= CLOSE:
                unloadable = [f"correlation {answer['correlation']}"]
    if verify:
        try:
            judged = api.verify(source, done.output, rows=2, context=LENGTH).findings
        except DoctorError as error:  # an embedding model has no logits to compare
            judged, answer["not verified"] = (), str(error)
        answer["verify"] = [f"{f.code} {f.message}" for f in judged if f.severity == "error" and f.code != "O606"]
        unloadable += answer["verify"]
    if unloadable:
        return answer | {"outcome": "unloadable", "why": unloadable[0]}
    if answer["unnamed"] or not packed:
        return answer | {"outcome": "silent partial", "why": ", ".join(answer["unnamed"][:4]) or "nothing is packed"}
    return answer | {"outcome": "works", "why": ""}


def in_gptq(source: Path, folder: Path, why: str) -> dict[str, Any]:
    """The same in the GPTQ format, which an engine with kernels of its own reads: what its words stand for is written
    as plain numbers, and the source's class computes with them.
    """
    import torch
    from safetensors.torch import load_file, save_file

    from doctor import api
    from doctor.checkpoint.directory import Checkpoint
    from doctor.core.errors import DoctorError
    from doctor.core.recipe import Recipe
    from doctor.model.spec import build_spec
    from doctor.quant.dequantize import as_float

    rows = calibration_file(folder)
    recipe = Recipe(group_size=32, format="gptq", goal="quantize")
    try:
        done = api.quantize(source, folder / "gptq", recipe, calibration=rows, max_seq_length=LENGTH)
    except DoctorError as error:
        return {"outcome": "refusal", "why": f"{why}; as GPTQ: {error}"}
    if done.output is None:
        errors = [f"{f.code} {f.message}" for f in done.report.findings if f.severity == "error"]
        return {"outcome": "refusal", "why": f"{why}; as GPTQ: {'; '.join(errors)}"}
    packed = sum(line["outcome"] not in ("kept", "failed") for line in done.linears)
    read, stored = as_float(Checkpoint.open(done.output)), load_file(source / "model.safetensors")
    spec = build_spec(Checkpoint.open(source).value("config.json") or {}, Checkpoint.open(source).tensors)
    transposed = {linear.name for linear in spec.linears if linear.transposed}
    for line in done.linears:
        name = f"{line['name']}.weight"
        if line["outcome"] != "kept":
            weight = torch.from_numpy(read.load(name))
            stored[name] = (weight.T if line["name"] in transposed else weight).contiguous()
    plain = folder / "decoded"
    plain.mkdir()
    save_file(stored, plain / "model.safetensors", {"format": "pt"})
    (plain / "config.json").write_text((source / "config.json").read_text())
    rng = random.Random(1)
    ids = torch.tensor([[1] + [rng.randrange(3, VOCABULARY) for _ in range(LENGTH - 1)] for _row in range(8)])
    close = round(correlation(outputs(plain, ids)[1], outputs(source, ids)[1]), 3)
    answer = {"packed": packed, "kept": len(done.linears) - packed, "correlation": close}
    return answer | {"outcome": "other client" if close >= CLOSE else "unloadable", "why": why}


def child(name: str, folder: str, verify: bool, answer_to: str, seconds: float) -> None:
    """judge in a process of its own, which ends after so much time of the processor; what it prints goes to a file
    beside the answer.
    """
    import contextlib
    import traceback

    resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds) + 5))
    log = os.open(Path(answer_to).with_suffix(".log"), os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    started = time.monotonic()
    try:
        answer = judge(name, Path(folder), verify)
    except ImportError as error:
        answer = {"name": name, "outcome": "not built", "why": " ".join(str(error).split())[:200]}
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]} ({Path(last.filename).name}:{last.lineno})"
        answer = {"name": name, "outcome": "crash", "why": why, "trace": traceback.format_exc()}
    answer["seconds"] = round(time.monotonic() - started, 1)
    with contextlib.suppress(OSError):
        Path(answer_to).write_text(json.dumps(answer))


def _plain(name: str) -> str:
    return re.sub("[-_]", "", name.removesuffix("_text").lower())


def main() -> int:
    from healthy_models import FAMILIES, UNKNOWN
    from tiny_classes import CLASSES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="", help="names, with commas between; all by default")
    parser.add_argument("--families", action="store_true", help="text families by model_type instead of classes")
    parser.add_argument("--all", action="store_true", help="classes, and text families that no class stands for")
    parser.add_argument("--json", type=Path, help="write the answers to this file, after those that it has")
    parser.add_argument("--again", action="store_true", help="run the rows again that the file has")
    parser.add_argument("--seconds", type=float, default=180, help="time of the processor that one row may take")
    parser.add_argument("--for", type=float, dest="whole", default=float("inf"), help="seconds to begin rows in")
    parser.add_argument("--keep", type=Path, help="keep checkpoints, outputs and logs in this folder")
    parser.add_argument("--verify", action="store_true", help="run `verify` on each output too")
    options = parser.parse_args()
    families, classes = [*FAMILIES, *UNKNOWN], list(CLASSES)
    if options.all:
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as causal

        ran = {row.architecture for row in CLASSES.values()}
        own = [n for n in families if causal.get(n) not in ran or _plain(n) not in _plain(causal[n])]  # gpt-sw3: GPT-2
        known = [*classes, *(name for name in own if name not in classes)]
    else:
        known = families if options.families else classes
    names = [n for n in options.rows.split(",") if n] or known
    unknown = [n for n in names if n not in known]
    if unknown:
        parser.error(f"no such rows: {', '.join(unknown)}")
    import torch  # noqa: F401 - imported once, before the rows' processes are forked
    import transformers  # noqa: F401

    from doctor import api  # noqa: F401

    commit = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    at = subprocess.run(commit, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    processes = multiprocessing.get_context("fork")
    answers: list[dict[str, Any]] = []
    if options.json and options.json.exists():
        answers = json.loads(options.json.read_text())
    late = {a["name"] for a in answers if a["why"].startswith(LATE)}
    done = set() if options.again else {a["name"] for a in answers} - late
    started = time.monotonic()
    for name in sorted((n for n in names if n not in done), key=lambda n: n in late):
        if time.monotonic() - started > options.whole:
            break
        with tempfile.TemporaryDirectory(prefix="doctor-coverage-") as place:
            folder = options.keep / name if options.keep else Path(place)
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            answer_to = folder / "answer.json"
            process = processes.Process(
                target=child, args=(name, str(folder), options.verify, str(answer_to), options.seconds)
            )
            process.start()
            process.join(_WALL * options.seconds)
            if process.is_alive() or process.exitcode == -signal.SIGXCPU:
                process.kill()
                process.join()
                answer = {"name": name, "outcome": "crash", "why": f"{LATE} {options.seconds:.0f} s"}
            elif answer_to.exists():
                answer = json.loads(answer_to.read_text())
            else:
                answer = {"name": name, "outcome": "crash", "why": f"the process ended with {process.exitcode}"}
        answers = [*(a for a in answers if a["name"] != name), answer | {"commit": at}]
        figures = f"{answer.get('packed', '')}/{answer.get('kept', '')} {answer.get('correlation', '')}"
        print(f"{name:22} {answer['outcome']:15} {figures:14} {answer['why'][:150]}", flush=True)
        if options.json:
            options.json.write_text(json.dumps(answers, indent=1, ensure_ascii=False))
    answers = [a for a in answers if a["name"] in names]
    counts = {o: sum(a["outcome"] == o for a in answers) for o in dict.fromkeys(a["outcome"] for a in answers)}
    print(
        f"{len(answers)} of {len(names)} rows: " + ", ".join(f"{n} {outcome}" for outcome, n in sorted(counts.items()))
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
