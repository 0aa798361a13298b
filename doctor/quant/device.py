"""The device that a command computes on: checked when it is named, and its errors explained."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from doctor.core.errors import DoctorError, MachineError
from doctor.core.messages import _, plural


def device_of(device: str) -> str:
    """The device that --device means in this process: auto is a GPU where torch sees one, else the processor; cuda
    becomes cuda:LOCAL_RANK where torchrun started several.

    Raises DoctorError for a name that is none of ours, MachineError for a GPU that torch does not see.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", str(device)):
        raise DoctorError(
            _("--device {device}: must be auto, cpu, cuda, or cuda:N for the N-th GPU from 0.", device=device)
        )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        return device
    if not torch.cuda.is_available():
        why = _("was built without CUDA") if torch.version.cuda is None else _("sees no GPU")
        raise MachineError(
            _("--device {device}: torch {version} {why}.", device=device, version=torch.__version__, why=why),
            _("Install a torch with CUDA and the GPU's driver (nvidia-smi must list it), or omit --device."),
        )
    local = os.environ.get("LOCAL_RANK")
    device = f"cuda:{local}" if device == "cuda" and local is not None else device
    count, number = torch.cuda.device_count(), int(device.partition(":")[2] or 0)
    if number >= count:
        raise MachineError(
            plural(
                "--device {device}: this process sees {n} GPU, numbered from 0.",
                "--device {device}: this process sees {n} GPUs, numbered from 0.",
                count,
                device=device,
            ),
            _("CUDA_VISIBLE_DEVICES says which it sees; start no more processes than there are."),
        )
    return device


def device_free(device: str) -> int | None:
    """Free bytes of a GPU's memory; None for a CPU."""
    return None if device == "cpu" else torch.cuda.mem_get_info(torch.device(device))[0]


@contextmanager
def device_memory(device: str) -> Iterator[None]:
    """Inside, running out of the device's memory is an error of the machine, with what was free."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        free, whole = torch.cuda.mem_get_info(torch.device(device))
        raise MachineError(
            _(
                "{device}: out of memory: {error} {free:.2f} of {whole:.2f} GiB are free now.",
                device=device,
                error=str(error).splitlines()[0],
                free=free / 2**30,
                whole=whole / 2**30,
            ),
            _(
                "End what else runs on this GPU (nvidia-smi lists it), or use another; --resume continues an "
                "interrupted "
                "quantize."
            ),
        ) from None
