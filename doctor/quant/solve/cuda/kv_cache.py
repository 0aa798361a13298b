"""Launches cuda/kv_cache.cu: the key/value cache's 4 and 8 bit codes."""

from __future__ import annotations

import torch

from doctor.core.errors import CudaError
from doctor.core.messages import _
from doctor.quant.solve.cuda.driver import Engine
from doctor.quant.solve.cuda.launcher import address, engine_for, require_tensor, stream_of
from doctor.quant.solve.cuda.structs import I32, I64, KV_BITS, SPANS, Pointer


def kv_store(x: torch.Tensor, bits: int, *, engine: Engine | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes u8[count*bits/8], scales f16[count/32]) of f16 values, count a multiple of 64, as ExLlamaV2 caches
    them.
    """
    engine = engine or engine_for(x.device)
    x = _by_four(require_tensor("x", x.reshape(-1), torch.float16, x.device))
    _require_kv(x.numel(), bits)
    codes = torch.empty(x.numel() * bits // 8, dtype=torch.uint8, device=x.device)
    scales = torch.empty(x.numel() // 32, dtype=torch.float16, device=x.device)
    _kv("kv_store", (x, codes, scales), x.numel(), bits, engine)
    return codes, scales


def kv_load(codes: torch.Tensor, scales: torch.Tensor, bits: int, *, engine: Engine | None = None) -> torch.Tensor:
    """f16[count] that attention reads back."""
    engine = engine or engine_for(codes.device)
    x = torch.empty(scales.numel() * 32, dtype=torch.float16, device=codes.device)
    _require_kv(x.numel(), bits)
    _kv("kv_load", (_by_four(codes.contiguous()), scales.contiguous(), x), x.numel(), bits, engine)
    return x


def _kv(kernel: str, tensors: tuple[torch.Tensor, ...], count: int, bits: int, engine: Engine) -> None:
    engine.launch(
        kernel,
        "kv_cache",
        (-(-count // (4 * 64 * SPANS)), 1),
        128,
        0,  # four warps a block
        (*[Pointer(address(t)) for t in tensors], I64(count), I32(bits)),
        stream_of(tensors[0]),
        f"{count} values, {bits} bits",
    )


def _by_four(tensor: torch.Tensor) -> torch.Tensor:
    """It, or its copy where a kernel that reads words of 32 bits could not."""
    return tensor if tensor.data_ptr() % 4 == 0 else tensor.clone()


def _require_kv(count: int, bits: int) -> None:
    if count % 64 or not count or bits not in KV_BITS:
        raise CudaError(
            _("{count} cached values at {bits} bits; must be a multiple of 64 at 4 or 8 bits.", count=count, bits=bits),
            _("Q6 is 8 bits for keys and 4 for values."),
        )
