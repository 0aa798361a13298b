"""Packed weights as float values, in NumPy. How they are packed, their format knows (doctor/formats)."""

from typing import cast

import numpy as np

from doctor.checkpoint.codecs import from_codes, to_codes
from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import BadCheckpoint
from doctor.core.messages import _
from doctor.core.recipe import Scheme
from doctor.edits.arithmetic import CASTS, new_info
from doctor.edits.kinds import Dequantize
from doctor.edits.stale import stale
from doctor.formats.base import Format
from doctor.formats.grid import e4m3_values
from doctor.formats.registry import KNOWN
from doctor.formats.requirements import stored_shape


class DequantizedTensor:
    """A quantized linear as float values. Its packed tensors stay in memory from the first row read to the last."""

    def __init__(self, source: Checkpoint, edit: Dequantize):
        self.source, self.edit, self.info = source, edit, new_info(edit.tensor, edit.dtype, edit.shape)
        self.module = edit.tensor.removesuffix(".weight")
        self.parts: dict[str, np.ndarray] | None = None

    def rows(self, begin: int, end: int) -> np.ndarray:
        """Codes (CODE_NUMPY) of the leading rows [begin, end), in the edit's dtype."""
        form = _format_of(self.edit)
        scheme = Scheme(self.edit.bits, tile=self.edit.block)
        stored = {name: form.part_of(self.edit.tensor, name) for name in form.part_names}
        parts = self.parts or {
            name: part_values(self.source, tensor) for name, tensor in stored.items() if tensor in self.source.tensors
        }
        self.parts = parts if end < self.edit.shape[0] else None
        try:
            self._require_shape(form, parts)
            values = form.unpack(parts, scheme, cast("tuple[int, int]", self.edit.shape), slice(begin, end))
        except KeyError as error:
            raise stale(
                _("{module}: {part} is absent, so it cannot be dequantized.", module=self.module, part=error.args[0])
            ) from None
        except BadCheckpoint as error:
            raise stale(_("{module}: {reason}", module=self.module, reason=error.message)) from None
        return to_codes(values, self.edit.dtype)

    def _require_shape(self, form: Format, parts: dict[str, np.ndarray]) -> None:
        shapes = {name: array.shape for name, array in parts.items()}
        found = form.weight_shape(shapes, parts.__getitem__, self.edit.bits)
        if tuple(found) != stored_shape(self.edit.shape, form.padded):
            raise stale(
                _(
                    "{module}: dequantizes to {found}; must be {expected}.",
                    module=self.module,
                    found=list(found),
                    expected=list(self.edit.shape),
                )
            )


def _format_of(edit: Dequantize) -> Format:
    """The format that the edit names. Receipts of 0.1 name GPTQ of either version alike and the version beside it."""
    form = KNOWN[edit.method]
    return KNOWN[form.twin] if form.twin and edit.version == 2 and form.zero_offset else form


def part_values(checkpoint: Checkpoint, name: str) -> np.ndarray:
    """A packed tensor: words as stored, scales and 8-bit floats as float32 values."""
    codes, kind = checkpoint.load(name), checkpoint.tensors[name].dtype
    if kind.name == "F8_E8M0":
        return np.where(codes == 0xFF, np.float32(np.nan), np.exp2(codes.astype(np.float32) - 127)).astype(np.float32)
    if kind.name == "F8_E4M3":
        return E4M3_VALUES[codes]
    if not kind.is_float:
        return codes
    if kind.name not in (*CASTS, "F64"):
        raise BadCheckpoint(_("{tensor}: dtype {dtype} cannot be decoded.", tensor=name, dtype=kind.name))
    return from_codes(codes, kind.name).astype(np.float32)


E4M3_VALUES = e4m3_values()
