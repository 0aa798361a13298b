"""The array arithmetic of edits: what happens to a tensor's codes, shape and type. Nothing here touches disk."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from doctor.checkpoint.codecs import encode, from_codes, nonfinite_mask, to_codes
from doctor.checkpoint.dtypes import DTYPES
from doctor.checkpoint.safetensors import TensorInfo
from doctor.core.errors import PlanRefused
from doctor.core.messages import _
from doctor.edits.kinds import (
    PHASES,
    CastTensor,
    ClampTensor,
    Edit,
    PadTensor,
    RenameTensor,
    ReplaceNonfinite,
    ShiftZeros,
)

if TYPE_CHECKING:
    import numpy as np
else:
    from doctor.core.lazy_numpy import np

CASTS = ("F16", "BF16", "F32")  # the types that CastTensor converts between


def new_info(name: str, dtype: str, shape: Sequence[int]) -> TensorInfo:
    """The entry of a tensor that is stored nowhere yet: bytes [0, size)."""
    return resized_info(TensorInfo(name, DTYPES[dtype], (), "", 0, 0), shape)


def resized_info(info: TensorInfo, shape: Sequence[int]) -> TensorInfo:
    """The entry with another shape. `begin` stays; `end - begin` is the new size in bytes."""
    numel = math.prod(shape)
    size = info.dtype.nbytes(numel)
    if size is None:
        raise PlanRefused(
            _(
                "{tensor}: {count:,} values of {dtype} do not fill whole bytes.",
                tensor=info.name,
                count=numel,
                dtype=info.dtype.name,
            )
        )
    return info._replace(shape=tuple(shape), end=info.begin + size)


def edited_info(info: TensorInfo, edits: Sequence[Edit]) -> TensorInfo:
    """Name, dtype and shape of the tensor after its edits. `begin` stays; `end - begin` is the new size in bytes."""
    shape, dtype = list(info.shape), info.dtype
    for edit in edits:
        if isinstance(edit, PadTensor):
            shape[edit.axis] = edit.size
        elif isinstance(edit, CastTensor):
            dtype = DTYPES[edit.dtype]
        elif isinstance(edit, RenameTensor):
            info = info._replace(name=edit.to)
    return resized_info(info._replace(dtype=dtype), shape)


def apply(codes: np.ndarray, info: TensorInfo, edits: Sequence[Edit]) -> np.ndarray:
    """The tensor's raw codes after its edits, in the order of PHASES. `codes` is not changed."""
    for edit in sorted(edits, key=lambda e: PHASES.index(e.phase)):
        if isinstance(edit, ReplaceNonfinite):
            codes = np.where(nonfinite_mask(codes, info.dtype.name), encode(edit.value, info.dtype.name), codes)
        elif isinstance(edit, ClampTensor):
            codes = clamp(codes, info.dtype.name, edit.limit)
        elif isinstance(edit, CastTensor):
            codes = cast(codes, info.dtype.name, edit.dtype, info.name)
        elif isinstance(edit, ShiftZeros):
            codes = shift_fields(codes, edit.bits, edit.step, info.name)
        elif isinstance(edit, PadTensor):
            codes = _pad(codes, edit)
    return codes


def widens(old: str, new: str) -> bool:
    """Whether every value of one dtype is a value of the other, so that a cast changes nothing."""
    return old == new or (old in ("F16", "BF16") and new == "F32")


def cast(codes: np.ndarray, old: str, new: str, name: str) -> np.ndarray:
    """Codes of the same values in another dtype. Raises PlanRefused where finite values would become Inf."""
    values = from_codes(codes, old)
    result = to_codes(values, new)
    lost = nonfinite_mask(result, new) & np.isfinite(values)
    if lost.any():
        worst = float(np.abs(values[lost]).max())
        raise PlanRefused(
            _(
                "{tensor}: {count:,} finite values, up to {largest:.6g}, exceed {dtype}; a cast would make them Inf.",
                tensor=name,
                count=int(lost.sum()),
                largest=worst,
                dtype=new,
            ),
            _("Keep its dtype, or leave this fix out with --ignore."),
        )
    return result


