"""Lets a client run a checkpoint on rows of token ids and prints, as JSON, the log-probability of every token that
follows. Runs as a process of its own, also in an environment that has the client and not doctor.

    PYTHON logprobs_child.py transformers|vllm CHECKPOINT ROWS.json

ROWS.json is [[token id, …], …]. The answer has {"client": name and version, "logprobs": [[float, …], …]}, one number
for each token of a row but the first, in nats; or "error", and "kind": "library" where the client or a library of its
is not there, "refused" where it does not run the checkpoint. Nothing of the checkpoint runs: remote code stays off.

Source: transformers src/transformers/modeling_utils.py (from_pretrained); vllm-project/vllm
vllm/sampling_params.py (prompt_logprobs).
"""

import contextlib
import importlib
import json
import os
import sys


def main() -> None:
    client, checkpoint, rows = sys.argv[1:4]
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    with open(rows, encoding="utf-8") as file:
        asked = json.load(file)
    with contextlib.redirect_stdout(sys.stderr):  # libraries print; stdout carries the answer alone
        answer = ask(client, checkpoint, asked)
    print(json.dumps(answer))


def ask(client: str, checkpoint: str, rows: list[list[int]]) -> dict:
    """The answer of one client; what it raises is part of it."""
    try:
        version = importlib.import_module(client).__version__
    except ImportError as error:
        return {"client": client, "kind": "library", "error": first_line(error)}
    answer = {"client": f"{client} {version}"}
    try:
        run = {"transformers": by_transformers, "vllm": by_vllm}[client]
        return answer | {"logprobs": run(checkpoint, rows)}
    except ImportError as error:
        return answer | {"kind": "library", "error": first_line(error)}
    except Exception as error:
        return answer | {"kind": "refused", "error": f"{type(error).__name__}: {first_line(error)}"}


def by_transformers(checkpoint: str, rows: list[list[int]]) -> list[list[float]]:
    """The class that config.json names, in the dtype that it states, on the GPU where there is one."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(checkpoint, trust_remote_code=False, local_files_only=True)
    names = getattr(config, "architectures", None) or [""]
    found = getattr(transformers, names[0], None)
    if found is None:
        raise ValueError(f"transformers has no class {names[0]!r}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = found.from_pretrained(
        checkpoint, config=config, dtype="auto", trust_remote_code=False, local_files_only=True
    )
    model = model.to(device).eval()
    logprobs = []
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row], device=device)
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            logprobs.append(torch.log_softmax(logits, 1).gather(1, ids[0, 1:, None])[:, 0].tolist())
    return logprobs


def by_vllm(checkpoint: str, rows: list[list[int]]) -> list[list[float]]:
    """vLLM in this process, without compiled graphs; the log-probabilities of the prompt's own tokens."""
    for key, value in (
        ("VLLM_ENABLE_V1_MULTIPROCESSING", "0"),
        ("VLLM_CPU_KVCACHE_SPACE", "1"),
        ("VLLM_LOGGING_LEVEL", "WARNING"),
        ("VLLM_NO_USAGE_STATS", "1"),
    ):
        os.environ.setdefault(key, value)
    from vllm import LLM, SamplingParams

    longest = max(map(len, rows))
    model = LLM(checkpoint, enforce_eager=True, max_model_len=longest + 8, max_num_seqs=1, trust_remote_code=False)
    asked = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    outputs = model.generate([{"prompt_token_ids": row} for row in rows], asked, use_tqdm=False)
    return [
        [step[token].logprob for token, step in zip(row[1:], output.prompt_logprobs[1:], strict=True)]
        for row, output in zip(rows, outputs, strict=True)
    ]


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]


if __name__ == "__main__":
    main()
