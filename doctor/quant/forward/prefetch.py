"""Reads tensors from a checkpoint, and those of the next decoder layer in a thread while the current one computes."""

from __future__ import annotations

import threading

import torch

from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import NotQuantizable
from doctor.core.messages import _

TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
_INDICES = {"I64": torch.int64, "BOOL": torch.bool}  # tables and counters, which no quantizer packs weights in


def load_tensor(checkpoint: Checkpoint, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
    """One tensor of the checkpoint (or a view of it) in its own dtype, or cast to `dtype`.

    Tables of indices and counters keep theirs. Raises NotQuantizable for other dtypes than F16, BF16, F32 and F64: such
    a checkpoint is quantized already.
    """
    stored = checkpoint.tensors[name].dtype.name
    if stored in _INDICES:
        return torch.from_numpy(checkpoint.load(name)).view(_INDICES[stored])
    if stored not in TORCH_DTYPES:
        raise NotQuantizable(
            _("{name}: dtype {dtype}; must be BF16, F16, F32 or F64.", name=name, dtype=stored),
            _("Quantize from the 16-bit original: rounding twice costs twice."),
        )
    codes = checkpoint.load(name)
    if codes.itemsize == 2:
        tensor = torch.from_numpy(codes.view("int16")).view(TORCH_DTYPES[stored])
    else:
        tensor = torch.from_numpy(codes)
    return tensor if dtype is None else tensor.to(dtype)


class Prefetch:
    """Tensors of one layer as stored, read by a thread of their own while another layer computes; pinned for a copy to
    a GPU.
    """

    def __init__(self, checkpoint: Checkpoint, names: list[str], pinned: bool):
        self._found: dict[str, torch.Tensor] = {}
        self._error: Exception | None = None
        self._wanted = True
        self._thread = threading.Thread(target=self._read, args=(checkpoint, names, pinned), name="doctor-read-ahead")
        self._thread.start()

    def _read(self, checkpoint: Checkpoint, names: list[str], pinned: bool) -> None:
        try:
            for name in names:
                if not self._wanted:
                    return
                tensor = load_tensor(checkpoint, name)
                self._found[name] = tensor.pin_memory() if pinned else tensor
        except Exception as error:  # whatever it is, it belongs to who asks for the layer
            self._error = error

    def tensors(self) -> dict[str, torch.Tensor]:
        """All of them, once. Raises what reading raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._found

    def stop(self) -> None:
        self._wanted = False
        self._thread.join()