def clamp(codes: np.ndarray, dtype_name: str, limit: float) -> np.ndarray:
    """Codes with finite values beyond ±limit replaced by the largest code within it; all others stay."""
    values = from_codes(codes, dtype_name)
    beyond = np.isfinite(values) & (np.abs(values) > limit)
    if not beyond.any():
        return codes
    top = to_codes(np.array([limit], np.float32), dtype_name)
    if from_codes(top, dtype_name)[0] > limit:  # rounded up: one code less is the next smaller value
        top = (top.view(f"u{top.itemsize}") - np.array([1], f"u{top.itemsize}")).view(top.dtype)
    within = from_codes(top, dtype_name)[0]
    return np.where(beyond, to_codes(np.where(values < 0, -within, within).astype(np.float32), dtype_name), codes)


def shift_fields(words: np.ndarray, bits: int, step: int, name: str) -> np.ndarray:
    """int32 words with `step` (1 or -1) added to each field of `bits`, for widths that divide 32.

    Raises PlanRefused where a field would wrap.
    """
    fields, top = words.view(np.uint32), (1 << bits) - 1
    edge = top if step > 0 else 0
    full = sum(int(((fields >> shift) & top == edge).sum()) for shift in range(0, 32, bits))
    if full:
        raise PlanRefused(
            _(
                "{tensor}: {count:,} zero points are {value} and cannot move by {step:+d} in {bits} bits.",
                tensor=name,
                count=full,
                value=edge,
                step=step,
                bits=bits,
            ),
            _("Quantize this linear again."),
        )
    ones = np.uint32(sum(1 << shift for shift in range(0, 32, bits)))
    return (fields + ones if step > 0 else fields - ones).view(np.int32)


def pad_positions(old: int, new: int, blocks: int, spread: bool) -> np.ndarray:
    """New index of each of the `old` entries: int64[old], strictly increasing.

    spread: evenly, so that the longest run of zeros is as short as possible: ceil((new - old) / old) where there is
    less padding than content. Raises ValueError for sizes that do not divide by `blocks`.
    """
    if old % blocks or new % blocks or new < old:
        raise ValueError(f"cannot pad {old} to {new} in {blocks} blocks")
    o, n = old // blocks, new // blocks
    inside = np.arange(o, dtype=np.int64)
    if spread and o:
        inside = inside * n // o
    return (np.arange(blocks, dtype=np.int64)[:, None] * n + inside).reshape(-1)


def pad_runs(old: int, new: int, blocks: int, spread: bool) -> tuple[int, list[tuple[int, int, int]]]:
    """The positions of pad_positions as runs: (periods, [(begin, end, position in the padded period)]).

    Both axes are cut into `periods` equal parts in which the pattern repeats. Copying by runs is several times faster
    than by an array of positions, because most runs are long.
    """
    positions = pad_positions(old, new, blocks, spread)
    periods = math.gcd(old, new) if spread and old else blocks
    part = positions[: old // periods]
    starts = np.flatnonzero(np.diff(part, prepend=-2) != 1)
    ends = np.append(starts[1:], len(part))
    return periods, [(int(a), int(b), int(part[a])) for a, b in zip(starts, ends, strict=True)]


def _pad(codes: np.ndarray, edit: PadTensor) -> np.ndarray:
    old, tail = codes.shape[edit.axis], codes.shape[edit.axis + 1 :]
    periods, runs = pad_runs(old, edit.size, edit.blocks, edit.spread)
    head = codes.shape[: edit.axis]
    # Code 0 is +0.0 in every float dtype except E8M0.
    out = np.zeros((*head, periods, edit.size // periods, *tail), codes.dtype)
    parts = codes.reshape(*head, periods, old // periods, *tail)
    before = (slice(None),) * (edit.axis + 1)
    for begin, end, place in runs:
        out[(*before, slice(place, place + end - begin))] = parts[(*before, slice(begin, end))]
    return out.reshape(*head, edit.size, *tail)
