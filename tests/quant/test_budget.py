"""What a run takes is worked out from headers, by hand here, and it does not grow with the number of blocks."""

import json
import os
import struct
import subprocess
import sys
from dataclasses import replace

import pytest

from doctor.checkpoint.directory import Checkpoint
from doctor.core.recipe import Recipe
from doctor.lint.testing import tiny
from doctor.model.spec import build_spec
from doctor.quant import budget, solving_budget
from doctor.quant.quantize import plan
from doctor.scan import native

HIDDEN, WIDE, KV, VOCAB, BLOCKS = 8192, 29568, 1024, 152064, 80
# One block: q and o [h, h], k and v [kv, h], gate, up and down, biases of q, k and v, two norms.
BLOCK = 2 * HIDDEN**2 + 2 * KV * HIDDEN + 3 * HIDDEN * WIDE + HIDDEN + 2 * KV + 2 * HIDDEN


def headers_of_72b(folder):
    """Qwen2.5-72B as headers over a file with a hole of its size: not a byte of weights."""
    shapes = {
        "model.embed_tokens.weight": [VOCAB, HIDDEN],
        "lm_head.weight": [VOCAB, HIDDEN],
        "model.norm.weight": [HIDDEN],
    }
    for i in range(BLOCKS):
        at = f"model.layers.{i}."
        for role, rows in (("q", HIDDEN), ("k", KV), ("v", KV)):
            shapes |= {f"{at}self_attn.{role}_proj.weight": [rows, HIDDEN], f"{at}self_attn.{role}_proj.bias": [rows]}
        shapes |= {
            f"{at}self_attn.o_proj.weight": [HIDDEN, HIDDEN],
            f"{at}mlp.gate_proj.weight": [WIDE, HIDDEN],
            f"{at}mlp.up_proj.weight": [WIDE, HIDDEN],
            f"{at}mlp.down_proj.weight": [HIDDEN, WIDE],
            f"{at}input_layernorm.weight": [HIDDEN],
            f"{at}post_attention_layernorm.weight": [HIDDEN],
        }
    header, at = {}, 0
    for name, shape in shapes.items():
        size = 2
        for n in shape:
            size *= n
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    folder.mkdir()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + at)
    (folder / "config.json").write_text(
        json.dumps(
            {
                "model_type": "qwen2",
                "architectures": ["Qwen2ForCausalLM"],
                "hidden_size": HIDDEN,
                "intermediate_size": WIDE,
                "num_hidden_layers": BLOCKS,
                "num_attention_heads": 64,
                "num_key_value_heads": 8,
                "vocab_size": VOCAB,
                "max_position_embeddings": 32768,
                "tie_word_embeddings": False,
            }
        )
    )
    return folder


def test_a_72b_model_is_planned_from_its_headers(tmp_path):
    found = plan(
        headers_of_72b(tmp_path / "m"), tmp_path / "out", Recipe(), rows=128, max_seq_length=2048, memory=48 << 30
    )
    need = found.need
    assert (found.blocks, need.ahead) == (80, need.block)
    assert 0 <= need.block - 2 * BLOCK <= 2 * (HIDDEN + 2 * KV + 2 * HIDDEN)  # biases and norms in float32
    assert need.hessians == 4 * WIDE**2  # down's
    assert need.computing == 4 * WIDE * HIDDEN
    # Codes and their transpose, packed panels, and float32 weights and errors of some rows.
    assert need.solving <= 2 * WIDE * HIDDEN + 3 * solving_budget.LOOP_BYTES + solving_budget.PACKED_BYTES
    assert need.outside == 2 * VOCAB * HIDDEN
    assert need.on_device == 4 * BLOCK + need.solving_on_device
    assert need.solving_on_device == need.hessians + 4 * (6 * WIDE**2 + 6 * WIDE * HIDDEN)  # of torch
    assert need.hidden == 128 * 2048 * HIDDEN * 4
    assert need.fixed == need.constant + need.block + need.packed + need.hessians + max(
        need.solving, need.computing + need.batch
    )
    assert need.fixed < 12 << 30
    packed = {
        (n, k): n * k // 2 + n * k // 128 * 2 + n * k // 128 // 2 + 4 * k
        for n, k in ((HIDDEN, HIDDEN), (KV, HIDDEN), (WIDE, HIDDEN), (HIDDEN, WIDE))
    }
    block = (
        2 * packed[HIDDEN, HIDDEN]
        + 2 * packed[KV, HIDDEN]
        + 2 * packed[WIDE, HIDDEN]
        + packed[HIDDEN, WIDE]
        + 2 * (HIDDEN + 2 * KV + 2 * HIDDEN)
    )
    assert need.packed == block - 2 * (HIDDEN + 2 * KV + 2 * HIDDEN)
    assert need.output == 80 * block + 2 * (2 * VOCAB * HIDDEN + HIDDEN)
    assert found.disk == 2 * need.output + (need.hidden if found.hidden_on_disk else 0)
    assert found.peak <= 48 << 30
    assert found.lines()[0].startswith(
        f"memory  {found.running / 2**30:.2f} GiB at the peak: one decoder layer as stored 1.63 GiB"
    )


