"""How long a check of headers takes from a cold interpreter: a checkpoint of 300 tensors, and one of 50,000 in 16
shards.

The files are made here: real names and shapes, header and index whole, tensor bytes a hole in a sparse file. Each
figure is the least of several runs of `doctor check --stage header --concise` in a process of its own, so it holds the
interpreter's start and all imports. CPU seconds are user and system time of that process; wall seconds depend on what
else the machine does.

    python bench/header.py [--runs 5]
"""

import argparse
import json
import math
import os
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LIMITS = {"300 tensors": 0.35, "50,000 tensors": 2.0}  # seconds we hold ourselves to on an idle machine


def dense(blocks: int = 33) -> tuple[dict, dict]:
    """(config, tensor -> shape) of a Llama with 9 tensors a block."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": blocks,
        "vocab_size": 128256,
    }
    shapes = {
        "model.embed_tokens.weight": [128256, 4096],
        "lm_head.weight": [128256, 4096],
        "model.norm.weight": [4096],
    }
    sizes = {
        "self_attn.q_proj": [4096, 4096],
        "self_attn.k_proj": [1024, 4096],
        "self_attn.v_proj": [1024, 4096],
        "self_attn.o_proj": [4096, 4096],
        "mlp.gate_proj": [14336, 4096],
        "mlp.up_proj": [14336, 4096],
        "mlp.down_proj": [4096, 14336],
        "input_layernorm": [4096],
        "post_attention_layernorm": [4096],
    }
    shapes |= {f"model.layers.{i}.{name}.weight": shape for i in range(blocks) for name, shape in sizes.items()}
    return _common(config), shapes


def mixture(blocks: int = 65, experts: int = 256) -> tuple[dict, dict]:
    """(config, tensor -> shape) of a Qwen3 mixture of experts: 50,508 tensors."""
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_hidden_layers": blocks,
        "vocab_size": 151936,
        "num_experts": experts,
        "num_experts_per_tok": min(8, experts),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    shapes = {
        "model.embed_tokens.weight": [151936, 2048],
        "lm_head.weight": [151936, 2048],
        "model.norm.weight": [2048],
    }
    sizes = {
        "self_attn.q_proj": [4096, 2048],
        "self_attn.k_proj": [512, 2048],
        "self_attn.v_proj": [512, 2048],
        "self_attn.o_proj": [2048, 4096],
        "self_attn.q_norm": [128],
        "self_attn.k_norm": [128],
        "mlp.gate": [experts, 2048],
        "input_layernorm": [2048],
        "post_attention_layernorm": [2048],
    }
    for e in range(experts):
        sizes |= {
            f"mlp.experts.{e}.gate_proj": [768, 2048],
            f"mlp.experts.{e}.up_proj": [768, 2048],
            f"mlp.experts.{e}.down_proj": [2048, 768],
        }
    shapes |= {f"model.layers.{i}.{name}.weight": shape for i in range(blocks) for name, shape in sizes.items()}
    return _common(config), shapes


def _common(config: dict) -> dict:
    return config | {
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def write(folder: Path, config: dict, shapes: dict, shards: int) -> Path:
    """A checkpoint of bfloat16 zeros that takes no room: each shard is its header and a hole."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    names, weight_map, total = list(shapes), {}, 0
    step = -(-len(names) // shards)
    for part in range(shards):
        file = f"model-{part + 1:05d}-of-{shards:05d}.safetensors" if shards > 1 else "model.safetensors"
        header, at = {"__metadata__": {"format": "pt"}}, 0
        for name in names[part * step : (part + 1) * step]:
            size = 2 * math.prod(shapes[name])
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [at, at + size]}
            weight_map[name] = file
            at += size
        total += at
        raw = json.dumps(header).encode()
        raw += b" " * (-len(raw) % 8)
        with open(folder / file, "wb") as out:
            out.write(struct.pack("<Q", len(raw)) + raw)
            out.truncate(8 + len(raw) + at)
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
        )
    return folder


def measure(folder: Path, runs: int, cache: Path) -> tuple[float, float]:
    """(least wall seconds, least CPU seconds) of a check in a fresh process; the first run, which compiles, is not
    counted.
    """
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | {
        "PYTHONPYCACHEPREFIX": str(cache)
    }
    command = [
        sys.executable,
        "-m",
        "doctor",
        "check",
        str(folder),
        "--stage",
        "header",
        "--concise",
        "--config",
        "none",
        "--fail-on",
        "never",
    ]
    wall, cpu = [], []
    for _ in range(runs + 1):
        before, start = os.times(), time.perf_counter()
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        wall.append(time.perf_counter() - start)
        after = os.times()
        cpu.append(after.children_user + after.children_system - before.children_user - before.children_system)
    return min(wall[1:]), min(cpu[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as temporary:
        for label, (config, shapes), shards in (("300 tensors", dense(), 1), ("50,000 tensors", mixture(), 16)):
            folder = write(Path(temporary) / str(shards), config, shapes, shards)
            wall, cpu = measure(folder, runs, Path(temporary) / "bytecode")
            print(
                f"{label:<15} {len(shapes):>6} tensors  {wall:.2f} s wall  {cpu:.2f} s CPU  (limit {LIMITS[label]} "
                f"s)  load {os.getloadavg()[0]:.1f}"
            )


if __name__ == "__main__":
    main()
