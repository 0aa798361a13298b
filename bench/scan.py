"""How fast the scan is against the memory it reads, the file system under it, and the loop most scripts write.

    python bench/scan.py [MiB]

One run, one table; every row is the best of several passes over bf16 weights, in GB per second of CPU time and per
second on the clock, the latter also against `cat FILE > /dev/null` of the same file. The peer is the usual torch loop
(isnan, isinf, zeros, absmax, sum on `.float()`), in a process of its own. The last rows are the full scan of a
checkpoint as `doctor check` does it, with one thread and with all. Ratios within one run are what to quote: machines
and neighbours differ.

    python bench/scan.py --check [MiB ...]

The whole command instead: `doctor check` of a checkpoint of that size (2048) in eight shards, a child with all its
threads, interpreter and rules included, against `cat` of the same files in page cache; and its peak memory, which must
not grow with the size.

    python bench/scan.py --peer CHECKPOINT

`doctor check` of that checkpoint beside `model-clinic exam` of its shards (tests/clients/setup.sh clinic), once each:
the clinic takes minutes.
"""

import json
import os
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from doctor.checkpoint.directory import Checkpoint
from doctor.checkpoint.safetensors import ShardFile
from doctor.core.recipe import Recipe
from doctor.scan import counters, native
from doctor.scan.header import header_facts
from doctor.scan.scan import scan

CHUNK = 1 << 20  # what doctor.scan.scan reads at a time
ROWS, COLUMNS = 4096, 4096

PEER = """
import sys, time, resource, torch
torch.set_num_threads(1)
begin = time.perf_counter(), time.process_time()
data = open(sys.argv[1], "rb").read()
n = int(sys.argv[2])
tensors = torch.frombuffer(bytearray(data), dtype=torch.bfloat16).view(-1, n)
del data
best = [1e9, 1e9]
for _ in range(2):
    wall, cpu = time.perf_counter(), time.process_time()
    for t in tensors:
        x = t.float()
        torch.isnan(x).sum().item(), torch.isinf(x).sum().item(), (x == 0).sum().item()
        x.abs().max().item(), x.min().item(), x.max().item(), x.sum(dtype=torch.float64).item()
    best = [min(best[0], time.process_time() - cpu), min(best[1], time.perf_counter() - wall)]
print(*best)
"""


def best_of(work, passes=5):
    """(CPU seconds of this process, wall seconds) of the fastest pass."""
    times = []
    for _ in range(passes):
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        times.append((time.process_time() - cpu, time.perf_counter() - wall))
    return tuple(min(column) for column in zip(*times, strict=True))


