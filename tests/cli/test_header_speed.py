"""A check of headers stays quick. The limits are several times what an idle machine needs, because tests share
theirs.
"""

import json
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "bench"))

import header  # noqa: E402


@pytest.mark.parametrize(
    "made, shards, limit", [(header.dense, 1, 1.5), (header.mixture, 16, 10.0)], ids=("300", "50000")
)
def test_cpu_time_of_a_header_check_from_a_cold_interpreter(tmp_path, made, shards, limit):
    folder = header.write(tmp_path / "m", *made(), shards)
    _, cpu = header.measure(folder, 1, tmp_path / "bytecode")
    assert cpu < limit, f"{cpu:.2f} s of CPU"


def test_the_files_of_the_measurement_are_whole_and_say_nothing_wrong(tmp_path):
    from doctor.api import check
    from doctor.core.recipe import Recipe

    for name, made, shards in (("d", header.dense(), 1), ("m", header.mixture(2, 4), 3)):
        report = check(header.write(tmp_path / name, *made, shards), Recipe(), stage="header")
        assert [f.code for f in report.findings] == ["C110"] and report.summary["tensors"] == len(made[1])


def test_a_header_check_imports_no_numpy_and_no_planner(tmp_path):
    folder = header.write(tmp_path / "m", *header.dense(1), 1)
    code = (
        "import sys\nfrom doctor.cli.main import main\n"
        f"try:\n    main(['check', {str(folder)!r}, '--stage', 'header', '--concise', '--config', 'none'])\nexcept "
        f"SystemExit:\n    pass\n"
        "heavy = {'numpy', 'rich', 'jinja2', 'doctor.fixing.plan', 'doctor.scan.scan', 'huggingface_hub'} & "
        "set(sys.modules)\nassert not heavy, heavy\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr


NAME = "model.layers.{}.mlp.experts.{}.down_proj.weight"
HOSTILE = {  # entry i of a header of so many
    "short names": (138_000, lambda i: {"dtype": "I8", "shape": [], "data_offsets": [i, i + 1]}),
    "holes": (75_000, lambda i: {"dtype": "BF16", "shape": [1, 1], "data_offsets": [4 * i, 4 * i + 2]}),
    "one place": (75_000, lambda i: {"dtype": "BF16", "shape": [1, 1], "data_offsets": [0, 2]}),
    "wrong dtypes": (75_000, lambda i: {"dtype": "XX", "shape": [1, -1], "data_offsets": [2 * i, 0]}),
    "no entries": (140_000, lambda i: i),
    "as many as are read": (65_536, lambda i: {"dtype": "BF16", "shape": [1, 1], "data_offsets": [2 * i, 2 * i + 2]}),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_nine_megabytes_of_header_take_a_second(tmp_path, kind):
    from doctor.api import check
    from doctor.core.recipe import Recipe
    from doctor.report import render

    count, entry = HOSTILE[kind]
    (tmp_path / "config.json").write_text(json.dumps(header.dense(1)[0]))
    name = "{1}" if kind == "short names" else NAME
    raw = json.dumps({name.format(i // 7, i): entry(i) for i in range(count)}, separators=(",", ":")).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(count * (1 if kind == "short names" else 4)))
    assert 7e6 < file.stat().st_size < 10e6
    recipe, least = Recipe(), 99.0
    for _ in range(2):  # the first time imports rules too
        began = time.process_time()
        report = check(tmp_path, recipe, stage="header")
        render("full", [report])
        least = min(least, time.process_time() - began)
        if least < 1.0:
            break
    # A second where nothing else runs; a neighbour on the core's other thread takes its share of it.
    assert least < 1.4, f"{least:.2f} s of CPU, for {len(report.findings)} findings"
