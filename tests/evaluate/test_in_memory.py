"""A model in memory is judged as the files would be that it is saved as, by the same rules, and nothing is written."""

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
import transformers
from tiny_classes import CLASSES, TEXT, fitting

from doctor import Recipe, check
from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import BadCheckpoint
from doctor.evaluate.in_memory import TORCH_NAMES
from doctor.evaluate.training import StopAtNonfinite
from doctor.lint.engine import load_rules
from doctor.lint.rule import RULES

load_rules()
TORCH = {name: getattr(torch, word) for word, name in TORCH_NAMES.items()}
TOLD = {"W201", "W202", "W204", "W205", "W207", "W208", "W213", "F050", "F051", "F052", "F053", "F054"}


def model_of(name):
    torch.manual_seed(0)
    known = getattr(transformers, CLASSES[name].architecture)
    return known(fitting(known.config_class, TEXT, CLASSES[name].config)).to(torch.bfloat16)


def held(files):
    """name -> torch tensor of every tensor of a checkpoint."""
    return {
        name: torch.frombuffer(bytearray(files.load(name).tobytes()), dtype=TORCH[info.dtype.name]).reshape(info.shape)
        if info.numel
        else torch.empty(info.shape, dtype=TORCH[info.dtype.name])
        for name, info in files.tensors.items()
    }


def codes(report, among=None):
    return Counter(f.code for f in report.findings if among is None or f.code in among)


def judged(report):
    return {run.rule.code for run in report.runs if run.status == "run"}


@pytest.mark.parametrize("name", ["Llama", "Mixtral", "gpt-oss", "Qwen3.5-MoE", "GPT-2"])
def test_a_healthy_model_of_transformers_is_silent_and_read_as_its_files_are(name, tmp_path):
    model = model_of(name)
    report = check(model)
    assert not report.findings and not report.crashed, [f.message for f in report.findings]
    model.save_pretrained(tmp_path)
    files = check(tmp_path, Recipe(goal="none"))
    assert report.bytes_read == files.bytes_read and report.summary["tensors"] == files.summary["tensors"]
    assert codes(files, judged(report)) == Counter()


def test_every_rule_on_tensors_says_the_same_of_memory_as_of_files(tmp_path):
    told = set()
    for code in sorted(c for c in RULES if c[0] in "FWC"):
        case, _ = sys.modules[RULES[code].module].bad()
        folder = case.write(tmp_path / code)
        files = Checkpoint.open(folder)
        whole = files.tensors and not files.gguf and not any(shard.defects for shard in files.shards.values())
        if not whole or files.value("config.json") is None:
            continue
        recipe = Recipe(goal="none")
        report = check(held(files), recipe, model_config=files.value("config.json"))
        assert not report.crashed, (code, [run.crashed for run in report.crashed])
        assert codes(report) == codes(check(folder, recipe), judged(report)), code
        assert all(f.fix is None for f in report.findings)
        told |= set(codes(report))
    assert told >= TOLD, TOLD - told


def test_a_tie_that_training_broke_is_an_error_and_one_that_holds_is_none():
    model = model_of("Llama")
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    assert check(model).ok and check(model.state_dict(), model_config=model.config).ok
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone() * 2)
    assert codes(check(model)) == codes(check(model.state_dict(), model_config=model.config)) == {"F054": 1}


def test_shapes_are_held_against_the_configuration_where_there_is_one():
    model = model_of("Llama")
    tensors = model.state_dict()
    tensors["model.layers.1.mlp.down_proj.weight"] = tensors["model.layers.1.mlp.down_proj.weight"][:, :-32]
    assert codes(check(tensors, model_config=model.config.to_dict())) == {"F051": 1}
    alone = check(tensors)
    assert alone.ok and "F051" not in judged(alone)
    reasons = next(run.reasons for run in alone.runs if run.rule.code == "F051")
    assert list(reasons) == ["a model in memory has no such file"]


def test_numpy_arrays_and_views_are_read_as_they_are():
    tensors = {
        "a.weight": np.zeros((40, 60), np.float32)[:, ::2],
        "b.weight": torch.ones(64, 256).t()[::2],
        "c.weight": np.full((3, 2), np.nan, np.float16),
        "d.weight": np.linspace(0, 1, 12, dtype=">f4").reshape(3, 4),
        "e.bias": torch.tensor(float("-inf"), dtype=torch.float64),
    }
    report = check(tensors)
    assert sorted((f.code, f.where.tensor) for f in report.findings) == [
        ("W201", "c.weight"),
        ("W201", "e.bias"),
        ("W202", "a.weight"),
        ("W208", "b.weight"),
    ]
    assert report.summary["parameters"] == 40 * 30 + 128 * 64 + 6 + 12 + 1


def test_any_module_is_judged_without_what_wraps_it_and_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inner = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.LayerNorm(4), torch.nn.BatchNorm1d(4))
    wrapped = torch.nn.DataParallel(inner)
    assert check(wrapped).findings == [] and check(wrapped).checkpoint == "Sequential"
    with torch.no_grad():
        inner[0].weight[1, 2] = float("nan")
    report = check(wrapped)
    assert [(f.code, f.where.tensor, f.where.index) for f in report.findings] == [("W201", "0.weight", (1, 2))]
    assert "model in memory" in report.to_markdown() and report.to_html() and report.to_json()
    assert list(tmp_path.iterdir()) == []


def test_what_holds_no_values_is_refused_by_name():
    with pytest.raises(BadCheckpoint, match="weight: is on the meta device"):
        check(torch.nn.Linear(2, 2, device="meta"))
    with pytest.raises(BadCheckpoint, match="state_dict: holds no tensors"):
        check({})
    with pytest.raises(BadCheckpoint, match="step: is int; must be a tensor or an array"):
        check({"step": 3})
    with pytest.raises(TypeError, match="takes no matrix"):
        check({"a": np.ones(2)}, matrix=True)
    part = torch.nn.Parameter(torch.ones(0))
    part.ds_shape = (4, 4)
    with pytest.raises(BadCheckpoint, match="held in parts by several processes"):
        check({"a.weight": part})


def test_the_callback_keeps_the_report_of_what_stopped_the_run():
    model, callback = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)), StopAtNonfinite()
    with torch.no_grad():
        model[0].weight[0, 0] = model[1].bias[1] = float("inf")
    callback.on_step_end(None, transformers.TrainerState(global_step=5), transformers.TrainerControl(), model=model)
    assert callback.found[:2] == ("0.weight", 0)
    assert [(f.code, f.where.tensor) for f in callback.report.findings] == [("W201", "0.weight"), ("W201", "1.bias")]


def test_arrays_are_checked_without_torch():
    code = (
        "import sys, numpy as np; from doctor import check\n"
        "found = check({'a.weight': np.full((2, 2), np.nan, np.float32)}).findings\n"
        "assert [f.code for f in found] == ['W201'] and 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
