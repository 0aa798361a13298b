"""The commands with which engines serve a model.

Sources: vllm-project/vllm 0.32.0 vllm/engine/arg_utils.py (--tensor-parallel-size, --max-model-len, --kv-cache-dtype);
sgl-project/sglang docs/advanced_features/server_arguments.md; ggml-org/llama.cpp common/arg.cpp (-m, -c, -ngl).
"""

from __future__ import annotations

from doctor.core.tables import table


def launch(runtime: str, model: str, *, gpus: int = 1, context: int | None = None, flags: str = "") -> str:
    """The command of a runtime that serves; "" where it has none. model: a directory, or the file for llama.cpp, quoted
    for a shell. context: tokens a sequence; None leaves it to the engine. flags: of the cache, as the table of engines
    has them.
    """
    words = {
        "vllm": ("vllm serve", "--max-model-len", "--tensor-parallel-size"),
        "sglang": ("python -m sglang.launch_server --model-path", "--context-length", "--tp"),
        "llama.cpp": ("llama-server -m", "-c", ""),
    }.get(runtime)
    if words is None:
        return ""
    start, length, shared = words
    parts = [start, model]
    if context is not None:
        parts += [f"{length} {context}", *(["-ngl 99"] if runtime == "llama.cpp" else [])]
    if gpus > 1 and shared:
        parts.append(f"{shared} {gpus}")
    return " ".join([*parts, *([flags] if flags else [])])


def cache_flags(runtime: str, cache: str) -> str:
    """What to type for a cache by its name in the table of engines, as fp8; "" where nothing need be said."""
    rows = table("engines").get(runtime, {}).get("caches", [])
    return next((str(flags) for name, _keys, _values, flags in rows if name == cache), "")
