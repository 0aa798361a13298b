"""Loads a checkpoint with vLLM on the CPU, continues prompts greedily, prints one line of JSON.

Run it with .cache/venv-vllm/bin/python. The engine runs in this process (no server), without compiled
graphs and with 1 GiB of KV cache, so that a machine of 8 GB is enough.

vLLM's 4-bit CPU kernel is compiled for AVX-512 alone. On a CPU without it the same product is computed
in torch here, from the words that vLLM's own loader made: the engine then still judges names, shapes, packing
and config of the checkpoint, and the answer says "int4_kernel": "reference".

    ask_vllm.py MODEL PROMPT... [--tp N] [--tokens 24] [--dtype bfloat16]

"text" continues the first prompt. "answers" has [token id, how far its logarithm of probability is ahead of the second
best token's] of every token of every prompt: where two servers differ, a small lead says that rounding decided.
"""

import argparse
import contextlib
import json
import os
import sys


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("prompts", nargs="+", metavar="PROMPT")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel degree")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--dtype", default="bfloat16")
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

    kernel = provide_int4_kernel()
    llm = LLM(options.model, tensor_parallel_size=options.tp, dtype=options.dtype, enforce_eager=True,
              max_model_len=256, max_num_seqs=1)
    asked = SamplingParams(temperature=0, max_tokens=options.tokens, ignore_eos=True, logprobs=2)
    outputs = [output.outputs[0] for output in llm.generate(options.prompts, asked, use_tqdm=False)]
    config = llm.llm_engine.model_config
    return {
        "text": outputs[0].text,
        "answers": [[[t, lead(step)] for t, step in zip(o.token_ids, o.logprobs, strict=True)] for o in outputs],
        "quantization": config.quantization,
        "dtype": str(config.dtype).removeprefix("torch."),
        "int4_kernel": kernel,
    }


def lead(step: dict) -> float:
    best, second = sorted((entry.logprob for entry in step.values()), reverse=True)[:2]
    return best - second


def provide_int4_kernel() -> str:
    """The 4-bit kernel: "vllm" where its build for this CPU has one, else "reference", which is ours."""
    import torch
    from vllm import _custom_ops
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    if hasattr(torch.ops._C, "cpu_gemm_wna16"):
        return "vllm"
    dequantized: dict[int, torch.Tensor] = {}

    def reference(input, q_weight, scales, zeros, bias, pack_factor, isa_hint):
        key = q_weight.data_ptr()
        if key not in dequantized:
            dequantized[key] = dequantize(q_weight, scales, zeros)
        product = input.float() @ dequantized[key]
        return (product if bias is None else product + bias.float()).to(input.dtype)

    _custom_ops.cpu_gemm_wna16 = reference
    return "reference"


def dequantize(q_weight, scales, zeros):
    """f32[k, n] of vLLM's layout: q_weight i32[n/16, k*2], scales [groups, n], zeros i32[groups, n/8] | None.

    Words hold eight outputs, low nibble first; sixteen outputs stand together. Without zeros, code 8 is 0.0.
    Source: vllm/model_executor/kernels/linear/mixed_precision/cpu.py, _process_gptq_weights_w4a16.
    """
    import torch

    groups, n = scales.shape
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    codes = (q_weight.reshape(n // 16, -1, 2, 1) >> shifts & 15).permute(1, 0, 2, 3).reshape(-1, n)
    zero = torch.full((groups, n), 8)
    if zeros is not None:
        zero = (zeros.unsqueeze(-1) >> shifts & 15).reshape(groups, n)
    k = codes.shape[0]
    repeat = k // groups
    return (codes - zero.repeat_interleave(repeat, 0)).float() * scales.float().repeat_interleave(repeat, 0)


if __name__ == "__main__":
    main()
elif __name__ == "__mp_main__":  # a worker of --tp: vLLM spawns it, and it imports this file before it loads the model
    provide_int4_kernel()
