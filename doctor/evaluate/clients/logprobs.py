"""What a client computes with the quantized files, against what doctor computes with them, token by token.

The load proof says where a client puts the tensors; this says that its kernels make the same numbers of them. Both give
the log-probability of each token that really follows; the client in the dtype in which it serves, doctor in float32.
"""

import json
import math
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from doctor.core.errors import DoctorError
from doctor.core.messages import _
from doctor.core.records import ClientRun
from doctor.evaluate.clients import llama_cpp_child, logprobs_child

CLIENTS = ("transformers", "vllm", "llama.cpp")
SECONDS = 3600


def run_client(
    client: str,
    python: str | None,
    folder: Path,
    rows: list[torch.Tensor],
    own: list[torch.Tensor],
    *,
    rounds: bool = False,
    seconds: float = SECONDS,
) -> ClientRun:
    """Let `client` run the checkpoint in `folder`, for llama.cpp a GGUF file, on rows int64[1, length].

    python: the interpreter of an environment that holds the client; None takes doctor's own. own: doctor's
    log-probabilities f32[length - 1] of the same rows, in nats. rounds: as ClientRun has it.
    What the client says is in the record, never raised. Raises DoctorError for an interpreter that cannot be started.
    """
    with tempfile.TemporaryDirectory(prefix="doctor-client-") as place:
        file = Path(place) / "rows.json"
        file.write_text(json.dumps([row[0].tolist() for row in rows]))
        child = [llama_cpp_child.__file__] if client == "llama.cpp" else [logprobs_child.__file__, client]
        command = [python or sys.executable, "-P", *map(str, child), str(folder.resolve()), str(file)]
        try:
            run = subprocess.run(
                command, capture_output=True, text=True, timeout=seconds, cwd=place, stdin=subprocess.DEVNULL
            )
        except subprocess.TimeoutExpired:
            return ClientRun(client, reason=_("{client} had not answered after {n:.0f} s", client=client, n=seconds))
        except OSError as error:
            raise DoctorError(
                _("{python}: cannot be started: {error}.", python=command[0], error=error.strerror or error),
                _("Give --client-python the interpreter of the environment that holds {client}.", client=client),
            ) from None
    try:
        answer = json.loads(run.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        last = (run.stderr.strip().splitlines() or [""])[-1][:300]
        return ClientRun(client, reason=_("{client} ended without an answer: {error}", client=client, error=last))
    return replace(_record(answer, own), rounds=rounds)


def _record(answer: dict, own: list[torch.Tensor]) -> ClientRun:
    client = answer["client"]
    if answer.get("kind") == "library":
        return ClientRun(client, reason=_("a library is missing: {error}", error=answer["error"]))
    if "logprobs" not in answer:
        return ClientRun(client, refused=answer["error"])
    theirs = torch.tensor([x for row in answer["logprobs"] for x in row], dtype=torch.float64)
    ours = torch.cat([row.double().cpu() for row in own])
    if theirs.shape != ours.shape:
        return ClientRun(client, refused=_("{n} log-probabilities for {m} tokens", n=len(theirs), m=len(ours)))
    apart = (theirs - ours).abs()
    return ClientRun(
        client,
        tokens=len(ours),
        perplexity=_perplexity(theirs),
        perplexity_doctor=_perplexity(ours),
        apart=float(apart.mean()),
        apart_p99=float(apart.quantile(0.99)) if len(apart) else math.nan,
    )


def _perplexity(logprobs: torch.Tensor) -> float:
    mean = -float(logprobs.mean())
    return math.exp(mean) if mean < 700 else (math.inf if mean == mean else math.nan)
