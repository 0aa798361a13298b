"""What `doctor quantize --plan` says of models that few machines hold, and whether runs take what it says.

Shapes: six checkpoints of their true shapes, header and index whole, tensor bytes a hole in a sparse file. Sweep:
models of a few decoder layers with a wide MLP, quantized for real, each in a process of its own; its highest resident
memory against the plan's. Experts: the same for mixtures that differ in the number of experts only.

    python bench/plan.py [--sweep 4096,8192,12288 [--layers 1] [--memory GIB]] [--experts 16,64,256]
"""

import argparse
import json
import math
import os
import re
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SIZES = {"BF16": 2, "F8_E4M3": 1, "F32": 4, "I32": 4, "I64": 8}
GB = 1 << 30


class Model:
    """config.json and tensors (name -> dtype, shape) of a checkpoint."""

    def __init__(self, kind: str, **config):
        self.config = {"model_type": kind, "torch_dtype": "bfloat16", "tie_word_embeddings": False, **config}
        self.tensors: dict[str, tuple[str, list[int]]] = {}
        self.plain("model.embed_tokens", config["vocab_size"], config["hidden_size"])
        self.plain("lm_head", config["vocab_size"], config["hidden_size"])
        self.plain("model.norm", config["hidden_size"])

    def plain(self, name: str, *shape: int) -> None:
        self.tensors[f"{name}.weight"] = ("BF16", list(shape))

    def fp8(self, name: str, n: int, k: int) -> None:
        self.tensors[f"{name}.weight"] = ("F8_E4M3", [n, k])
        self.tensors[f"{name}.weight_scale_inv"] = ("F32", [-(-n // 128), -(-k // 128)])

    def int4(self, name: str, n: int, k: int) -> None:
        self.tensors[f"{name}.weight_packed"] = ("I32", [n, k // 8])
        self.tensors[f"{name}.weight_scale"] = ("BF16", [n, k // 32])
        self.tensors[f"{name}.weight_shape"] = ("I32", [2])

    def norms(self, at: str) -> None:
        for name in ("input_layernorm", "post_attention_layernorm"):
            self.plain(f"{at}.{name}", self.config["hidden_size"])

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True)
        header, end = {}, 0
        for name, (dtype, shape) in self.tensors.items():
            begin, end = end, end + SIZES[dtype] * math.prod(shape)
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        raw = json.dumps(header).encode()
        raw += b" " * (-len(raw) % 8)
        with open(folder / "model.safetensors", "wb") as file:
            file.write(struct.pack("<Q", len(raw)) + raw)
            file.truncate(8 + len(raw) + end)
        (folder / "config.json").write_text(json.dumps(self.config))
        return folder


def dense(kind: str, layers: int, hidden: int, inner: int, heads: int, kv: int, vocab: int) -> Model:
    classes = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
    model = Model(
        kind,
        architectures=[classes[kind]],
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        vocab_size=vocab,
        max_position_embeddings=32768,
    )
    width = hidden // heads * kv
    for i in range(layers):
        at = f"model.layers.{i}"
        for role, rows in (("q", hidden), ("k", width), ("v", width), ("o", hidden)):
            model.plain(f"{at}.self_attn.{role}_proj", rows, hidden)
            if kind == "qwen2" and role != "o":
                model.tensors[f"{at}.self_attn.{role}_proj.bias"] = ("BF16", [rows])
        for role in ("gate", "up"):
            model.plain(f"{at}.mlp.{role}_proj", inner, hidden)
        model.plain(f"{at}.mlp.down_proj", hidden, inner)
        model.norms(at)
    return model


def mixture(layers: int, hidden: int, inner: int, experts: int, heads: int, kv: int, head: int) -> Model:
    """A Qwen3-MoE."""
    model = Model(
        "qwen3_moe",
        architectures=["Qwen3MoeForCausalLM"],
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        moe_intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        head_dim=head,
        num_experts=experts,
        num_experts_per_tok=8,
        vocab_size=151936,
        max_position_embeddings=32768,
    )
    for i in range(layers):
        at = f"model.layers.{i}"
        for role, n, k in (("q", heads * head, hidden), ("k", kv * head, hidden), ("v", kv * head, hidden)):
            model.plain(f"{at}.self_attn.{role}_proj", n, k)
        model.plain(f"{at}.self_attn.o_proj", hidden, heads * head)
        for name in ("q_norm", "k_norm"):
            model.plain(f"{at}.self_attn.{name}", head)
        model.plain(f"{at}.mlp.gate", experts, hidden)
        for e in range(experts):
            for role, n, k in (("gate", inner, hidden), ("up", inner, hidden), ("down", hidden, inner)):
                model.plain(f"{at}.mlp.experts.{e}.{role}_proj", n, k)
        model.norms(at)
    return model


def deepseek(experts: int, heads: int, stored: str) -> Model:
    """DeepSeek-V3's layers: attention of low rank, and experts as `stored`."""
    hidden, inner, vocab = 7168, 2048, 129280 if stored == "fp8" else 163840
    fp8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "group_size": 32, "strategy": "group"}
    int4 = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"],
    }
    model = Model(
        "deepseek_v3",
        architectures=["DeepseekV3ForCausalLM"],
        hidden_size=hidden,
        intermediate_size=18432,
        moe_intermediate_size=inner,
        num_hidden_layers=61,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        n_routed_experts=experts,
        n_shared_experts=1,
        num_experts_per_tok=8,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=3 if stored == "fp8" else 1,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        vocab_size=vocab,
        max_position_embeddings=131072,
        quantization_config=fp8 if stored == "fp8" else int4,
    )
    other, expert = (model.fp8, model.fp8) if stored == "fp8" else (model.plain, model.int4)
    for i in range(61):
        at = f"model.layers.{i}"
        other(f"{at}.self_attn.q_a_proj", 1536, hidden)
        other(f"{at}.self_attn.q_b_proj", heads * 192, 1536)
        other(f"{at}.self_attn.kv_a_proj_with_mqa", 576, hidden)
        other(f"{at}.self_attn.kv_b_proj", heads * 256, 512)
        other(f"{at}.self_attn.o_proj", hidden, heads * 128)
        model.plain(f"{at}.self_attn.q_a_layernorm", 1536)
        model.plain(f"{at}.self_attn.kv_a_layernorm", 512)
        model.norms(at)
        if i < model.config["first_k_dense_replace"]:
            for role, n, k in (("gate", 18432, hidden), ("up", 18432, hidden), ("down", hidden, 18432)):
                other(f"{at}.mlp.{role}_proj", n, k)
            continue
        model.plain(f"{at}.mlp.gate", experts, hidden)
        model.tensors[f"{at}.mlp.gate.e_score_correction_bias"] = ("F32", [experts])
        for name, put in [("shared_experts", other), *((f"experts.{e}", expert) for e in range(experts))]:
            for role, n, k in (("gate", inner, hidden), ("up", inner, hidden), ("down", hidden, inner)):
                put(f"{at}.mlp.{name}.{role}_proj", n, k)
    return model


SHAPES = {  # name -> (model, GiB wanted of memory)
    "Qwen2-72B": (lambda: dense("qwen2", 80, 8192, 29568, 64, 8, 152064), 12),
    "Qwen1.5-110B": (lambda: dense("qwen2", 80, 8192, 49152, 64, 8, 152064), 18),
    "Qwen3-235B-A22B": (lambda: mixture(94, 4096, 1536, 128, 64, 4, 128), None),
    "Llama-3.1-405B": (lambda: dense("llama", 126, 16384, 53248, 128, 8, 128256), 26),
    "DeepSeek-V3, FP8": (lambda: deepseek(256, 128, "fp8"), 24),
    "Kimi-K2, INT4": (lambda: deepseek(384, 64, "int4"), 32),
}


def shapes(folder: Path) -> None:
    from doctor.core.recipe import Recipe
    from doctor.quant.quantize import plan

    print("shape               least GiB   wanted   with hidden states and reading ahead   GPU GiB   seconds")
    for name, (made, wanted) in SHAPES.items():
        source = made().write(folder / re.sub(r"\W", "_", name))
        started = time.perf_counter()
        found = plan(source, folder / "out", Recipe(), rows=128, max_seq_length=512, memory=1 << 40, calibration="text")
        took = time.perf_counter() - started
        least, on_device = found.need.fixed / GB, found.need.on_device / GB
        print(f"{name:18} {least:10.1f} {wanted or '':8} {found.running / GB:37.1f} {on_device:9.1f} {took:9.1f}")
        print("    " + ", ".join(f"{what} {size / GB:.2f}" for what, size in found.need.parts()), flush=True)


CHILD = """
import json, re, sys
from pathlib import Path
from doctor.core.recipe import Recipe
from doctor.quant import import_stubs
from doctor.quant.quantize import plan, quantize
from doctor.lint.engine import load_rules
import_stubs.install()
source, text, memory = sys.argv[1], sys.argv[2], int(sys.argv[3]) or None
rows, length = 8, 256
need = plan(source, source + ".out", Recipe(), rows=rows, max_seq_length=length, memory=memory, calibration=text)
done = quantize(source, source + ".out", Recipe(), calibration=text, rows=rows, max_seq_length=length, memory=memory,
                select=("O",), progress=lambda line: print(line, file=sys.stderr))
peak = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
print(json.dumps({"plan": need.running, "least": need.need.fixed, "peak": peak, "ok": done.output is not None}))
"""


def run(source: Path, text: Path, memory: int = 0) -> dict:
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(source), str(text), str(memory)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return {**json.loads(done.stdout.splitlines()[-1]), "seconds": time.perf_counter() - started}


def fill(source: Path) -> Path:
    """Normal weights into the hole of a checkpoint, and a tokenizer beside it."""
    import numpy as np

    from doctor.lint.testing import tiny

    rng = np.random.default_rng(0)
    with open(source / "model.safetensors", "r+b") as file:
        size = struct.unpack("<Q", file.read(8))[0]
        header = json.loads(file.read(size))
        for name, tensor in header.items():
            count = math.prod(tensor["shape"])
            file.seek(8 + size + tensor["data_offsets"][0])
            for at in range(0, count, 1 << 24):
                part = min(count - at, 1 << 24)
                values = rng.standard_normal(part, dtype=np.float32) * 0.02 + ("norm" in name)
                file.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())
    for name, document in tiny("llama").json.items():
        if name.startswith("tokenizer"):
            (source / name).write_text(json.dumps(document))
    return source


def ids(folder: Path) -> Path:
    import random

    rng, path = random.Random(0), folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"input_ids": [1, *rng.choices(range(3, 96), k=255)]}) for _ in range(8)))
    return path


