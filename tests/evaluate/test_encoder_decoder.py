"""Models of an encoder and a decoder: rounded without calibration, loaded by their class, compared by states."""

import json

import pytest
import torch
from tiny_classes import BOTH, Row, save_class

from doctor.api import check
from doctor.checkpoint.directory import Checkpoint
from doctor.core.recipe import Recipe
from doctor.evaluate.clients import transformers_child
from doctor.evaluate.clients.load_proof import as_record
from doctor.evaluate.verify import verify
from doctor.formats.schemes import fields_of
from doctor.quant.client import Client
from doctor.quant.early import refused_by_headers
from doctor.quant.quantize import quantize
from doctor.report.formats.terminal import render

ROWS = "".join(json.dumps({"input_ids": [(7 * i + 5 * j) % 80 + 3 for j in range(32)]}) + "\n" for i in range(3))
CLASSES = {
    "bart": Row("BartForConditionalGeneration", BOTH),
    "t5": Row("T5ForConditionalGeneration"),
    "whisper": Row("WhisperForConditionalGeneration"),
}

SIDE = {"layers": 1, "attention_heads": 2, "ffn_dim": 64}
SMALL = {"vocab_size": 96, "d_model": 32, "max_position_embeddings": 64, "pad_token_id": 0, "decoder_start_token_id": 0}


def in_this_process():
    """transformers, asked without a process of its own."""

    def linears(folder, modules):
        return {n: tuple(s) for n, s in transformers_child.linears(folder, list(modules))["linears"].items()}

    return Client(linears, lambda folder: as_record(transformers_child.ask(folder, 0, None), (), 0))


def states(folder, ids):
    """Decoder states by transformers' own loading."""
    import transformers

    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, name).from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        half = ids.shape[1] // 2
        out = model(input_ids=ids[:, :half], decoder_input_ids=ids[:, half:], output_hidden_states=True)
    return out.decoder_hidden_states[-1][0]


def the_printed_line_generates(folder):
    """With a stand-in for the tokenizer, which the tiny class has none of: the rest is what is printed."""
    import shlex

    from doctor.report.after import commands

    steps = commands("m", folder, Recipe(**fields_of("FP8_DYNAMIC", {"method": "rtn"})), kind="encoder-decoder")
    code = shlex.split(steps[1][0])[2].replace("AutoTokenizer as T, ", "")
    words = {"input_ids": torch.arange(3, 19)[None]}
    tokenizer = type("T", (), {"__call__": lambda self, *a, **k: words, "decode": lambda self, ids: len(ids)})()
    exec(code, {"T": type("T", (), {"from_pretrained": staticmethod(lambda folder: tokenizer)})})


@pytest.mark.parametrize("scheme, name", [("FP8_DYNAMIC", "bart"), ("NVFP4A16", "t5"), ("INT8", "whisper")])
def test_both_halves_are_rounded_load_and_compute_what_the_source_does(scheme, name, tmp_path):
    pytest.importorskip("compressed_tensors")
    source = save_class(CLASSES[name], tmp_path / "m")
    (tmp_path / "rows.jsonl").write_text(ROWS)
    done = quantize(source, tmp_path / "q", Recipe(**fields_of(scheme, {"method": "rtn"})), client=in_this_process())
    assert done.report.ok and done.output, [f.message for f in done.report.findings]
    sides = {line["name"].split(".")[0 if name == "t5" else 1] for line in done.linears if line["outcome"] == "rtn"}
    assert sides == {"encoder", "decoder"} and not [x for x in done.linears if x["outcome"] != "rtn"]
    assert not {"O617", "O623"} & {f.code for f in done.report.findings}  # it loads whole
    report = verify(source, tmp_path / "q", text=tmp_path / "rows.jsonl", rows=3, context=32)
    assert "  decoder states  cosine" in render([report], width=200)
    found = report.extra["own_measure"]
    assert found["kind"] == "sequence" and found["cosine"] > 0.95 and not found["nonfinite_quantized"]
    if name == "bart":
        the_printed_line_generates(tmp_path / "q")
        ids = torch.tensor([json.loads(ROWS.splitlines()[0])["input_ids"]])
        theirs = [torch.nn.functional.cosine_similarity(states(source, ids), states(tmp_path / "q", ids), dim=-1)]
        first = verify(source, tmp_path / "q", text=tmp_path / "rows.jsonl", rows=1, context=32).extra["own_measure"]
        assert abs(float(theirs[0].mean()) - first["cosine"]) < 0.002


@pytest.mark.parametrize("name", ["Marian", "M2M100"])
def test_positions_that_a_class_computes_and_never_saves_are_its_own(name, tmp_path):
    import transformers

    from doctor.evaluate.encoder_decoder import decoder_states

    sides = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in SIDE.items()}
    config = getattr(transformers, f"{name}Config")(**SMALL, **sides)
    torch.manual_seed(0)
    class_ = {"Marian": "MarianMTModel"}.get(name, f"{name}ForConditionalGeneration")
    getattr(transformers, class_)(config).save_pretrained(tmp_path)
    ids = torch.arange(3, 35)[None]
    own, _again = decoder_states(Checkpoint.open(tmp_path), Checkpoint.open(tmp_path), [ids])[0]
    assert float((own - states(tmp_path, ids)).abs().max()) < 1e-5


def test_a_scheme_that_runs_the_model_is_refused_by_headers_with_the_way_out(tmp_path):
    source = save_class(CLASSES["t5"], tmp_path / "m")
    report = refused_by_headers(Checkpoint.open(source), tmp_path / "q", Recipe(group_size=32))
    found = next(f for f in report.findings if f.code == "G336")
    assert "needs to run it" in found.message and "--scheme FP8_DYNAMIC" in found.advice
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"eos_token_id": 6000}))
    found = {f.code: f.consequence_of for f in check(source, Recipe(group_size=32)).findings}
    assert found["G336"] == found["C103"] == ""  # neither explains the other: the id is wrong with any recipe
    (source / "config.json").write_text(json.dumps(config))
    plan = Recipe(**fields_of("FP8_DYNAMIC", {}))
    assert refused_by_headers(Checkpoint.open(source), tmp_path / "q", plan) is None
    assert not {"G330", "G336"} & {f.code for f in check(source, plan).findings}


def test_a_parameter_without_a_tensor_is_named(tmp_path):
    from safetensors.torch import load_file, save_file

    from doctor.core.errors import NotQuantizable
    from doctor.evaluate.encoder_decoder import decoder_states

    source = save_class(CLASSES["bart"], tmp_path / "m")
    tensors = load_file(source / "model.safetensors")
    del tensors["model.decoder.layers.1.fc1.weight"]
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    broken = Checkpoint.open(source)
    with pytest.raises(NotQuantizable, match=r"decoder.layers.1.fc1.weight: the checkpoint has no tensor"):
        decoder_states(broken, broken, [torch.arange(3, 35)[None]])
