"""Quantizing from the first check to the commit, on the smallest models of every family."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from doctor import api
from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import MachineError, PlanRefused
from doctor.core.recipe import Recipe
from doctor.lint.testing import FAMILIES, encode, tiny
from doctor.model.linears import Linear
from doctor.model.spec import build_spec
from doctor.quant import activations, budget, export, job, layer, setup
from doctor.quant.activations import Activations
from doctor.quant.dequantize import as_float
from doctor.quant.forward import staged, suspended
from doctor.quant.forward.hidden_states import HiddenStates, make_batches
from doctor.quant.forward.linear_groups import arrange
from doctor.quant.forward.skeleton import Skeleton
from doctor.quant.forward.spill import SpillFile
from doctor.quant.forward.staged import StagedForward
from doctor.quant.solve import gptq

RECIPE = Recipe(group_size=32)
KILLS = int(os.environ.get("DOCTOR_TEST_KILLS", "4"))


@pytest.fixture
def text(tmp_path):
    """32 rows of 64 random ids."""
    rng = random.Random(0)
    rows = [[1] + [rng.randrange(3, 96) for _ in range(63)] for _ in range(32)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"input_ids": r}) for r in rows))
    return path


def quantized(case, tmp_path, text, recipe=RECIPE, name="o", **options):
    folder = tmp_path / "m"
    if not folder.exists():
        case.write(folder)
    return api.quantize(folder, tmp_path / name, recipe, calibration=text, max_seq_length=64, **options)


def bytes_of(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def codes(findings):
    return sorted({f.code for f in findings if f.severity != "info"})


def last_hidden(checkpoint, spec, ids):
    """HiddenStates states after the last block of a checkpoint or of a dequantized view."""
    built = Skeleton(checkpoint, spec)
    with torch.no_grad():
        [(hidden, calls)] = list(built.open_calls([ids]))
        for i in range(len(built.layers)):
            built.load_layer(i)
            hidden = built.run_layer(i, hidden, calls[i])
            built.drop_layer(i)
    return hidden


class _Plain:
    """A dequantized checkpoint under the config of its original, which is how Skeleton takes it."""

    def __init__(self, view, config):
        self._view, self._config = view, config
        self.tensors, self.load, self.root = view.tensors, view.load, None

    def value(self, name):
        return self._config


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_of_every_family_is_quantized_and_closer_than_rounding(family, tmp_path, text):
    case = tiny(family)
    result = quantized(case, tmp_path, text)
    assert result.report.ok and codes(result.report.findings) == []
    assert result.output == tmp_path / "o"
    source = Checkpoint.open(tmp_path / "m")
    spec = build_spec(source.value("config.json"), source.tensors)
    assert [r["name"] for r in result.linears] and {r["name"] for r in result.linears} == {x.name for x in spec.linears}
    assert {r["outcome"] for r in result.linears} == {"gptq"}
    assert all(r["solve"]["loss"] < r["solve"]["rtn_loss"] for r in result.linears)
    ids = torch.randint(3, 96, (4, 32), generator=torch.Generator().manual_seed(1))
    want = last_hidden(source, spec, ids)
    got = last_hidden(_Plain(as_float(Checkpoint.open(result.output)), source.value("config.json")), spec, ids)
    error = float((got - want).norm() / want.norm())
    rounded = quantized(case, tmp_path, text, Recipe(method="rtn", group_size=32), name="rtn")
    coarse = last_hidden(_Plain(as_float(Checkpoint.open(rounded.output)), source.value("config.json")), spec, ids)
    assert error < float((coarse - want).norm() / want.norm())
    assert error < 0.2


def test_what_is_not_quantized_is_carried_bit_for_bit(tmp_path, text):
    quantized(tiny("qwen2"), tmp_path, text)
    before, after = Checkpoint.open(tmp_path / "m"), Checkpoint.open(tmp_path / "o")
    same = [n for n in after.tensors if n in before.tensors]
    assert "model.embed_tokens.weight" in same and "model.layers.1.self_attn.k_proj.bias" in same
    assert all((before.load(n) == after.load(n)).all() for n in same)
    packed = {n.rpartition(".")[0] for n in after.tensors if n.endswith(".qweight")}
    assert {n for n in before.tensors if n not in same} == {f"{n}.weight" for n in packed}


def test_later_linears_see_the_errors_of_earlier_ones(tmp_path, text, monkeypatch):
    """down_proj of block 0 gets inputs that quantized gate and up made: its Hessian differs from the float model's."""
    seen = {}
    real = gptq.solve

    def watch(W, H, **options):
        seen.setdefault(len(seen), H.matrix().clone())
        return real(W, H, **options)

    monkeypatch.setattr(gptq, "solve", watch)
    quantized(tiny("llama"), tmp_path, text)
    exact = dict(seen)
    seen.clear()

    def untouched(module, W, transposed):
        pass

    monkeypatch.setattr(layer, "put_weight", untouched)
    quantized(tiny("llama"), tmp_path, text, name="o2")
    assert torch.equal(exact[0], seen[0])  # q of block 0: nothing before it
    assert not torch.equal(exact[6], seen[6])  # down of block 0
    assert not torch.equal(exact[7], seen[7])  # q of block 1


