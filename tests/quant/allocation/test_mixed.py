"""`--bpw` from end to end: measure, choose, quantize twice, keep the better; and what is refused before any work."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from doctor import api
from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import DoctorError, NotQuantizable, PlanRefused
from doctor.core.recipe import Recipe
from doctor.evaluate.divergence import divergence
from doctor.lint.testing import tiny
from doctor.model.spec import build_spec
from doctor.quant.allocation.budget import Budget
from doctor.quant.allocation.ladder import ladder
from doctor.quant.allocation.measure import WidthSurvey
from doctor.quant.allocation.run import held_back
from doctor.quant.calibration.pictures import SeenRow
from doctor.quant.dequantize import as_float
from doctor.quant.forward.layer_input import LayerInput
from doctor.quant.forward.prefetch import load_tensor
from doctor.quant.prepare import Calibrated
from doctor.quant.solve import gptq
from doctor.quant.solve.hessian import Hessian
from tests.helpers import gguf_models

sys.path.insert(0, str(Path(__file__).parents[3] / "examples"))
from demo import train as teach

RECIPE = Recipe(group_size=32, format="compressed-tensors")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """17 rows of 64 ids, in which each token mostly decides the next."""
    rng = random.Random(0)
    rows = []
    for _row in range(17):
        ids = [1, rng.randrange(3, 96)]
        while len(ids) < 64:
            ids.append(3 + (7 * ids[-1] + rng.randrange(2)) % 93)
        rows.append(ids)
    path = tmp_path_factory.mktemp("text") / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"input_ids": r}) for r in rows))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny("llama").write(tmp_path_factory.mktemp("model") / "m")


def mixed(model, output, text, recipe=RECIPE, options=None, **asked):
    """(result, progress lines). Nobody is asked to load the output unless options name a client."""
    said = []
    options = {"calibration": text, "max_seq_length": 64, "progress": said.append, "client": None, **(options or {})}
    return api.quantize(model, output, recipe, budget=Budget(**asked), **options), said


def linear_bits(folder):
    """Bits of all parts of packed linears, and their weights."""
    tensors = Checkpoint.open(folder).tensors
    packed = {n.rpartition(".")[0] for n in tensors if n.endswith(".weight_packed")}
    bits = 8 * sum(t.nbytes for n, t in tensors.items() if n.rpartition(".")[0] in packed)
    return bits, packed


def test_a_mixture_keeps_its_budget_and_transformers_reads_it(model, tmp_path, text):
    found, said = mixed(model, tmp_path / "o", text, bpw=5.5, measurement=tmp_path / "m.json")
    fact = found.report.extra["allocation"]
    assert found.output and fact["written"] == "mixture" and fact["kl"] < fact["kl_uniform"], fact
    assert len(fact["linears"]) > 1 and fact["uniform"] == "4-bit g32" and fact["bpw"] <= 5.5
    spec = build_spec(Checkpoint.open(model).value("config.json"), Checkpoint.open(model).tensors)
    weights = sum(x.in_features * x.out_features for x in spec.linears if x.block is not None)
    assert linear_bits(found.output)[0] / weights == pytest.approx(fact["bpw"], abs=1e-9)
    config = json.loads((found.output / "config.json").read_text())["quantization_config"]
    assert {g["weights"]["num_bits"] for g in config["config_groups"].values()} == set(fact["linears"])
    loaded = AutoModelForCausalLM.from_pretrained(found.output, dtype=torch.float32)
    ids = torch.tensor([[1, *range(3, 60)]])
    with torch.no_grad():
        theirs = loaded(ids).logits.log_softmax(-1)
        ours = _dense(found.output, model)(ids).logits.log_softmax(-1)
    assert float((theirs - ours).abs().max()) < 1e-4
    assert not list(tmp_path.glob(".o*")) and any("held-back rows" in line for line in said)
    # another budget with the saved measurement: nothing is measured again, and the same budget gives the same bytes
    again, said = mixed(model, tmp_path / "p", text, bpw=5.5, measurement=tmp_path / "m.json")
    assert not any("sensitivity" in line for line in said) and again.output
    for path in found.output.glob("*.safetensors"):
        assert path.read_bytes() == (again.output / path.name).read_bytes()


def _dense(quantized, original):
    """transformers' model of the original with the weights that doctor reads from a quantized checkpoint."""
    model = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)
    view = as_float(Checkpoint.open(quantized))
    weights = {name: load_tensor(view, name).to(torch.float32) for name in view.tensors}
    assert not model.load_state_dict(weights, strict=False).unexpected_keys
    return model


