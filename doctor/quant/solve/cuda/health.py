"""Launches cuda/health_scan.cu: counts of non-finite, zero and out-of-range values on a device."""

from __future__ import annotations

import ctypes

import torch

from doctor.quant.solve.cuda.driver import Engine
from doctor.quant.solve.cuda.launcher import address, engine_for, stream_of
from doctor.quant.solve.cuda.structs import DTYPES, I32, I64, RUN, Health, Pointer


class DeviceScan:
    """stats.Stats of float32, float16 or bfloat16 tensors on a device that are added one after the other, as if they
    were one.

    Nothing waits for the device before `read`. Calibration counts what is not finite by it (hessian.py).
    """

    def __init__(self, device: torch.device, *, engine: Engine | None = None):
        self.numel = 0
        self._engine = engine or engine_for(device)
        self._found = torch.frombuffer(bytearray(bytes(Health(first_nonfinite=2**64 - 1))), dtype=torch.uint8).to(
            device
        )

    def add(self, tensor: torch.Tensor) -> None:
        tensor = tensor.contiguous()
        if not tensor.numel():
            return
        blocks = min(-(-tensor.numel() // (256 * RUN)), self._engine.multiprocessors * 8)
        self._engine.launch(
            "health_scan",
            "health_scan",
            (blocks, 1),
            256,
            8 * ctypes.sizeof(Health),
            (
                Pointer(address(tensor)),
                Pointer(address(self._found)),
                I64(tensor.numel()),
                I64(self.numel),
                I32(DTYPES[tensor.dtype]),
            ),
            stream_of(tensor),
            f"{tensor.numel()} values",
        )
        self.numel += tensor.numel()

    def read(self) -> dict[str, int | float]:
        found = Health.from_buffer_copy(bytes(self._found.cpu().numpy()))
        low, high = _float_of_key(~found.lowest & 0xFFFFFFFF) if found.lowest else 0.0, _float_of_key(found.highest)
        names = ("n_nan", "n_inf", "n_zero", "n_subnormal", "n_fp16_overflow", "n_fp16_underflow")
        first = found.first_nonfinite
        return {
            "numel": self.numel,
            **dict(zip(names, found.counts, strict=True)),
            "absmax": max(abs(low), abs(high)),
            "min": low,
            "max": high,
            "sum": found.sum,
            "sumsq": found.sumsq,
            "first_nonfinite": -1 if first == 2**64 - 1 else first,
        }


def health_scan(tensor: torch.Tensor, *, engine: Engine | None = None) -> dict[str, int | float]:
    """stats.Stats of one tensor on a device, as a dictionary. Waits for the device."""
    scan = DeviceScan(tensor.device, engine=engine)
    scan.add(tensor)
    return scan.read()


def _float_of_key(key: int) -> float:
    """The float32 that key_of of health_scan.cu made `key` from; 0 for no value at all."""
    if not key:
        return 0.0
    bits = key & 0x7FFFFFFF if key & 0x80000000 else ~key & 0xFFFFFFFF
    return ctypes.c_float.from_buffer(ctypes.c_uint32(bits)).value
