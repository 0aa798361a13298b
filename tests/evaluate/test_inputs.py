"""Rows of held-out text: how long they may be."""

from doctor.checkpoint.directory import Checkpoint
from doctor.evaluate.inputs import fitting
from doctor.lint.testing import tiny


def test_rows_end_where_learned_positions_do(tmp_path):
    learned = Checkpoint.open(tiny("gpt2").write(tmp_path / "learned"))
    positions = next(info.shape[0] for name, info in learned.tensors.items() if name.endswith("wpe.weight"))
    assert fitting(learned, positions + 100) == positions and fitting(learned, positions - 1) == positions - 1
    rotary = Checkpoint.open(tiny("llama").write(tmp_path / "rotary"))
    assert fitting(rotary, 1 << 20) == 1 << 20
