"""One decoder layer in memory computes what the class that config.json names computes, whatever kind of class it is."""

import json

import pytest
import torch
import transformers
from tiny_classes import CLASSES, save_class

from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import NotQuantizable
from doctor.core.recipe import Recipe
from doctor.evaluate.compare import Streamed
from doctor.model.spec import build_spec
from doctor.quant.forward.parameter_names import ParameterNames
from doctor.quant.forward.skeleton import Skeleton
from doctor.quant.quantize import quantize

IDS = torch.arange(3, 35)[None]


def streamed_logits(folder):
    """By one decoder layer at a time."""
    run = Streamed(Checkpoint.open(folder), [IDS])
    for i in range(len(run.skeleton.layers)):
        run.step(i)
    return next(run.logits())


def logits_of_class(folder):
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, name).from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits[0]


@pytest.mark.parametrize(
    "name",
    [
        "Qwen2-VL",  # a text class without a head of its own, with rotary positions of three axes
        "Qwen3-Omni-thinker",  # and experts stored one by one in a family without a table
        "SmolVLM",  # the files' `model.text_model.` is the class's `model`
        "GLM-4.1V",
        "GLM-5",  # layers hand indices of keys on to the next layer
        "HY-V4",  # and hidden states have four streams
        "Gemma3n-text",  # four streams in front
        "Zaya",
        "Bamba",
        "Nemotron-H",  # experts without a gate
        "Kimi-Linear",  # one parameter joined from three tensors
    ],
)
def test_layers_one_by_one_equal_the_named_class(name, tmp_path):
    folder = save_class(CLASSES[name], tmp_path / "m", "float32")
    ours, theirs = streamed_logits(folder), logits_of_class(folder)
    assert torch.isfinite(ours).all()
    assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


def test_a_model_that_changes_hidden_states_between_layers_is_refused(tmp_path):
    """RWKV halves them every six layers: a layer by itself cannot say what the next one gets."""
    folder = save_class(CLASSES["RWKV"], tmp_path / "m")
    checkpoint = Checkpoint.open(folder)
    config = checkpoint.value("config.json") | {"rescale_every": 2}
    (folder / "config.json").write_text(json.dumps(config))
    checkpoint = Checkpoint.open(folder)
    built = Skeleton(checkpoint, build_spec(config, checkpoint.tensors))
    with pytest.raises(NotQuantizable, match="changes the hidden states between its decoder layers"):
        list(built.open_calls([IDS]))


@pytest.mark.parametrize("name", ["T5", "Whisper"])
def test_an_encoder_with_a_decoder_is_refused_by_name(name, tmp_path):
    checkpoint = Checkpoint.open(save_class(CLASSES[name], tmp_path / "m"))
    with pytest.raises(NotQuantizable, match="is an encoder and a decoder; one stack of layers is needed"):
        Skeleton(checkpoint, build_spec(checkpoint.value("config.json"), checkpoint.tensors))


def test_of_several_lists_of_layers_the_decoders_is_the_one_that_fits(tmp_path):
    """Qwen3-Next's `mtp.layers.0` has the names of `model.layers.0`, and other shapes or fewer of them."""
    folder = save_class(CLASSES["Qwen3"], tmp_path / "m")
    checkpoint = Checkpoint.open(folder)
    tensors = dict(checkpoint.tensors)
    first = {n.replace("model.layers.0.", "mtp.layers.0."): i for n, i in tensors.items() if ".layers.0." in n}

    class View:
        def value(self, name):
            return checkpoint.value(name)

    built = Skeleton(checkpoint, build_spec(checkpoint.value("config.json"), tensors))
    for order in ({**first, **tensors}, {**tensors, **first}):
        view = View()
        view.tensors = order
        names = ParameterNames(view, "model", "layers", "qwen3", built.layers)
        assert names.stem == "model."
        assert names.find("layers.0.mlp.up_proj.weight") == "model.layers.0.mlp.up_proj.weight"
        assert not [n for n in names.of_layer(0) if n.startswith("mtp.")]


def test_the_files_of_a_vision_model_keep_their_names_and_its_processor_comes_along(tmp_path):
    folder = save_class(CLASSES["Qwen2-VL"], tmp_path / "m")
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "Qwen2VLImageProcessor"}')
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"input_ids": [1, *range(3 + i, 34 + i)]}) for i in range(12)))
    done = quantize(
        folder, tmp_path / "q", Recipe(group_size=32, format="compressed-tensors"), calibration=rows, max_seq_length=32
    )
    source, written = Checkpoint.open(folder).tensors, Checkpoint.open(done.output).tensors
    packed = {n.removesuffix("_packed") for n in written if n.endswith(".weight_packed")}
    assert len(packed) == 28 and packed <= source.keys()
    assert source.keys() - packed == {n for n in written if not n.rpartition(".")[2].startswith("weight_")}
    assert (done.output / "preprocessor_config.json").read_text() == (folder / "preprocessor_config.json").read_text()
