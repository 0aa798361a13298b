"""What doctor's own process leaves out of transformers and torch, and that it comes back when it is asked for."""

import json
import os
import subprocess
import sys

from doctor.lint.testing import tiny

LOADED = (
    "[m for m in ('sympy', 'torch._dynamo', 'torch.distributed.tensor', 'scipy.optimize', "
    "'transformers.loss.loss_utils') "
    "if type(sys.modules.get(m)).__name__ == 'module']"
)


def run(code: str, **environment: str):
    """The JSON that `code` prints in an interpreter of its own."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


MODEL = """
import sys, json
from doctor.quant import import_stubs
if {install}: import_stubs.install()
import torch, transformers
from transformers import AutoModelForCausalLM, LlamaConfig
config = LlamaConfig(num_hidden_layers=2, hidden_size=64, intermediate_size=128, num_attention_heads=4, vocab_size=100)
torch.manual_seed(0)
model = AutoModelForCausalLM.from_config(config)
logits = model(torch.arange(24).view(2, 12)).logits
"""


def test_a_model_computes_the_same_without_what_was_left_out():
    with_stubs = run(MODEL.format(install=True) + f"print(json.dumps([logits.double().sum().item(), {LOADED}]))")
    whole = run(MODEL.format(install=False) + "print(json.dumps(logits.double().sum().item()))")
    assert with_stubs == [whole, []]


def test_what_was_left_out_is_there_when_it_is_asked_for():
    code = (
        MODEL.format(install=True)
        + """
loss = model.loss_function
from transformers.masking_utils import TransformGetItemToIndex
import transformers.loss.loss_utils as losses
from torch._dynamo.utils import counters
wanted = [type(TransformGetItemToIndex()).__module__,
          torch.compile(lambda x: 2 * x, backend="eager")(torch.ones(1)).item(),
          loss is losses.ForCausalLMLoss, type(sys.modules["torch._dynamo"]).__name__]
print(json.dumps(wanted))
"""
    )
    assert run(code) == ["torch._dynamo._trace_wrapped_higher_order_op", 2.0, True, "module"]


def test_ranks_keep_their_torch_distributed():
    code = MODEL.format(install=True) + f"print(json.dumps({LOADED}))"
    assert "torch.distributed.tensor" in run(code, WORLD_SIZE="2")


def test_a_program_that_imports_doctor_is_left_alone():
    code = f"import sys, json\nimport doctor\nfrom transformers import LlamaForCausalLM\nprint(json.dumps({LOADED}))"
    assert "torch._dynamo" in run(code)


def test_the_command_quantizes_without_them(tmp_path):
    tiny("qwen3").write(tmp_path / "m")
    code = f"""
import sys, json
from doctor.cli import main as cli
sys.argv = ["doctor", "quantize", {str(tmp_path / "m")!r}, "-o", {str(tmp_path / "out")!r},
            "--calibration", {str(tmp_path / "rows.jsonl")!r},
            "--group-size", "32", "--max-seq-length", "32", "-f", "json:" + {str(tmp_path / "report.json")!r}]
try:
    cli.main()
except SystemExit as end:
    print(json.dumps([end.code, {LOADED}]))
"""
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"input_ids": [(7 * i + j) % 90 + 3 for j in range(32)]}) + "\n" for i in range(16))
    )
    assert run(code) == [0, []]
    assert (tmp_path / "out" / "config.json").exists()
