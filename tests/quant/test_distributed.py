"""torchrun on two processes of this machine: the same result as one, and a rank that dies leaves a run to be
resumed.
"""

import json
import os
import random
import subprocess
import sys

import pytest

from doctor.checkpoint.directory import Checkpoint
from doctor.lint.testing import tiny

ROWS = 16


def started(tmp_path, name, ranks, *args, code=None):
    """The finished process of a run on so many ranks; code: Python that runs before it in every rank."""
    script = tmp_path / "start.py"
    script.write_text((code or "") + "\nfrom doctor.cli.main import main\nmain()\n")
    command = (
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), str(script)]
        if ranks > 1
        else [sys.executable, str(script)]
    )
    return subprocess.run(
        [
            *command,
            "quantize",
            str(tmp_path / "m"),
            "-o",
            str(tmp_path / name),
            "--group-size",
            "32",
            "--calibration",
            str(tmp_path / "rows.jsonl"),
            "--max-seq-length",
            "64",
            "--report",
            f"json:{tmp_path / name}.json",
            *args,
        ],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DOCTOR_LANG": "en"},
    )


@pytest.fixture
def text(tmp_path):
    rng = random.Random(0)
    rows = [[1] + [rng.randrange(3, 96) for _ in range(63)] for _ in range(ROWS)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"input_ids": r}) for r in rows))


@pytest.mark.parametrize("family, method", [("llama", "gptq"), ("qwen2_moe", "awq")])
def test_two_ranks_give_what_one_gives_up_to_the_order_of_sums(tmp_path, text, family, method):
    tiny(family).write(tmp_path / "m")
    for name, ranks in (("one", 1), ("two", 2)):
        done = started(tmp_path, name, ranks, "--method", method)
        assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("layer 2 of 2") == 1  # one voice
    one, two = (json.loads((tmp_path / name / "doctor.json").read_text()) for name in ("one", "two"))
    assert [x["name"] for x in one["linears"]] == [x["name"] for x in two["linears"]] and one["outcomes"] == two[
        "outcomes"
    ]
    for a, b in zip(one["linears"], two["linears"], strict=False):
        assert b["solve"]["loss"] == pytest.approx(a["solve"]["loss"], rel=0.05), a["name"]
    reports = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two")]
    tokens = (
        [[x["hessian"]["tokens"] for x in r["linears"]] for r in reports] if "linears" in reports[0] else [[0], [0]]
    )
    # A router's near tie may fall the other way after a layer whose sums were taken in another order.
    assert tokens[0] == pytest.approx(tokens[1], abs=2)
    first, second = (Checkpoint.open(tmp_path / name) for name in ("one", "two"))
    assert {n: t.shape for n, t in first.tensors.items()} == {n: t.shape for n, t in second.tensors.items()}


def test_a_rank_that_dies_ends_the_run_which_can_be_resumed(tmp_path, text):
    tiny("llama").write(tmp_path / "m")
    dies = """
import os
from doctor.quant import job
real = job.quantize_layer
def quantize_layer(setup, activations, i, recipe, **options):
    if i == 1 and os.environ["RANK"] == "1":
        os._exit(7)
    return real(setup, activations, i, recipe, **options)
job.quantize_layer = quantize_layer
"""
    done = started(tmp_path, "out", 2, code=dies)
    assert done.returncode != 0 and not (tmp_path / "out").exists()
    assert "rank 0 of 2: another rank of this run is gone" in done.stderr and "--resume" in done.stderr
    assert (tmp_path / ".out.doctor-quantize" / "part-00000.safetensors").exists()
    again = started(tmp_path, "out", 2, "--resume")
    assert again.returncode == 0, again.stderr[-3000:]
    assert len(json.loads((tmp_path / "out" / "doctor.json").read_text())["linears"]) == 14


def test_more_ranks_than_batches_are_refused():
    from doctor.core.errors import DoctorError
    from doctor.quant.distributed import Ranks

    assert [Ranks(r, 3).local_batches([0, 1, 2, 3, 4]) for r in range(3)] == [[0], [1, 2], [3, 4]]
    with pytest.raises(DoctorError, match="3 ranks for 2 batches of rows"):
        Ranks(0, 3).local_batches([0, 1])
