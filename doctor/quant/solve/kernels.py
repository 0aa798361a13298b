"""The CUDA kernels of cuda/*.cu: compiled on first use by NVRTC, launched through the driver, both by ctypes.

torch's CUDA builds bring libnvrtc and the driver brings libcuda, so a user needs no compiler and we no dependency. A
compiled kernel is kept on disk under a key of its source, options, compute capability and NVRTC version. Everything
here has a twin in torch (grid.py, gptq.py, pack.py), which is its definition and takes over where `available()` gives a
reason; a kernel that is there and fails raises CudaError instead, because a broken device must not look like a slow
one.

Functions take the tensors of their twins, on one device, run on torch's current stream and do not wait for it.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from doctor.core.errors import CudaError
from doctor.quant.solve import grid as reference
from doctor.quant.solve.grid import Grid, group_width

LEAST_CAPABILITY = (8, 0)  # one thread per row needs 80 KiB of shared memory a block
OPTIONS = ("--std=c++17", "--fmad=false")
SOURCES = ("gptq_block", "grid_search", "pack", "awq_difference", "kv_cache", "health_scan")

_BLOCK = 128  # BLOCK of gptq_block.cu
_SPANS = 4  # SPANS of kv_cache.cu
_RUN = 8  # RUN of core.cuh
_TALLEST = 65535  # blocks in a grid's second direction
_OPTIN = 48 << 10  # dynamic shared memory that needs no opt-in
KV_BITS = (4, 8)  # widths of ExLlamaV2's cache: Q6 is 8 bits for keys and 4 for values
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_ATTRIBUTES = {"multiprocessors": 16, "major": 75, "minor": 76, "shared_optin": 97}  # CUdevice_attribute
_MAX_DYNAMIC_SHARED = 8  # CUfunction_attribute
_Pointer, _I64, _I32, _F32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


def _struct(name: str, fields: str) -> type[ctypes.Structure]:
    """A ctypes structure of "name:type" words, where type is p (pointer), l (i64), i (i32) or f (f32)."""
    types = {"p": _Pointer, "l": _I64, "i": _I32, "f": _F32}
    return type(name, (ctypes.Structure,), {"_fields_": [(f[:-2], types[f[-1]]) for f in fields.split()]})


# One to one with the structs of the .cu files.
Rule = _struct("Rule", "top:f half:f zero_min:f sym:i turn:i mse:i dtype:i ratios:i fine:i refits:i")
Columns = _struct(
    "Columns",
    "T:p U:p owner:p scale:p zero:p codes:p errors:p loss:p cost:p candidates:p n:l k:l begin:i count:i width:i",
)
Refinement = _struct(
    "Refinement", "H:p owner:p scale:p zero:p codes:p pull:p moved:p loss:p n:l k:l begin:i count:i width:i"
)
Search = _struct("Search", "W:p cost:p candidates:p scale:p zero:p n:l k:l row_stride:l width:i")
Stream = _struct(
    "Stream",
    "codes:p words:p lines:l count:l height:l line_stride:l code_stride:l word_line_stride:l "
    "word_stride:l bits:i along_codes:i",
)
Packed = _struct(
    "Packed",
    "words:p zeros:p scales:p owner:p W:p n:l k:l groups:l word_line_stride:l word_stride:l "
    "zero_line_stride:l zero_stride:l scale_row_stride:l scale_group_stride:l row_stride:l column_stride:l bits:i "
    "zero_offset:i dtype:i width:i along_rows:i",
)
Difference = _struct("Difference", "W:p s:p D:p n:l k:l width:i source:i")


class Health(ctypes.Structure):
    """struct Health of health_scan.cu."""

    _fields_ = [
        ("counts", ctypes.c_uint64 * 6),
        ("first_nonfinite", ctypes.c_uint64),
        ("highest", ctypes.c_uint32),
        ("lowest", ctypes.c_uint32),
        ("sum", ctypes.c_double),
        ("sumsq", ctypes.c_double),
    ]


def source_folder() -> Path:
    """Where the .cu files are: beside the package in a checkout, inside it in a wheel."""
    here = Path(__file__).resolve()
    inside, beside = here.parents[2] / "cuda", here.parents[3] / "cuda"
    return inside if (inside / "core.cuh").exists() else beside


def cache_folder() -> Path:
    """HF_HOME/doctor/kernels, or doctor/kernels in XDG's cache."""
    home = os.environ.get("HF_HOME")
    root = Path(home) if home else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "doctor" / "kernels"


