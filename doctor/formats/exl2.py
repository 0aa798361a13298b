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

Written here: one width a linear, in groups of neighbours, so that q_invperm counts. The head and the embedding stay in
16 bits. No client on a processor reads this format; what is written is decoded by unpack(), which is proved on the
reference's own kernels.

Source: turboderp/exllamav2 0.3.2 exllamav2/linear.py, exllamav2_ext/cuda/q_matrix.cu (reconstruct), quant/qdq_*.cuh.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from doctor.checkpoint.safetensors import TensorInfo
from doctor.core.errors import BadCheckpoint, NotQuantizable
from doctor.core.lazy_numpy import np
from doctor.core.messages import _
from doctor.core.recipe import Recipe, Scheme
from doctor.formats.arrays import Array, cast, contiguous, is_torch, zeros
from doctor.formats.base import Format, Part, Parts, Shapes, Texts
from doctor.formats.bits import pack_columns, pack_rows, unpack_columns, unpack_rows
from doctor.formats.grid import Grid, GridKind, group_bits, squared_scale
from doctor.formats.registry import register
from doctor.formats.requirements import require_shape

MOST_ROWS = 32767  # of q_weight: q_groups counts them in signed 16 bits
LAYOUT = "0.3.2"  # of ExLlamaV2, whose layout is written
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
    """ExLlamaV2's format of groups."""

    name = "exl2"
    label = "EXL2"
    quant_methods = ("exl2",)
    part_names = ("q_weight", "q_scale", "q_scale_max", "q_groups", "q_invperm", "q_perm")
    beside = part_names
    verbatim = ("q_groups",)
    bits = (2, 3, 4, 5, 6, 8)
    wide = (10, 25)  # as ExLlamaV2's own converter has them: a tenth or a quarter
    groups = (128, 64, 32)
    methods = ("gptq", "rtn")
    scales = "q_scale"
    padded = (32, 1)
    unit = (32, 1)
    joint = ()
    client = ""

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

    def grid(self, scheme: Scheme) -> GridKind:
        return GridKind(scheme.bits, scheme.group_size, True, squared=True, wide=scheme.wide)

    def unfit(self, scheme: Scheme, in_features: int, out_features: int) -> str:
        if in_features % scheme.group_size:
            return _(
                "in_features {size} is not a multiple of group_size {group}", size=in_features, group=scheme.group_size
            )
        rows = _rows_of(in_features, scheme)[-1]
        if rows > MOST_ROWS:
            return _("q_weight would have {rows:,} rows; EXL2 counts at most {most:,}", rows=rows, most=MOST_ROWS)
        return ""

    def parts(self, in_features: int, out_features: int, scheme: Scheme) -> tuple[Part, ...]:
        groups, width = in_features // scheme.group_size, -(-out_features // 32) * 32
        return (
            Part("q_weight", "I32", (int(_rows_of(in_features, scheme)[-1]), width)),
            Part("q_scale", "I32", (groups, width // 8)),
            Part("q_scale_max", "F16", (groups,)),
            Part("q_groups", "I16", (2 * groups,)),
            Part("q_invperm", "I32", (in_features,)),
        )

    def pack(self, codes: Array, grid: Grid, g_idx: Array | None, scheme: Scheme) -> dict[str, Array]:
        if is_torch(codes):
            torch = sys.modules["torch"]
            divisor = None if grid.divisor is None else grid.divisor.cpu().numpy()
            plain = Grid(grid.scale.cpu().numpy(), grid.zero.cpu().numpy(), grid.levels, divisor)
            made = self.pack(codes.cpu().numpy(), plain, None if g_idx is None else g_idx.cpu().numpy(), scheme)
            return {name: torch.from_numpy(part).to(codes.device) for name, part in made.items()}
        (n, k), groups = codes.shape, grid.scale.shape[1]
        owner = np.arange(k) // (k // groups) if g_idx is None else g_idx
        widths = group_bits(scheme.bits, scheme.wide, groups)
        middles = np.array([1 << (bits - 1) for bits in widths])
        if grid.divisor is None or not (grid.zero == middles).all() or k % (32 * groups):
            raise NotQuantizable(_("EXL2: needs symmetric groups of a multiple of 32 columns under squared scales."))
        roots = np.clip(np.rint(np.sqrt(grid.scale / grid.divisor)), 1, 16).astype(np.float32)
        off = int((squared_scale(roots, grid.divisor) != grid.scale).sum())
        if off:
            raise NotQuantizable(
                _(
                    "EXL2: {off} of {count} scales are no square of 1 to 16 times their group's.",
                    off=off,
                    count=roots.size,
                )
            )
        short = -n % 32  # rows that the kernels want and the linear has not
        order = np.argsort(owner, kind="stable")
        levels = np.vstack([codes, np.broadcast_to(middles[owner], (short, k))]).astype(np.uint8).T[order]
        places = np.empty(k, np.int32)
        places[order] = np.arange(k, dtype=np.int32)
        starts = np.stack([widths, _rows_of(k, scheme)[:-1]], 1)
        by_group = np.repeat(widths, k // groups)
        runs = [np.ascontiguousarray(levels[by_group == bits]) for bits in dict.fromkeys(widths)]
        return {
            "q_weight": np.concatenate(
                [pack_columns(run, bits) for run, bits in zip(runs, dict.fromkeys(widths), strict=True)]
            ),
            "q_scale": pack_rows(np.pad(roots - 1, ((0, short), (0, 0))).T.astype(np.uint8), 4),
            "q_scale_max": (grid.divisor * 256).astype(np.float16),
            "q_groups": starts.reshape(-1).astype(np.int16),
            "q_invperm": places,
        }

    def bias(self, values: Array) -> Array:
        """float16, with a zero for each row that was added. Raises NotQuantizable where float16 does not hold it."""
        made = zeros((-(-len(values) // 32) * 32,), "F16", values)
        made[: len(values)] = cast(values, "F16")
        if not bool((abs(cast(made, "F32")) <= 65504).all()):
            raise NotQuantizable(_("EXL2: a bias of {most:.6g} exceeds float16.", most=float(abs(values).max())))
        return made

    def config(
        self, recipe: Recipe, kept: Iterable[str] = (), widths: Mapping[str, int] | None = None
    ) -> dict[str, Any]:
        """What front ends show; ExLlamaV2 reads the tensors alone. bits: of the linears that no list names."""
        return {"quant_method": "exl2", "version": LAYOUT, "bits": float(recipe.width), "head_bits": 16}

    def weight_name(self, codes: str) -> str:
        return f"{codes.removesuffix('.q_weight')}.weight" if codes.endswith(".q_weight") else codes

    def weight_shape(self, shapes: Shapes, load: Callable[[str], Array], bits: int) -> tuple[int, int]:
        order = "q_invperm" if "q_invperm" in shapes else "q_perm"
        return shapes["q_weight"][1], shapes[order][0]

    def unpack(
        self, parts: Parts, scheme: Scheme, shape: tuple[int, int] | None = None, rows: slice | None = None
    ) -> Array:
        first_part = parts["q_weight"]
        if is_torch(first_part):
            plain = {name: part.cpu().numpy() for name, part in parts.items()}
            found = self.unpack(plain, scheme, shape, rows)
            return sys.modules["torch"].from_numpy(found).to(first_part.device)
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


def _rows_of(in_features: int, scheme: Scheme) -> Array:
    """Rows of q_weight before each group, and of all groups."""
    widths = group_bits(scheme.bits, scheme.wide, in_features // scheme.group_size)
    return np.cumsum([0, *(scheme.group_size * bits // 32 for bits in widths)])


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
