"""The CUDA driver through ctypes: loads compiled kernels, caches them on disk, launches them.

A compiled kernel is cached under a key of its source, options, compute capability and NVRTC version.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import tempfile
from pathlib import Path

import torch

from doctor.core.errors import CudaError
from doctor.core.messages import _
from doctor.quant.solve.cuda.nvrtc import Compiler
from doctor.quant.solve.grid import FINE, RATIOS

OPTIONS = ("--std=c++17", "--fmad=false")
SOURCES = ("gptq_block", "grid_search", "pack", "awq_difference", "kv_cache", "health_scan")
_OPTIN = 48 << 10  # dynamic shared memory that needs no opt-in
_ATTRIBUTES = {"multiprocessors": 16, "major": 75, "minor": 76, "shared_optin": 97}  # CUdevice_attribute
_MAX_DYNAMIC_SHARED = 8  # CUfunction_attribute


def source_folder() -> Path:
    """Where the .cu files are: beside the package in a checkout, inside it in a wheel."""
    here = Path(__file__).resolve()
    inside, beside = here.parents[3] / "cuda", here.parents[4] / "cuda"
    return inside if (inside / "core.cuh").exists() else beside


def cache_folder() -> Path:
    """HF_HOME/doctor/kernels, or doctor/kernels in XDG's cache."""
    home = os.environ.get("HF_HOME")
    root = Path(home) if home else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "doctor" / "kernels"


class Engine:
    """Kernels on one device: compiled or taken from the cache, loaded once, launched."""

    def __init__(self, cuda: ctypes.CDLL, compiler: Compiler, ordinal: int, cache: Path):
        self._cuda, self._compiler, self._cache = cuda, compiler, cache
        self._functions: dict[str, tuple[ctypes.c_void_p, list[int]]] = {}
        self._modules: dict[str, ctypes.c_void_p] = {}
        self._candidates: dict[torch.device, torch.Tensor] = {}
        self._driver("cuInit", 0)
        device = ctypes.c_int()
        self._driver("cuDeviceGet", ctypes.byref(device), ordinal)
        value = ctypes.c_int()
        found = {}
        for name, number in _ATTRIBUTES.items():
            self._driver("cuDeviceGetAttribute", ctypes.byref(value), number, device)
            found[name] = value.value
        self.capability = (found["major"], found["minor"])
        self.multiprocessors, self.shared_optin = found["multiprocessors"], found["shared_optin"]
        self._context = ctypes.c_void_p()  # torch's own: both use the primary context
        self._driver("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)

    def launch(
        self,
        kernel: str,
        source: str,
        grid: tuple[int, int],
        threads: int,
        shared: int,
        arguments: tuple,
        stream: int,
        shapes: str,
    ) -> None:
        """Runs `kernel` of cuda/<source>.cu. arguments: ctypes values. shapes: for the message of an error."""
        where = _(
            "{kernel}({shapes}): grid {x}x{y}, {threads} threads, {shared} bytes of shared memory",
            kernel=kernel,
            shapes=shapes,
            x=grid[0],
            y=grid[1],
            threads=threads,
            shared=shared,
        )
        if shared > self.shared_optin:
            raise CudaError(
                _(
                    "{where}: this device allows {allowed} bytes a block.",
                    where=where,
                    allowed=self.shared_optin,
                ),
                _("Set DOCTOR_KERNELS=0 to quantize with torch."),
            )
        if not (0 < grid[0] < 2**31 and 0 < grid[1] < 2**16):
            raise CudaError(
                _(
                    "{where}: a grid has 1..{x} by 1..{y} blocks.",
                    where=where,
                    x=2**31 - 1,
                    y=2**16 - 1,
                ),
                _("Set DOCTOR_KERNELS=0."),
            )
        pointers = (ctypes.c_void_p * len(arguments))(*[ctypes.addressof(argument) for argument in arguments])
        self._driver("cuCtxPushCurrent_v2", self._context)
        try:
            function, allowed = self._function(kernel, source)
            if shared > allowed[0]:
                self._driver("cuFuncSetAttribute", function, _MAX_DYNAMIC_SHARED, shared, where=where)
                allowed[0] = shared
            self._driver(
                "cuLaunchKernel",
                function,
                *grid,
                1,
                threads,
                1,
                1,
                shared,
                ctypes.c_void_p(stream),
                pointers,
                None,
                where=where,
            )
        finally:
            self._driver("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def image(self, source: str) -> tuple[bytes, Path, bool]:
        """(cubin or PTX of cuda/<source>.cu, its file in the cache, whether it was there)."""
        folder = source_folder()
        text, core = (folder / f"{source}.cu").read_text(), (folder / "core.cuh").read_text()
        target, cubin = self._compiler.target(self.capability)
        options = [*OPTIONS, f"--gpu-architecture={target}"]
        key = hashlib.sha256(repr((text, core, options, self.capability, self._compiler.version)).encode()).hexdigest()
        path = self._cache / f"{source}-{target}-{key[:32]}.{'cubin' if cubin else 'ptx'}"
        try:
            return path.read_bytes(), path, True
        except OSError:
            image = self._compiler.compile(f"{source}.cu", text, {"core.cuh": core}, options, cubin)
            _write_whole(path, image)
            return image, path, False

    def candidates(self, device: torch.device) -> torch.Tensor:
        """grid.py's factors of the search as f32, for DeviceGridParams's ratios and fine."""
        if device not in self._candidates:
            self._candidates[device] = torch.tensor(RATIOS + FINE, dtype=torch.float32, device=device)
        return self._candidates[device]

    def _function(self, kernel: str, source: str) -> tuple[ctypes.c_void_p, list[int]]:
        if kernel not in self._functions:
            if source not in self._modules:
                self._modules[source] = self._load(source)
            function = ctypes.c_void_p()
            self._driver(
                "cuModuleGetFunction", ctypes.byref(function), self._modules[source], kernel.encode(), where=kernel
            )
            self._functions[kernel] = function, [_OPTIN]
        return self._functions[kernel]

    def _load(self, source: str) -> ctypes.c_void_p:
        module = ctypes.c_void_p()
        image, path, cached = self.image(source)
        if cached and self._cuda.cuModuleLoadData(ctypes.byref(module), image):
            path.unlink(missing_ok=True)  # e.g. half a file from a full disk: compile it again, once
            image, path, cached = self.image(source)
            cached = False
        if not module:
            self._driver(
                "cuModuleLoadData",
                ctypes.byref(module),
                image,
                where=_("{source}.cu ({size} bytes)", source=source, size=len(image)),
            )
        return module

    def _driver(self, name: str, *arguments, where: str = "") -> None:
        code = getattr(self._cuda, name)(*arguments)
        if code:
            text = ctypes.c_char_p()
            known = text.value if self._cuda.cuGetErrorName(code, ctypes.byref(text)) == 0 else None
            raised = (
                _("{function} returned {code} ({name})", function=name, code=code, name=known.decode())
                if known
                else _("{function} returned {code}", function=name, code=code)
            )
            raise CudaError(
                _("{where}: {raised}.", where=where, raised=raised) if where else _("{raised}.", raised=raised),
                _("Set DOCTOR_KERNELS=0 to quantize with torch, and report this text."),
            )


def _write_whole(path: Path, image: bytes) -> None:
    """Write, then rename. A cache that cannot be written costs a compilation next time and nothing else."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    except OSError:
        return
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(image)
        os.replace(name, path)
    except OSError:
        Path(name).unlink(missing_ok=True)
