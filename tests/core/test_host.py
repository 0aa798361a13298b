"""A report says where it was made and how; finding that out imports nothing."""

import json
import subprocess
import sys

from doctor.api import check
from doctor.checkpoint.directory import Checkpoint
from doctor.core.host import describe
from doctor.fixing import output_summary
from doctor.lint.testing import tiny
from doctor.report import render

RECEIPT = {
    "doctor": "0.1.0",
    "torch": "2.13.0",
    "recipe": {"method": "gptq", "bits": 4, "group_size": 32, "keep": []},
    "outcomes": {"gptq": 13, "kept": 1},
    "calibration": {"source": "<texts>", "rows": 4, "tokens": 128},
    "notes": ["calibration: 4 rows instead of 9"],
}


def test_versions_are_told_without_importing_torch():
    code = (
        "import sys; from doctor.core.host import describe; d = describe(); assert 'torch' not in sys.modules; "
        "print(d['torch'], d['cores'])"
    )
    version, cores = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert version[0].isdigit() and int(cores) >= 1
    assert describe()["Python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}")


def test_a_quantized_checkpoint_shows_its_receipt_its_files_and_the_machine(tmp_path):
    root = tiny().write(tmp_path / "q")
    (root / "doctor.json").write_text(json.dumps(RECEIPT))
    report = check(root, tiny().recipe, figures=True)
    for lang, heads in (
        ("en", ("Receipt", "Machine", "how these files were made")),
        ("zh", ("凭据", "机器", "这些文件是怎样做出来的")),
    ):
        page = render("html", [report], lang)
        assert all(h in page for h in heads) and len(page) < 300_000
        assert "13 gptq, 1 kept" in page and "&lt;texts&gt;: 4 rows, 128 tokens" in page and "<texts>: 4" not in page
        assert Checkpoint.open(root).sha256("config.json") in page


def test_a_receipt_with_wrong_types_is_shown_as_far_as_it_goes():
    for wrong in (None, 3, "x", [1], {"a": [2]}):
        found = output_summary.quantization_summary(
            {"outcomes": {"gptq": wrong}, "recipe": wrong, "calibration": wrong, "notes": wrong, "torch": wrong}
        )
        assert all(isinstance(cell, str) for row in found["steps"] for cell in row)
