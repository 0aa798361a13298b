"""Whether a merged checkpoint is its base plus its adapter: W' against W + scale * B @ A, linear by linear.

A merge that went wrong loads and answers: the adapter was never added, was added twice, or with another scale. The
right result is computed here as PEFT does, in float32 and rounded once to the merged file's type; codes may be one
apart, because a merge in 16 bits rounds the product first. The merged file is read once: the pass that counts its
values shows its bytes here, and the same rows of the base are read beside them.

Source: huggingface/peft src/peft/tuners/lora/layer.py (get_delta_weight), variants.py (DoraLinearVariant.merge_safe).
"""

from collections.abc import Callable, Mapping
from typing import Any

from doctor.checkpoint.codecs import from_codes, to_codes
from doctor.checkpoint.directory import Checkpoint
from doctor.checkpoint.dtypes import Dtype
from doctor.checkpoint.safetensors import TensorInfo
from doctor.core.lazy_numpy import np
from doctor.core.messages import _
from doctor.core.records import MergedLinear, MergeProof
from doctor.model.lora import ADAPTER, NotMergeable, Pair, pairs, product, saved_whole

Array = Any  # numpy is imported late
ROUNDED = 2.0**-7  # of the change: what a product in 16 bits may be off by
FLOATS = ("F32", "F16", "BF16")


class MergeWatch:
    """What became of each matrix of the adapter in `merged`, and what changed that the adapter does not touch.

    of() gives what takes a tensor's bytes, in order; result() what they showed. What forbids the comparison is the
    record's reason.
    """

    def __init__(self, merged: Checkpoint, base: Checkpoint, adapter: Checkpoint):
        self._names = base.name, adapter.name
        self._linears: dict[str, _Linear | MergedLinear] = {}
        self._others: dict[str, _Other | None] = {}  # None: of another shape or type than the base's
        self._reason = self._prepare(merged, base, adapter)

    def _prepare(self, merged: Checkpoint, base: Checkpoint, adapter: Checkpoint) -> str:
        config = adapter.value(ADAPTER)
        if not isinstance(config, Mapping):
            return _("{path} holds no {file}", path=adapter.name, file=ADAPTER)
        try:
            found, whole = pairs(config, adapter.tensors, adapter.tensors), saved_whole(config)
        except NotMergeable as error:
            return str(error)
        own = {pair.module: _name(pair.module, base) for pair in found}
        lost = [pair.module for pair in found if own[pair.module] is None]
        if lost or not found:
            return _("{name} of the adapter is in no file of the base", name=lost[0] if lost else "nothing")
        for pair in found:
            name = own[pair.module] or ""
            problem = _problem(name, pair, merged, base, adapter)
            self._linears[name] = (
                MergedLinear(name, problem=problem) if problem else _Linear(merged.tensors[name], pair, base, adapter)
            )
        for name in base.tensors:
            if name in self._linears or name not in merged.tensors or any(f".{part}." in f".{name}" for part in whole):
                continue
            fits = _comparable(merged.tensors[name], base.tensors[name])
            self._others[name] = _Other(merged.tensors[name], base) if fits else None
        return ""

    def of(self, info: TensorInfo) -> Callable[[memoryview], None] | None:
        """What takes the bytes of this tensor of the merged file; None where nothing is compared with them."""
        linear = self._linears.get(info.name)
        if isinstance(linear, _Linear):
            return linear.start()
        other = self._others.get(info.name)
        return other.add if other is not None else None

    def result(self) -> MergeProof:
        if self._reason:
            return MergeProof(reason=self._reason)
        linears = tuple(x.result() if isinstance(x, _Linear) else x for x in self._linears.values())
        changed = tuple(name for name, other in self._others.items() if other is None or not other.same)
        return MergeProof(*self._names, linears, changed)


def _name(module: str, base: Checkpoint) -> str | None:
    """The base's weight of an adapter's module: its own name, or the only one that ends in it."""
    if f"{module}.weight" in base.tensors:
        return f"{module}.weight"
    same = [
        name for name in base.tensors if name.endswith(f".{module}.weight") or f".{module}.weight".endswith(f".{name}")
    ]
    return same[0] if len(same) == 1 else None


def _problem(name: str, pair: Pair, merged: Checkpoint, base: Checkpoint, adapter: Checkpoint) -> str:
    """Why a matrix cannot be compared; "" where it can."""
    info, before = merged.tensors.get(name), base.tensors[name]
    if info is None or info.shape != before.shape or before.shape != product(pair, adapter.tensors):
        return _("its shape is not that of the base and the adapter")
    if info.dtype.name not in FLOATS or before.dtype.name not in FLOATS:
        return _("stored in {dtype}, not in floats", dtype=info.dtype.name)
    return ""


def _comparable(here: TensorInfo, there: TensorInfo) -> bool:
    """Whether a tensor that no adapter touches can be the base's, rounded to the type of the merged file."""
    same = here.dtype.name == there.dtype.name or {here.dtype.name, there.dtype.name} <= {*FLOATS}
    return same and here.shape == there.shape


