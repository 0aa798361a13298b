"""Tuning in a run that writes GGUF: codes stay, block scales and norms change, and the file is what was tuned."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from doctor.checkpoint.directory import Checkpoint
from doctor.checkpoint.ggml_types import BY_NAME
from doctor.formats.ggml_blocks import decode
from doctor.quant.block_change import HEADS
from doctor.quant.dequantize import as_float
from doctor.quant.solve import ggml
from doctor.quant.tuning import blocks
from doctor.quant.tuning.train import Trainer
from tests.helpers.gguf_models import model, run

sys.path.insert(0, str(Path(__file__).parents[3] / "examples"))
from demo import train as teach

pytestmark = pytest.mark.skipif(not ggml.usable(), reason="needs the native library")


def scales_of(kind, n=6, width=512):
    """(words, weights, levels, scales) of random weights in blocks; the first block is of zeros."""
    W = torch.randn(n, width, generator=torch.Generator().manual_seed(5)) * 0.05
    W[0, : BY_NAME[kind].block] = 0
    words = ggml.round_blocks(W, BY_NAME[kind])
    weights = torch.from_numpy(decode(words.numpy(), BY_NAME[kind], width).copy())
    scales = blocks.BlockScales.of("w", words, BY_NAME[kind], "cpu")
    return words, weights, blocks.levels_of(words, BY_NAME[kind]), scales


@pytest.mark.parametrize("kind", ggml.FITTED)
def test_words_under_a_change_are_the_weights_under_it(kind):
    words, weights, levels, scales = scales_of(kind)
    assert torch.equal(scales.weight(torch.zeros_like(scales.scale), levels), weights)
    change = torch.linspace(-0.4, 0.4, scales.scale.numel()).reshape(scales.scale.shape)
    change = scales.rounded(change)
    written = torch.from_numpy(decode(scales.stored(change).of(words).numpy(), scales.kind, weights.shape[1]).copy())
    assert torch.allclose(written, scales.weight(change, levels), rtol=1e-5, atol=1e-7)
    assert torch.equal(scales.stored(torch.zeros_like(change)).of(words), words)
    assert torch.equal(scales.stored(change).of(words[2:4], 2), scales.stored(change).of(words)[2:4])
    other = scales.stored(change).of(words) ^ words
    heads = {at for head in HEADS[kind] for at in (head, head + 1)}
    touched = other.reshape(-1, scales.kind.nbytes).any(0).nonzero().flatten().tolist()
    assert set(touched) <= heads and touched


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "Q5_0", "Q5_1"])
def test_slopes_are_those_of_finite_differences(kind):
    _words, weights, levels, scales = scales_of(kind)
    target = torch.randn(weights.shape, generator=torch.Generator().manual_seed(6)) * 0.05
    change = torch.full_like(scales.scale, 0.01)

    def loss(change):
        return (scales.weight(change, levels) - target).double().square().sum()

    found = scales.gradient(2 * (scales.weight(change, levels) - target), levels)
    for place in (1, scales.scale.shape[1] - 1):  # the last one is a minimum's where there are any
        step = torch.zeros_like(change)
        step[2, place] = 1e-2
        wanted = float(loss(change + step) - loss(change - step)) / 2e-2
        assert float(found[2, place]) == pytest.approx(wanted, rel=1e-2, abs=1e-6)


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    return teach(model("llama", tmp_path_factory.mktemp("blocks") / "original"), steps=60)


@pytest.mark.parametrize("scheme", ["Q4_K_M"])
def test_a_tuned_file_differs_in_block_scales_and_norms_alone(scheme, taught, tmp_path, monkeypatch):
    # six steps at the usual rate are less than what a norm's type rounds away
    monkeypatch.setitem(Trainer.__init__.__kwdefaults__, "rate", 2e-3)
    for tune in ("off", 6):
        (tmp_path / str(tune)).mkdir()
    plain, tuned = (run(taught, tmp_path / str(tune) / "out", scheme, tune=tune) for tune in ("off", 6))
    assert plain.output and tuned.output
    done = tuned.report.extra["tuning"]
    assert done["end"] < done["start"] and done["written"]
    before, after = (Checkpoint.open(result.output) for result in (plain, tuned))
    old, new = (checkpoint.gguf[0].tensors for checkpoint in (before, after))
    assert {n: (t.type.name, t.shape) for n, t in old.items()} == {n: (t.type.name, t.shape) for n, t in new.items()}
    changed = [name for name in old if raw(before, name) != raw(after, name)]
    assert any(name.endswith("_norm.weight") for name in changed)
    packed = [name for name in changed if not name.endswith("_norm.weight")]
    assert packed and all(name.startswith("blk.") for name in packed)
    for name in packed:
        kind = new[name].type
        different = np.frombuffer(raw(before, name), np.uint8) != np.frombuffer(raw(after, name), np.uint8)
        at = set(np.flatnonzero(different.reshape(-1, kind.nbytes).any(0)).tolist())
        assert at <= {i for head in HEADS[kind.name] for i in (head, head + 1)}, name
    floats = as_float(after)
    assert all(
        np.isfinite(floats.load(name)).all() for name in floats.tensors if floats.tensors[name].dtype.name == "F32"
    )


def raw(checkpoint, name):
    tensor = checkpoint.gguf[0].tensors[name]
    with checkpoint.open_file(tensor.file) as file:
        return bytes(file.read(tensor.begin, tensor.nbytes))
