"""NVRTC through ctypes: CUDA C++ source to a cubin of one compute capability.

torch's CUDA builds bring libnvrtc, so a user needs no compiler and doctor no dependency.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

from doctor.core.errors import CudaError
from doctor.core.messages import _


def find_nvrtc() -> ctypes.CDLL | None:
    """libnvrtc from the nvidia packages that torch's CUDA builds depend on, torch's own folder, or the system."""
    names = []
    for folder in map(Path, sys.path):
        for place in ("nvidia/*/lib", "nvidia/*/bin", "torch/lib"):
            names += sorted(map(str, [*folder.glob(f"{place}/libnvrtc.so*"), *folder.glob(f"{place}/nvrtc64_*_0.dll")]))
    for builtins in {path for name in names for path in Path(name).parent.glob("libnvrtc-builtins.so*")}:
        first_library(
            [str(builtins)]
        )  # NVRTC opens it by name alone, which finds what is loaded and not what lies beside it
    names += ["libnvrtc.so", "libnvrtc.so.13", "libnvrtc.so.12"]
    return first_library(names)


def find_libcuda() -> ctypes.CDLL | None:
    """The driver's library."""
    return first_library(["libcuda.so.1", "libcuda.so", "nvcuda.dll"])


def first_library(names: list[str]) -> ctypes.CDLL | None:
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:  # absent, or for another machine: the next name may do
            continue
    return None


class Compiler:
    """NVRTC: source to a cubin of one compute capability."""

    def __init__(self, library: ctypes.CDLL):
        self._library = library
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        self.version = (major.value, minor.value)
        count = ctypes.c_int()
        self._call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        archs = (ctypes.c_int * count.value)()
        self._call("nvrtcGetSupportedArchs", archs)
        self.architectures = tuple(archs)

    def target(self, capability: tuple[int, int]) -> tuple[str, bool]:
        """(--gpu-architecture, whether that yields a cubin). PTX, which the driver finishes, where the device is
        newer.
        """
        wanted = capability[0] * 10 + capability[1]
        if wanted in self.architectures:
            return f"sm_{wanted}", True
        older = [arch for arch in self.architectures if arch <= wanted]
        if not older:
            raise CudaError(
                _(
                    "NVRTC {major}.{minor} compiles for capabilities from {least}, and this device has {capability}.",
                    major=self.version[0],
                    minor=self.version[1],
                    least=min(self.architectures),
                    capability=wanted,
                ),
                _("Use a newer device or an older torch."),
            )
        return f"compute_{max(older)}", False

    def compile(self, name: str, source: str, headers: dict[str, str], options: list[str], cubin: bool) -> bytes:
        program = ctypes.c_void_p()
        texts = (ctypes.c_char_p * len(headers))(*[text.encode() for text in headers.values()])
        names = (ctypes.c_char_p * len(headers))(*[header.encode() for header in headers])
        self._call(
            "nvrtcCreateProgram", ctypes.byref(program), source.encode(), name.encode(), len(headers), texts, names
        )
        try:
            flags = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
            code = self._library.nvrtcCompileProgram(program, len(options), flags)
            if code:
                raise CudaError(
                    _(
                        "{name}: NVRTC {major}.{minor} stopped with code {code} for {options}: {log}",
                        name=name,
                        major=self.version[0],
                        minor=self.version[1],
                        code=code,
                        options=" ".join(options),
                        log=self._take(program, "ProgramLog").decode(errors="replace").strip(),
                    ),
                    _("This is an internal error (a bug in doctor): report it with this text."),
                )
            return self._take(program, "CUBIN" if cubin else "PTX")
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _take(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._call(f"nvrtcGet{what}", program, buffer)
        return buffer.raw

    def _call(self, name: str, *arguments) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            raise CudaError(
                _("{function} returned {code}.", function=name, code=code),
                _("libnvrtc does not fit this machine: reinstall torch."),
            )
