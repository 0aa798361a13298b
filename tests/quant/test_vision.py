"""`--vision` quantizes the layers of a vision tower too, calibrated by rows with images."""

import json

import pytest
import torch

pytest.importorskip("PIL", reason="Pillow is not installed")
pytest.importorskip("accelerate")
pytest.importorskip("compressed_tensors")

from seeing_models import conversations, save_seeing, videos_are_not_asked_for

from doctor import api
from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import DoctorError
from doctor.core.recipe import Recipe
from doctor.quant.calibration.documents import read_documents
from doctor.quant.calibration.pictures import seen_rows

RECIPE = Recipe(group_size=32, format="compressed-tensors", vision=True)


@pytest.fixture(autouse=True)
def no_videos(monkeypatch):
    monkeypatch.setenv("DOCTOR_LOAD_PROOF", "1")
    with videos_are_not_asked_for():
        yield


def seen_by(folder, rows):
    """Logits of the class that config.json names, for rows with images, and how it was loaded."""
    import transformers

    known = getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])
    model, info = known.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    with torch.no_grad():
        return [model.eval()(**row.inputs, use_cache=False).logits.double() for row in rows], info


@pytest.mark.parametrize("name", ["LLaVA"])
def test_a_tower_is_packed_calibrated_and_loaded(name, tmp_path):
    source = save_seeing(name, tmp_path / "m")
    lines = conversations(tmp_path, 6)
    done = api.quantize(source, tmp_path / "q", RECIPE, calibration=lines)
    assert done.output and not [f for f in done.report.findings if f.severity == "error"], done.report.findings
    tower = [line for line in done.linears if line["role"] == "vision"]
    assert len(tower) >= 8 and {line["outcome"] for line in tower} == {"gptq"}
    assert all(line["hessian"]["tokens"] > 0 and line["solve"]["loss"] <= line["solve"]["rtn_loss"] for line in tower)
    tensors = Checkpoint.open(done.output).tensors
    assert all(f"{line['name']}.weight_packed" in tensors and f"{line['name']}.weight" not in tensors for line in tower)
    documents = read_documents(lines)
    rows = seen_rows(Checkpoint.open(source), documents.messages, documents.folder, documents.name, 2)
    (theirs, _info), (ours, info) = seen_by(source, rows), seen_by(done.output, rows)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for a, b in zip(theirs, ours, strict=True):
        pair = torch.stack([x.flatten() - x.mean() for x in (a, b)])
        assert torch.corrcoef(pair)[0, 1] > 0.9


def test_a_tower_is_rounded_without_calibration(tmp_path):
    source = save_seeing("Qwen3-VL", tmp_path / "m")
    recipe = Recipe(method="rtn", group_size=32, format="compressed-tensors", vision=True)
    done = api.quantize(source, tmp_path / "q", recipe)
    assert done.output and sum(line["role"] == "vision" for line in done.linears) >= 8
    stated = json.loads((done.output / "config.json").read_text())["quantization_config"]
    assert not [name for name in stated["ignore"] if ".blocks." in name] and stated["ignore"] != ["lm_head"]


def test_a_tower_that_nothing_reaches_is_refused(tmp_path):
    source = save_seeing("Qwen3-VL", tmp_path / "m")
    ids = tmp_path / "ids.jsonl"
    ids.write_text("\n".join(json.dumps({"input_ids": [1, *range(3 + n, 60)]}) for n in range(4)))
    with pytest.raises(DoctorError, match="--vision: none of the 4 calibration rows has an image"):
        api.quantize(source, tmp_path / "q", RECIPE, calibration=ids)
    assert not (tmp_path / "q").exists()


def test_a_model_without_a_tower_is_refused_by_check(tmp_path):
    from healthy_models import save

    report = api.check(save("qwen3", tmp_path / "m"), Recipe(group_size=32, vision=True, goal="quantize"))
    (said,) = [f.message for f in report.findings if f.code == "G321"]
    assert said.startswith(
        "quantize would refuse it: --vision: transformers names no linears in layers of a vision tower"
    )