def report(name: str, found: dict) -> None:
    share = found["peak"] / found["plan"] - 1
    print(
        f"{name:14} plan {found['plan'] / GB:6.2f} GiB, peak {found['peak'] / GB:6.2f} GiB ({share:+.0%}), "
        f"{found['seconds']:6.0f} s",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweep", default="", help="widths of the MLP")
    parser.add_argument("--layers", type=int, default=2, help="decoder layers of the sweep's models")
    parser.add_argument("--memory", type=float, default=0, help="GiB that the sweep's runs may take; none: no limit")
    parser.add_argument("--experts", default="", help="numbers of experts")
    parser.add_argument("--skip-shapes", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as name:
        folder = Path(name)
        if not options.skip_shapes:
            shapes(folder)
        for width in map(int, filter(None, options.sweep.split(","))):
            made = dense("llama", options.layers, 1024, width, 8, 8, 96)
            source = fill(made.write(folder / f"w{width}"))
            report(f"width {width}", run(source, ids(folder), int(options.memory * GB)))
        for count in map(int, filter(None, options.experts.split(","))):
            made = mixture(2, 512, 256, count, 8, 8, 64)
            made.config["vocab_size"] = 96
            for part in ("model.embed_tokens", "lm_head"):
                made.plain(part, 96, 512)
            report(f"experts {count}", run(fill(made.write(folder / f"e{count}")), ids(folder)))


if __name__ == "__main__":
    main()
