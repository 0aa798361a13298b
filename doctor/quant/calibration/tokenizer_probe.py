"""Loads a tokenizer and lets it work, in a process with limits of memory and time; says why it cannot be used.

A tokenizer.json holds regular expressions, normalizers and a chat template, which are programs of whoever made it: a
pattern may backtrack for years, a replacement may double a text a hundred times, a template may loop. So the first use
of it is in a process of its own, which the system ends.

    python -m doctor.quant.calibration.tokenizer_probe FOLDER        prints the reason as JSON, "" where there is none
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from doctor.core.messages import _

MEMORY_BYTES, MEMORY_A_BYTE = 2 << 30, 64  # beyond what the libraries take, and for each byte of the files
CPU_S, WALL_S = 60, 180
OTHER_LIBRARIES = ("sentencepiece", "tiktoken", "mistral_common", "mistral-common", "protobuf", "pip install")
# Runs of one kind are what a pattern that backtracks dies of.
TEXTS = (
    "The quick brown fox jumps over the lazy dog. 1,234.5 + 67 = ?\n\n\tdef f(x):\n        return x\n",
    *(c * 1000 + "!" for c in "ae \n0._-<"),
    "".join(chr(c) * 40 + "~" for c in range(33, 127)),
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002 \u0441\u043b\u043e\u0432\u043e \U0001f600 e\u0301" * 50,
)
CHAT = [
    {"role": "user", "content": "Hello."},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "?"},
]


def why_unusable(folder: Path) -> str:
    """Why transformers' tokenizer of a directory cannot be used, asked in a process of its own; "" where it can."""
    command = [sys.executable, "-P", "-m", "doctor.quant.calibration.tokenizer_probe", str(Path(folder).resolve())]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=2 * WALL_S, stdin=subprocess.DEVNULL)
        return str(json.loads(run.stdout.strip().splitlines()[-1]))
    except subprocess.TimeoutExpired:
        return _("it takes more than {n} s", n=2 * WALL_S)
    except (IndexError, ValueError):
        return (run.stderr.strip().splitlines() or [_("its process ended")])[-1][:200]


def use(folder: Path) -> str:
    """Load it, encode texts, render its template; the reason where that raises, "" where it works or where a library is
    not installed here.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        for text in TEXTS:
            tokenizer(text, verbose=False)
    except MemoryError:
        raise
    except BaseException as error:  # tokenizers raises a plain Exception, and a panic of Rust is a BaseException
        words = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        other = isinstance(error, ImportError) or any(name in str(error) for name in OTHER_LIBRARIES)
        return "" if other else words
    try:
        tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    except MemoryError:
        raise
    except Exception:  # rules judge what a template refuses; here only what it takes counts
        return ""
    return ""


def limited(work: Callable[[], str], memory: int, cpu: int = CPU_S, wall: int = WALL_S) -> Callable[[], str]:
    """Start `work` in a fork with `memory` more bytes than this process has and `cpu` seconds; the value waits for what
    it returns, or says which limit it met. The caller has no other threads.
    """
    ours, theirs = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(ours)
        _work_in_child(work, theirs, memory, cpu)
    os.close(theirs)
    deadline = time.monotonic() + wall

    def result() -> str:
        raw = b""
        while True:
            ready, _w, _x = select.select([ours], [], [], max(0.0, deadline - time.monotonic()))
            part = os.read(ours, 1 << 16) if ready else b""
            if not part:
                break
            raw += part
        os.close(ours)
        if not ready:
            os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        if not ready or (os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL)):
            return _("it takes more than {n} s", n=wall if not ready else cpu)
        if status or not raw:
            return _("it takes more than {n:.0f} GiB of memory", n=memory / 2**30)
        return str(json.loads(raw))

    return result


def _work_in_child(work: Callable[[], str], answer: int, memory: int, cpu: int) -> None:
    code = 1
    try:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads do not survive a fork
        pages = int(Path("/proc/self/statm").read_text().split()[0]) if os.path.exists("/proc/self/statm") else 0
        if pages:
            resource.setrlimit(resource.RLIMIT_AS, 2 * (pages * resource.getpagesize() + memory,))
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = int(used.ru_utime + used.ru_stime) + cpu
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 1))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.write(answer, json.dumps(work()).encode())
        code = 0
    finally:
        os._exit(code)


def memory_for(folder: Path) -> int:
    """Bytes that a tokenizer of these files may take."""
    return MEMORY_BYTES + MEMORY_A_BYTE * sum(
        (folder / name).stat().st_size for name in os.listdir(folder) if name.endswith((".json", ".model", ".txt"))
    )


def main() -> None:
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
    from doctor.quant import import_stubs

    import_stubs.install()
    folder = Path(sys.argv[1])
    with contextlib.redirect_stdout(sys.stderr):
        import transformers.models.auto.tokenization_auto  # noqa: F401 - imported once, before the limits

        words = limited(lambda: use(folder), memory_for(folder))()
    print(json.dumps(words))


if __name__ == "__main__":
    main()
