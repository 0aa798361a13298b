"""What headers, flags and the machine refuse is refused before torch is imported."""

import os
import subprocess
import sys

import pytest

from doctor.api import quantize
from doctor.core.errors import MachineError
from doctor.core.recipe import Recipe
from doctor.lint.testing import tiny
from doctor.quant import stage

RTN = Recipe(group_size=32, method="rtn")
GPTQ = Recipe(group_size=32)
SCRIPT = """
import sys
from doctor.cli.main import main
try:
    main(sys.argv[1:])
except SystemExit as exit:
    code = exit.code
heavy = [name for name in ("torch", "transformers") if name in sys.modules]
sys.exit("imported: " + ", ".join(heavy) if heavy else code)
"""


def broken(config):
    case = tiny()
    config(case)
    return case


def of_unknown_family(case):
    case.config["model_type"] = "zebra9"


def said_to_be_packed(case):
    case.config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}


REFUSED = {
    "pattern": (None, ("--ignore", "nothing*"), "--ignore nothing*: matches none of the"),
    "width": (None, ("--override", "*nowhere:bits=8"), "--override *nowhere: matches none of the"),
    "memory": (None, ("--memory", "24"), "'24' is a number of bytes; must have a unit"),
    "little memory": (None, ("--memory", "24MB"), "this run needs"),
    "output": (None, ("-o", "/dev/null/out"), "/dev/null is not a directory"),
    "family": (of_unknown_family, (), "'zebra9' is not defined in transformers"),
    "groups": (None, ("--group-size", "48"), "G301"),
    "packed": (said_to_be_packed, (), "C153"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_headers_refuse_is_refused_without_torch(name, tmp_path):
    change, options, said = REFUSED[name]
    broken(change or (lambda case: None)).write(tmp_path / "model")
    line = ["quantize", "model", "--group-size", "32", "-o", "out", "-f", "concise", *options]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *line], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert "imported" not in done.stderr
    assert said in done.stdout + done.stderr
    assert done.returncode in (1, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize("pattern", ("lm_head", "*embed_tokens", "{q,k}_proj", "layers.0.", "model.norm"))
def test_a_pattern_may_name_any_module_and_a_tied_head(pattern, tmp_path):
    case = tiny()
    case.config["tie_word_embeddings"] = True
    case.tensors.pop("lm_head.weight", None)
    model = case.write(tmp_path / "model")
    assert quantize(model, tmp_path / "out", RTN, keep=[pattern], client=None).output


def test_a_full_disk_is_refused_before_the_weights_are_read(tmp_path, monkeypatch):
    model = tiny().write(tmp_path / "model")
    monkeypatch.setattr(stage, "free_bytes", lambda folder: 1000)
    with pytest.raises(MachineError, match="1,000 bytes are free"):
        quantize(model, tmp_path / "out", GPTQ)


COMPARED = {
    "another model": (("verify", "good", "small"), "are not one model: hidden_size"),
    "a link out": (("verify", "good", "linked"), "F019"),
    "text": (("verify", "good", "good", "--text", "pipe.jsonl"), "pipe.jsonl: not a regular file"),
    "tuned link": (("tune", "linked", "--to", "good", "-o", "out"), "F019"),
    "tuned floats": (("tune", "strange", "--to", "good", "-o", "out"), "strange: holds no packed linears"),
    "converted link": (("convert", "linked", "--format", "bf16", "-o", "out"), "F019"),
    "cache": (("kvcache", "good", "--context", "0"), "'0' is not a number of tokens; write 32768 or 32k"),
    "measured family": (("kvcache", "strange", "--measure"), "'zebra9' is not defined"),
    "planned": (("quantize", "good", "--plan", "--memory", "24", "-o", "out"), "must have a unit"),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    broken(lambda case: None).write(folder / "good")
    broken(lambda case: case.config.update(hidden_size=32)).write(folder / "small")
    broken(of_unknown_family).write(folder / "strange")
    broken(lambda case: None).write(folder / "linked")
    shard = folder / "linked" / "model.safetensors"
    shard.unlink()
    shard.symlink_to(folder / "good" / "model.safetensors")
    os.mkfifo(folder / "pipe.jsonl")
    return folder


@pytest.mark.parametrize("name", COMPARED)
def test_other_commands_refuse_without_torch_too(name, models):
    line, said = COMPARED[name]
    before = sorted(p.name for p in models.iterdir())
    done = subprocess.run([sys.executable, "-c", SCRIPT, *line], cwd=models, capture_output=True, text=True, timeout=60)
    assert "imported" not in done.stderr
    assert said in done.stdout + done.stderr
    assert done.returncode == 2
    assert sorted(p.name for p in models.iterdir()) == before
