"""Codes to the int32 words that engines read, and back: GPTQ v1 and v2, AWQ gemm, compressed-tensors pack-quantized.

One law serves all of them: along one axis the codes form a little-endian bit stream, code e in bits [e*b, e*b+b),
stream bit p being bit p % 32 of word p // 32. Thirty-two codes fill b words exactly, so packing goes through blocks of
32 codes. AWQ differs by an order inside each word; compressed-tensors up to 0.17 did not let codes cross words.

| format | weights | zero points | scales |
|---|---|---|---|
| gptq, gptq_v2 | qweight [k*b/32, n], along k | qzeros [G, n*b/32], along n; v1 stores zero - 1 | scales [G, n] |
| awq gemm | qweight [k, n/8], along n | qzeros [G, n/8] | scales [G, n] |
| compressed-tensors | weight_packed [n, ceil(k*b/32)], along k | weight_zero_point [ceil(n*b/32), G] | weight_scale [n, G] |

Sources: GPTQModel nn_modules/qlinear/__init__.py; AutoAWQ awq/modules/linear/gemm.py; compressed-tensors
compressors/pack_quantized. The packed examples of the tests were made by those programs.
"""

from __future__ import annotations

import torch

from doctor.core.errors import BadCheckpoint, NotQuantizable
from doctor.quant.solve import cuda
from doctor.quant.solve.grid import BITS, Grid, contiguous_groups, dequantize

# Position of a word's eight 4-bit fields in AWQ: field p holds column AWQ_ORDER[p] of its eight.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_AWQ_INVERSE = tuple(AWQ_ORDER.index(column) for column in range(8))


