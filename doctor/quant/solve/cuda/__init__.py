"""The CUDA kernels of cuda/*.cu: compiled on first use by NVRTC, launched through the driver, both by ctypes.

Everything here has a twin in torch, which defines the result and does the work where `available()` gives a reason. A
kernel that is there and fails raises CudaError instead, because a broken device must not look like a slow one.

Functions take the tensors of their twins, on one device, run on torch's current stream and do not wait for it.
"""

from doctor.quant.solve.cuda.columns import fits, refine, round_columns
from doctor.quant.solve.cuda.driver import OPTIONS, SOURCES, Engine, cache_folder, source_folder
from doctor.quant.solve.cuda.grids import awq_difference, fit
from doctor.quant.solve.cuda.health import DeviceScan, health_scan
from doctor.quant.solve.cuda.kv_cache import kv_load, kv_store
from doctor.quant.solve.cuda.launcher import available, engine_for, note
from doctor.quant.solve.cuda.nvrtc import Compiler, find_libcuda, find_nvrtc
from doctor.quant.solve.cuda.packing import (
    awq_dequantize,
    awq_words,
    compressed_dequantize,
    gptq_dequantize,
    pack_columns,
    pack_rows,
)
from doctor.quant.solve.cuda.structs import KV_BITS

__all__ = [
    "KV_BITS",
    "OPTIONS",
    "SOURCES",
    "Compiler",
    "DeviceScan",
    "Engine",
    "available",
    "awq_dequantize",
    "awq_difference",
    "awq_words",
    "cache_folder",
    "compressed_dequantize",
    "engine_for",
    "find_libcuda",
    "find_nvrtc",
    "fit",
    "fits",
    "gptq_dequantize",
    "health_scan",
    "kv_load",
    "kv_store",
    "note",
    "pack_columns",
    "pack_rows",
    "refine",
    "round_columns",
    "source_folder",
]
