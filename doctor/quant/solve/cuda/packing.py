"""Launches cuda/pack.cu: codes to packed words and back. In torch: the formats' own pack and dequantize."""

from __future__ import annotations

import torch

from doctor.core.errors import CudaError
from doctor.core.messages import _
from doctor.quant.solve.cuda.driver import Engine
from doctor.quant.solve.cuda.launcher import address, engine_for, stream_of
from doctor.quant.solve.cuda.structs import DTYPES, I32, I64, RUN, TALLEST, Packed, Pointer, Stream


def pack_columns(codes: torch.Tensor, bits: int, *, engine: Engine | None = None) -> torch.Tensor:
    """pack.pack_columns for codes u8[m, c]: i32[ceil(m*bits/32), c]."""
    m, columns = codes.shape
    words = torch.empty(-(-m * bits // 32), columns, dtype=torch.int32, device=codes.device)
    return _pack(codes.T, words, words.T, bits, engine)


def pack_rows(codes: torch.Tensor, bits: int, *, engine: Engine | None = None) -> torch.Tensor:
    """pack.pack_rows for codes u8[r, m]: i32[r, ceil(m*bits/32)]."""
    words = torch.empty(codes.shape[0], -(-codes.shape[1] * bits // 32), dtype=torch.int32, device=codes.device)
    return _pack(codes, words, words, bits, engine)


def _pack(
    lines: torch.Tensor, words: torch.Tensor, by_line: torch.Tensor, bits: int, engine: Engine | None
) -> torch.Tensor:
    """lines u8[l, m], any strides, to by_line i32[l, words], a view of words."""
    engine = engine or engine_for(lines.device)
    if lines.dtype != torch.uint8:
        raise CudaError(
            _("codes are {dtype}; must be torch.uint8.", dtype=lines.dtype),
            _("This is an internal error (a bug in doctor): report it with this text."),
        )
    count, m = lines.shape
    fast, slow = count, -(-m // 32)
    along_codes = lines.stride(1) == 1 and lines.stride(0) != 1
    if along_codes:
        fast, slow = slow, fast
    stream = Stream(
        address(lines),
        address(words),
        count,
        m,
        by_line.shape[1],
        *lines.stride(),
        *by_line.stride(),
        bits,
        along_codes,
    )
    engine.launch(
        "pack_stream",
        "pack",
        (-(-fast // 128), min(slow, TALLEST)),
        128,
        0,
        (stream,),
        stream_of(lines),
        f"codes[{count}, {m}], {bits} bits",
    )
    return words


def awq_words(codes: torch.Tensor, *, engine: Engine | None = None) -> torch.Tensor:
    """i32[c, n/8]: eight rows of codes u8[n, c], any strides, to a word in AWQ's order."""
    engine = engine or engine_for(codes.device)
    n, columns = codes.shape
    if codes.dtype != torch.uint8 or n % 8:
        raise CudaError(
            _(
                "codes are {dtype}[{n}, {columns}]; must be torch.uint8 with n a multiple of 8.",
                dtype=codes.dtype,
                n=n,
                columns=columns,
            ),
            _("This is an internal error (a bug in doctor): report it with this text."),
        )
    codes = (
        codes.T.contiguous().T
    )  # the eight rows of a word side by side: read one by one from eight lines they cost 32 times the bytes
    words = torch.empty(columns, n // 8, dtype=torch.int32, device=codes.device)
    engine.launch(
        "pack_awq",
        "pack",
        (-(-(n // 8) // 128), min(columns, TALLEST)),
        128,
        0,
        (Pointer(address(codes)), Pointer(address(words)), I64(columns), I64(n // 8), *map(I64, codes.stride())),
        stream_of(codes),
        f"codes[{n}, {columns}]",
    )
    return words


def gptq_dequantize(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor | None,
    bits: int,
    *,
    version: int = 1,
    engine: Engine | None = None,
) -> torch.Tensor:
    """pack.gptq_dequantize: W f32[n, k], a view of [k, n]. Words are trusted: g_idx must be in 0..G-1."""
    k, n, groups = qweight.shape[0] * 32 // bits, qweight.shape[1], scales.shape[0]
    out = torch.empty(k, n, device=qweight.device)
    packed = Packed(
        address(qweight),
        address(qzeros),
        address(scales),
        address(g_idx),
        address(out),
        n,
        k,
        groups,
        1,
        n,
        qzeros.shape[1],
        1,
        1,
        n,
        1,
        n,
        bits,
        1 if version == 1 else 0,
        DTYPES[scales.dtype],
        k // groups,
        1,
    )
    return _dequantize(packed, (qweight, qzeros, scales, g_idx), (n, -(-k // RUN)), engine, out).T


def compressed_dequantize(
    weight_packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_shape,
    bits: int,
    *,
    weight_zero_point: torch.Tensor | None = None,
    weight_g_idx: torch.Tensor | None = None,
    engine: Engine | None = None,
) -> torch.Tensor:
    """pack.compressed_dequantize of the dense stream: W f32[n, k]."""
    n, k = (int(side) for side in weight_shape)
    groups, width = weight_scale.shape[1], weight_packed.shape[1]
    out = torch.empty(n, k, device=weight_packed.device)
    packed = Packed(
        address(weight_packed),
        address(weight_zero_point),
        address(weight_scale),
        address(weight_g_idx),
        address(out),
        n,
        k,
        groups,
        width,
        1,
        1,
        groups,
        groups,
        1,
        k,
        1,
        bits,
        0 if weight_zero_point is not None else 2 ** (bits - 1),
        DTYPES[weight_scale.dtype],
        k // groups,
        0,
    )
    return _dequantize(
        packed, (weight_packed, weight_zero_point, weight_scale, weight_g_idx), (-(-k // RUN), n), engine, out
    )


def _dequantize(
    packed: Packed, tensors: tuple, sides: tuple[int, int], engine: Engine | None, out: torch.Tensor
) -> torch.Tensor:
    """sides: (fast, slow), the grid's two directions."""
    engine = engine or engine_for(out.device)
    for tensor in tensors:
        if tensor is not None and not (tensor.is_contiguous() and tensor.device == out.device):
            raise CudaError(
                _(
                    "a packed tensor {shape} on {device} has strides {strides}; must be contiguous on {place}.",
                    shape=list(tensor.shape),
                    device=tensor.device,
                    strides=tensor.stride(),
                    place=out.device,
                ),
                _("This is an internal error (a bug in doctor): report it with this text."),
            )
    engine.launch(
        "dequantize_stream",
        "pack",
        (-(-sides[0] // 128), min(sides[1], TALLEST)),
        128,
        0,
        (packed,),
        stream_of(out),
        f"W[{packed.n}, {packed.k}], {packed.bits} bits",
    )
    return out


def awq_dequantize(
    qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, *, engine: Engine | None = None
) -> torch.Tensor:
    """pack.awq_dequantize: W f32[n, k], a view of [k, n]."""
    engine = engine or engine_for(qweight.device)
    (k, words), groups = qweight.shape, scales.shape[0]
    out = torch.empty(k, words * 8, device=qweight.device)
    engine.launch(
        "dequantize_awq",
        "pack",
        (-(-words // 128), min(k, TALLEST)),
        128,
        0,
        (
            *[Pointer(address(t)) for t in (qweight, qzeros, scales, out)],
            I64(words * 8),
            I64(k),
            I32(k // groups),
            I32(DTYPES[scales.dtype]),
        ),
        stream_of(out),
        f"W[{words * 8}, {k}]",
    )
    return out.T