def find_nvrtc() -> ctypes.CDLL | None:
    """libnvrtc from the nvidia packages that torch's CUDA builds depend on, torch's own folder, or the system."""
    names = []
    for folder in map(Path, sys.path):
        for place in ("nvidia/*/lib", "nvidia/*/bin", "torch/lib"):
            names += sorted(map(str, [*folder.glob(f"{place}/libnvrtc.so*"), *folder.glob(f"{place}/nvrtc64_*_0.dll")]))
    for builtins in {path for name in names for path in Path(name).parent.glob("libnvrtc-builtins.so*")}:
        _first_library(
            [str(builtins)]
        )  # NVRTC opens it by name alone, which finds what is loaded and not what lies beside it
    names += ["libnvrtc.so", "libnvrtc.so.13", "libnvrtc.so.12"]
    return _first_library(names)


def find_libcuda() -> ctypes.CDLL | None:
    """The driver's library."""
    return _first_library(["libcuda.so.1", "libcuda.so", "nvcuda.dll"])


def _first_library(names: list[str]) -> ctypes.CDLL | None:
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
                f"NVRTC {self.version[0]}.{self.version[1]} compiles for capabilities from "
                f"{min(self.architectures)}, and this device has {wanted}.",
                "Use a newer device or an older torch.",
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
                    f"{name}: NVRTC {self.version[0]}.{self.version[1]} stopped with code {code} for "
                    f"{' '.join(options)}: {self._take(program, 'ProgramLog').decode(errors='replace').strip()}",
                    "This is a fault of ours: report it with this text.",
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
            raise CudaError(f"{name} returned {code}.", "libnvrtc does not fit this machine: reinstall torch.")


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
        where = f"{kernel}({shapes}): grid {grid[0]}x{grid[1]}, {threads} threads, {shared} bytes of shared memory"
        if shared > self.shared_optin:
            raise CudaError(
                f"{where}: this device allows {self.shared_optin} bytes a block.",
                "Set DOCTOR_KERNELS=0 to quantize with torch.",
            )
        if not (0 < grid[0] < 2**31 and 0 < grid[1] < 2**16):
            raise CudaError(f"{where}: a grid has 1..{2**31 - 1} by 1..{2**16 - 1} blocks.", "Set DOCTOR_KERNELS=0.")
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
        """grid.py's factors of the search as f32, for Rule's ratios and fine."""
        if device not in self._candidates:
            self._candidates[device] = torch.tensor(
                reference._RATIOS + reference._FINE, dtype=torch.float32, device=device
            )
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
            path.unlink(missing_ok=True)  # half a file of a full disk, say: compile it anew, once
            image, path, cached = self.image(source)
            cached = False
        if not module:
            self._driver("cuModuleLoadData", ctypes.byref(module), image, where=f"{source}.cu ({len(image)} bytes)")
        return module

    def _driver(self, name: str, *arguments, where: str = "") -> None:
        code = getattr(self._cuda, name)(*arguments)
        if code:
            text = ctypes.c_char_p()
            known = self._cuda.cuGetErrorName(code, ctypes.byref(text)) == 0 and text.value
            raise CudaError(
                f"{where + ': ' if where else ''}{name} returned {code}{f' ({text.value.decode()})' if known else ''}.",
                "Set DOCTOR_KERNELS=0 to quantize with torch, and report this text.",
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


@cache
def _engine(ordinal: int) -> tuple[Engine | None, str]:
    """(engine, "") or (None, reason)."""
    if not torch.cuda.is_available():
        return None, "torch sees no CUDA device"
    capability = torch.cuda.get_device_capability(ordinal)
    if capability < LEAST_CAPABILITY:
        return None, (
            f"device {ordinal} has compute capability {capability[0]}.{capability[1]}, and the kernels need "
            f"{LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]}"
        )
    cuda, nvrtc = find_libcuda(), find_nvrtc()
    if cuda is None:
        return None, "libcuda does not load"
    if nvrtc is None:
        return None, "no libnvrtc beside torch or on the library path (pip install nvidia-cuda-nvrtc brings one)"
    return Engine(cuda, Compiler(nvrtc), ordinal, cache_folder()), ""


def available(device: torch.device | str = "cuda") -> str | None:
    """None where the kernels run on this device, else the reason why torch does the work, for a finding or a log."""
    device = torch.device(device)
    if device.type != "cuda":
        return f"the kernels are for CUDA, and the tensors are on {device.type}"
    if os.environ.get("DOCTOR_KERNELS", "1") == "0":
        return "DOCTOR_KERNELS=0 turns them off"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return _engine(torch.cuda.current_device() if device.index is None else device.index)[1] or None


def note(device: torch.device | str) -> str:
    """The sentence for a finding where torch does the kernels' work on a GPU; empty where they run, or where the device
    is none.
    """
    reason = available(device) if torch.device(device).type == "cuda" else None
    return f"no CUDA kernel runs on {device}, torch does their work: {reason}" if reason else ""


def engine_for(device: torch.device) -> Engine:
    """The device's engine. Raises CudaError with the reason of available()."""
    reason = available(device)
    if reason:
        raise CudaError(f"no CUDA kernels on {device}: {reason}.", "Use the torch functions of doctor.quant.")
    return _engine(torch.cuda.current_device() if device.index is None else device.index)[0]


def _stream(tensor: torch.Tensor) -> int:
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0


def _at(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _require(name: str, tensor: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if tensor.dtype != dtype or tensor.device != device:
        raise CudaError(
            f"{name} is {tensor.dtype} on {tensor.device}; must be {dtype} on {device}.", "This is a fault of ours."
        )
    return tensor.contiguous()


def _require_countable(groups: int, n: int, k: int) -> None:
    if groups >= 2**31:
        raise CudaError(
            f"W[{n}, {k}] has {groups} groups; a launch counts to 2^31.", "Quantize it in parts of its rows."
        )


def _rule(bits: int, sym: bool, mse: bool, signed: bool, zero_min: int, scale_dtype: torch.dtype) -> Rule:
    return Rule(
        2**bits - 1,
        2 ** (bits - 1),
        zero_min,
        sym,
        signed,
        mse,
        _DTYPES[scale_dtype],
        len(reference._RATIOS),
        len(reference._FINE),
        reference._REFITS,
    )


def fit(
    W: torch.Tensor,
    bits: int,
    group_size: int,
    sym: bool,
    *,
    mse: bool = False,
    weight: torch.Tensor | None = None,
    signed: bool = False,
    zero_min: int = 0,
    scale_dtype: torch.dtype = torch.float16,
    engine: Engine | None = None,
) -> Grid:
    """grid.fit without its judgement: a group that is not finite, or whose scale does not fit scale_dtype, gets a scale
    that is not finite."""
    engine = engine or engine_for(W.device)
    n, k = W.shape
    width = group_width(k, group_size)
    W = _require("W", W.to(torch.float32), torch.float32, W.device)
    weight = None if weight is None else _require("weight", weight.to(W.device, torch.float32), torch.float32, W.device)
    scale = torch.empty(n, k // width, dtype=torch.float32, device=W.device)
    zero = torch.empty(n, k // width, dtype=torch.int32, device=W.device)
    _require_countable(scale.numel(), n, k)
    each = next((each for each in (1, 2, 4) if width <= 32 * each), None)
    search = Search(_at(W), _at(weight), _at(engine.candidates(W.device)), _at(scale), _at(zero), n, k, k, width)
    engine.launch(
        f"grid_search_{each or 'wide'}",
        "grid_search",
        (-(-scale.numel() // 4), 1),
        128,
        0,
        (search, _rule(bits, sym, mse, signed, zero_min, scale_dtype)),
        _stream(W),
        f"W[{n}, {k}] by {width}",
    )
    return Grid(scale, zero)


def round_columns(
    T: torch.Tensor,
    U: torch.Tensor,
    rules,
    groups: torch.Tensor,
    static: Grid | None,
    cost: torch.Tensor | None = None,
    width: int = 0,
    loss: torch.Tensor | None = None,
    *,
    engine: Engine | None = None,
) -> tuple[torch.Tensor, Grid]:
    """gptq._round_columns: a launch and a product for every 128 columns. A non-finite weight makes its row's later
    errors NaN, takes code 0 and touches no other row.
    """
    engine = engine or engine_for(T.device)
    k, n = T.shape
    device = T.device
    if not T.is_contiguous():
        raise CudaError(f"T[{k}, {n}] has strides {T.stride()}; must be contiguous.", "This is a fault of ours.")
    U, groups = _require("U", U, torch.float32, device), _require("groups", groups.to(torch.int32), torch.int32, device)
    cost = None if cost is None else _require("cost", cost, torch.float32, device)
    block, inside = _BLOCK, 0
    if static is None:
        scale, zero = torch.empty(2, k // width, n, device=device)
        if fits(width):
            inside = width
        else:
            block = max(size for size in range(1, _BLOCK + 1) if width % size == 0)
    else:
        scale, zero = static.scale.T.contiguous(), static.zero.T.to(torch.float32).contiguous()
    codes = torch.empty(k, n, dtype=torch.uint8, device=device)
    errors = torch.empty(_BLOCK, n, device=device)
    rule = _rule(rules.bits, rules.sym, rules.mse, rules.signed, rules.zero_min, rules.scale_dtype)
    threads = _threads(engine, n, _shared)
    for begin in range(0, k, block):
        count = min(block, k - begin)
        if static is None and not inside and begin % width == 0:
            fitted = fit(
                T[begin : begin + width].T,
                rules.bits,
                -1,
                rules.sym,
                mse=rules.mse,
                signed=rules.signed,
                weight=None if cost is None else cost[begin : begin + width],
                zero_min=rules.zero_min,
                scale_dtype=rules.scale_dtype,
                engine=engine,
            )
            scale[begin // width], zero[begin // width] = fitted.scale[:, 0], fitted.zero[:, 0].to(torch.float32)
        columns = Columns(
            _at(T),
            _at(U),
            _at(groups),
            _at(scale),
            _at(zero),
            _at(codes),
            _at(errors),
            _at(loss),
            _at(cost),
            _at(engine.candidates(device)),
            n,
            k,
            begin,
            count,
            inside,
        )
        engine.launch(
            "gptq_block",
            "gptq_block",
            (-(-n // threads), 1),
            threads,
            _shared(threads),
            (columns, rule),
            _stream(T),
            f"T[{k}, {n}], columns {begin}..{begin + count}",
        )
        if begin + count < k:
            T[begin + count :].addmm_(U[begin : begin + count, begin + count :].T, errors[:count], alpha=-1)
    return codes, Grid(scale.T.contiguous(), zero.T.to(torch.int32).contiguous())


def refine(
    E: torch.Tensor,
    H: torch.Tensor,
    codes: torch.Tensor,
    grid: Grid,
    groups: torch.Tensor,
    rules,
    width: int = 0,
    loss: torch.Tensor | None = None,
    *,
    engine: Engine | None = None,
) -> tuple[torch.Tensor, Grid]:
    """gptq.descend, and a new scale for each group after its codes where its `width` fits(): (codes u8[k, n], grid).

    E f32[k, n] = (W - Q)^T and codes u8[k, n], which is changed, with H f32[k, k] damped and groups i32[k] in one order
    of columns, in which groups are runs of `width` (0: scales stay as they are). The change of the loss is added to
    loss f64[n].
    """
    engine = engine or engine_for(E.device)
    k, n = E.shape
    device = E.device
    H, groups = _require("H", H, torch.float32, device), _require("groups", groups.to(torch.int32), torch.int32, device)
    scale, zero = grid.scale.T.clone(memory_format=torch.contiguous_format), grid.zero.T.to(torch.float32).contiguous()
    pull = H @ E
    moved = torch.empty(_BLOCK, n, device=device)
    rule = _rule(rules.bits, rules.sym, rules.mse, rules.signed, rules.zero_min, rules.scale_dtype)
    threads = _threads(engine, n, _shared_to_refine)
    for begin in range(0, k, _BLOCK):
        count = min(_BLOCK, k - begin)
        block = Refinement(
            _at(H),
            _at(groups),
            _at(scale),
            _at(zero),
            _at(codes),
            _at(pull),
            _at(moved),
            _at(loss),
            n,
            k,
            begin,
            count,
            width,
        )
        engine.launch(
            "gptq_refine",
            "gptq_block",
            (-(-n // threads), 1),
            threads,
            _shared_to_refine(threads),
            (block, rule),
            _stream(E),
            f"E[{k}, {n}], columns {begin}..{begin + count}",
        )
        if begin + count < k:
            pull[begin + count :].addmm_(H[begin + count :, begin : begin + count], moved[:count])
    return codes, Grid(scale.T.contiguous(), grid.zero)


def fits(width: int) -> bool:
    """Whether gptq_block.cu can fit the grid of a group of `width` columns inside a block."""
    return width % 16 == 0 and _BLOCK % width == 0


def _shared(threads: int) -> int:
    """Bytes of shared memory of a block of gptq_block."""
    return (_BLOCK + threads) * _BLOCK * 4


def _shared_to_refine(threads: int) -> int:
    return _shared(threads) + _BLOCK * threads


def _threads(engine: Engine, n: int, shared: Callable[[int], int]) -> int:
    """Rows a block: as many as the device's shared memory holds while every multiprocessor still gets a block."""
    for threads in (128, 64):
        if shared(threads) <= engine.shared_optin and -(-n // threads) >= engine.multiprocessors:
            return threads
    return 32


def pack_columns(codes: torch.Tensor, bits: int, *, engine: Engine | None = None) -> torch.Tensor:
    """pack.pack_columns for codes u8[m, c]: i32[ceil(m*bits/32), c]."""
    m, columns = codes.shape
    words = torch.empty(-(-m * bits // 32), columns, dtype=torch.int32, device=codes.device)
    return _pack(codes.T, words, words.T, bits, engine)


def pack_rows(codes: torch.Tensor, bits: int, *, engine: Engine | None = None) -> torch.Tensor:
    """pack.pack_rows for codes u8[r, m]: i32[r, ceil(m*bits/32)]."""
    words = torch.empty(codes.shape[0], -(-codes.shape[1] * bits // 32), dtype=torch.int32, device=codes.device)
    return _pack(codes, words, words, bits, engine)


def _pack(
    lines: torch.Tensor, words: torch.Tensor, by_line: torch.Tensor, bits: int, engine: Engine | None
) -> torch.Tensor:
    """lines u8[l, m], any strides, to by_line i32[l, words], a view of words."""
    engine = engine or engine_for(lines.device)
    if lines.dtype != torch.uint8:
        raise CudaError(f"codes are {lines.dtype}; must be torch.uint8.", "This is a fault of ours.")
    count, m = lines.shape
    fast, slow = count, -(-m // 32)
    along_codes = lines.stride(1) == 1 and lines.stride(0) != 1
    if along_codes:
        fast, slow = slow, fast
    stream = Stream(
        _at(lines), _at(words), count, m, by_line.shape[1], *lines.stride(), *by_line.stride(), bits, along_codes
    )
    engine.launch(
        "pack_stream",
        "pack",
        (-(-fast // 128), min(slow, _TALLEST)),
        128,
        0,
        (stream,),
        _stream(lines),
        f"codes[{count}, {m}], {bits} bits",
    )
    return words


def awq_words(codes: torch.Tensor, *, engine: Engine | None = None) -> torch.Tensor:
    """i32[c, n/8]: eight rows of codes u8[n, c], any strides, to a word in AWQ's order."""
    engine = engine or engine_for(codes.device)
    n, columns = codes.shape
    if codes.dtype != torch.uint8 or n % 8:
        raise CudaError(
            f"codes are {codes.dtype}[{n}, {columns}]; must be torch.uint8 with n a multiple of 8.",
            "This is a fault of ours.",
        )
    codes = (
        codes.T.contiguous().T
    )  # the eight rows of a word side by side: read one by one from eight lines they cost 32 times the bytes
    words = torch.empty(columns, n // 8, dtype=torch.int32, device=codes.device)
    engine.launch(
        "pack_awq",
        "pack",
        (-(-(n // 8) // 128), min(columns, _TALLEST)),
        128,
        0,
        (_Pointer(_at(codes)), _Pointer(_at(words)), _I64(columns), _I64(n // 8), *map(_I64, codes.stride())),
        _stream(codes),
        f"codes[{n}, {columns}]",
    )
    return words


def gptq_dequantize(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor | None,
    bits: int,
    *,
    version: int = 1,
    engine: Engine | None = None,
) -> torch.Tensor:
    """pack.gptq_dequantize: W f32[n, k], a view of [k, n]. Words are trusted: g_idx must be in 0..G-1."""
    k, n, groups = qweight.shape[0] * 32 // bits, qweight.shape[1], scales.shape[0]
    out = torch.empty(k, n, device=qweight.device)
    packed = Packed(
        _at(qweight),
        _at(qzeros),
        _at(scales),
        _at(g_idx),
        _at(out),
        n,
        k,
        groups,
        1,
        n,
        qzeros.shape[1],
        1,
        1,
        n,
        1,
        n,
        bits,
        1 if version == 1 else 0,
        _DTYPES[scales.dtype],
        k // groups,
        1,
    )
    return _dequantize(packed, (qweight, qzeros, scales, g_idx), (n, -(-k // _RUN)), engine, out).T


def compressed_dequantize(
    weight_packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_shape,
    bits: int,
    *,
    weight_zero_point: torch.Tensor | None = None,
    weight_g_idx: torch.Tensor | None = None,
    engine: Engine | None = None,
) -> torch.Tensor:
    """pack.compressed_dequantize of the dense stream: W f32[n, k]."""
    n, k = (int(side) for side in weight_shape)
    groups, width = weight_scale.shape[1], weight_packed.shape[1]
    out = torch.empty(n, k, device=weight_packed.device)
    packed = Packed(
        _at(weight_packed),
        _at(weight_zero_point),
        _at(weight_scale),
        _at(weight_g_idx),
        _at(out),
        n,
        k,
        groups,
        width,
        1,
        1,
        groups,
        groups,
        1,
        k,
        1,
        bits,
        0 if weight_zero_point is not None else 2 ** (bits - 1),
        _DTYPES[weight_scale.dtype],
        k // groups,
        0,
    )
    return _dequantize(
        packed, (weight_packed, weight_zero_point, weight_scale, weight_g_idx), (-(-k // _RUN), n), engine, out
    )


def _dequantize(
    packed: Packed, tensors: tuple, sides: tuple[int, int], engine: Engine | None, out: torch.Tensor
) -> torch.Tensor:
    """sides: (fast, slow), the grid's two directions."""
    engine = engine or engine_for(out.device)
    for tensor in tensors:
        if tensor is not None and not (tensor.is_contiguous() and tensor.device == out.device):
            raise CudaError(
                f"a packed tensor {list(tensor.shape)} on {tensor.device} has strides {tensor.stride()}; must be "
                f"contiguous on {out.device}.",
                "This is a fault of ours.",
            )
    engine.launch(
        "dequantize_stream",
        "pack",
        (-(-sides[0] // 128), min(sides[1], _TALLEST)),
        128,
        0,
        (packed,),
        _stream(out),
        f"W[{packed.n}, {packed.k}], {packed.bits} bits",
    )
    return out


def awq_dequantize(
    qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, *, engine: Engine | None = None
) -> torch.Tensor:
    """pack.awq_dequantize: W f32[n, k], a view of [k, n]."""
    engine = engine or engine_for(qweight.device)
    (k, words), groups = qweight.shape, scales.shape[0]
    out = torch.empty(k, words * 8, device=qweight.device)
    engine.launch(
        "dequantize_awq",
        "pack",
        (-(-words // 128), min(k, _TALLEST)),
        128,
        0,
        (
            *[_Pointer(_at(t)) for t in (qweight, qzeros, scales, out)],
            _I64(words * 8),
            _I64(k),
            _I32(k // groups),
            _I32(_DTYPES[scales.dtype]),
        ),
        _stream(out),
        f"W[{words * 8}, {k}]",
    )
    return out.T


def awq_difference(
    W: torch.Tensor,
    s: torch.Tensor,
    bits: int,
    group_size: int,
    sym: bool,
    *,
    zero_min: int = 0,
    scale_dtype: torch.dtype = torch.float16,
    engine: Engine | None = None,
) -> torch.Tensor:
    """D f32[n, k] = grid(W * s) / s - W with min-max grids: a candidate s f32[k] > 0 of AWQ's search costs tr(D H
    D^T).
    """
    engine = engine or engine_for(W.device)
    n, k = W.shape
    width = group_width(k, group_size)
    _require_countable(n * (k // width), n, k)
    W, s = W.contiguous(), _require("s", s, torch.float32, W.device)
    out = torch.empty(n, k, device=W.device)
    difference = Difference(_at(W), _at(s), _at(out), n, k, width, _DTYPES[W.dtype])
    engine.launch(
        "awq_difference",
        "awq_difference",
        (-(-n * (k // width) // 4), 1),
        128,
        0,
        (difference, _rule(bits, sym, False, False, zero_min, scale_dtype)),
        _stream(W),
        f"W[{n}, {k}] by {width}",
    )
    return out


def kv_store(x: torch.Tensor, bits: int, *, engine: Engine | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes u8[count*bits/8], scales f16[count/32]) of f16 values, count a multiple of 64, as ExLlamaV2 caches
    them.
    """
    engine = engine or engine_for(x.device)
    x = _by_four(_require("x", x.reshape(-1), torch.float16, x.device))
    _require_kv(x.numel(), bits)
    codes = torch.empty(x.numel() * bits // 8, dtype=torch.uint8, device=x.device)
    scales = torch.empty(x.numel() // 32, dtype=torch.float16, device=x.device)
    _kv("kv_store", (x, codes, scales), x.numel(), bits, engine)
    return codes, scales


def kv_load(codes: torch.Tensor, scales: torch.Tensor, bits: int, *, engine: Engine | None = None) -> torch.Tensor:
    """f16[count] that attention reads back."""
    engine = engine or engine_for(codes.device)
    x = torch.empty(scales.numel() * 32, dtype=torch.float16, device=codes.device)
    _require_kv(x.numel(), bits)
    _kv("kv_load", (_by_four(codes.contiguous()), scales.contiguous(), x), x.numel(), bits, engine)
    return x


def _kv(kernel: str, tensors: tuple[torch.Tensor, ...], count: int, bits: int, engine: Engine) -> None:
    engine.launch(
        kernel,
        "kv_cache",
        (-(-count // (4 * 64 * _SPANS)), 1),
        128,
        0,  # four warps a block
        (*[_Pointer(_at(t)) for t in tensors], _I64(count), _I32(bits)),
        _stream(tensors[0]),
        f"{count} values, {bits} bits",
    )


def _by_four(tensor: torch.Tensor) -> torch.Tensor:
    """It, or its copy where a kernel that reads words of 32 bits could not."""
    return tensor if tensor.data_ptr() % 4 == 0 else tensor.clone()


def _require_kv(count: int, bits: int) -> None:
    if count % 64 or not count or bits not in KV_BITS:
        raise CudaError(
            f"{count} cached values at {bits} bits; must be a multiple of 64 at 4 or 8 bits.",
            "Q6 is 8 bits for keys and 4 for values.",
        )


class Scan:
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
        blocks = min(-(-tensor.numel() // (256 * _RUN)), self._engine.multiprocessors * 8)
        self._engine.launch(
            "health_scan",
            "health_scan",
            (blocks, 1),
            256,
            8 * ctypes.sizeof(Health),
            (
                _Pointer(_at(tensor)),
                _Pointer(_at(self._found)),
                _I64(tensor.numel()),
                _I64(self.numel),
                _I32(_DTYPES[tensor.dtype]),
            ),
            _stream(tensor),
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
            **dict(zip(names, found.counts)),
            "absmax": max(abs(low), abs(high)),
            "min": low,
            "max": high,
            "sum": found.sum,
            "sumsq": found.sumsq,
            "first_nonfinite": -1 if first == 2**64 - 1 else first,
        }


def health_scan(tensor: torch.Tensor, *, engine: Engine | None = None) -> dict[str, int | float]:
    """stats.Stats of one tensor on a device, as a dictionary. Waits for the device."""
    scan = Scan(tensor.device, engine=engine)
    scan.add(tensor)
    return scan.read()


def _float_of_key(key: int) -> float:
    """The float32 that key_of of health_scan.cu made `key` from; 0 for no value at all."""
    if not key:
        return 0.0
    bits = key & 0x7FFFFFFF if key & 0x80000000 else ~key & 0xFFFFFFFF
    return ctypes.c_float.from_buffer(ctypes.c_uint32(bits)).value
