"""Embedding and reward models are compared by their own measure: cosine of embeddings, correlation of scores."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_classes import CLASSES, save_class

from doctor import api
from doctor.core.recipe import Recipe


@pytest.fixture(scope="module", params=["BERT", "Qwen3-Embedding", "Qwen2-reward"])
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    source = save_class(CLASSES[request.param], folder / "m")
    recipe = Recipe(method="rtn", bits=8, group_size=32, format="compressed-tensors")
    return request.param, source, api.quantize(source, folder / "q", recipe).output


def test_the_figures_are_those_of_transformers_own_class(pair, tmp_path):
    import transformers

    name, source, output = pair
    report = api.verify(source, output, rows=4, context=32)
    found = report.extra["own_measure"]
    assert "comparison" not in report.extra and found["tokens"] == 128 and found["cosine"] > 0.995
    assert "Q421" not in {f.code for f in report.findings}
    if name != "Qwen2-reward":
        return
    from doctor.checkpoint.directory import Checkpoint
    from doctor.evaluate.inputs import text_rows
    from doctor.quant.dequantize import as_float

    plain = tmp_path / "plain"
    plain.mkdir()
    read = as_float(Checkpoint.open(output))
    tensors = {n: torch.from_numpy(read.load(n)) if n not in read.source.tensors else None for n in read.tensors}
    stored = load_file(source / "model.safetensors")
    save_file(
        {n: stored[n] if t is None else t for n, t in tensors.items()}, plain / "model.safetensors", {"format": "pt"}
    )
    (plain / "config.json").write_text((source / "config.json").read_text())
    ids, _tokenizer, _source = text_rows(Checkpoint.open(source), None, 4, 32)
    known, scores = transformers.Qwen2ForSequenceClassification, []
    for folder in (source, plain):
        model = known.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            scores.append(torch.cat([model(input_ids=row).logits.flatten() for row in ids]))
    assert torch.corrcoef(torch.stack(scores))[0, 1].item() == pytest.approx(found["score_correlation"], abs=1e-3)


def test_a_broken_copy_is_named(pair, tmp_path):
    name, source, output = pair
    if name != "BERT":
        pytest.skip("one is enough")
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in output.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    tensors = load_file(broken / "model.safetensors")
    for part in [n for n in tensors if n.endswith("weight_packed")]:
        tensors[part] = tensors[part].flip(0)
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    report = api.verify(source, broken, rows=4, context=32)
    assert "Q421" in {f.code for f in report.findings}
    assert json.dumps(report.extra["own_measure"])
