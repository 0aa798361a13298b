"""The whole chain on real weights: SmolLM2-135M checked as a user checks it, and its first two blocks quantized and
verified.
"""

import json
import os
import re
import subprocess
import sys
import time

import pytest

from doctor import api
from doctor.checkpoint.directory import Checkpoint
from doctor.core.recipe import Recipe
from doctor.lint.testing import shard_bytes

pytestmark = pytest.mark.real

MEMORY_LIMIT = (
    400 << 20
)  # bytes resident at most; the weights alone are 269 MB, so a check that loads them whole cannot pass
# VmHWM and not ru_maxrss: the latter starts at what the process that forked this one had.
CHILD = (
    "import json, resource, sys; from doctor.cli.main import main\n"
    "try: main(sys.argv[1:])\n"
    "finally:\n"
    "    peak = next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
    "    print(json.dumps([*resource.getrusage(resource.RUSAGE_SELF)[:2], peak]), file=sys.stderr)"
)


def doctor(*arguments):
    """(exit code, stdout, CPU seconds, peak resident bytes) of a process of its own."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("DOCTOR_")}
    run = subprocess.run(
        [sys.executable, "-c", CHILD, *map(str, arguments)], capture_output=True, text=True, env=environment
    )
    user, system, peak = json.loads(run.stderr.splitlines()[-1])
    return run.returncode, run.stdout, user + system, peak * 1024


def test_groups_of_64_are_ready_in_two_lines_and_little_memory(smollm2):
    code, text, _, peak = doctor("check", smollm2, "--group-size", 64)
    assert code == 0
    first, second = text.splitlines()
    assert first.startswith("✓ ready for gptq 4-bit g64   smollm2 · LlamaForCausalLM · 134.5 M")
    assert "272 tensors, every byte read" in second
    assert peak < MEMORY_LIMIT, f"{peak / 2**20:.0f} MiB"


def test_groups_of_128_give_one_finding_that_names_576(smollm2):
    code, text, _, _ = doctor("check", smollm2, "-f", "concise")
    assert code == 1
    (finding,) = api.check(smollm2, Recipe()).findings
    assert finding.code == "G301" and "in_features 576" in finding.message and "4.5 × 128" in finding.message
    assert len(re.findall(r"\b[A-Z]\d{3}\b", text)) == 1 and "G301" in text


def test_headers_alone_are_judged_in_a_moment(smollm2):
    code, text, seconds, peak = doctor("check", smollm2, "--group-size", 64, "--stage", "header")
    assert code == 0 and "ready" in text
    # 0.3 s on an idle core; the limit is for a busy machine, and still far below what reading the weights would take
    # there.
    assert seconds < 2, f"{seconds:.2f} s of CPU"
    assert peak < 160 << 20, f"{peak / 2**20:.0f} MiB"


@pytest.fixture(scope="module")
def two_blocks(smollm2, tmp_path_factory):
    """SmolLM2 without its blocks 2 to 29: a checkpoint of its own, with real embeddings and real inputs of two
    blocks.
    """
    folder = tmp_path_factory.mktemp("real") / "two-blocks"
    folder.mkdir()
    source = Checkpoint.open(smollm2)
    names = [n for n in source.tensors if not (n.startswith("model.layers.") and int(n.split(".")[2]) > 1)]
    dtypes = {n: source.tensors[n].dtype.name for n in names}
    (folder / "model.safetensors").write_bytes(shard_bytes({n: source.load(n) for n in names}, dtypes))
    for entry in source.entries:
        if not entry.endswith(".safetensors"):
            (folder / entry).write_bytes((smollm2 / entry).read_bytes())
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 2}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_two_real_blocks_are_quantized_far_closer_than_rounding_and_verified(two_blocks, tmp_path):
    started = time.process_time()
    recipe = Recipe(group_size=64)
    result = api.quantize(two_blocks, tmp_path / "q", recipe, rows=8, max_seq_length=256)
    assert result.output is not None, result.report.findings
    assert {r["outcome"] for r in result.linears} == {"gptq"} and len(result.linears) == 14
    for record in result.linears:
        ratio = record["solve"]["loss"] / record["solve"]["rtn_loss"]
        assert ratio < 0.8, f"{record['name']}: {ratio:.2f} of rounding's loss"
    assert not [f for f in api.check(tmp_path / "q", recipe).findings if f.severity != "info"]
    report = api.verify(two_blocks, tmp_path / "q", rows=4, context=256, memory=0)
    measured = report.extra["comparison"]
    assert measured["nonfinite_quantized"] == 0 and len(measured["block_errors"]) == 2
    assert measured["kl_mean"] < 0.1, measured["kl_mean"]
    assert measured["perplexity_quantized"] < 1.1 * measured["perplexity_original"]
    assert "O604" not in {f.code for f in report.findings}
    spent = time.process_time() - started
    assert spent < 120, f"{spent:.0f} s of CPU"  # 40 s alone; a neighbour on the same core doubles that
