"""How fast weights are rounded without a model, against `cp` of the same bytes: python bench/stream.py [--size 2].

Writes a made checkpoint of random bfloat16 weights (the shapes of an 8B Llama, as many layers as the size asks for)
into shards of about 0.5 GB, copies it with cp, and rounds it by each scheme; every run in a process of its own, which
also tells its peak memory and the seconds of processor that it took. Figures are of the rounding alone: from the first
byte read to the last one synced, without the checks before and after.

Both take the files from the page cache where they fit there. On a machine that others use, compare columns of one run
only.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCHEMES = ("FP8_DYNAMIC", "FP8_BLOCK", "INT8", "NVFP4A16", "MXFP4A16", "MXFP8")
HIDDEN, INNER, KV = 4096, 14336, 1024


def made(folder: Path, gigabytes: float) -> int:
    """Writes the checkpoint; returns its bytes."""
    import torch
    from safetensors.torch import save_file

    shapes = {"q": (HIDDEN, HIDDEN), "k": (KV, HIDDEN), "v": (KV, HIDDEN), "o": (HIDDEN, HIDDEN)}
    inner = {"gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER)}
    layers = max(1, round(gigabytes * 1e9 / 436e6))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 1024,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    weight_map, total = {}, 0
    for i in range(layers):
        rng = torch.Generator().manual_seed(i)
        stem = f"model.layers.{i}."
        names = {f"{stem}self_attn.{r}_proj.weight": s for r, s in shapes.items()}
        names |= {f"{stem}mlp.{r}_proj.weight": s for r, s in inner.items()}
        tensors = {n: (torch.randn(s, generator=rng) * 0.02).to(torch.bfloat16) for n, s in names.items()}
        file = f"model-{i + 1:05d}-of-{layers:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def one(folder: Path, out: Path, scheme: str) -> dict:
    """In this process: seconds and peak memory of rounding alone."""
    from doctor.checkpoint.directory import Checkpoint
    from doctor.core.recipe import Recipe
    from doctor.core.store import Store
    from doctor.formats.schemes import fields_of
    from doctor.model.spec import build_spec
    from doctor.quant.export import Output
    from doctor.quant.stream.choose import choose
    from doctor.quant.stream.run import run

    checkpoint = Checkpoint.open(folder)
    spec = build_spec(checkpoint.value("config.json"), checkpoint.tensors)
    recipe = Recipe(**fields_of(scheme, {"method": "rtn"}))
    staged = Output.open(out, {})
    started, before = time.perf_counter(), time.process_time()
    run(choose(checkpoint, spec, recipe, {}, Store()), recipe, staged, Store(), [])
    seconds, processor = time.perf_counter() - started, time.process_time() - before
    status = Path("/proc/self/status").read_text()
    peak = int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024
    size = sum(p.stat().st_size for p in staged.stage.glob("*.safetensors"))
    staged.discard()
    return {"seconds": seconds, "processor": processor, "peak": peak, "bytes": size}


def copied(folder: Path, out: Path) -> float:
    """Seconds of cp and sync."""
    started = time.perf_counter()
    subprocess.run(["cp", "-r", "--reflink=never", str(folder), str(out)], check=True)
    subprocess.run(["sync", "-f", str(out)], check=True)
    seconds = time.perf_counter() - started
    shutil.rmtree(out)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=float, default=2.0, help="gigabytes of the made checkpoint")
    parser.add_argument("--folder", type=Path, default=None, help="where to write; a temporary folder by default")
    parser.add_argument("--one", nargs=3, metavar=("FOLDER", "OUT", "SCHEME"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(Path(options.one[0]), Path(options.one[1]), options.one[2])))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        folder = Path(place) / "made"
        folder.mkdir()
        total = made(folder, options.size)
        print(f"{total / 1e9:.2f} GB of bfloat16")
        for scheme in SCHEMES:
            copy = copied(folder, Path(place) / "copy")
            command = [sys.executable, __file__, "--one", str(folder), f"{place}/out", scheme]
            ran = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            pace = total / ran["seconds"] / 1e9
            print(
                f"{scheme:<12} {ran['seconds']:6.2f} s ({ran['processor']:.2f} of processor) {pace:5.2f} GB/s, "
                f"{ran['bytes'] / 1e9:.2f} GB written, "
                f"peak {ran['peak'] / 2**20:.0f} MiB; cp {copy:6.2f} s {total / copy / 1e9:5.2f} GB/s: "
                f"{copy / ran['seconds']:.2f} of its pace"
            )


if __name__ == "__main__":
    main()