def test_the_uniform_model_is_written_where_the_mixture_is_no_closer(model, tmp_path, text):
    figures = iter([0.5, float("nan")])  # uniform, mixture
    found, _said = mixed(model, tmp_path / "o", text, options={"diverge": lambda *_: next(figures)}, bpw=5.0)
    assert found.output and [f.code for f in found.report.findings if f.code == "Q430"] == ["Q430"]
    raw = json.loads((found.output / "config.json").read_text())["quantization_config"]
    assert [g["weights"]["num_bits"] for g in raw["config_groups"].values()] == [4]
    assert not list(tmp_path.glob(".o*"))
    assert found.report.extra["allocation"]["written"] == "uniform"


def test_the_better_model_alone_is_tuned(tmp_path):
    asked, taught = [], teach(tiny("llama").write(tmp_path / "model"), steps=60)

    def diverge(source, folder, rows):
        asked.append(folder)
        return divergence(source, folder, rows)

    def run(name, tune):
        options = {"calibration": None, "rows": 24, "diverge": diverge, "tune": tune}
        return mixed(taught, tmp_path / name, None, options=options, bpw=4.0, measurement=tmp_path / "m.json")

    (plain, _said), (tuned, said) = run("plain", "off"), run("tuned", 12)
    assert len(asked) == 4 and sum("layer by layer on" in str(line) for line in said) == 1
    facts = tuned.report.extra["tuning"]
    assert facts["written"] and facts["end"] < facts["start"] and "tuning" not in plain.report.extra
    assert tuned.report.extra["allocation"] == plain.report.extra["allocation"]  # compared before it was tuned
    before, after = (Checkpoint.open(x.output) for x in (plain, tuned))
    changed = {n for n in before.tensors if bytes(before.load(n)) != bytes(after.load(n))}
    assert changed and all(n.endswith("weight_scale") or "norm" in n for n in changed)
    notes = json.loads((tuned.output / "doctor.json").read_text())["notes"]
    assert any("scales tuned on 12 rows" in note for note in notes)


def test_gptq_files_say_the_widths_of_a_mixture_under_dynamic(model, tmp_path, text):
    recipe = Recipe(group_size=32, format="gptq", runtime="vllm")
    figures = iter([0.6, 0.5])
    found, _said = mixed(model, tmp_path / "o", text, recipe, {"diverge": lambda *_: next(figures)}, bpw=6.0)
    raw = json.loads((found.output / "config.json").read_text())["quantization_config"]
    own = {value["bits"] for key, value in raw["dynamic"].items() if key.startswith("+:")}
    assert own | {raw["bits"]} == set(found.report.extra["allocation"]["linears"])
    assert divergence(Checkpoint.open(model), found.output, [torch.tensor([[1, *range(3, 40)]])]) >= 0