class _Beside:
    """The base's tensor, read in step with the merged one's bytes."""

    def __init__(self, name: str, base: Checkpoint):
        self._base, self._info, self._done = base, base.tensors[name], 0

    def next(self, count: int) -> Array:
        """Its next `count` values, u8[bytes]."""
        raw = bytearray(count * self._info.dtype.bits // 8)
        with self._base.open_file(self._info.shard) as file:
            file.read_into(self._info.begin + self._done, memoryview(raw))
        self._done += len(raw)
        return np.frombuffer(raw, np.uint8)


class _Other:
    """A tensor that the adapter does not touch. same: whether it is the base's so far."""

    def __init__(self, info: TensorInfo, base: Checkpoint):
        self.same = True
        self._here, self._there = info.dtype, base.tensors[info.name].dtype
        self._before = _Beside(info.name, base)

    def add(self, part: memoryview) -> None:
        if not self.same:
            return
        old = self._before.next(len(part) * 8 // self._here.bits)
        if self._here.name != self._there.name:
            values = from_codes(old.view(_codes_of(self._there)), self._there.name)
            old = to_codes(values, self._here.name)
        self.same = old.tobytes() == part


class _Linear:
    """One matrix of the adapter, row by row as the merged file is read; whole where DoRA's norms run across rows."""

    def __init__(self, info: TensorInfo, pair: Pair, base: Checkpoint, adapter: Checkpoint):
        self._info, self._pair, self._adapter = info, pair, adapter
        self._before, self._there = _Beside(info.name, base), base.tensors[info.name].dtype
        self._across = bool(pair.magnitude) and pair.transposed
        self._held = bytearray()
        self._parts: list[Array] = []  # A, B and DoRA's sizes, while this matrix is read
        self._rows = self._far = 0
        self._squares = self._along = 0.0
        self._unchanged = True

    def start(self) -> Callable[[memoryview], None]:
        self._parts = [
            from_codes(self._adapter.load(n), self._adapter.tensors[n].dtype.name) if n else None
            for n in (self._pair.a, self._pair.b, self._pair.magnitude)
        ]
        return self._add

    def _add(self, part: memoryview) -> None:
        row = self._info.nbytes // self._info.shape[0]
        if self._across or len(part) % row or self._held:
            self._held += part
            if len(self._held) < self._info.nbytes:
                return
            part = memoryview(self._held)
        self._judge(np.frombuffer(part, _codes_of(self._info.dtype)).reshape(len(part) // row, -1))
        if self._rows == self._info.shape[0]:
            self._parts, self._held = [], bytearray()

    def _judge(self, codes: Array) -> None:
        """codes: u16 or f32[rows, columns] of the merged file, the next of its rows."""
        pair, (a, b, size) = self._pair, self._parts
        rows = slice(self._rows, self._rows + len(codes))
        self._rows += len(codes)
        before = self._before.next(codes.size).view(_codes_of(self._there)).reshape(codes.shape)
        old, new = from_codes(before, self._there.name), from_codes(codes, self._info.dtype.name)
        added = a[:, rows].T @ b.T if pair.transposed else b[rows] @ a
        whole = old + (np.float32(pair.scale) * added).astype(np.float32)
        if size is not None:
            axis = 0 if pair.transposed else 1
            length = np.linalg.norm(whole, axis=axis)
            whole = whole * np.expand_dims((size if pair.transposed else size[rows]) / length, axis)
        change = whole - old
        self._squares += float(np.vdot(change, change))
        self._along += float(np.vdot(new - old, change))
        right = to_codes(whole.astype(np.float32), self._info.dtype.name)
        close = np.abs(_ordered(codes) - _ordered(right)) <= 1
        close |= np.abs(new - from_codes(right, self._info.dtype.name)) <= np.abs(change) * ROUNDED
        self._far += int((~close).sum())
        self._unchanged = self._unchanged and bool((new == old).all())

    def result(self) -> MergedLinear:
        share = self._along / self._squares if self._squares else float("nan")
        seen = self._info.numel and self._rows == self._info.shape[0]
        apart = self._far / self._info.numel if seen else 1.0
        return MergedLinear(self._info.name, share=share, apart=apart, unchanged=self._unchanged)


def _codes_of(dtype: Dtype) -> str:
    """numpy's type of the codes of floats, as from_codes takes them."""
    return "<f4" if dtype.name == "F32" else f"<u{dtype.bits // 8}"


def _ordered(codes):
    """Codes as integers i64 in the order of the numbers that they stand for."""
    bits = codes.dtype.itemsize * 8
    unsigned = codes.view(f"u{codes.dtype.itemsize}").astype(np.int64)
    sign = 1 << (bits - 1)
    return np.where(unsigned >= sign, sign - unsigned, unsigned)