def pack_columns(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """i32[ceil(m*bits/32), c]: each column of codes [m, c] as a bit stream, the last word filled up with zeros.

    Any integer dtype; values must be 0..2^bits-1. A field of 32 neighbouring words is one contiguous run of c.
    """
    if _by_kernel(codes):
        return cuda.pack_columns(codes.to(torch.uint8), bits)
    m, columns = codes.shape
    blocks = -(-m // 32)
    padded = codes if m == blocks * 32 else torch.nn.functional.pad(codes, (0, 0, 0, blocks * 32 - m))
    fields = padded.reshape(blocks, 32, columns)
    packed = torch.zeros(blocks, bits, columns, dtype=torch.int32, device=codes.device)
    for word, code, shift in _placements(bits):
        field = fields[:, code].to(torch.int32)
        packed[:, word] |= field << shift if shift >= 0 else field >> -shift
    return packed.reshape(blocks * bits, columns)[: -(-m * bits // 32)].contiguous()


def unpack_columns(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """codes u8[count, c] from the columns of words i32[at least ceil(count*bits/32), c]."""
    height, columns = words.shape
    blocks = -(-count // 32)
    short = max(0, blocks * bits - height)
    packed = torch.nn.functional.pad(words, (0, 0, 0, short))[: blocks * bits].reshape(blocks, bits, columns)
    codes = torch.zeros(blocks, 32, columns, dtype=torch.uint8, device=words.device)
    for word, code, shift in _placements(bits):
        value = packed[:, word]
        # >> of a negative int32 copies its sign downwards, and a field that crosses words meets its other half: mask.
        part = (value >> shift) & _low(min(bits, 32 - shift)) if shift >= 0 else (value << -shift) & _low(bits)
        codes[:, code] |= part.to(torch.uint8)
    return codes.reshape(blocks * 32, columns)[:count]


def pack_rows(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """i32[r, ceil(m*bits/32)]: each row of codes [r, m] as a bit stream."""
    if _by_kernel(codes):
        return cuda.pack_rows(codes.to(torch.uint8), bits)
    return pack_columns(codes.T.contiguous(), bits).T.contiguous()


def unpack_rows(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """codes u8[r, count] from the rows of words i32[r, at least ceil(count*bits/32)]."""
    return unpack_columns(words.T.contiguous(), bits, count).T.contiguous()


def gptq_pack(
    codes: torch.Tensor,
    grid: Grid,
    g_idx: torch.Tensor,
    bits: int,
    *,
    version: int = 1,
    scale_dtype: torch.dtype = torch.float16,
) -> dict[str, torch.Tensor]:
    """qweight, qzeros, scales and g_idx of codes u8[n, k] for checkpoint_format gptq (version 1) or gptq_v2 (2).

    Raises NotQuantizable where n or k is not a multiple of 32 (both packers need whole words), or where version 1 would
    have to store a zero point of 0 as -1: one writer lets it borrow from the next field, another overwrites seven
    neighbours with it.
    """
    n, k = codes.shape
    _require_bits(bits)
    if k % 32 or n % 32:
        raise NotQuantizable(
            f"GPTQ packing of [{n}, {k}]: out_features and in_features must be multiples of 32.",
            "Pad them, or keep this linear in 16 bits.",
        )
    zero = grid.zero
    if version == 1:
        if int(zero.min()) < 1:
            row, group = divmod(int(zero.argmin()), zero.shape[1])
            raise NotQuantizable(
                f"GPTQ v1 stores zero - 1, and row {row}, group {group} has zero {int(zero.min())} "
                f"({int((zero < 1).sum())} such groups): zeros must be 1..{2**bits - 1}.",
                "Fit the grid with zero_min=1, or write gptq_v2.",
            )
        zero = zero - 1
    return {
        "qweight": pack_columns(codes.T.contiguous(), bits),
        "qzeros": pack_rows(zero.T, bits),
        "scales": _stored_scale(grid.scale.T, scale_dtype),
        "g_idx": g_idx.to(torch.int32),
    }


def gptq_unpack(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor | None,
    bits: int,
    *,
    version: int = 1,
) -> tuple[torch.Tensor, Grid, torch.Tensor]:
    """(codes u8[n, k], grid, g_idx i32[k]) of a GPTQ linear; g_idx None stands for groups of neighbours."""
    k, n, g_idx = _require_gptq(qweight, qzeros, scales, g_idx, bits)
    codes = unpack_columns(qweight, bits, k).T.contiguous()
    zero = unpack_rows(qzeros, bits, n).to(torch.int32)
    if version == 1:
        # The stored field is zero - 1. Its highest value means 2^bits: written so by no grid of ours, read so by
        # engines.
        zero = zero + 1
    return codes, Grid(scales.T.to(torch.float32).contiguous(), zero.T.contiguous()), g_idx


def awq_pack(codes: torch.Tensor, grid: Grid, *, scale_dtype: torch.dtype = torch.float16) -> dict[str, torch.Tensor]:
    """qweight, qzeros and scales of codes u8[n, k] (4 bits, groups of neighbours) for AWQ version gemm."""
    n, k = codes.shape
    if n % 32:
        raise NotQuantizable(
            f"AWQ gemm packing of [{n}, {k}]: out_features must be a multiple of 32.",
            "Pad them, or keep this linear in 16 bits.",
        )
    return {
        "qweight": _awq_words(codes),
        "qzeros": _awq_words(grid.zero),
        "scales": _stored_scale(grid.scale.T, scale_dtype),
    }


def awq_unpack(
    qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor
) -> tuple[torch.Tensor, Grid, torch.Tensor]:
    """(codes u8[n, k], grid, g_idx i32[k]) of an AWQ gemm linear."""
    g_idx = _require_awq(qweight, qzeros, scales)
    codes, zero = _awq_fields(qweight), _awq_fields(qzeros)
    return codes, Grid(scales.T.to(torch.float32).contiguous(), zero.to(torch.int32)), g_idx


def compressed_pack(
    codes: torch.Tensor, grid: Grid, bits: int, sym: bool, *, scale_dtype: torch.dtype = torch.float16
) -> dict[str, torch.Tensor]:
    """weight_packed, weight_scale, weight_shape and, asymmetric, weight_zero_point of codes u8[n, k].

    Groups of neighbours. Stored codes are offset binary, signed + 2^(b-1), which is what our codes are already.
    """
    _require_bits(bits)
    n, k = codes.shape
    packed = {
        "weight_packed": pack_rows(codes, bits),
        "weight_scale": _stored_scale(grid.scale, scale_dtype),
        "weight_shape": torch.tensor([n, k], dtype=torch.int64),
    }
    if not sym:
        packed["weight_zero_point"] = pack_columns(grid.zero, bits)
    elif not (grid.zero == 2 ** (bits - 1)).all():
        raise NotQuantizable(
            f"a symmetric compressed-tensors weight has no zero points, and a group has "
            f"{int(grid.zero.min())}..{int(grid.zero.max())}: all must be {2 ** (bits - 1)}.",
            "Write it as symmetric=false.",
        )
    return packed


def compressed_unpack(
    weight_packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_shape: tuple[int, int],
    bits: int,
    *,
    weight_zero_point: torch.Tensor | None = None,
    weight_g_idx: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Grid, torch.Tensor]:
    """(codes u8[n, k], grid, g_idx i32[k]) of a pack-quantized weight of [n, k] = weight_shape.

    The layout follows from the width: ceil(k*b/32) words is the dense stream; ceil(k / floor(32/b)) is the older layout
    without crossings, which differs for 3 bits.
    """
    g_idx = _require_compressed(weight_scale, weight_shape, bits, weight_zero_point, weight_g_idx)
    n, k = (int(side) for side in weight_shape)
    groups, width = weight_scale.shape[1], weight_packed.shape[1]
    per_word = 32 // bits
    if width == -(-k * bits // 32):
        codes = unpack_rows(weight_packed, bits, k)
    elif width == -(-k // per_word):
        shifts = torch.arange(per_word, device=weight_packed.device, dtype=torch.int32) * bits
        codes = ((weight_packed[:, :, None] >> shifts) & _low(bits)).reshape(n, -1)[:, :k].to(torch.uint8)
    else:
        raise BadCheckpoint(
            f"weight_packed has {width} words a row for {k} codes of {bits} bits: a dense stream has "
            f"{-(-k * bits // 32)}, the layout before compressed-tensors 0.18 {-(-k // per_word)}."
        )
    if weight_zero_point is None:
        zero = torch.full((n, groups), 2 ** (bits - 1), dtype=torch.int32, device=codes.device)
    else:
        zero = unpack_columns(weight_zero_point, bits, n).to(torch.int32)
    return codes, Grid(weight_scale.to(torch.float32), zero), g_idx


def gptq_dequantize(qweight, qzeros, scales, g_idx, bits: int, *, version: int = 1) -> torch.Tensor:
    """W f32[n, k] that an engine computes from a GPTQ linear."""
    if _by_kernel(qweight):
        _, _, g_idx = _require_gptq(qweight, qzeros, scales, g_idx, bits)
        return cuda.gptq_dequantize(
            qweight.contiguous(), qzeros.contiguous(), scales.contiguous(), g_idx, bits, version=version
        )
    return dequantize(*gptq_unpack(qweight, qzeros, scales, g_idx, bits, version=version))


def awq_dequantize(qweight, qzeros, scales) -> torch.Tensor:
    """W f32[n, k] that an engine computes from an AWQ gemm linear."""
    if _by_kernel(qweight):
        _require_awq(qweight, qzeros, scales)
        return cuda.awq_dequantize(qweight.contiguous(), qzeros.contiguous(), scales.contiguous())
    return dequantize(*awq_unpack(qweight, qzeros, scales))


def compressed_dequantize(weight_packed, weight_scale, weight_shape, bits: int, **optional) -> torch.Tensor:
    """W f32[n, k] that an engine computes from a pack-quantized weight; optional as in compressed_unpack."""
    if _by_kernel(weight_packed) and weight_packed.shape[1] == -(-int(weight_shape[1]) * bits // 32):
        _require_compressed(weight_scale, weight_shape, bits, **optional)
        optional = {name: None if t is None else t.contiguous() for name, t in optional.items()}
        return cuda.compressed_dequantize(
            weight_packed.contiguous(), weight_scale.contiguous(), weight_shape, bits, **optional
        )
    return dequantize(*compressed_unpack(weight_packed, weight_scale, weight_shape, bits, **optional))


def _placements(bits: int):
    """(word, code, shift) for the 32 codes in `bits` words; a negative shift puts a code's upper bits in the next
    word.
    """
    for code in range(32):
        word, shift = divmod(code * bits, 32)
        yield word, code, shift
        if shift + bits > 32:
            yield word + 1, code, shift - 32


def _by_kernel(codes: torch.Tensor) -> bool:
    return codes.is_cuda and cuda.available(codes.device) is None


def _low(bits: int) -> int:
    return (1 << bits) - 1


def _awq_words(codes: torch.Tensor) -> torch.Tensor:
    """i32[c, n/8] of codes [n, c], eight rows to a word in AWQ's order."""
    if _by_kernel(codes):
        return cuda.awq_words(codes.to(torch.uint8))
    n, columns = codes.shape
    ordered = codes.reshape(n // 8, 8, columns)[:, list(AWQ_ORDER)].reshape(n, columns)
    return pack_columns(ordered, 4).T.contiguous()


def _awq_fields(words: torch.Tensor) -> torch.Tensor:
    """codes u8[n, c] of words i32[c, n/8]."""
    columns, width = words.shape
    fields = unpack_columns(words.T.contiguous(), 4, width * 8)
    return fields.reshape(width, 8, columns)[:, list(_AWQ_INVERSE)].reshape(width * 8, columns)


def _stored_scale(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """scale in its stored dtype; NotQuantizable where that changes a value, since codes were chosen against it."""
    stored = scale.to(dtype).contiguous()
    off = int((stored.to(torch.float32) != scale).sum())
    if off:
        raise NotQuantizable(
            f"{off} of {scale.numel()} scales are not exact in {str(dtype)[6:]}: codes were chosen "
            "against other scales than would be stored.",
            "Fit the grid with this scale_dtype.",
        )
    return stored


def _groups_of_neighbours(k: int, groups: int, device: torch.device) -> torch.Tensor:
    if groups < 1 or k % groups:
        raise BadCheckpoint(f"{groups} groups of scales for {k} in_features: groups must divide in_features.")
    return contiguous_groups(k, k // groups, device)


def _require_bits(bits: int) -> None:
    if bits not in BITS:
        raise NotQuantizable(f"bits is {bits}: the packed formats here have {', '.join(map(str, BITS))}.")


def _require_gptq(
    qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, g_idx: torch.Tensor | None, bits: int
) -> tuple[int, int, torch.Tensor]:
    """(k, n, g_idx i32[k]) of a GPTQ linear whose tensors fit each other."""
    _require_bits(bits)
    k, n, groups = qweight.shape[0] * 32 // bits, qweight.shape[1], scales.shape[0]
    _require_shape("qzeros", qzeros, (groups, -(-n * bits // 32)))
    _require_shape("scales", scales, (groups, n))
    if g_idx is None:
        g_idx = _groups_of_neighbours(k, groups, scales.device)
    _require_groups(g_idx, k, groups)
    return k, n, g_idx.to(torch.int32).contiguous()


def _require_awq(qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """g_idx i32[k] of an AWQ gemm linear whose tensors fit each other."""
    (k, words), groups = qweight.shape, scales.shape[0]
    _require_shape("qzeros", qzeros, (groups, words))
    _require_shape("scales", scales, (groups, words * 8))
    return _groups_of_neighbours(k, groups, scales.device)


def _require_compressed(
    weight_scale: torch.Tensor,
    weight_shape,
    bits: int,
    weight_zero_point: torch.Tensor | None = None,
    weight_g_idx: torch.Tensor | None = None,
) -> torch.Tensor:
    """g_idx i32[k] of a pack-quantized weight whose other tensors fit each other."""
    _require_bits(bits)
    n, k = (int(side) for side in weight_shape)
    groups = weight_scale.shape[1]
    _require_shape("weight_scale", weight_scale, (n, groups))
    if weight_zero_point is not None:
        _require_shape("weight_zero_point", weight_zero_point, (-(-n * bits // 32), groups))
    if weight_g_idx is None:
        weight_g_idx = _groups_of_neighbours(k, groups, weight_scale.device)
    _require_groups(weight_g_idx, k, groups)
    return weight_g_idx.to(torch.int32)


def _require_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise BadCheckpoint(f"{name} is {list(tensor.shape)}: the other tensors of this linear ask for {list(shape)}.")


def _require_groups(g_idx: torch.Tensor, k: int, groups: int) -> None:
    _require_shape("g_idx", g_idx, (k,))
    if int(g_idx.min()) < 0 or int(g_idx.max()) >= groups:
        raise BadCheckpoint(f"g_idx spans {int(g_idx.min())}..{int(g_idx.max())}: there are {groups} groups of scales.")
