"""A run whose limit leaves no room for a Hessian: it lies in files, and the limit is said and kept."""

import json
from dataclasses import replace

import pytest

from doctor import api
from doctor.core.recipe import Recipe
from doctor.lint.testing import tiny
from doctor.quant import budget
from doctor.quant.forward import staged
from doctor.quant.solve.mapped import Mapped
from doctor.scan import native

pytestmark = pytest.mark.skipif(native.level() is None, reason="needs the native library")


def test_a_run_with_squares_on_disk_quantizes_as_one_in_memory(tmp_path, monkeypatch):
    source = tiny("llama").write(tmp_path / "m")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"input_ids": [1 + (i * j) % 90 for j in range(1, 65)]}) for i in range(1, 9)))
    real, made = budget.needs, []

    def mapped(folder, k):
        made.append((folder, k))
        return Mapped(folder, k)

    monkeypatch.setattr(staged, "Mapped", mapped)
    options = {"calibration": rows, "max_seq_length": 64, "recipe": Recipe(group_size=32)}
    want = api.quantize(source, tmp_path / "o", **options)
    assert not made
    monkeypatch.setattr(budget, "needs", lambda *given: replace(real(*given), squares_on_disk=1))
    got = api.quantize(source, tmp_path / "disk", **options)
    assert got.output and made and {folder.parent for folder, _k in made} == {tmp_path}
    assert [r["outcome"] for r in got.linears] == [r["outcome"] for r in want.linears] == ["gptq"] * len(got.linears)
    losses = [[r["solve"]["loss"] for r in done.linears] for done in (got, want)]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
