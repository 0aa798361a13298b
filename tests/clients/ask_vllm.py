"""Loads a checkpoint with vLLM on the CPU, continues prompts greedily, prints one line of JSON.

Run it with .cache/venv-vllm/bin/python. The engine runs in this process (no server), without compiled
graphs and with 1 GiB of KV cache, so that a machine of 8 GB is enough.

vLLM's 4-bit CPU kernel is compiled for AVX-512 alone. On a CPU without it the same product is computed in torch here,
from the words that vLLM's own loader made: the engine then still judges names, shapes, packing and config of the
checkpoint, and the answer says "int4_kernel": "reference". Its 4-bit kernel for experts wants AMX; without it the
experts are computed here in the same way ("int4_experts").

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

    kernel, experts = provide_int4_kernel(), provide_int4_experts()
    llm = LLM(
        options.model,
        tensor_parallel_size=options.tp,
        dtype=options.dtype,
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=1,
    )
    asked = SamplingParams(temperature=0, max_tokens=options.tokens, ignore_eos=True, logprobs=2)
    outputs = [output.outputs[0] for output in llm.generate(options.prompts, asked, use_tqdm=False)]
    config = llm.llm_engine.model_config
    return {
        "text": outputs[0].text,
        "answers": [[[t, lead(step)] for t, step in zip(o.token_ids, o.logprobs, strict=True)] for o in outputs],
        "quantization": config.quantization,
        "dtype": str(config.dtype).removeprefix("torch."),
        "int4_kernel": kernel,
        "int4_experts": experts,
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


def provide_int4_experts() -> str:
    """The 4-bit kernel for experts: "vllm" where this CPU has AMX, else "reference": sums over experts in torch."""
    import torch
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUExpertsInt4
    from vllm.model_executor.layers.fused_moe.oracle.int_wna16 import WNA16MoEBackend
    from vllm.model_executor.layers.quantization import auto_awq, auto_gptq
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_wna16 as packed,
    )

    if torch.cpu._is_amx_tile_supported():
        return "vllm"

    def keep(decode):
        def after_loading(self, layer):
            layer.decoded = [[decode(layer, name, e) for e in range(layer.local_num_experts)] for name in ("w13", "w2")]

        return after_loading

    def apply(self, layer, x, topk_weights, topk_ids, shared_experts=None, shared_experts_input=None):
        out = torch.zeros(x.shape, dtype=torch.float32)
        for e, (both, down) in enumerate(zip(*layer.decoded, strict=True)):
            token, choice = torch.where(topk_ids == e)
            weight = topk_weights[token, choice, None].float()
            given = x[token].float() * (weight if layer.apply_router_weight_on_input else 1)
            gate, up = (given @ both.T).chunk(2, -1)
            made = (torch.nn.functional.silu(gate) * up) @ down.T
            out.index_add_(0, token, made * (1 if layer.apply_router_weight_on_input else weight))
        return out.to(x.dtype)

    for module, method, decode in (
        (auto_gptq, auto_gptq.AutoGPTQMoEMethod, gptq_expert),
        (auto_awq, auto_awq.AutoAWQMoEMethod, awq_expert),
        (packed, packed.CompressedTensorsWNA16MoEMethod, packed_expert),
    ):
        module.select_wna16_moe_backend = lambda *args, **kwargs: (WNA16MoEBackend.CPU, CPUExpertsInt4)
        method.process_weights_after_loading, method.apply = keep(decode), apply
    return "reference"


def fields(words, order=range(8)):
    """i32[..., n] -> codes of 4 bits, i32[..., n * 8], in the order of their places in a word."""
    import torch

    return (words.unsqueeze(-1) >> torch.tensor([4 * place for place in order], dtype=torch.int32) & 15).flatten(-2)


def spread(codes, scale, zero):
    """f32[n, k] from codes [n, k] and a grid [n, groups]."""
    repeat = codes.shape[1] // scale.shape[1]
    return (codes - zero.repeat_interleave(repeat, 1)).float() * scale.float().repeat_interleave(repeat, 1)


def gptq_expert(layer, name, e):
    """Symmetric: code 8 is 0.0."""
    import torch

    scale = getattr(layer, f"{name}_scales")[e].T
    return spread(fields(getattr(layer, f"{name}_qweight")[e].T.contiguous()), scale, torch.full(scale.shape, 8))


def awq_expert(layer, name, e):
    order = (0, 4, 1, 5, 2, 6, 3, 7)
    return spread(
        *(
            fields(getattr(layer, f"{name}_qweight")[e], order).T,
            getattr(layer, f"{name}_scales")[e].T,
            fields(getattr(layer, f"{name}_qzeros")[e], order).T,
        )
    )


def packed_expert(layer, name, e):
    """Without zero points, code 8 is 0.0."""
    import torch

    scale, zeros = getattr(layer, f"{name}_weight_scale")[e], getattr(layer, f"{name}_weight_zero_point", None)
    zero = torch.full(scale.shape, 8) if zeros is None else fields(zeros[e].T.contiguous()).T
    return spread(fields(getattr(layer, f"{name}_weight_packed")[e]), scale, zero)


if __name__ == "__main__":
    main()
elif __name__ == "__mp_main__":  # a worker of --tp: vLLM spawns it, and it imports this file before it loads the model
    provide_int4_kernel()