def test_predicted_losses_of_widths_are_near_those_that_gptq_reaches():
    torch.manual_seed(0)
    k, n = 128, 96
    X = torch.randn(2000, k) @ torch.randn(k, k) * torch.logspace(0, -1, k)
    W = torch.randn(n, k) * 0.1
    hessian = Hessian(k)
    hessian.add(X)
    given = LayerInput(hessian, RECIPE)
    solve = lambda bits: gptq.solve(W, given.H, bits=bits, group_size=32, damp=given.damp, zero_min=0)  # noqa: E731
    survey = WidthSurvey(RECIPE, RECIPE, (2, 3, 4, 5, 8))
    linear = type("L", (), {"name": "l"})()
    survey.see(linear, W, given, solve(4))
    E = W - solve(4).weight()
    energy = float(torch.einsum("nk,kl,nl->", W, given.H.matrix(), W)) / 4
    own = torch.einsum("nk,kl,nl->n", E, given.H.matrix(), E).double() / 4
    for bits, hurt in survey.hurts({"l": own})["l"].items():
        assert hurt == pytest.approx(solve(bits).loss * energy, rel=0.25), bits


def test_an_expert_without_rows_keeps_the_uniform_width():
    survey = WidthSurvey(RECIPE, RECIPE, (3, 4, 8))
    survey.see(type("L", (), {"name": "l"})(), torch.ones(32, 32), None, None)
    assert survey.hurts({}) == {"l": {}}


@pytest.mark.parametrize(
    ("recipe", "asked", "text"),
    [
        (RECIPE, {"bpw": 3.0}, "--bpw 3: 3.524 to 8.524 bits a weight can be reached"),
        (RECIPE, {"size": 1000}, "--size 1,000 bytes: leaves 0.000 bits a weight; 3.524 to 8.524"),
        (RECIPE, {"bpw": 5.0, "widths": (4,)}, "widths to choose from: 4; must be 2 or more"),
        (Recipe(method="awq", group_size=32), {"bpw": 5.0}, "needs a calibrated method and widths"),
        (Recipe(method="rtn", group_size=32), {"bpw": 5.0}, "needs a calibrated method and widths"),
        (Recipe(group_size=32, bits_for=("*q_proj=8",)), {"bpw": 5.0}, "needs a calibrated method and widths"),
        (Recipe(group_size=32), {"bpw": 5.0, "widths": (4, 5)}, "GPTQ has no 5 bits"),
    ],
)
def test_a_budget_that_cannot_be_met_is_refused_from_headers_alone(model, recipe, asked, text):
    checkpoint = Checkpoint.open(model)
    with pytest.raises(DoctorError, match=text):
        ladder(checkpoint, build_spec(checkpoint.value("config.json"), checkpoint.tensors), recipe, Budget(**asked))


def test_vllm_gets_only_widths_that_it_reads(model):
    checkpoint = Checkpoint.open(model)
    spec = build_spec(checkpoint.value("config.json"), checkpoint.tensors)
    served = Recipe(group_size=32, format="compressed-tensors", runtime="vllm")
    assert ladder(checkpoint, spec, served, Budget(bpw=6)).widths == (4, 8)
    assert ladder(checkpoint, spec, RECIPE, Budget(bpw=6)).widths == (3, 4, 5, 6, 7, 8)


def test_a_budget_is_met_by_what_prints_as_the_same_number(model):
    checkpoint = Checkpoint.open(model)
    spec = build_spec(checkpoint.value("config.json"), checkpoint.tensors)
    uniform = ladder(checkpoint, spec, RECIPE, Budget(bpw=6))
    size = uniform.uniform_bpw()  # 16 bytes of each linear are its shape
    same, less = (ladder(checkpoint, spec, RECIPE, Budget(bpw=size - d)) for d in (0.0004, 0.001))
    assert same.uniform == uniform.uniform and less.uniform_bpw() < size


def test_experts_of_a_layer_and_joined_linears_share_a_width(tmp_path):
    checkpoint = Checkpoint.open(tiny("mixtral").write(tmp_path / "m"))
    spec = build_spec(checkpoint.value("config.json"), checkpoint.tensors)
    steps = ladder(checkpoint, spec, RECIPE, Budget(bpw=6))
    kinds = {tuple(sorted({x.role for x in linears})) for linears in steps.units.values()}
    assert kinds == {("k", "q", "v"), ("o",), ("down", "gate", "up")}
    recipe = steps.provisional
    for linears in steps.units.values():
        assert len({recipe.for_linear(x.name).bits for x in linears}) == 1
    assert len({recipe.for_linear(x.name).bits for unit in steps.units.values() for x in unit}) > 1


