"""Which kernels can run on which device, and what a launch needs: the engine, pointers, streams, checked tensors."""

from __future__ import annotations

import os
from functools import cache

import torch

from doctor.core.errors import CudaError
from doctor.core.messages import _
from doctor.quant.solve.cuda.driver import Engine, cache_folder
from doctor.quant.solve.cuda.nvrtc import Compiler, find_libcuda, find_nvrtc
from doctor.quant.solve.cuda.structs import DTYPES, DeviceGridParams
from doctor.quant.solve.grid import FINE, RATIOS, REFITS

LEAST_CAPABILITY = (8, 0)  # one thread per row needs 80 KiB of shared memory a block


@cache
def engine_or_reason(ordinal: int) -> tuple[Engine | None, str]:
    """(engine, "") or (None, reason)."""
    if not torch.cuda.is_available():
        return None, _("torch sees no CUDA device")
    capability = torch.cuda.get_device_capability(ordinal)
    if capability < LEAST_CAPABILITY:
        return None, _(
            "device {number} has compute capability {capability}, and the kernels need {least}",
            number=ordinal,
            capability=".".join(map(str, capability)),
            least=".".join(map(str, LEAST_CAPABILITY)),
        )
    cuda, nvrtc = find_libcuda(), find_nvrtc()
    if cuda is None:
        return None, _("libcuda does not load")
    if nvrtc is None:
        return None, _("no libnvrtc beside torch or on the library path (pip install nvidia-cuda-nvrtc brings one)")
    return Engine(cuda, Compiler(nvrtc), ordinal, cache_folder()), ""


def available(device: torch.device | str = "cuda") -> str | None:
    """None where the kernels run on this device, else the reason why torch does the work, for a finding or a log."""
    device = torch.device(device)
    if device.type != "cuda":
        return _("the kernels are for CUDA, and the tensors are on {device}", device=device.type)
    if os.environ.get("DOCTOR_KERNELS", "1") == "0":
        return _("DOCTOR_KERNELS=0 turns them off")
    if not torch.cuda.is_available():
        return _("torch sees no CUDA device")
    return engine_or_reason(torch.cuda.current_device() if device.index is None else device.index)[1] or None


def note(device: torch.device | str) -> str:
    """The sentence for a finding where torch does the kernels' work on a GPU; empty where they run, or where the device
    is none.
    """
    reason = available(device) if torch.device(device).type == "cuda" else None
    return (
        _("no CUDA kernel runs on {device}, torch does their work: {reason}", device=str(device), reason=reason)
        if reason
        else ""
    )


def engine_for(device: torch.device) -> Engine:
    """The device's engine. Raises CudaError with the reason of available()."""
    reason = available(device)
    if reason:
        raise CudaError(
            _("no CUDA kernels on {device}: {reason}.", device=device, reason=reason),
            _("Use the torch functions of doctor.quant."),
        )
    engine, _reason = engine_or_reason(torch.cuda.current_device() if device.index is None else device.index)
    assert engine is not None  # available() said so
    return engine


def stream_of(tensor: torch.Tensor) -> int:
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0


def address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def require_tensor(name: str, tensor: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if tensor.dtype != dtype or tensor.device != device:
        raise CudaError(
            _(
                "{name} is {dtype} on {device}; must be {wanted} on {place}.",
                name=name,
                dtype=tensor.dtype,
                device=tensor.device,
                wanted=dtype,
                place=device,
            ),
            _("This is an internal error (a bug in doctor): report it with this text."),
        )
    return tensor.contiguous()


def require_countable(groups: int, n: int, k: int) -> None:
    if groups >= 2**31:
        raise CudaError(
            _("W[{n}, {k}] has {groups} groups; a launch counts to 2^31.", n=n, k=k, groups=groups),
            _("Quantize it in parts of its rows."),
        )


def device_grid_params(
    bits: int, sym: bool, mse: bool, signed: bool, zero_min: int, scale_dtype: torch.dtype
) -> DeviceGridParams:
    return DeviceGridParams(
        2**bits - 1,
        2 ** (bits - 1),
        zero_min,
        sym,
        signed,
        mse,
        DTYPES[scale_dtype],
        len(RATIOS),
        len(FINE),
        REFITS,
    )
