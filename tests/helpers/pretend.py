"""A CUDA device that is none: tensors that say they are on cuda:0 and are computed by the CPU, so that what a GPU run
does can be run here line by line, through the real launcher and the host build of the kernels.

It catches what a CPU run cannot: tensors of two devices in one operation (which CUDA refuses), `numpy()` of a device
tensor, and it counts the places where the host waits for the device. It says nothing about speed or about CUDA's own
arithmetic.
"""

from collections import Counter
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode, get_default_nowrap_functions

PLACE = torch.device("cuda", 0)
_WAITS = {
    "item",
    "tolist",
    "__bool__",
    "__float__",
    "__int__",
    "__index__",
    "__len__",
    "cpu",
    "nonzero",
    "masked_select",
    "equal",
    "allclose",
    "repeat_interleave",
} - {"__len__"}
_MAY_MIX = {
    "copy_",
    "__getitem__",
    "__setitem__",
    "to",
    "__get__",
    "__set__",
    "set_",
    "is_floating_point",
    "size",
    "stride",
    "dim",
}


class OnCuda(torch.Tensor):
    """A CPU tensor that passes for one on cuda:0."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class Pretend(TorchFunctionMode):
    """Makes tensors on cuda:0 where functions are asked for that device. waits: host waits, by function."""

    now = None

    def __init__(self):
        super().__init__()
        self.waits = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _tensors(values):
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)


def _device_of(value):
    return (
        value
        if isinstance(value, torch.device)
        else torch.device(value)
        if isinstance(value, str) and value[:4] in ("cuda", "cpu", "meta")
        else None
    )


def _run(func, args, kwargs):
    name = func.__name__
    found = list(_tensors([*args, *kwargs.values()]))
    placed = [t for t in found if isinstance(t, OnCuda)]
    if name == "__get__" and placed and getattr(func, "__self__", None) is torch.Tensor.device:
        return PLACE
    if name == "__get__" and placed and getattr(func, "__self__", None) is torch.Tensor.is_cuda:
        return True
    if name == "numpy" and placed:
        raise TypeError("can't convert cuda:0 device type tensor to numpy.")
    wanted, args, kwargs = _asked(name, args, kwargs)
    moves = name in ("to", "cpu", "cuda")
    if name == "cpu":
        wanted = torch.device("cpu")
    if placed and not moves and name not in _MAY_MIX:
        strangers = [t for t in found if not isinstance(t, OnCuda) and t.dim() and t.device.type == "cpu"]
        if strangers:
            raise RuntimeError(
                f"{name}: Expected all tensors to be on the same device, but found at least two devices, cuda:0 and "
                "cpu "
                f"{[list(t.shape) for t in strangers]}!"
            )
    if placed and Pretend.now is not None:
        masks = name in ("__getitem__", "__setitem__") and any(
            t.dtype == torch.bool and t.dim() for t in _tensors(args[1:2])
        )
        if (
            (
                name in _WAITS
                and not (name == "repeat_interleave" and not any(isinstance(a, torch.Tensor) for a in args[1:]))
            )
            or masks
            or (moves and wanted is not None and wanted.type == "cpu")
            or (name == "where" and len(found) == 1 and len(args) == 1)
        ):
            Pretend.now.waits[name] += 1
    if name == "mm" and placed and "out_dtype" in kwargs:  # CUDA only
        args, kwargs = [t.to(kwargs["out_dtype"]) for t in args], {}
    with torch._C.DisableTorchFunctionSubclass(), _without_mode():
        out = func(*args, **kwargs)
    if func in get_default_nowrap_functions() or name in ("__set__",):
        return out
    if moves and wanted is None:
        there = bool(placed)
    elif moves or not placed:
        there = wanted is not None and wanted.type == "cuda"
    else:
        there = wanted is None or wanted.type == "cuda"
    return _as(out, there, args)


def _asked(name, args, kwargs):
    """(the device that a call names, its arguments with the CPU in that place)."""
    wanted = None
    if kwargs.get("device") is not None:
        wanted = _device_of(kwargs["device"])
        if wanted is not None and wanted.type == "cuda":
            kwargs = {**kwargs, "device": torch.device("cpu")}
    if name == "to":
        changed = list(args)
        for at, value in enumerate(args[1:], 1):
            if isinstance(value, torch.Tensor):
                wanted = PLACE if isinstance(value, OnCuda) else value.device
            elif _device_of(value) is not None:
                wanted = _device_of(value)
                changed[at] = torch.device("cpu") if wanted.type == "cuda" else wanted
        args = tuple(changed)
    if name == "cuda":
        raise AssertionError("say which device")
    return wanted, args, kwargs


def _as(value, there, inputs):
    if isinstance(value, torch.Tensor):
        if isinstance(value, OnCuda) == there or value.device.type == "meta":
            return value
        if value.__class__ is not torch.Tensor and not isinstance(value, OnCuda) and not there:
            return value
        return value.as_subclass(OnCuda if there else torch.Tensor)
    if isinstance(value, (tuple, list)):
        made = [_as(v, there, inputs) for v in value]
        return type(value)(made)
    return value


@contextmanager
def _without_mode():
    with torch._C.DisableTorchFunction():
        yield


class _Event:
    def __init__(self, enable_timing=False):
        self.at = None

    def record(self):
        import time

        self.at = time.perf_counter()

    def elapsed_time(self, other):
        return max(1e-6, (other.at - self.at) * 1e3)


class _Generator(torch.Generator):
    def __new__(cls, device="cpu"):
        return super().__new__(cls)


class _Stream:
    cuda_stream = 0


@contextmanager
def pretend(engine=None, free=64 << 30):
    """A cuda:0 with `engine` (host.engine) for its kernels; without one, torch does their work."""
    from doctor.quant.solve import hessian
    from doctor.quant.solve.cuda import launcher

    hessian.mixed_products.cache_clear()
    mode = Pretend()
    with ExitStack() as stack:
        cuda = {
            "is_available": lambda: True,
            "current_device": lambda: 0,
            "synchronize": lambda *a: None,
            "Event": _Event,
            "get_device_capability": lambda *a: (9, 0),
            "get_device_name": lambda *a: "a pretended device",
            "current_stream": lambda *a: _Stream,
            "mem_get_info": lambda *a: (free, free),
            "empty_cache": lambda: None,
            "set_device": lambda *a: None,
            "device_count": lambda: 1,
        }
        for name, value in cuda.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(torch, "Generator", _Generator))
        found = (engine, "") if engine is not None else (None, "this device is pretended")
        stack.enter_context(mock.patch.object(launcher, "engine_or_reason", lambda ordinal: found))
        stack.enter_context(
            mock.patch.object(torch.Tensor, "pin_memory", lambda tensor: tensor)
        )  # also in other threads
        stack.enter_context(mode)
        Pretend.now = mode
        try:
            yield mode
        finally:
            Pretend.now = None
            hessian.mixed_products.cache_clear()
