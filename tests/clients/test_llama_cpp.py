"""llama.cpp opens our GGUF files and computes what doctor computes with them; xllamacpp brings it whole.

`make test-clients` builds its environment; without it the tests skip.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from doctor.checkpoint.directory import Checkpoint
from doctor.evaluate.clients import load_proof
from doctor.evaluate.clients.load_proof import prove_loading
from doctor.evaluate.clients.logprobs import run_client
from doctor.lint.testing import tiny_gguf, use_family
from doctor.quant.dequantize import as_float
from tests.helpers.broken_gguf import BROKEN, NAN, SOUND
from tests.helpers.gguf_models import FAMILIES, model, run

pytestmark = [pytest.mark.real, pytest.mark.clients]
ROOT = Path(__file__).resolve().parents[2]
ROWS = [torch.randint(3, 90, (1, 24), generator=torch.Generator().manual_seed(i)) for i in range(2)]
# llama.cpp rounds activations to 8 bits where a weight is in blocks: nats a token, on models of random weights.
ACTIVATIONS = 0.02


@pytest.fixture
def python():
    folder = ROOT / ".cache" / "venv-llama"
    if not (folder / "finished").exists():
        pytest.skip("venv-llama is not built: make test-clients")
    return str(folder / "bin" / "python")


def computed(out):
    """The log-probabilities of ROWS that transformers' class computes with the values and config of a GGUF output."""
    import transformers

    view, folder = as_float(Checkpoint.open(out)), out.parent / "plain"
    folder.mkdir()
    (folder / "config.json").write_bytes(view.json["config.json"].raw)
    save_file({name: torch.from_numpy(view.load(name)) for name in view.tensors}, folder / "model.safetensors")
    made = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = [made(input_ids=row).logits[0, :-1].float() for row in ROWS]
    return [torch.log_softmax(x, 1).gather(1, row[0, 1:, None])[:, 0] for x, row in zip(logits, ROWS, strict=True)]


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_computes_what_the_values_say(family, python, tmp_path):
    result = run(model(family, tmp_path / "m"), tmp_path / "out", fields={"method": "rtn"})
    path = result.output / "model-Q8_0.gguf"
    proof = prove_loading(result.output, python=python)
    assert proof.whole and proof.packed, proof
    ran = run_client("llama.cpp", python, path, ROWS, computed(result.output))
    assert ran.tokens == 46 and not ran.refused and not ran.reason, ran
    assert ran.apart < ACTIVATIONS and ran.apart_p99 < 4 * ACTIVATIONS


def test_llama_cpp_refuses_a_file_that_lacks_a_tensor(python, tmp_path):
    result = run(model("llama", tmp_path / "m"), tmp_path / "out", fields={"method": "rtn"})
    path = result.output / "model-Q8_0.gguf"
    path.write_bytes(path.read_bytes().replace(b"blk.0.ffn_up.weight", b"blk.0.ffn_xx.weight"))
    proof = prove_loading(result.output, python=python)
    assert "tensor 'blk.0.ffn_up.weight' not found" in proof.refused and not proof.whole


@pytest.mark.parametrize("scheme", ["Q4_K_M", "Q4_0"])
def test_the_real_model_is_served(scheme, python, smollm2, tmp_path):
    command = [sys.executable, "-m", "doctor", "quantize", smollm2, "-o", tmp_path / "out", "--scheme", scheme]
    done = subprocess.run([*command, "--for", "rtn"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    command = [sys.executable, "-m", "doctor", "verify", smollm2, tmp_path / "out", "--client", "llama.cpp"]
    options = ["--client-python", python, "--rows", "2", "--context", "128", "-f", "json"]
    asked = {**os.environ, "DOCTOR_LOAD_PROOF": "1"}
    checked = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, env=asked)
    report = json.loads(checked.stdout)
    proof, types = report["extra"]["load_proof"], Checkpoint.open(tmp_path / "out").gguf[0].tensors.values()
    assert checked.returncode == 0 and proof["architecture"] == "llama" and not proof["missing"], checked.stdout
    assert "F16" not in {tensor.type.name for tensor in types}


def does(python, spoil, folder):
    """What llama.cpp makes of a tiny file that is spoilt so: "refuses", "dies", "NaN" or "computes"."""
    with use_family("llama"):
        case = tiny_gguf()
    spoil(case)
    (folder / "rows.json").write_text("[[3, 4, 5, 6]]")
    command = [python, Path(load_proof.__file__).with_name("llama_cpp_child.py"), case.write(folder) / case.name]
    quick = os.environ | {"GGML_NO_BACKTRACE": "1"}  # a debugger's trace of each death takes minutes
    ran = subprocess.run([*command, folder / "rows.json"], capture_output=True, text=True, timeout=120, env=quick)
    if ran.returncode:
        return "dies"
    answer = json.loads(ran.stdout.splitlines()[-1])
    if "error" in answer:
        return "refuses"
    return "computes" if all(math.isfinite(x) for x in answer["logprobs"][0]) else "NaN"


@pytest.mark.parametrize("name", BROKEN)
def test_llama_cpp_does_not_load_what_the_rules_call_broken(name, python, tmp_path):
    assert does(python, BROKEN[name][1], tmp_path) in ("refuses", "dies")


@pytest.mark.parametrize("name", NAN)
def test_llama_cpp_computes_nan_by_an_impossible_rotation(name, python, tmp_path):
    assert does(python, NAN[name][1], tmp_path) == "NaN"


@pytest.mark.parametrize("name", SOUND)
def test_llama_cpp_loads_what_the_rules_pass(name, python, tmp_path):
    assert does(python, SOUND[name], tmp_path) == "computes"