def test_linears_that_share_an_input_share_a_hessian(tmp_path, text):
    result = quantized(tiny("llama"), tmp_path, text)
    hessian = {r["role"]: r["hessian"] for r in result.linears if r["block"] == 0}
    assert hessian["q"] == hessian["k"] == hessian["v"] != hessian["o"]
    assert hessian["gate"] == hessian["up"] != hessian["down"]
    assert hessian["q"]["tokens"] == 32 * 64


def test_the_same_run_writes_the_same_bytes(tmp_path, text):
    quantized(tiny("llama"), tmp_path, text)
    quantized(tiny("llama"), tmp_path, text, name="again")
    assert bytes_of(tmp_path / "o") == bytes_of(tmp_path / "again")


@pytest.mark.parametrize("call", [2, 3])
def test_an_interrupted_run_leaves_no_output_and_resumes_to_the_same_bytes(tmp_path, text, monkeypatch, call):
    quantized(tiny("llama"), tmp_path, text, name="whole")
    write, count = export.Output.write_part, 0

    def killed(self, name, tensors):
        nonlocal count
        count += 1
        if count == call:
            raise KeyboardInterrupt
        write(self, name, tensors)

    monkeypatch.setattr(export.Output, "write_part", killed)
    with pytest.raises(KeyboardInterrupt):
        quantized(tiny("llama"), tmp_path, text)
    assert not (tmp_path / "o").exists()
    monkeypatch.setattr(export.Output, "write_part", write)
    solved = []
    real = gptq.solve
    monkeypatch.setattr(gptq, "solve", lambda *a, **k: solved.append(1) or real(*a, **k))
    advance, computed = Activations.advance, []
    monkeypatch.setattr(Activations, "advance", lambda self, i: computed.append(i) or advance(self, i))
    result = quantized(tiny("llama"), tmp_path, text, resume=True)
    assert len(solved) == 7 * (2 - min(call - 1, 2))
    assert computed == ([0] if call == 2 else []), "outputs of finished layers are for those that follow"
    assert len(result.linears) == 14
    assert bytes_of(tmp_path / "o") == bytes_of(tmp_path / "whole")


