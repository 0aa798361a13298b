"""Tensors computed by an edit: copied from a donor, dequantized, LoRA-merged, or extended.

A derived tensor is read by leading rows like a stored one, so the overlay streams it and computes nothing twice. NumPy
only: a fix of a quantized checkpoint needs no torch.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from doctor.checkpoint.codecs import from_codes, nonfinite_mask, to_codes
from doctor.checkpoint.directory import Checkpoint
from doctor.checkpoint.dtypes import CODE_NUMPY
from doctor.checkpoint.safetensors import TensorInfo
from doctor.core.errors import PlanRefused
from doctor.core.messages import Message, _
from doctor.edits.arithmetic import CASTS, new_info, resized_info
from doctor.edits.dequantized import DequantizedTensor
from doctor.edits.donor_registry import open_donor, tensor_digest
from doctor.edits.kinds import (
    DERIVED,
    AddLowRank,
    Dequantize,
    Edit,
    EqualZeros,
    GroupsInOrder,
    GrowRows,
    Repack,
    TakeTensor,
)
from doctor.edits.repacked import RepackedTensor
from doctor.edits.stale import stale

MEAN_SLAB = 1 << 22  # values summed at once


class DerivedTensor(Protocol):
    """A tensor that is computed while it is read. `info` gives dtype and shape of what `rows` returns."""

    info: TensorInfo

    def rows(self, begin: int, end: int) -> np.ndarray:
        """Codes (CODE_NUMPY) of the leading rows [begin, end)."""
        ...


class StoredTensor:
    """A tensor as a checkpoint stores it."""

    def __init__(self, checkpoint: Checkpoint, name: str):
        if name not in checkpoint.tensors:
            raise stale(_("{tensor}: {checkpoint} has no such tensor.", tensor=name, checkpoint=checkpoint.root))
        self.checkpoint, self.info = checkpoint, checkpoint.tensors[name]
        if self.info.dtype.name not in CODE_NUMPY:
            raise PlanRefused(no_whole_bytes(name, self.info.dtype.name))

    def rows(self, begin: int, end: int) -> np.ndarray:
        shape = self.info.shape or (1,)
        codes = np.empty((end - begin, *shape[1:]), CODE_NUMPY[self.info.dtype.name])
        row = self.info.nbytes // max(shape[0], 1)
        with self.checkpoint.open_file(self.info.shard) as file:
            file.read_into(self.info.begin + begin * row, codes.reshape(-1).view(np.uint8).data)
        return codes


class DonorTensor(StoredTensor):
    """A tensor of a donor. Its bytes must be those that the edit was made for; they are hashed before the first
    read.
    """

    def __init__(self, edit: TakeTensor):
        super().__init__(open_donor(edit.root), edit.called or edit.tensor)
        self.edit, self.checked = edit, False

    def rows(self, begin: int, end: int) -> np.ndarray:
        if not self.checked:
            found = tensor_digest(self.checkpoint, self.info)
            if found != self.edit.digest:
                raise stale(
                    _(
                        "{donor}: {tensor} has blake2b {found}; the edit was made for {expected}.",
                        donor=self.edit.root,
                        tensor=self.info.name,
                        found=found,
                        expected=self.edit.digest,
                    )
                )
            self.checked = True
        return super().rows(begin, end)


class ExtendedTensor:
    """Another tensor with rows appended, each the mean of its finite values, column by column."""

    def __init__(self, inner: DerivedTensor, edit: GrowRows):
        shape = inner.info.shape
        if inner.info.dtype.name not in CASTS or not shape or edit.size < shape[0]:
            raise stale(
                _(
                    "{tensor}: {dtype} {shape} cannot grow to {rows} rows.",
                    tensor=edit.tensor,
                    dtype=inner.info.dtype.name,
                    shape=list(shape),
                    rows=edit.size,
                )
            )
        self.inner, self.info = inner, resized_info(inner.info, (edit.size, *shape[1:]))
        self.mean: np.ndarray | None = None

    def rows(self, begin: int, end: int) -> np.ndarray:
        old = self.inner.info.shape[0]
        parts = [self.inner.rows(begin, min(end, old))] if begin < old else []
        if end > old:
            if self.mean is None:
                self.mean = self._mean()
            parts.append(np.repeat(self.mean[None], end - max(begin, old), 0))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _mean(self) -> np.ndarray:
        info = self.inner.info
        step = max(MEAN_SLAB // max(info.numel // info.shape[0], 1), 1)
        total, count = np.zeros(info.shape[1:]), np.zeros(info.shape[1:])
        for row in range(0, info.shape[0], step):
            values = from_codes(self.inner.rows(row, min(row + step, info.shape[0])), info.dtype.name)
            finite = np.isfinite(values)
            total += np.where(finite, values, 0).sum(0, dtype=np.float64)
            count += finite.sum(0)
        return to_codes((total / np.maximum(count, 1)).astype(np.float32), info.dtype.name)


class MergedTensor:
    """A weight plus a low-rank update; with DoRA's magnitudes, each output row of the sum is scaled to its magnitude.

    PEFT computes the norms in the dtype of the sum, float32 here; their squares are summed in float64, whose rounding
    does not depend on the order.
    """

    def __init__(self, inner: DerivedTensor, edit: AddLowRank):
        adapter = open_donor(edit.root)
        self.inner, self.info, self.edit = inner, inner.info, edit
        self.a, self.b = (_adapter_values(adapter, name, 2) for name in (edit.a, edit.b))
        product = (self.b.shape[0], self.a.shape[1])
        want = product[::-1] if edit.transposed else product
        if self.a.shape[0] != self.b.shape[1] or want != self.info.shape or self.info.dtype.name not in CASTS:
            raise PlanRefused(
                _(
                    "{tensor}: {dtype} {shape}; B {b} times A {a} cannot be added to it.",
                    tensor=edit.tensor,
                    dtype=self.info.dtype.name,
                    shape=list(self.info.shape),
                    b=list(self.b.shape),
                    a=list(self.a.shape),
                ),
                _other_base(),
            )
        self.magnitude = _adapter_values(adapter, edit.magnitude, 1) if edit.magnitude else None
        if self.magnitude is not None and len(self.magnitude) != product[0]:
            raise stale(
                _(
                    "{tensor}: {outputs} outputs; {magnitude} has {count}.",
                    tensor=edit.tensor,
                    outputs=product[0],
                    magnitude=edit.magnitude,
                    count=len(self.magnitude),
                )
            )
        self.factor: np.ndarray | None = None  # f32[out], of a transposed weight only

    def rows(self, begin: int, end: int) -> np.ndarray:
        total = self._sum(begin, end)
        if self.magnitude is not None and self.edit.transposed:
            if self.factor is None:
                step = max(MEAN_SLAB // max(self.info.shape[1], 1), 1)
                squares = np.zeros(self.info.shape[1])
                for row in range(0, self.info.shape[0], step):
                    part = self._sum(row, min(row + step, self.info.shape[0]))
                    squares += np.square(part, dtype=np.float64).sum(0)
                self.factor = self._factor(squares, self.magnitude)
            total = self.factor * total
        elif self.magnitude is not None:
            total = self._factor(np.square(total, dtype=np.float64).sum(1), self.magnitude[begin:end])[:, None] * total
        return to_codes(total, self.info.dtype.name)

    def _sum(self, begin: int, end: int) -> np.ndarray:
        values = from_codes(self.inner.rows(begin, end), self.info.dtype.name)
        change = (self.b @ self.a[:, begin:end]).T if self.edit.transposed else self.b[begin:end] @ self.a
        return values + np.float32(self.edit.scale) * change

    def _factor(self, squares: np.ndarray, magnitude: np.ndarray) -> np.ndarray:
        zero = int((squares == 0).sum())
        if zero:
            raise PlanRefused(
                _(
                    "{tensor}: {count:,} outputs are all zero after the sum and cannot be scaled to a magnitude.",
                    tensor=self.edit.tensor,
                    count=zero,
                ),
                _other_base(),
            )
        return magnitude / np.sqrt(squares).astype(np.float32)


class ContiguousGroups:
    """g_idx i32[in_features] of contiguous groups."""

    def __init__(self, edit: GroupsInOrder):
        self.size, self.info = edit.group_size, new_info(edit.tensor, "I32", (edit.in_features,))

    def rows(self, begin: int, end: int) -> np.ndarray:
        return np.arange(begin, end, dtype=np.int32) // (self.size if self.size > 0 else self.info.shape[0])


class ConstantZeros:
    """Packed zero points i32[groups, words], all the same word."""

    def __init__(self, edit: EqualZeros):
        self.word, self.info = np.uint32(edit.word).view(np.int32), new_info(edit.tensor, "I32", edit.shape)

    def rows(self, begin: int, end: int) -> np.ndarray:
        return np.full((end - begin, self.info.shape[1]), self.word, np.int32)


def derive(source: Checkpoint, name: str, edits: Sequence[Edit]) -> DerivedTensor | None:
    """The tensor that these edits compute, before those that change codes in place; None where none computes one.

    Raises PlanRefused where the files lack what an edit needs.
    """
    if not any(isinstance(e, DERIVED) for e in edits):
        return None
    result: DerivedTensor | None = StoredTensor(source, name) if name in source.tensors else None
    for edit in sorted(edits, key=lambda e: e.phase == "shape"):
        if isinstance(edit, TakeTensor):
            result = DonorTensor(edit)
        elif isinstance(edit, Dequantize):
            result = DequantizedTensor(source, edit)
        elif isinstance(edit, Repack):
            result = RepackedTensor(source, edit)
        elif isinstance(edit, GroupsInOrder):
            result = ContiguousGroups(edit)
        elif isinstance(edit, EqualZeros):
            result = ConstantZeros(edit)
        elif isinstance(edit, (AddLowRank, GrowRows)):
            if result is None:
                raise stale(_("{tensor}: the checkpoint has no such tensor.", tensor=name))
            result = MergedTensor(result, edit) if isinstance(edit, AddLowRank) else ExtendedTensor(result, edit)
    return result


def no_whole_bytes(tensor: str, dtype: str) -> Message:
    """What is said of a dtype with elements smaller than a byte."""
    return _(
        "{tensor}: dtype {dtype} has elements smaller than a byte and cannot be edited.", tensor=tensor, dtype=dtype
    )


def _other_base() -> Message:
    return _("Give the base model that the adapter was trained on.")


def _adapter_values(adapter: Checkpoint, name: str, axes: int) -> np.ndarray:
    """f32 values of an adapter's tensor; PlanRefused where it has another rank or is not finite."""
    info = StoredTensor(adapter, name).info
    if info.dtype.name not in CASTS or len(info.shape) != axes:
        raise PlanRefused(
            _(
                "{tensor}: {dtype} {shape}; must be a float tensor with {axes} axes.",
                tensor=name,
                dtype=info.dtype.name,
                shape=list(info.shape),
                axes=axes,
            )
        )
    codes = adapter.load(name)
    wrong = int(nonfinite_mask(codes, info.dtype.name).sum())
    if wrong:
        raise PlanRefused(
            _(
                "{tensor}: {count:,} values are not finite; a merge would spread them over whole rows.",
                tensor=name,
                count=wrong,
            ),
            _("Train or download the adapter again."),
        )
    return from_codes(codes, info.dtype.name)