def weights(n_bytes):
    """bf16 codes of normal weights of scale 0.02."""
    rng = np.random.default_rng(0)
    parts = [
        (rng.standard_normal(1 << 22, dtype=np.float32) * np.float32(0.02)).view(np.uint32) >> 16 for _ in range(8)
    ]
    codes = np.concatenate(parts).astype(np.uint16)
    return np.resize(codes, n_bytes // 2)


def with_level(level, work):
    def run():
        os.environ["DOCTOR_NATIVE"] = level
        work()

    return run


def scan_file(path):
    buffer = memoryview(bytearray(CHUNK))
    with ShardFile(path, "weights") as file:
        for at in range(0, file.size(), CHUNK):
            counters.read_and_scan(file, at, buffer[: file.size() - at], "BF16")


def scan_checkpoint(folder, workers):
    opened = Checkpoint.open(folder)
    scan(opened, header_facts(opened, Recipe()), workers=workers)


def checkpoint(folder, mib, shards=8):
    """A Llama of about this size in bf16, its config and index with it."""
    wide, inner, vocab = 2048, 5632, 32000
    block = {
        "self_attn.q_proj": (wide, wide),
        "self_attn.k_proj": (512, wide),
        "self_attn.v_proj": (512, wide),
        "self_attn.o_proj": (wide, wide),
        "mlp.gate_proj": (inner, wide),
        "mlp.up_proj": (inner, wide),
        "mlp.down_proj": (wide, inner),
        "input_layernorm": (wide,),
        "post_attention_layernorm": (wide,),
    }
    per_block = 2 * sum(int(np.prod(s)) for s in block.values())
    blocks = max((mib << 20) // per_block, 1)
    shapes = {"model.embed_tokens.weight": (vocab, wide), "lm_head.weight": (vocab, wide), "model.norm.weight": (wide,)}
    shapes |= {f"model.layers.{i}.{name}.weight": shape for i in range(blocks) for name, shape in block.items()}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": wide,
        "intermediate_size": inner,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": blocks,
        "vocab_size": vocab,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    some, names, where = weights(64 << 20), list(shapes), {}
    for shard in range(shards):
        mine = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
        file, at, header = f"model-{shard + 1:05}-of-{shards:05}.safetensors", 0, {"__metadata__": {"format": "pt"}}
        for name in mine:
            size = 2 * int(np.prod(shapes[name]))
            header[name], where[name], at = (
                {"dtype": "BF16", "shape": shapes[name], "data_offsets": [at, at + size]},
                file,
                at + size,
            )
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / file, "wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            for number, name in enumerate(mine, 7 * shard):  # no two alike: equal tensors are compared to their ends
                out.write(np.resize(some[1000 * number :], int(np.prod(shapes[name]))).data)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


MEASURED = """
import os, resource, subprocess, sys, time
start = time.perf_counter()
subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(time.perf_counter() - start, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)
"""


def child(*command, times=5):
    """(wall seconds, CPU seconds, peak MiB) of a command; best wall of `times`, its own CPU, largest peak."""
    runs = [
        tuple(
            map(
                float,
                subprocess.run(
                    [sys.executable, "-c", MEASURED, *map(str, command)], capture_output=True, text=True, check=True
                ).stdout.split(),
            )
        )
        for _ in range(times)
    ]
    return *min(runs)[:2], max(r[2] for r in runs)


def whole_command(sizes):
    print(
        f"{'':10} {'cat s':>7} {'check s':>8} {'GB/s':>6} {'of cat':>7} {'CPU s':>6} {'headers s':>10} {'peak MiB':>9}"
    )
    for mib in sizes:
        with tempfile.TemporaryDirectory() as temporary:
            folder = checkpoint(Path(temporary) / "m", mib)
            files = sorted(folder.glob("*.safetensors"))
            size = sum(f.stat().st_size for f in files)
            plain = child("cat", *files)[0]
            command = [
                sys.executable,
                "-m",
                "doctor",
                "check",
                folder,
                "--concise",
                "--config",
                "none",
                "--fail-on",
                "never",
            ]
            wall, cpu, peak = child(*command)
            headers = child(*command, "--stage", "header")[0]
            print(
                f"{size / 1e9:7.2f} GB {plain:7.2f} {wall:8.2f} {size / wall / 1e9:6.2f} {plain / wall:7.2f} "
                f"{cpu:6.2f} {headers:10.2f} {peak:9.0f}"
            )


def beside_clinic(folder):
    """model-clinic looks for other things too, singular values above all: the figures are what a user waits, not the
    same work.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    clinic = Path(__file__).resolve().parents[1] / ".cache" / "venv-clinic" / "bin" / "model-clinic"
    size = sum(f.stat().st_size for f in files)
    ours = [sys.executable, "-m", "doctor", "check", folder, "--concise", "--config", "none", "--fail-on", "never"]
    for name, commands in (
        ("cat", [["cat", *files]]),
        ("doctor check", [ours]),
        ("model-clinic exam", [[clinic, "exam", f] for f in files]),
    ):
        wall, cpu, peak = (
            sum(x) if i < 2 else max(x) for i, x in enumerate(zip(*(child(*c, times=1) for c in commands), strict=True))
        )
        print(
            f"{name:20} {wall:8.2f} s  {cpu:8.2f} CPU s  {size / wall / 1e9:7.3f} GB/s  {peak:7.0f} MiB at most",
            flush=True,
        )


def main():
    if sys.argv[1:2] == ["--peer"]:
        return beside_clinic(sys.argv[2])
    if sys.argv[1:2] == ["--check"]:
        return whole_command([int(x) for x in sys.argv[2:]] or [2048])
    n_bytes = int(sys.argv[1] if len(sys.argv) > 1 else 256) << 20
    n_bytes -= n_bytes % (2 * ROWS * COLUMNS)
    codes = weights(n_bytes)
    chunks = [memoryview(codes).cast("B")[i : i + CHUNK] for i in range(0, n_bytes, CHUNK)]
    available = native.level()
    levels = native.LEVELS[: native.LEVELS.index(available) + 1] if available else ()
    rows = [("memory: numpy sum of uint64", best_of(lambda: codes.view(np.uint64).sum()))]

    def scan_all():
        for chunk in chunks:
            counters.scan(chunk, "BF16")

    for level in levels:
        rows.append((f"scan, native {level}", best_of(with_level(level, scan_all))))
    rows.append(("scan, NumPy", best_of(with_level("0", scan_all), 2)))
    os.environ.pop("DOCTOR_NATIVE")
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "weights"
        codes.tofile(file)
        plain = cat(file)
        rows.append(("file in page cache: cat > /dev/null", plain))
        rows.append((f"file in page cache: read and scan ({available or 'NumPy'})", best_of(lambda: scan_file(file))))
        peer = subprocess.run(
            [sys.executable, "-c", PEER, file, str(ROWS * COLUMNS)], capture_output=True, text=True, check=True
        )
        torch_loop = tuple(map(float, peer.stdout.split()))
        rows.append(("torch loop on .float()", torch_loop))
        folder = checkpoint(Path(temporary) / "m", n_bytes >> 20)
        shards = sorted(folder.glob("*.safetensors"))
        size = sum(f.stat().st_size for f in shards)
        plain_shards = cat(*shards)
        whole = [("its shards in page cache: cat > /dev/null", plain_shards)]
        for workers in sorted({1, os.cpu_count() or 1}):
            whole.append(
                (
                    f"full scan of the checkpoint, {workers} thread{'s' * (workers > 1)}",
                    best_of(lambda: scan_checkpoint(folder, workers)),
                )
            )
    print(
        f"{n_bytes >> 20} MiB of bf16 in one thread; a checkpoint of {size >> 20} MiB in {len(shards)} shards; "
        f"native level: {available or 'none'}"
    )
    print(f"{'':52} {'GB/cpu-s':>9} {'GB/s':>7} {'of cat':>7} {'x torch loop':>13}")
    for some, bytes_of, copy in ((rows, n_bytes, plain), (whole, size, plain_shards)):
        for name, (cpu, wall) in some:
            print(
                f"{name:52} {bytes_of / cpu / 1e9:9.2f} {bytes_of / wall / 1e9:7.2f} {copy[1] / wall:7.2f} "
                f"{torch_loop[0] / n_bytes * bytes_of / cpu:13.1f}"
            )


def cat(*paths):
    """(CPU seconds of the child, wall seconds) of the fastest of five."""
    times = []
    for _ in range(5):
        before, wall = os.times(), time.perf_counter()
        with open(os.devnull, "wb") as sink:
            subprocess.run(["cat", *paths], stdout=sink, check=True)
        after = os.times()
        cpu = after.children_user + after.children_system - before.children_user - before.children_system
        times.append((max(cpu, 0.01), time.perf_counter() - wall))
    return tuple(min(column) for column in zip(*times, strict=True))


if __name__ == "__main__":
    main()
