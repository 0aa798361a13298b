"""Calibration with images and sound: each decoder layer gets what transformers' own model gives it for such a row."""

import json
import wave

import numpy as np
import pytest
import torch

pytest.importorskip("PIL", reason="Pillow is not installed")

from seeing_models import SIGHTS, conversations, save_hearing, save_seeing, sounds, videos_are_not_asked_for

from doctor import api
from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import DoctorError
from doctor.core.recipe import Recipe
from doctor.model.spec import build_spec
from doctor.quant.calibration.documents import read_documents
from doctor.quant.calibration.pictures import SeenRow, read_sound, seen_rows
from doctor.quant.forward.skeleton import Skeleton


@pytest.fixture(autouse=True)
def no_videos():
    with videos_are_not_asked_for():
        yield


def rows_of(source, file, count=2):
    documents = read_documents(file)
    return seen_rows(Checkpoint.open(source), documents.messages, documents.folder, documents.name, count)


@pytest.mark.parametrize("name", [*SIGHTS, "Qwen2-Audio"])
def test_layers_get_what_the_model_itself_gives_them_for_a_row_with_a_file(name, tmp_path):
    import transformers

    if name in SIGHTS:
        source, file = save_seeing(name, tmp_path / "m", dtype="float32"), conversations(tmp_path, 2)
    else:
        source, file = save_hearing(tmp_path / "m", dtype="float32"), sounds(tmp_path, 2)
    first, second = rows_of(source, file)
    checkpoint = Checkpoint.open(source)
    skeleton = Skeleton(checkpoint, build_spec(checkpoint.value("config.json"), checkpoint.tensors))
    ids = [torch.tensor([row]) for row in (first, second)]
    given = list(skeleton.open_calls(ids, {0: first.inputs, 1: second.inputs}))
    known = getattr(transformers, checkpoint.value("config.json")["architectures"][0])
    theirs = known.from_pretrained(source, dtype=torch.float32).eval()
    kind, outputs = type(skeleton.layers[0]), []
    layers = next(m for m in theirs.modules() if isinstance(m, torch.nn.ModuleList) and type(m[0]) is kind)
    layers[-1].register_forward_hook(
        lambda module, args, out: outputs.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        for row in (first, second):
            theirs(**row.inputs, use_cache=False)
        for (hidden, calls), wanted in zip(given, outputs, strict=True):
            for i in range(len(skeleton.layers)):
                skeleton.load_layer(i)
                hidden = skeleton.run_layer(i, hidden, calls[i])
            assert (hidden - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert (outputs[0] - outputs[1]).abs().max() > 0.1  # the files count


def test_a_run_calibrates_on_images_and_says_so(tmp_path):
    source = save_seeing("Qwen3-VL", tmp_path / "m")
    recipe = Recipe(group_size=32, format="compressed-tensors")
    done = api.quantize(source, tmp_path / "out", recipe, calibration=conversations(tmp_path, 4))
    assert done.output and done.calibration.seen_rows == done.calibration.rows == 4
    assert {line["outcome"] for line in done.linears} == {"gptq"}
    assert "Q420" not in {f.code for f in done.report.findings}
    ids = tmp_path / "ids.jsonl"
    ids.write_text("\n".join(json.dumps({"input_ids": [1, *range(3 + n, 60)]}) for n in range(4)))
    done = api.quantize(source, tmp_path / "text", recipe, calibration=ids)
    assert done.output and "Q420" in {f.code for f in done.report.findings}


def test_a_run_calibrates_on_sounds_and_says_so(tmp_path):
    source = save_hearing(tmp_path / "m")
    recipe = Recipe(group_size=32, format="compressed-tensors")
    done = api.quantize(source, tmp_path / "out", recipe, calibration=sounds(tmp_path, 4))
    assert done.output and done.calibration.seen_rows == done.calibration.rows == 4
    assert {line["outcome"] for line in done.linears} == {"gptq"}
    assert "Q420" not in {f.code for f in done.report.findings}


def test_rows_of_the_same_ids_with_other_images_are_other_rows(tmp_path):
    first, second = rows_of(save_seeing("LLaVA", tmp_path / "m"), conversations(tmp_path, 2))
    other = SeenRow({**first.inputs, "pixel_values": second.inputs["pixel_values"]})
    assert list(other) == list(first) and repr(other) != repr(first)


@pytest.mark.parametrize(
    "image, words",
    [
        ("https://example.com/cat.png", "an address; must be the path of a file"),
        ("data:image/png;base64,AAAA", "an address; must be the path of a file"),
        ("absent.png", "absent.png: not a readable image"),
        ("text.png", "text.png: not a readable image"),
        (None, "an image without a path"),
    ],
)
def test_what_is_no_image_file_is_named(image, words, tmp_path):
    source = save_seeing("LLaVA", tmp_path / "m")
    (tmp_path / "text.png").write_text("no image")
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": [{"type": "image", "image": image}]}]}))
    with pytest.raises(DoctorError, match=words):
        api.quantize(source, tmp_path / "out", Recipe(group_size=32), calibration=path)
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_processor_says_so(tmp_path):
    from healthy_models import save

    with pytest.raises(DoctorError, match=r"no processor|processor cannot be loaded"):
        rows_of(save("llama", tmp_path / "m"), conversations(tmp_path, 2))


@pytest.mark.parametrize("rate, width, words", [(16000, 2, ""), (8000, 2, "16 bits at 8000 Hz"), (16000, 1, "8 bits")])
def test_sound_is_read_at_the_rate_of_the_model_or_refused(rate, width, words, tmp_path):
    path = tmp_path / "tone.wav"
    with wave.open(str(path), "wb") as file:
        file.setparams((2, width, rate, 0, "NONE", ""))
        file.writeframes(np.array([[16384, 0], [-16384, -16384]], np.int16).tobytes() if width == 2 else bytes(4))
    if words:
        with pytest.raises(DoctorError, match=words):
            read_sound(path, 16000)
    else:
        assert read_sound(path, 16000).tolist() == [0.25, -0.5]
