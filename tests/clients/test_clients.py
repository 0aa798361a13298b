"""Real engines open our checkpoints: each test starts vLLM or transformers in its own environment and asks it.

`make test-clients` builds the environments; without them the tests skip.
"""

import json
import subprocess
from pathlib import Path

import pytest

pytestmark = [pytest.mark.real, pytest.mark.clients]
ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENTS = {"transformers": "venv-hf", "vllm": "venv-vllm"}
PROMPT = "The capital of France is"


def ask(client: str, model: Path, *options: str) -> dict:
    """{"text", "quantization", "dtype"} from the client's process; fails with the end of its log."""
    environment = ROOT / ".cache" / ENVIRONMENTS[client]
    if not (environment / "finished").exists():
        pytest.skip(f"{environment.name} is not built: make test-clients")
    script = ROOT / "tests" / "clients" / f"ask_{client}.py"
    command = [environment / "bin" / "python", script, model, PROMPT, *options]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("client", ENVIRONMENTS)
def test_client_opens_the_unquantized_model(client, smollm2):
    answer = ask(client, smollm2)
    assert "Paris" in answer["text"]
    assert answer["quantization"] is None
