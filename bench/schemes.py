"""Seconds of each scheme that needs no calibration beside its format's own library: python bench/schemes.py.

The same bfloat16 weight through both, in turn and in one process: doctor's rounding of a slab (scales and codes, for
NVFP4 the better of two scale ranges a block), and compressed-tensors' scales (calculate_qparams) and compressor, which
take one range; for GGUF's types doctor's block rounding and ggml_quantize_chunk, both without importance, where
xllamacpp can be imported. Seconds of processor, the least of some runs.
"""

import argparse
import time
from collections.abc import Callable

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.quantization.utils.helpers import calculate_qparams, generate_gparam
from gguf_quality import chunk, ggml

from doctor.checkpoint.ggml_types import BY_NAME
from doctor.core.recipe import Recipe
from doctor.formats.registry import format_of
from doctor.formats.schemes import fields_of
from doctor.quant import pack
from doctor.quant.linear import grid_options
from doctor.quant.solve.float_scale import divisor_of
from doctor.quant.solve.ggml import round_blocks
from doctor.quant.solve.rtn import round_to_nearest
from doctor.quant.stream.rounding import Rounding

STREAMED = ("FP8_DYNAMIC", "FP8_BLOCK", "INT8", "NVFP4A16", "MXFP4A16", "MXFP8")
INTEGERS = ("W8A16", "W4A16")
TYPES = ("Q8_0", "Q4_0", "Q4_K", "Q5_K", "Q6_K")


def least(runs: int, work: Callable[[], object]) -> float:
    """Seconds of processor of the fastest of some runs, after one that is not counted."""
    work()
    found = []
    for _run in range(runs):
        before = time.process_time()
        work()
        found.append(time.process_time() - before)
    return min(found)


def ours(name: str, W: torch.Tensor) -> Callable[[], object]:
    recipe = Recipe(**fields_of(name, {"method": "rtn"}))
    if name in STREAMED:
        return lambda: Rounding.of(recipe, divisor_of(float(W.abs().amax())) if name == "NVFP4A16" else 1.0).round(W)

    def rounded() -> object:
        found = round_to_nearest(W.float(), mse=False, **grid_options(recipe))
        return pack.pack_linear("x", found.codes, found.grid, found.g_idx, recipe)

    return rounded


def theirs(name: str, W: torch.Tensor) -> Callable[[], object]:
    recipe = Recipe(**fields_of(name, {"method": "rtn"}))
    form = format_of(recipe)
    scheme = QuantizationConfig.model_validate(form.config(recipe)).config_groups["group_0"]
    library, kind = BaseCompressor.get_value_from_registry(form.layout), form.grid(recipe.scheme)
    high, wide = kind.tile or (1, W.shape[1] if kind.group_size == -1 else kind.group_size)
    n, k = W.shape

    def compressed() -> object:
        state = {"weight": W.float()}
        blocks = state["weight"].view(n // high, high, k // wide, wide)
        low, most = blocks.amin((1, 3)), blocks.amax((1, 3))
        whole = generate_gparam(low.amin(), most.amax()).reshape(1) if kind.divided else None
        scale, zero = calculate_qparams(low, most, scheme.weights, whole)
        state |= {"weight_scale": scale, "weight_zero_point": zero}
        if whole is not None:
            state["weight_global_scale"] = whole
        return library.compress(state, scheme)

    return compressed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    W = (torch.randn(options.rows, options.columns, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    print("| scheme | doctor, processor s | its library, processor s | times as fast |\n|---|---:|---:|---:|")
    pairs = [(name, ours(name, W), theirs(name, W)) for name in (*STREAMED, *INTEGERS)]
    if ggml() is not None:
        F = W.float()
        pairs += [
            (name, lambda kind=BY_NAME[name]: round_blocks(F, kind), lambda kind=BY_NAME[name]: chunk(F, kind, None))
            for name in TYPES
        ]
    else:
        print("xllamacpp is not installed: GGUF's types are left out")
    for name, own, other in pairs:
        left, right = least(options.runs, own), least(options.runs, other)
        print(f"| {name} | {left:.3f} | {right:.3f} | {right / left:.1f} |", flush=True)


if __name__ == "__main__":
    main()