# Forks a run for each line that it reads: imports are paid for once.
SERVER = """
import os, sys
import transformers.models.llama.modeling_llama
from doctor import api
from doctor.quant import quantize
from doctor.core.recipe import Recipe
folder, out, rows = sys.argv[1:]
for line in sys.stdin:
    pid = os.fork()
    if not pid:
        print(os.getpid(), flush=True)
        result = api.quantize(folder, out, Recipe(group_size=32), calibration=rows, max_seq_length=64, resume=True)
        os._exit(0 if result.output else 1)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


def test_a_kill_at_any_moment_leaves_a_run_that_is_resumed_to_the_same_bytes(tmp_path, text):
    folder, out = tiny("llama").write(tmp_path / "m"), tmp_path / "out"
    with subprocess.Popen(
        [sys.executable, "-c", SERVER, folder, out, text],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as server:

        def go(seconds=None):
            """(exit code of a run, how long it took); it is killed after so many seconds."""
            print(file=server.stdin, flush=True)
            pid, started = int(server.stdout.readline()), time.perf_counter()
            if seconds is not None:
                time.sleep(seconds)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return int(server.stdout.readline()), time.perf_counter() - started

        code, whole = go()
        assert code == 0
        want, draw, killed, ended = bytes_of(out), random.Random(7), 0, 0
        shutil.rmtree(out)
        while killed < KILLS:
            code, _ = go(draw.uniform(0, whole))
            assert code in (0, -signal.SIGKILL) and out.exists() == (code == 0)
            killed += code != 0
            if code == 0 or draw.random() < 0.3:  # some are killed again and again before they end
                assert code == 0 or go()[0] == 0
                assert bytes_of(out) == want and not [n for n in os.listdir(tmp_path) if ".doctor-" in n]
                shutil.rmtree(out)
                ended += 1
        assert go()[0] == 0 and bytes_of(out) == want
        print(f"{killed} kills, {ended + 1} runs ended whole")
        server.stdin.close()


def least_memory(folder, rows=32, length=64):
    checkpoint = Checkpoint.open(folder)
    return budget.needs(
        checkpoint, build_spec(checkpoint.value("config.json"), checkpoint.tensors), RECIPE, rows, length
    ).fixed


def test_hidden_states_on_disk_give_the_same_bytes(tmp_path, text):
    said = []
    quantized(tiny("llama"), tmp_path, text)
    quantized(tiny("llama"), tmp_path, text, name="disk", memory=least_memory(tmp_path / "m"), progress=said.append)
    assert any("hidden states take 0.00 GiB, more than 0.00 GiB: kept on disk, in" in line for line in said)
    assert any(
        "suspended forwards hold 0.00 GiB, more than 0.00 GiB: the rest is spilled to disk, in" in line for line in said
    )
    assert bytes_of(tmp_path / "o") == bytes_of(tmp_path / "disk")


def test_less_memory_than_a_layer_takes_is_refused_with_the_sum(tmp_path, text):
    least = least_memory(tiny("llama").write(tmp_path / "m"))
    with pytest.raises(
        MachineError,
        match=r"needs 0\.\d\d GiB at least: one decoder layer as stored .* and Python, torch and transformers",
    ):
        quantized(tiny("llama"), tmp_path, text, memory=least - 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "rows.jsonl"]


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("family", (*FAMILIES, "llama4_text", "gpt_oss", "granitemoe"))
def test_suspended_spilled_and_restarted_forwards_write_the_same_bytes(family, method, tmp_path, text, monkeypatch):
    recipe = Recipe(method=method, group_size=32)
    monkeypatch.setattr(setup, "BATCH_TOKENS", 512)  # four batches
    quantized(tiny(family), tmp_path, text, recipe)
    monkeypatch.setattr(staged, "greenlet", None)
    quantized(tiny(family), tmp_path, text, recipe, name="anew")
    monkeypatch.undo()
    monkeypatch.setattr(setup, "BATCH_TOKENS", 512)
    resumable = []

    class Half(StagedForward):
        file = None

        def __init__(self, *args, capacity, suspended_bytes, spill_file, **more):
            super().__init__(
                *args,
                capacity=2.5 if self.file is None else 1 << 20,
                suspended_bytes=1 / 512 if suspended_bytes < float("inf") else suspended_bytes,
                spill_file=self.file,
                **more,
            )
            resumable.append([one.resumable and (one.spill_file or True) for one in self.forwards])

    monkeypatch.setattr(activations, "StagedForward", Half)
    quantized(tiny(family), tmp_path, text, recipe, name="half")
    assert [True, True, False, False] in resumable
    Half.file = SpillFile(tmp_path)
    quantized(tiny(family), tmp_path, text, recipe, name="spilled")
    assert [Half.file] * 4 in resumable and Half.file.written > 0
    assert Half.file.end == os.fstat(Half.file._file.fileno()).st_size == 0  # every layer released its extents
    assert (
        bytes_of(tmp_path / "o")
        == bytes_of(tmp_path / "anew")
        == bytes_of(tmp_path / "half")
        == bytes_of(tmp_path / "spilled")
    )


def forwards(tmp_path, text, monkeypatch, name):
    """Calls of linears inside blocks, as a share of those of one pass of every batch through every block."""
    calls, real = 0, torch.nn.Linear.forward

    def counted(self, x):
        nonlocal calls
        calls += x.shape[:2].numel()
        return real(self, x)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Linear, "forward", counted)
        result = quantized(tiny("llama"), tmp_path, text, name=name)
    return calls / (len(result.linears) * 32 * 64)


def test_a_layer_is_computed_about_once(tmp_path, text, monkeypatch):
    monkeypatch.setattr(setup, "BATCH_TOKENS", 256)  # eight batches
    assert 1 <= forwards(tmp_path, text, monkeypatch, "once") < 1.15  # one batch more, once: to see who reads what
    monkeypatch.setattr(staged, "greenlet", None)
    assert forwards(tmp_path, text, monkeypatch, "anew") > 2.5


def test_kept_linears_stay_as_they_are_and_are_no_finding(tmp_path, text):
    result = quantized(tiny("llama"), tmp_path, text, keep=("*down_proj",))
    assert result.report.ok and codes(result.report.findings) == []
    kept = [r for r in result.linears if r["outcome"] == "kept"]
    assert [r["role"] for r in kept] == ["down", "down"] and kept[0]["solve"]["note"] == "asked for with keep"
    stated = json.loads((tmp_path / "o" / "config.json").read_text())["quantization_config"]
    assert list(stated["dynamic"]) == [rf"-:^model\.layers\.{i}\.mlp\.down_proj$" for i in (0, 1)]
    name = "model.layers.1.mlp.down_proj.weight"
    assert (Checkpoint.open(tmp_path / "m").load(name) == Checkpoint.open(tmp_path / "o").load(name)).all()


def test_experts_that_no_row_reached_are_rounded_and_found(tmp_path):
    case = tiny("qwen2_moe")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        json.dumps({"input_ids": [5] * 16})
    )  # equal tokens stay equal through attention: two experts of four
    result = quantized(case, tmp_path, rows, rows=1)
    unseen = [r for r in result.linears if r["outcome"] == "rtn"]
    assert unseen and all(r["solve"]["note"] == "no calibration row reached it" for r in unseen)
    found = {f.where.tensor or f.subject for f in result.report.findings if f.code in ("Q406", "Q410")}
    assert all(any(r["name"] in str(f) for f in found) for r in unseen)
    assert any("0 tokens reached it" in f.message for f in result.report.findings if f.code == "Q410")
    assert result.output is not None


def test_a_broken_checkpoint_is_refused_before_anything_is_written(tmp_path, text):
    case = tiny("llama")
    case.down()[3, 5] = 0x7FC0
    result = quantized(case, tmp_path, text)
    assert result.output is None and not result.report.ok
    assert "W201" in codes(result.report.findings) and result.linears == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "rows.jsonl"]


def test_fix_repairs_on_the_way_in_and_leaves_the_source_alone(tmp_path, text):
    case = tiny("llama")
    case.down()[3, 5] = 0x7FC0
    before = bytes_of(case.write(tmp_path / "m"))
    result = quantized(case, tmp_path, text, fix=True, unsafe_fixes=("W201",))
    assert result.output is not None and result.report.ok
    assert any(note.startswith("fix: W201") for note in result.notes)
    assert bytes_of(tmp_path / "m") == before


def test_activations_that_overflow_stop_the_run_at_their_layer(tmp_path, text):
    case = tiny("llama")
    case.tensors["model.layers.1.input_layernorm.weight"][:] = encode(np.full(64, 3e38), "BF16")
    said = []
    result = quantized(case, tmp_path, text, progress=said.append)
    assert result.output is None and not (tmp_path / "o").exists()
    assert "Q401" in codes(result.report.findings)
    assert {r["block"] for r in result.linears if r["outcome"] == "failed"} == {1}
    assert any(line.startswith("layer 1 of 2") for line in said) and not any(
        line.startswith("layer 2 of 2") for line in said
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "rows.jsonl"]


def test_the_destination_is_not_replaced_unless_asked(tmp_path, text):
    quantized(tiny("llama"), tmp_path, text, Recipe(method="rtn", group_size=32))
    with pytest.raises(PlanRefused, match="exists and holds"):
        quantized(tiny("llama"), tmp_path, text)
    before = (tmp_path / "o" / "model.safetensors").read_bytes()
    quantized(tiny("llama"), tmp_path, text, Recipe(method="rtn", group_size=32, bits=8), overwrite=True)
    assert (tmp_path / "o" / "model.safetensors").read_bytes() != before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "o", "rows.jsonl"]


@pytest.mark.parametrize(
    "format, sym", [("gptq_v2", False), ("gptq", False), ("compressed-tensors", True), ("compressed-tensors", False)]
)
def test_other_formats_are_checked_and_committed_too(tmp_path, text, format, sym):
    result = quantized(tiny("llama"), tmp_path, text, Recipe(method="rtn", group_size=32, format=format, sym=sym))
    assert result.report.ok and codes(result.report.findings) == [] and result.output is not None


def test_gpt2_is_quantized_though_its_linears_lie_transposed(tmp_path, text):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "gpt2", n_embd=64, n_layer=2, n_head=4, n_positions=64, vocab_size=96, bos_token_id=1, eos_token_id=2
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "m")
    result = api.quantize(
        tmp_path / "m", tmp_path / "o", RECIPE, calibration=text, max_seq_length=64, select=("Q", "G", "O")
    )
    assert {r["outcome"] for r in result.linears} == {"gptq"} and len(result.linears) == 8
    linear = next(r["name"] for r in result.linears if r["role"] == "up")
    got = torch.from_numpy(np.array(as_float(Checkpoint.open(tmp_path / "o")).load(f"{linear}.weight")))
    want = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32).transformer.h[0].mlp.c_fc.weight.T
    assert got.shape == want.shape
    assert (got - want).norm() < 0.15 * want.norm()


def test_batches_hold_rows_of_one_length():
    batches = make_batches([[1] * 2000, [2] * 3, [3] * 3, [4] * 2000, [5] * 2000], 4096)
    assert [tuple(b.shape) for b in batches] == [(2, 3), (2, 2000), (1, 2000)]


def test_hidden_states_are_kept_apart(tmp_path):
    for limit in (0, 1 << 20):
        hidden = HiddenStates([(2, 3, 4), (1, 5, 4)], [6, 5], limit, lambda: SpillFile(tmp_path))
        hidden[0], hidden[1] = torch.full((2, 3, 4), 1.0), torch.full((1, 5, 4), 2.0)
        assert hidden.on_disk == (limit == 0)
        assert hidden[0].eq(1).all() and hidden[1].eq(2).all() and hidden[1].shape == (1, 5, 4)


def test_experts_of_one_kind_share_a_stage_and_unreached_ones_join_it():
    linears = {}
    for e in range(3):
        for role in ("gate", "up", "down"):
            name = f"model.layers.0.mlp.experts.{e}.{role}_proj"
            linears[name] = Linear(name, f"{name}.weight", role, 0, 32, 32, expert=e)
    linears["model.layers.0.o"] = Linear("model.layers.0.o", "o.weight", "o", 0, 32, 32)

    def of(e, *roles):
        return [f"model.layers.0.mlp.experts.{e}.{r}_proj" for r in roles]

    stages = arrange(
        [["model.layers.0.o"], of(0, "gate", "up"), of(0, "down"), of(2, "gate", "up"), of(2, "down")], linears
    )
    assert stages == [
        [["model.layers.0.o"]],
        [of(0, "gate", "up"), of(2, "gate", "up"), of(1, "gate", "up")],
        [of(0, "down"), of(2, "down"), of(1, "down")],
    ]


def interrupted(tmp_path, text, monkeypatch, recipe):
    """A run that was killed behind its first layer."""
    with monkeypatch.context() as patch:
        real = job.quantize_layer

        def killed(setup, activations, i, recipe, **options):
            if i:
                raise KeyboardInterrupt
            return real(setup, activations, i, recipe, **options)

        patch.setattr(job, "quantize_layer", killed)
        with pytest.raises(KeyboardInterrupt):
            quantized(tiny("llama"), tmp_path, text, recipe)


def test_a_run_is_not_resumed_in_another_output_format(tmp_path, text, monkeypatch):
    interrupted(tmp_path, text, monkeypatch, RECIPE)
    with pytest.raises(PlanRefused, match=r"differs in recipe \(format was gptq, is compressed-tensors\)"):
        quantized(tiny("llama"), tmp_path, text, Recipe(group_size=32, format="compressed-tensors"), resume=True)
    assert (
        quantized(tiny("llama"), tmp_path, text, Recipe(group_size=32, format="gptq"), resume=True).output is not None
    )  # said or meant


def test_fused_experts_that_the_runtime_cannot_read_unfused_stay_in_16_bits_and_are_found(tmp_path, text):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "gpt_oss",
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        vocab_size=96,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "m")
    recipe = Recipe(group_size=32, runtime="vllm")
    result = api.quantize(
        tmp_path / "m", tmp_path / "o", recipe, calibration=text, max_seq_length=64, select=("Q", "O")
    )
    stacked = [r for r in result.linears if r["role"] == "experts"]
    assert [(r["block"], r["outcome"], r["out_features"] * r["in_features"]) for r in stacked] == [
        (i, "kept", size) for i in (0, 1) for size in (64 * 128, 64 * 256)
    ]
    found = [f.message for f in result.report.findings if f.code == "Q416"]
    assert len(found) == 2 and all(
        message.startswith("2 tensors of experts stay in 16 bits, first ") for message in found
    )
    assert "4 experts in one tensor [4, 128, 64]" in "".join(found)
    stated = json.loads((tmp_path / "o" / "config.json").read_text())["quantization_config"]
    assert r"-:^model\.layers\.1\.mlp\.experts$" in stated["dynamic"]


def test_work_done_in_a_slower_way_is_in_the_report(tmp_path, text, monkeypatch):
    monkeypatch.setattr(staged, "greenlet", None)
    monkeypatch.setattr(setup, "greenlet", None)
    result = quantized(tiny("llama"), tmp_path, text)
    assert [f.message for f in result.report.findings if f.code == "Q417"] == [
        suspended.WITHOUT_GREENLET
    ] and result.report.ok


# fixes of the recipe during the run


@pytest.mark.parametrize("code", ["Q400", "Q405"])
def test_a_linear_that_fails_is_kept_with_those_fused_to_it_as_if_asked_at_the_start(tmp_path, text, monkeypatch, code):
    broken, honest = "model.layers.1.self_attn.q_proj", layer.solve_linear

    def spoiled(linear, *args):
        solved = honest(linear, *args)
        if linear.name != broken:
            return solved
        if code == "Q400":
            return replace(solved, solution=None, failure="no factor")
        return replace(solved, solution=replace(solved.solution, loss=2 * solved.solution.rtn_loss))

    parts = [f"model.layers.1.self_attn.{x}_proj" for x in "kqv"]
    asked = quantized(tiny("llama"), tmp_path, text, name="asked", keep=parts)
    monkeypatch.setattr(layer, "solve_linear", spoiled)
    alone = quantized(tiny("llama"), tmp_path, text, name="alone", fix=True)
    assert (alone.output is None) == (code == "Q400") and code in codes(alone.report.findings)
    fixed = quantized(tiny("llama"), tmp_path, text, name="fixed", fix=True, unsafe_fixes=[code])
    assert fixed.report.ok and code not in codes(fixed.report.findings) and fixed.report.recipe.keep == tuple(parts)
    assert [r["name"] for r in fixed.linears if r["outcome"] == "kept"] == [
        r["name"] for r in asked.linears if r["outcome"] == "kept"
    ]
    assert any(f"fix: {code} keep it in 16 bits: {broken}" in n for n in fixed.notes)
    assert (fixed.output / "model.safetensors").read_bytes() == (asked.output / "model.safetensors").read_bytes()
    assert json.loads((fixed.output / "config.json").read_text()) == json.loads(
        (asked.output / "config.json").read_text()
    )


def test_damp_is_raised_for_a_layer_and_those_after_it(tmp_path, text, monkeypatch):
    honest = layer.put_facts

    def foretold(store, name, solved, hessian):
        if name.startswith("model.layers.1.") and hessian is not None:
            hessian = replace(hessian, damp_needed=0.13)  # more than so few rows get at first
        honest(store, name, solved, hessian)

    monkeypatch.setattr(layer, "put_facts", foretold)
    recipe = replace(RECIPE, damp_max=0.5)
    result = quantized(tiny("llama"), tmp_path, text, recipe, fix=True, unsafe_fixes=["Q411"])
    assert result.report.ok and "Q411" not in codes(result.report.findings) and result.report.recipe.damp == 0.2
    assert {(r["block"], r["solve"]["damp_asked"]) for r in result.linears} == {(0, 0.01), (1, 0.2)}


def test_what_libraries_ask_the_environment_for_once_stands_there_before_they_are_loaded():
    """And what the user gave stays. Spinning threads of two libraries took 0.4 of a run on two processors."""
    names = ("THP_MEM_ALLOC_ENABLE", "OPENBLAS_THREAD_TIMEOUT", "GOMP_SPINCOUNT")
    loaded = "sorted({'torch', 'scipy', 'numpy'} & set(sys.modules))"
    code = f"import os, sys, doctor.quant; print([os.environ[n] for n in {names}], {loaded})"
    clean = {k: v for k, v in os.environ.items() if k not in names}
    for given, said in (({}, "['1', '4', '1000'] []"), ({"GOMP_SPINCOUNT": "infinite"}, "['1', '4', 'infinite'] []")):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**clean, **given}
        )
        assert done.stdout.strip() == said
