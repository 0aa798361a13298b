"""What a run refuses before it computes: an output that another run writes, and finished work that would be lost."""

import json
import subprocess
import sys

from doctor.fixing.lock import hold
from doctor.lint.testing import tiny
from doctor.quant.stage import JOURNAL, stage_of

REFUSED = """
import sys
from doctor.cli.main import main
try:
    main(sys.argv[1:])
except SystemExit as error:
    print(error.code, "torch" in sys.modules)
"""


def quantize(folder, out, *options):
    """(exit code and whether torch was imported, stderr) of a run that is refused."""
    command = [sys.executable, "-c", REFUSED, "quantize", str(folder), "-o", str(out), "--group-size", "32", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.stdout.split(), done.stderr


def test_an_output_that_another_run_writes_is_refused_before_torch_is_imported(tmp_path):
    folder = tiny().write(tmp_path / "m")
    with hold(tmp_path / "out"):
        said, error = quantize(folder, tmp_path / "out")
    assert said == ["2", "False"] and "is writing it" in error and "doctor-lock" in error


def test_finished_work_is_not_deleted_and_the_ways_out_are_named(tmp_path):
    folder, out = tiny().write(tmp_path / "m"), tmp_path / "out"
    stage_of(out).mkdir()
    lines = [{"fingerprint": {}}, {"block": 0, "records": []}, {"block": 1, "records": []}]
    (stage_of(out) / JOURNAL).write_text("".join(json.dumps(line) + "\n" for line in lines))
    said, error = quantize(folder, out)
    assert said == ["2", "False"] and "holds 2 finished layers of an interrupted run" in error and "--resume" in error
    assert (stage_of(out) / JOURNAL).exists()
