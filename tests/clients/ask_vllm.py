"""Loads a checkpoint with vLLM on the CPU, continues a prompt greedily, prints one line of JSON.

Run it with .cache/venv-vllm/bin/python. The engine runs in this process (no server), without compiled
graphs and with 1 GiB of KV cache, so that a machine of 8 GB is enough.

    ask_vllm.py MODEL PROMPT [--tp N] [--tokens 24] [--dtype auto]
"""

import argparse
import contextlib
import json
import os
import sys


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("prompt")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel degree")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--dtype", default="auto")
    options = parser.parse_args()
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with contextlib.redirect_stdout(sys.stderr):  # the engine prints; stdout carries the answer alone
        answer = ask(options)
    print(json.dumps(answer))


def ask(options) -> dict:
    from vllm import LLM, SamplingParams

    llm = LLM(options.model, tensor_parallel_size=options.tp, dtype=options.dtype, enforce_eager=True,
              max_model_len=512, max_num_seqs=1)
    output = llm.generate([options.prompt], SamplingParams(temperature=0, max_tokens=options.tokens))[0]
    config = llm.llm_engine.model_config
    return {
        "text": output.outputs[0].text,
        "quantization": config.quantization,
        "dtype": str(config.dtype).removeprefix("torch."),
    }


if __name__ == "__main__":
    main()
