"""The public interface: typed options are the jobs' own parameters, and a user's script passes mypy."""

import importlib
import inspect
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import doctor
from doctor.core import options

JOBS = {
    "QuantizeOptions": "doctor.quant.quantize.quantize",
    "PlanOptions": "doctor.quant.quantize.plan",
    "ConvertOptions": "doctor.quant.convert.convert",
    "TuneOptions": "doctor.quant.tuning.tune.tune",
    "VerifyOptions": "doctor.evaluate.verify.verify",
    "CompareOptions": "doctor.evaluate.ranking.rank",
    "KvcacheOptions": "doctor.evaluate.kvcache.study.kvcache",
    "AdviseOptions": "doctor.evaluate.advise.advise.advise",
}
SCRIPT = """
import torch

import doctor
from doctor import Recipe, advise, check, convert, explain, kvcache, quantize, tune, verify

recipe = Recipe(method="gptq", bits=4, group_size=64)
report = check("model", recipe)
held = check(torch.nn.Linear(2, 2)), check({"a": torch.ones(2)}, model_config={"vocab_size": 2})
done = quantize("model", "out", recipe, rows=8, memory=1 << 30, compare_rows=2)
compared = verify("model", "out", rows=4)
better = tune("out", "model", "tuned", rows=8)
floats = convert("out", "floats", "bf16", overwrite=True)
cache = kvcache("model", context=1024)
advice = advise("model", memory=24 << 30, gpus=2)
page: str = explain("W201")
html: str = report.to_html()
first: str = advice.fitting[0].quantize
version: str = doctor.__version__
ok: bool = done.report.ok and compared.ok
"""
# What torch and the like declare is theirs to check, and most of the work.
OTHERS = "[mypy]\n[mypy-torch.*,transformers.*,scipy.*,numpy.*]\nfollow_imports = skip\n"
WRONG = 'from doctor import quantize, tune\nquantize("model", "out", row=8)\ntune("out", "model", "tuned", row=8)\n'


@pytest.mark.parametrize("name, job", JOBS.items())
def test_typed_options_are_the_parameters_of_the_job(name, job):
    module, _dot, function = job.rpartition(".")
    parameters = inspect.signature(getattr(importlib.import_module(module), function)).parameters
    own = {p.name for p in parameters.values() if p.kind is p.KEYWORD_ONLY}
    assert set(typing.get_type_hints(getattr(options, name))) == own


def test_every_public_name_is_there_and_documented():
    for name in doctor.__all__:
        assert inspect.getdoc(getattr(doctor, name)), name
    assert {"quantize", "verify", "kvcache", "advise", "explain", "check", "fix"} <= set(doctor.__all__)


def test_a_script_of_a_user_passes_mypy_and_a_wrong_option_does_not(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "wrong.py").write_text(WRONG)
    (tmp_path / "mypy.ini").write_text(OTHERS)
    root = Path(doctor.__file__).parents[1]
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--no-incremental"]
    run = subprocess.run(
        [*command, "script.py", "wrong.py"],
        cwd=tmp_path,
        env={"MYPYPATH": str(root), "PATH": ""},
        capture_output=True,
        text=True,
    )
    for line in (2, 3):
        assert f'wrong.py:{line}: error: Unexpected keyword argument "row"' in run.stdout, run.stdout + run.stderr
    assert "script.py" not in run.stdout, run.stdout
