"""Packed linears in another format's words, in NumPy: the same codes under the same scales and zero points.

Nothing is quantized again. What the other format cannot hold (a zero point, a scale's digits, groups that are scattered
over columns) is refused, and what was packed is unpacked again and compared before it is handed out.
"""

from __future__ import annotations

import weakref

import numpy as np

from doctor.checkpoint.codecs import to_codes
from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import BadCheckpoint, NotQuantizable, PlanRefused
from doctor.core.messages import _
from doctor.core.recipe import Scheme
from doctor.edits.arithmetic import CASTS, new_info
from doctor.edits.dequantized import part_values
from doctor.edits.kinds import Repack
from doctor.edits.stale import stale
from doctor.formats.grid import Grid, neighbours
from doctor.formats.registry import KNOWN

# Parts that were made with another one of their linear and were not read yet: source -> module -> part -> values. A
# file that keeps all words before all scales would otherwise be packed once for each part.
_WAITING: weakref.WeakKeyDictionary[Checkpoint, dict[str, dict[str, np.ndarray]]] = weakref.WeakKeyDictionary()


class RepackedTensor:
    """One part of a linear in the new format."""

    def __init__(self, source: Checkpoint, edit: Repack):
        self.source, self.edit, self.info = source, edit, new_info(edit.tensor, edit.dtype, edit.size)
        self.module = edit.tensor.removesuffix(f".{edit.part}")

    def rows(self, begin: int, end: int) -> np.ndarray:
        """Codes (CODE_NUMPY) of the leading rows [begin, end)."""
        waiting = _WAITING.setdefault(self.source, {})
        values = waiting.get(self.module, {}).get(self.edit.part)
        if values is None:
            waiting[self.module] = self._packed()
            values = waiting[self.module][self.edit.part]
        if end >= (self.edit.size or (1,))[0]:
            waiting[self.module].pop(self.edit.part, None)
            if not waiting[self.module]:
                del waiting[self.module]
        return to_codes(values[begin:end], self.edit.dtype) if self.edit.dtype in CASTS else values[begin:end]

    def _packed(self) -> dict[str, np.ndarray]:
        edit, old, new = self.edit, KNOWN[self.edit.method], KNOWN[self.edit.to]
        parts = {
            name: part_values(self.source, f"{self.module}.{name}")
            for name in old.part_names
            if f"{self.module}.{name}" in self.source.tensors
        }
        scheme = Scheme(edit.bits, edit.group_size, edit.sym)
        try:
            codes, grid, g_idx = old.codes(parts, scheme, edit.shape)
            require_held(grid, scheme)
            order = None if (g_idx == neighbours(len(g_idx), grid.scale.shape[1], g_idx)).all() else g_idx
            if order is not None and not new.order_key:
                raise NotQuantizable(
                    _("its groups are scattered over columns, which {label} cannot hold", label=new.label)
                )
            packed = new.pack(codes, grid, order, scheme)
            again = new.codes({n: _as_read(a) for n, a in packed.items()}, scheme, edit.shape)
        except KeyError as error:
            raise stale(
                _("{module}: {part} is absent, so it cannot be unpacked.", module=self.module, part=error.args[0])
            ) from None
        except BadCheckpoint as error:
            raise stale(_("{module}: {reason}", module=self.module, reason=error.message)) from None
        except NotQuantizable as error:
            raise PlanRefused(
                _("{module}: {reason}", module=self.module, reason=error.message),
                error.hint or _("Choose another format; `--format bf16` holds every weight."),
            ) from None
        same = [(again[0], codes), (again[1].scale, grid.scale), (again[1].zero, grid.zero), (again[2], g_idx)]
        if not all(np.array_equal(one, other) for one, other in same):
            raise PlanRefused(
                _("{module}: packed as {label} it does not read back the same.", module=self.module, label=new.label),
                _("This is an internal error (a bug in doctor): report it."),
            )
        return packed


def require_held(grid: Grid, scheme: Scheme) -> None:
    """NotQuantizable for a grid that no other file could hold: scales that are not finite, zero points outside the
    codes, or other than the middle in a file that says it is symmetric.
    """
    wrong = int((~np.isfinite(grid.scale)).sum())
    if wrong:
        raise NotQuantizable(_("{count:,} scales are not finite", count=wrong))
    most = 2**scheme.bits - 1
    outside = int(((grid.zero < 0) | (grid.zero > most)).sum())
    if outside:
        raise NotQuantizable(
            _(
                "{count:,} zero points are outside 0..{most}, which only this file's own words can hold",
                count=outside,
                most=most,
            )
        )
    middle = 2 ** (scheme.bits - 1)
    if scheme.sym and not (grid.zero == middle).all():
        raise NotQuantizable(
            _(
                "quantization_config says symmetric, and zero points span {least}..{most}; must be {middle}",
                least=int(grid.zero.min()),
                most=int(grid.zero.max()),
                middle=middle,
            )
        )


def _as_read(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) if array.dtype.kind == "f" else array