def test_the_plan_says_what_would_not_fit(tmp_path):
    found = plan(headers_of_72b(tmp_path / "m"), tmp_path / "out", Recipe(), memory=4 << 30)
    assert next(p.partition(":")[0] for p in found.problems) == "memory" and "4.00 GiB allowed" in found.problems[0]


def test_depth_does_not_enter(tmp_path):
    checkpoint = Checkpoint.open(headers_of_72b(tmp_path / "m"))
    spec = build_spec(checkpoint.value("config.json"), checkpoint.tensors)
    need = budget.needs(checkpoint, spec, Recipe(), 8, 64)
    half = {n: t for n, t in checkpoint.tensors.items() if not any(f".layers.{i}." in n for i in range(40, 80))}
    checkpoint.__dict__["tensors"] = half
    config = {**checkpoint.value("config.json"), "num_hidden_layers": 40}
    fewer = budget.needs(checkpoint, build_spec(config, half), Recipe(), 8, 64)
    assert fewer.fixed == need.fixed and fewer.output < need.output


@pytest.mark.skipif(native.level() is None, reason="needs the native library")
def test_the_plan_puts_squares_on_disk_where_the_limit_asks_for_it(tmp_path):
    checkpoint = Checkpoint.open(headers_of_72b(tmp_path / "m"))
    spec = build_spec(checkpoint.value("config.json"), checkpoint.tensors)
    whole = budget.needs(checkpoint, spec, Recipe(), 128, 512, 12 << 30)
    tight = budget.needs(checkpoint, spec, Recipe(), 128, 512, 6 << 30)
    assert not whole.squares_on_disk and tight.squares_on_disk == 2 * whole.hessians
    assert tight.fixed < 6 << 30 < whole.fixed and tight.disk == whole.disk + tight.squares_on_disk
    budget.require(tight, 6 << 30)
    assert "Hessians on disk, read by rows" in [what for what, _size in replace(tight, outside=0).parts()]
    assert not budget.needs(checkpoint, spec, Recipe(method="awq", sym=False), 128, 512, 1 << 30).squares_on_disk


MEASURED = """
import json, os, re, sys
import torch
torch.manual_seed(0)
folder, layers = sys.argv[1], int(sys.argv[2])
from transformers import AutoConfig, AutoModelForCausalLM
if len(sys.argv) == 3:
    config = AutoConfig.for_model(
        "llama", hidden_size=128, intermediate_size=384, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=4, vocab_size=96, max_position_embeddings=64, bos_token_id=1, eos_token_id=2)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
else:
    from doctor import api
    from doctor.core.recipe import Recipe
    peaks = []
    def said(line):
        if line.startswith("layer"):
            status = open("/proc/self/status").read()
            peaks.append(int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]) * 1024)
    api.quantize(folder, folder + ".out", Recipe(group_size=64), calibration=sys.argv[3], rows=8, max_seq_length=64,
                 select=("O",), progress=said)
    print(json.dumps(peaks))
"""


def test_quantize_says_at_the_start_that_the_disk_will_not_do(tmp_path, monkeypatch):
    from doctor import api
    from doctor.core.machine import Machine

    monkeypatch.setattr(
        "doctor.quant.prepare.measure", lambda *asked: Machine("OUT", 64 << 30, 1 << 30, 1 << 20, 64 << 20)
    )
    done = api.quantize(tiny("llama").write(tmp_path / "m"), tmp_path / "q", Recipe(method="rtn", group_size=32))
    assert [f.code for f in done.report.findings] == ["G314"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_hundred_layers_take_no_more_memory_than_the_first_few(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"input_ids": [1 + (i * j) % 90 for j in range(1, 65)]}) for i in range(1, 9)))
    run = [sys.executable, "-c", MEASURED, str(tmp_path / "m"), "100"]
    subprocess.run(run, check=True, timeout=120, capture_output=True)
    done = subprocess.run(
        [*run, str(rows)], timeout=240, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    peaks = json.loads(done.stdout.splitlines()[-1])
    assert len(peaks) == 100
    checkpoint = Checkpoint.open(tmp_path / "m")
    need = budget.needs(
        checkpoint, build_spec(checkpoint.value("config.json"), checkpoint.tensors), Recipe(group_size=64), 8, 64
    )
    assert peaks[-1] - peaks[9] < 16 << 20  # 90 layers are 38 MB as stored and 77 MB in float32
    assert peaks[-1] < need.fixed + need.hidden
