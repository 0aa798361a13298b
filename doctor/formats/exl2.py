"""EXL2, ExLlamaV2's own: groups of rows of 2 to 8 bits in one matrix, in an order of their own, under squared scales.

| tensor | dtype | shape |
|---|---|---|
| q_weight | I32 | [sum over groups of rows*b/32, n], each group packed along k, the widest first |
| q_scale | I32 | [G, n/8], code qs - 1 of column 8j + i in bits 4i..4i+3 of word j; qs in 1..16 |
| q_scale_max | F16 | [G] |
| q_groups | I16 | [2 G], pairs (bits, first row of q_weight) |
| q_invperm | I32 | [k], the packed row of each input channel |
| q_perm | I32 | [k], the inverse; the loader makes it anew |

w = (q - 2^(b-1)) * (qs^2 * (q_scale_max / 256)), every product rounded to float16. in_features is not stored: it is the
sum of the groups' rows, a group of b bits having 32/b rows a word. n is out_features padded to a multiple of 32.

Source: turboderp/exllamav2 0.3.2 exllamav2/linear.py, exllamav2_ext/cuda/q_matrix.cu (reconstruct), quant/qdq_*.cuh.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from doctor.checkpoint.safetensors import TensorInfo
from doctor.core.errors import BadCheckpoint
from doctor.core.lazy_numpy import np
from doctor.core.messages import _
from doctor.core.recipe import Scheme
from doctor.formats.arrays import Array, contiguous
from doctor.formats.base import Format, Parts, Shapes, Texts
from doctor.formats.bits import unpack_columns, unpack_rows
from doctor.formats.registry import register
from doctor.formats.requirements import require_shape

WIDTHS = (8, 6, 5, 4, 3, 2)  # that kernels have, in the order in which groups must stand


class Group(NamedTuple):
    """Rows begin..end of q_weight, which hold `channels` packed rows of `bits` each."""

    bits: int
    begin: int
    end: int

    @property
    def channels(self) -> int:
        return (self.end - self.begin) * 32 // self.bits if self.bits > 0 else 0


@register
class EXL2(Format):
    """Read only."""

    name = "exl2"
    label = "EXL2"
    quant_methods = ("exl2",)
    part_names = ("q_weight", "q_scale", "q_scale_max", "q_groups", "q_invperm", "q_perm")
    beside = part_names
    verbatim = ("q_groups",)
    bits = (2, 3, 4, 5, 6, 8)
    padded = (32, 1)
    writes = False

    def scheme_beside(
        self, info: TensorInfo, tensors: Mapping[str, TensorInfo], raw: Mapping[str, Any] | None
    ) -> Scheme | None:
        """The mean width, and the mean size of a group."""
        module, _dot, last = info.name.rpartition(".")
        if last != "q_weight" or len(info.shape) != 2:
            return None
        held = {part: tensors[f"{module}.{part}"] for part in self.part_names if f"{module}.{part}" in tensors}
        order = held.get("q_invperm") or held.get("q_perm")
        if order is None or not {"q_scale", "q_scale_max", "q_groups"} <= held.keys() or not order.numel:
            return None
        groups = held["q_scale_max"].numel
        return Scheme(round(info.shape[0] * 32 / order.numel), order.numel // groups if groups else -1)

    def shape_beside(self, info: TensorInfo, texts: Texts) -> tuple[int, int] | None:
        stored = texts.get(f"{info.name.rpartition('.')[0]}.q_groups")
        if stored is None or len(info.shape) != 2:
            return None
        rows = sum(group.channels for group in groups_of(np.frombuffer(stored, np.int16), info.shape[0]))
        return info.shape[1], rows

    def weight_name(self, codes: str) -> str:
        return f"{codes.removesuffix('.q_weight')}.weight" if codes.endswith(".q_weight") else codes

    def weight_shape(self, shapes: Shapes, load: Callable[[str], Array], bits: int) -> tuple[int, int]:
        order = "q_invperm" if "q_invperm" in shapes else "q_perm"
        return shapes["q_weight"][1], shapes[order][0]

    def unpack(
        self, parts: Parts, scheme: Scheme, shape: tuple[int, int] | None = None, rows: slice | None = None
    ) -> Array:
        words, order = parts["q_weight"].view(np.int32), _order(parts)
        n, k = words.shape[1], len(order)
        groups = groups_of(parts["q_groups"], len(words))
        _require_fitting(parts, groups, n, k)
        first, last, _step = (rows or slice(0, shape[0] if shape else n)).indices(n)
        roots = unpack_rows(contiguous(parts["q_scale"].view(np.int32)), 4, n)[:, first:last].astype(np.float16) + 1
        largest = (parts["q_scale_max"].astype(np.float32) / 256).astype(np.float16)
        packed = np.empty((k, last - first), np.float32)  # by packed row
        row = 0
        for number, group in enumerate(groups):
            scale = (roots[number] ** 2).astype(np.float16) * largest[number]
            codes = unpack_columns(contiguous(words[group.begin : group.end, first:last]), group.bits, group.channels)
            levels = codes.astype(np.float16) - np.float16(2 ** (group.bits - 1))
            packed[row : row + group.channels] = levels * scale
            row += group.channels
        return contiguous(packed[order[: shape[1]] if shape else order].T)


def groups_of(stored: Array, words: int) -> list[Group]:
    """The groups that q_groups says, of `words` rows of q_weight, as they stand."""
    pairs = [(int(bits), int(begin)) for bits, begin in zip(stored[0::2], stored[1::2], strict=False)]
    ends = [begin for _bits, begin in pairs[1:]] + [words]
    return [Group(bits, begin, end) for (bits, begin), end in zip(pairs, ends, strict=True)]


def broken_groups(groups: list[Group]) -> Iterator[tuple[int, str]]:
    """(number of the group, what is wrong with it) for what kernels take as sound and compute wrong numbers from."""
    before = WIDTHS[0]
    for number, group in enumerate(groups):
        rows = group.end - group.begin
        if number == 0 and group.begin:
            yield number, _("begins at row {row} of q_weight; must be 0", row=group.begin)
        if group.bits not in WIDTHS:
            yield number, _("has {bits} bits; must be 2, 3, 4, 5, 6 or 8", bits=group.bits)
            continue
        if rows <= 0:
            yield number, _("has {rows} rows of q_weight; must be 1 or more", rows=rows)
        elif group.channels % (16 if group.bits == 2 else 32) or rows * 32 % group.bits:
            yield number, _("has {n} input channels; must be a multiple of 32", n=group.channels)
        if group.bits > before:
            yield (
                number,
                _("has {bits} bits after one of {before}; wider ones come first", bits=group.bits, before=before),
            )
        before = group.bits


def exl2_defects(stored: bytes, words: int) -> Iterator[tuple[int, str]]:
    """broken_groups of the bytes of a stored q_groups, for `words` rows of q_weight."""
    return broken_groups(groups_of(np.frombuffer(stored[: len(stored) // 4 * 4], "<i2"), words))


def _order(parts: Parts) -> Array:
    """i64[k], the packed row of each input channel. Raises BadCheckpoint where that is no order."""
    given = parts.get("q_invperm")
    order = np.argsort(parts["q_perm"]) if given is None else given.astype(np.int64) & 0xFFFF
    if not np.array_equal(np.sort(order), np.arange(len(order))):
        raise BadCheckpoint(_("q_invperm names some packed rows twice and others never: it must be a permutation."))
    return order


def _require_fitting(parts: Parts, groups: list[Group], n: int, k: int) -> None:
    require_shape("q_scale", parts["q_scale"], (len(groups), n // 8))
    require_shape("q_scale_max", parts["q_scale_max"], (len(groups),))
    for number, reason in broken_groups(groups):
        raise BadCheckpoint(_("group {number} {reason}.", number=number, reason=reason))
    rows = sum(group.channels for group in groups)
    if rows != k:
        raise BadCheckpoint(_("the groups hold {rows} input channels; q_invperm has {k}.", rows=rows, k=k))