def test_a_measurement_of_another_recipe_and_a_file_that_is_none_are_refused(model, tmp_path, text):
    (tmp_path / "bad.json").write_text("[1]")
    with pytest.raises(DoctorError, match="holds no measurement of widths"):
        mixed(model, tmp_path / "o", text, bpw=5.0, measurement=tmp_path / "bad.json")
    other = {"linears": {}, "checkpoint": "x", "method": "gptq", "format": "gptq", "group_size": 64}
    (tmp_path / "other.json").write_text(json.dumps(other))
    with pytest.raises(DoctorError, match="checkpoint was x; is"):
        mixed(model, tmp_path / "o", text, bpw=5.0, measurement=tmp_path / "other.json")
    assert not (tmp_path / "o").exists() and not list(tmp_path.glob(".o*"))


def test_rows_are_held_back_at_equal_distances_and_never_with_pictures():
    seen = SeenRow({"input_ids": torch.tensor([[1, 2, 3]])})
    rows = [seen, *([i] * 8 for i in range(16)), seen]
    left, held = held_back(Calibrated(None, rows))
    assert held == [[4] * 8, [12] * 8] and left.rows == [row for row in rows if row not in held]
    with pytest.raises(NotQuantizable, match="1 calibration row; must be 2 or more"):
        held_back(Calibrated(None, [seen, [1] * 8, seen]))


def test_a_mixture_is_not_resumed(model, tmp_path, text):
    with pytest.raises(PlanRefused, match="a mixture is made by one process, in one run"):
        api.quantize(model, tmp_path / "o", RECIPE, calibration=text, budget=Budget(bpw=5.0), resume=True)


def test_gguf_gets_a_type_for_every_linear_by_its_own_measurement(tmp_path):
    figures = iter([0.6, 0.5])
    source = gguf_models.model("llama", tmp_path / "m")
    options = {"budget": Budget(bpw=7.0), "diverge": lambda *_: next(figures)}
    found = gguf_models.run(source, tmp_path / "o", "Q4_K_M", **options)
    fact = found.report.extra["allocation"]
    assert found.output and fact["uniform"] == "Q5_K_M" and fact["bpw"] <= 7.0 and len(fact["linears"]) > 1, fact
    tensors = Checkpoint.open(found.output).gguf[0].tensors
    types = {t.type.name for t in tensors.values() if t.name.startswith("blk.") and "norm" not in t.name}
    # rows of 64 and 128 do not fill blocks of 256, so llama.cpp's types for such widths stand in
    assert types == {{4: "Q5_0", 5: "Q5_1", 6: "Q8_0", 8: "Q8_0"}[bits] for bits in fact["linears"]}
    weights = sum(t.numel for t in tensors.values() if t.name.startswith("blk.") and "norm" not in t.name)
    stored = sum(8 * t.nbytes for t in tensors.values() if t.name.startswith("blk.") and "norm" not in t.name)
    assert stored / weights == pytest.approx(fact["bpw"], abs=1e-9)


def test_a_budget_out_of_reach_is_refused_before_torch_is_imported(model, tmp_path):
    code = """
import sys
from doctor import api
from doctor.core.errors import DoctorError
from doctor.core.recipe import Recipe
from doctor.quant.allocation.budget import Budget
try:
    api.quantize(sys.argv[1], sys.argv[2], Recipe(group_size=32, format="compressed-tensors"), budget=Budget(bpw=2.0))
except DoctorError as error:
    assert "can be reached" in error.message, error.message
    assert "torch" not in sys.modules
    print("refused")
"""
    done = subprocess.run([sys.executable, "-c", code, model, tmp_path / "o"], capture_output=True, text=True)
    assert done.stdout == "refused\n", done.stderr
