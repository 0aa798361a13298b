"""Lets llama.cpp load a GGUF file and run it on rows of token ids; prints JSON. Runs as a process of its own, also in
an environment that has xllamacpp, which brings llama.cpp whole, and not doctor.

    PYTHON llama_cpp_child.py FILE.gguf [ROWS.json]

Without rows it only loads: {"client", "architecture", "parameters", "vocabulary"}. With rows, [[token id,
…], …], it adds "logprobs": [[float, …], …], of each token of a row but the first, in nats. What fails is "error",
with "kind": "library" where xllamacpp is not there, "refused" where llama.cpp does not load or compute the file.

llama.cpp is called through its C interface, of which xllamacpp's library exports all. Its parameter structs differ from
version to version, so they are taken as it fills them, in more room than any version needs; only the first three fields
of the context's (n_ctx, n_batch, n_ubatch) are set, which have stood there since 2024.

Source: ggml-org/llama.cpp include/llama.h, src/llama-model.cpp (the messages of a load).
"""

import contextlib
import ctypes
import importlib.metadata
import json
import math
import os
import sys

ROOM = 1024  # bytes for a struct of parameters; the largest has 170


class Params(ctypes.Structure):
    """A struct of parameters as llama.cpp fills it."""

    _fields_ = [("words", ctypes.c_uint32 * (ROOM // 4))]


class Batch(ctypes.Structure):
    """struct llama_batch."""

    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


class Refused(Exception):
    """llama.cpp does not do it; the text is its own."""


def main() -> None:
    path, *rest = sys.argv[1:3]
    rows = []
    if rest:
        with open(rest[0], encoding="utf-8") as file:
            rows = json.load(file)
    sys.stdout.flush()
    answer_to = os.dup(1)
    os.dup2(2, 1)  # the library prints; the answer alone goes to stdout
    with contextlib.redirect_stdout(sys.stderr):
        answer = ask(path, rows)
    with os.fdopen(answer_to, "w") as out:
        out.write(json.dumps(answer) + "\n")


def ask(path: str, rows: list[list[int]]) -> dict:
    """The answer; what fails is part of it."""
    try:
        import xllamacpp  # type: ignore[import-not-found]

        version = importlib.metadata.version("xllamacpp")
    except ImportError as error:
        return {"client": "llama.cpp", "kind": "library", "error": first_line(error)}
    answer = {"client": f"llama.cpp (xllamacpp {version})"}
    try:
        library = find_library(os.path.dirname(xllamacpp.__file__))
        return answer | run(library, path, rows)
    except OSError as error:
        return answer | {"kind": "library", "error": first_line(error)}
    except Refused as error:
        return answer | {"kind": "refused", "error": first_line(error)}


def find_library(folder: str) -> ctypes.CDLL:
    """The shared library in which llama.cpp is. Raises OSError."""
    for name in sorted(os.listdir(folder)):
        if ".so" in name or name.endswith((".dylib", ".pyd")):
            library = ctypes.CDLL(os.path.join(folder, name))
            if hasattr(library, "llama_model_load_from_file"):
                return declared(library)
    raise OSError(f"no library with llama.cpp in {folder}")


def declared(library: ctypes.CDLL) -> ctypes.CDLL:
    """The library with the types of the functions that are called."""
    pointer, number = ctypes.c_void_p, ctypes.c_int32
    for name, result, arguments in (
        ("llama_log_set", None, [LOG, pointer]),
        ("llama_backend_init", None, []),
        ("llama_model_default_params", Params, []),
        ("llama_context_default_params", Params, []),
        ("llama_model_load_from_file", pointer, [ctypes.c_char_p, Params]),
        ("llama_init_from_model", pointer, [pointer, Params]),
        ("llama_model_get_vocab", pointer, [pointer]),
        ("llama_vocab_n_tokens", number, [pointer]),
        ("llama_model_n_params", ctypes.c_uint64, [pointer]),
        ("llama_model_meta_val_str", number, [pointer, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t]),
        ("llama_batch_init", Batch, [number, number, number]),
        ("llama_decode", number, [pointer, Batch]),
        ("llama_get_logits_ith", ctypes.POINTER(ctypes.c_float), [pointer, number]),
        ("llama_get_memory", pointer, [pointer]),
        ("llama_memory_clear", None, [pointer, ctypes.c_bool]),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def run(library: ctypes.CDLL, path: str, rows: list[list[int]]) -> dict:
    """Load the file, and compute the rows. Raises Refused."""
    said: list[str] = []

    @LOG
    def log(level, text, _data):
        if level == 4:  # GGML_LOG_LEVEL_ERROR
            said.append((text or b"").decode("utf-8", "replace").strip())

    library.llama_log_set(log, None)
    library.llama_backend_init()
    model = library.llama_model_load_from_file(os.fsencode(path), library.llama_model_default_params())
    if not model:
        raise Refused(" ".join(said[:2]) or "llama.cpp did not load the file")
    vocabulary = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))
    name = ctypes.create_string_buffer(128)
    library.llama_model_meta_val_str(model, b"general.architecture", name, 128)
    answer = {
        "architecture": name.value.decode("utf-8", "replace"),
        "parameters": library.llama_model_n_params(model),
        "vocabulary": vocabulary,
    }
    if not rows:
        return answer
    longest = max(map(len, rows))
    params = library.llama_context_default_params()
    for place, value in enumerate((longest + 8, longest, longest)):
        params.words[place] = value
    context = library.llama_init_from_model(model, params)
    if not context:
        raise Refused(" ".join(said[:2]) or "llama.cpp made no context")
    batch = library.llama_batch_init(longest, 0, 1)
    logprobs = [row_logprobs(library, context, batch, row, vocabulary) for row in rows]
    return answer | {"logprobs": logprobs}


def row_logprobs(library: ctypes.CDLL, context: int, batch: Batch, row: list[int], vocabulary: int) -> list[float]:
    """The log-probability of each token but the first. Raises Refused."""
    import numpy as np

    library.llama_memory_clear(library.llama_get_memory(context), True)
    batch.n_tokens = len(row)
    for place, token in enumerate(row):
        if not 0 <= token < vocabulary:
            raise Refused(f"token {token} is not among llama.cpp's {vocabulary}")
        batch.token[place], batch.pos[place] = token, place
        batch.n_seq_id[place], batch.seq_id[place][0], batch.logits[place] = 1, 0, 1
    code = library.llama_decode(context, batch)
    if code:
        raise Refused(f"llama_decode returned {code}")
    found = []
    for place, token in enumerate(row[1:]):
        pointer = library.llama_get_logits_ith(context, place)
        if not pointer:
            raise Refused(f"llama.cpp gives no logits at position {place}")
        logits = np.ctypeslib.as_array(pointer, (vocabulary,)).astype(np.float64)
        most = float(logits.max())
        found.append(float(logits[token]) - most - math.log(float(np.exp(logits - most).sum())))
    return found


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


if __name__ == "__main__":
    main()
