"""What is known of GGUF models: their headers, and counts over their values.

A scan reads every byte once. Of blocks only the float16 scales are looked at: where one is NaN or Inf, all values of
its block are. IQ3_S has a defect of its own: ggml's quantizer does not move on past a block of 32 zeros, so later
blocks of the same 256 stand one place too early and the last one is left empty.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from doctor.checkpoint.directory import Checkpoint
from doctor.checkpoint.ggml_types import GgmlType
from doctor.checkpoint.gguf import GgufModel, GgufTensor
from doctor.core.facts import FactKey, Unavailable, fact, provide
from doctor.core.lazy_numpy import np
from doctor.core.messages import _
from doctor.core.store import Store

CHUNK = 4 << 20  # bytes read at once, rounded down to whole blocks


@dataclass(frozen=True)
class GgufCounts:
    """Of one tensor: values that are NaN or Inf, or blocks whose scale is; the first of them; IQ3_S blocks whose last
    32 are empty.
    """

    file: str
    nonfinite: int = 0
    first: int | None = None
    shifted: int = 0


GGUF_COUNTS: FactKey[dict[str, dict[str, GgufCounts]]] = provide(
    "gguf_counts",
    "checkpoint",
    "values",
    "Counts over the values of GGUF models: model -> tensor -> GgufCounts (doctor.scan.gguf_facts).",
)


@fact("checkpoint", cost="header")
def gguf_models(checkpoint) -> Sequence[GgufModel]:
    """The models in .gguf files, where no safetensors file is."""
    if not checkpoint.gguf:
        raise Unavailable(_("no GGUF file is here"))
    return checkpoint.gguf


def scan_gguf(checkpoint: Checkpoint, store: Store, progress: Callable[[int], None]) -> int:
    """Read the tensors of all models into facts. Returns the bytes read."""
    found: dict[str, dict[str, GgufCounts]] = {}
    total = 0
    for model in checkpoint.gguf:
        counts = found.setdefault(model.name, {})
        for tensor in model.tensors.values():
            counts[tensor.name] = _count(checkpoint, tensor, progress)
            total += tensor.nbytes
    store.put(GGUF_COUNTS, found)
    return total


def _count(checkpoint: Checkpoint, tensor: GgufTensor, progress: Callable[[int], None]) -> GgufCounts:
    kind = tensor.type
    if kind is None or not tensor.nbytes:
        return GgufCounts(tensor.file)
    nonfinite, first, shifted, seen = 0, None, 0, 0
    step = max(CHUNK // kind.nbytes, 1) * kind.nbytes
    with checkpoint.open_file(tensor.file) as file:
        for _at, part in file.blocks(tensor.begin, tensor.begin + tensor.nbytes, step):
            blocks = np.frombuffer(part, np.uint8).reshape(-1, kind.nbytes)
            bad = _nonfinite(blocks, kind)
            if bad.any():
                nonfinite += int(bad.sum())
                first = seen + int(bad.argmax()) if first is None else first
            if kind.name == "IQ3_S":
                shifted += int(_shifted(blocks).sum())
            seen += len(blocks)
            progress(len(part))
    return GgufCounts(tensor.file, nonfinite, first, shifted)


def _nonfinite(blocks: np.ndarray, kind: GgmlType) -> np.ndarray:
    """bool[n]: whether a value, or the scale of a block, is NaN or Inf."""
    if kind.name in ("F32", "F64", "BF16", "F16"):
        word, mask = {
            "F32": ("<u4", 0x7F800000),
            "F64": ("<u8", 0x7FF0000000000000),
            "BF16": ("<u2", 0x7F80),
            "F16": ("<u2", 0x7C00),
        }[kind.name]
        values = np.ascontiguousarray(blocks).view(word)[:, 0]
        return (values & values.dtype.type(mask)) == mask
    found = np.zeros(len(blocks), bool)
    for at in kind.halves:
        high = blocks[:, at + 1]
        found |= (high & 0x7C) == 0x7C
    return found


def _shifted(blocks: np.ndarray) -> np.ndarray:
    """bool[n]: IQ3_S blocks of a scale that is not 0 whose last 32 values are the first point of the lattice, all
    positive: what the quantizer leaves where it wrote nothing.
    """
    empty = (blocks[:, 58:66] == 0).all(1) & (blocks[:, 73] == 0) & (blocks[:, 102:106] == 0).all(1)
    return empty & (blocks[:, :2] != 0).any(1)
