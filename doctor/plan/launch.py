"""The commands with which engines serve a model.

Sources: vllm-project/vllm 0.32.0 vllm/engine/arg_utils.py (--tensor-parallel-size, --max-model-len, --kv-cache-dtype);
sgl-project/sglang docs/advanced_features/server_arguments.md; ggml-org/llama.cpp common/arg.cpp (-m, -c, -ngl);
turboderp-org/exllamav2 0.3.2 examples/inference.py, exllamav2/generator/dynamic.py.
"""

from __future__ import annotations

import json
import shlex

from doctor.core.tables import table

# It has no server of its own. paged=False: one sequence at a time, which needs no flash-attn and an older GPU does.
_EXLLAMAV2 = (
    "from exllamav2 import ExLlamaV2 as M, ExLlamaV2Cache as K, ExLlamaV2Config as C, ExLlamaV2Tokenizer as T; "
    "from exllamav2.generator import ExLlamaV2DynamicGenerator as G; "
    "c = C({folder}); m = M(c); k = K(m, max_seq_len=2048, lazy=True); m.load_autosplit(k); "
    'print(G(m, k, T(c), paged=False).generate("Hello", max_new_tokens=32, add_bos=True))'
)


def run_in_exllamav2(folder: str) -> str:
    """The command that writes a reply with ExLlamaV2's own classes."""
    return f"python -c {shlex.quote(_EXLLAMAV2.format(folder=json.dumps(folder, ensure_ascii=False)))}"


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
