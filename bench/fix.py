"""What a fix costs beside copying: one JSON value, one shard, every MLP padded, on a generated sharded checkpoint.

Prints seconds of the write (without the scans before and after, which `bench/scan.py` measures), bytes written and the
ratio to `cp` of the same bytes, each the best of several runs that take turns. `cp` does not sync, the writer does: a
`cp` followed by `sync` of the files stands beside it. Last the whole command for one JSON value, with what it read:
each weight once, before the write, and none after it; the same in place, and its undo.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from doctor import api
from doctor.checkpoint.directory import Checkpoint
from doctor.edits.kinds import PadTensor, SetJson
from doctor.edits.overlay import EditedCheckpoint
from doctor.fixing.filesystem import Carry
from doctor.fixing.in_place import after_name, kept_name
from doctor.fixing.overlay_writer import write_overlay
from doctor.fixing.staging import open_staging
from doctor.lint.testing import shard_bytes


def build(folder: Path, hidden: int, width: int, blocks: int, shards: int) -> None:
    """A sharded llama of bf16 noise; every block is alike, which no part of the writer notices."""
    rng = np.random.default_rng(0)
    noise = (rng.integers(0, 1 << 16, (width, hidden), dtype=np.uint16) & 0xBFFF) | 0x3000
    square = noise[:hidden]
    folder.mkdir(parents=True)
    weight_map, total = {}, 0
    for shard in range(shards):
        tensors = {}
        for i in range(shard * blocks // shards, (shard + 1) * blocks // shards):
            at = f"model.layers.{i}."
            tensors |= {
                f"{at}mlp.down_proj.weight": np.ascontiguousarray(noise.T),
                f"{at}mlp.gate_proj.weight": noise,
                f"{at}mlp.up_proj.weight": noise,
            }
            tensors |= {f"{at}self_attn.{n}_proj.weight": square for n in "qkvo"}
        name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        (folder / name).write_bytes(shard_bytes(tensors, dict.fromkeys(tensors, "BF16")))
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(t.nbytes for t in tensors.values())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
    )
    (folder / "config.json").write_text(
        json.dumps({"model_type": "llama", "intermediate_size": width, "bos_token_id": None}, indent=2)
    )


def best(times: int, *actions) -> list[float]:
    """Least seconds of each action; they take turns, so that a busy minute of the machine meets them all."""
    seconds = [[] for _ in actions]
    for _ in range(times):
        for action, taken in zip(actions, seconds, strict=True):
            os.sync()
            start = time.perf_counter()
            action()
            taken.append(time.perf_counter() - start)
    return [min(taken) for taken in seconds]


def write(overlay: EditedCheckpoint, output: Path, carry: Carry) -> None:
    shutil.rmtree(output, ignore_errors=True)
    with open_staging(overlay, output, carry=carry) as staging:
        write_overlay(overlay, staging, carry=carry)
        staging.commit()


def whole_command(work: Path, times: int) -> None:
    """`fix` of one JSON value from Python, scans included, beside a check alone."""
    (work / "source" / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"})
    )
    config = json.loads((work / "source" / "config.json").read_text())
    config |= {
        "architectures": ["LlamaForCausalLM"],
        "torch_dtype": "float16",
    }  # the tensors are bf16: C152, cured in config.json alone
    (work / "source" / "config.json").write_text(json.dumps(config, indent=2))
    read = {"scan": 0, "verify": 0}

    def fix() -> None:
        shutil.rmtree(work / "out", ignore_errors=True)
        read.update(scan=0, verify=0)
        result = api.fix(
            work / "source",
            work / "out",
            only=("C152",),
            progress=lambda phase, n: read.__setitem__(phase, read.get(phase, 0) + n),
        )
        assert [s.code for s in result.plan.steps] == ["C152"] and result.receipt_path

    command, check = best(times, fix, lambda: api.check(work / "source"))
    print(
        f"whole fix of one JSON value {command:.3f} s, check alone {check:.3f} s, ratio {command / check:.2f}; "
        f"{read['scan']:,} bytes of weights read before the write, {read['verify']:,} after it"
    )


def in_place(work: Path, times: int) -> None:
    """The same `fix` in place, which keeps the old directory under another name, and `undo`, which puts it back."""
    source, fixes, undos = work / "source", [], []
    for _ in range(times):
        os.sync()
        start = time.perf_counter()
        api.fix(source, None, only=("C152",), in_place=True)
        fixes.append(time.perf_counter() - start)
        kept = kept_name(source)
        own = sum(p.stat().st_blocks * 512 for p in source.iterdir() if p.stat().st_nlink == 1)
        start = time.perf_counter()
        api.undo(source)
        undos.append(time.perf_counter() - start)
        assert not kept.exists()
        shutil.rmtree(after_name(source), ignore_errors=True)
    print(f"in place {min(fixes):.3f} s, {own:,} bytes of its own beside the kept directory; undo {min(undos):.3f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--dir", type=Path, help="where to work (default: a temporary directory)")
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--times", type=int, default=3)
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="bench-fix-", dir=options.dir))
    try:
        run(work, options.blocks, options.times)
    finally:
        shutil.rmtree(work)


def run(work: Path, blocks: int, times: int) -> None:
    hidden, width, shards = 1536, 4864, 4
    build(work / "source", hidden, width, blocks, shards)
    source = Checkpoint.open(work / "source")
    size = sum(e.size for e in source.entries.values())
    names = list(source.shards)
    print(
        f"{size / 1e9:.2f} GB in {shards} shards, {blocks} blocks of hidden {hidden}, MLP {width} → 5120; best of "
        f"{times}"
    )

    def copy(files, sync):
        shutil.rmtree(work / "copy", ignore_errors=True)
        (work / "copy").mkdir()
        subprocess.run(["cp", "--reflink=never", *(work / "source" / n for n in files), work / "copy"], check=True)
        if sync:
            subprocess.run(["sync", *(work / "copy" / n for n in files)], check=True)

    edits = []
    for name in source.tensors:
        if ".mlp." in name:
            edits.append(PadTensor(name, 1 if "down" in name else 0, 5120))
    json_edit = SetJson("config.json", "/bos_token_id", 1, expect=None)
    one = [e for e in edits if source.tensors[e.tensor].shard == names[0]]
    rows = (
        ("one JSON value", [json_edit], names[:0], Carry.AUTO),
        ("the same, copied", [json_edit], names, Carry.COPY),  # what --in-place writes where blocks cannot be shared
        ("one shard's MLPs", one, names[:1], Carry.AUTO),
        ("every MLP", edits, names, Carry.AUTO),
    )
    print(
        f"{'change':<18}{'written':>12}{'write s':>9}{'cp s':>8}{'cp+sync s':>11}{'ratio cp':>10}{'ratio cp+sync':>15}"
    )
    for label, chosen, files, carry in rows:
        view = EditedCheckpoint(source, chosen)
        written = sum(e.size for n, e in view.entries.items() if carry is Carry.COPY or n in view.changed)
        copies = [lambda s=s: copy(files, s) for s in (False, True)] if files else []
        seconds, plain, synced = [
            *best(times, lambda: write(view, work / "out", carry), *copies),
            *([float("nan")] * (2 - len(copies))),
        ]
        ratios = f"{seconds / plain:>10.2f}{seconds / synced:>15.2f}" if files else f"{'-':>10}{'-':>15}"
        print(f"{label:<18}{written:>12,}{seconds:>9.3f}{plain:>8.3f}{synced:>11.3f}{ratios}", flush=True)
    whole_command(work, times)
    in_place(work, times)
    print(
        f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB, most of it from "
        f"generating the checkpoint"
    )


if __name__ == "__main__":
    main()
