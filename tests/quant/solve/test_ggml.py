"""Block types of GGUF: bytes of ggml without feedback, and less loss with it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from doctor.checkpoint.ggml_types import BY_NAME
from doctor.core.errors import NotQuantizable
from doctor.formats.ggml_blocks import decode
from doctor.quant.solve import ggml
from doctor.quant.solve.losses import energies

VECTOR = json.loads((Path(__file__).parents[3] / "fixtures" / "vectors" / "gguf_blocks.json").read_text())
EQUAL = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
pytestmark = pytest.mark.skipif(not ggml.usable(), reason="needs the native library")


def bf16(digits):
    return torch.from_numpy((np.frombuffer(bytes.fromhex(digits), ">u2").astype(np.uint32) << 16).view(np.float32))


def inputs():
    given = VECTOR["inputs"]
    return bf16(given["x_bf16_hex"]).reshape(2, 256).clone(), bf16(given["imatrix_bf16_hex"]).clone()


@pytest.mark.parametrize("case", ["plain", "imatrix"])
@pytest.mark.parametrize("name", EQUAL)
def test_without_feedback_the_bytes_are_those_of_ggml(name, case):
    x, importance = inputs()
    words = ggml.round_blocks(x, BY_NAME[name], importance if case == "imatrix" else None)
    assert bytes(words.numpy()).hex() == VECTOR["types"][name]["cases"][case]["hex"]


@pytest.mark.parametrize("case", ["plain", "imatrix"])
@pytest.mark.parametrize("name", ["IQ4_NL", "IQ4_XS"])
def test_uneven_levels_are_chosen_no_worse_than_by_ggml(name, case):
    x, importance = inputs()
    kind = BY_NAME[name]
    words = ggml.round_blocks(x, kind, importance if case == "imatrix" else None).numpy()
    theirs = np.frombuffer(bytes.fromhex(VECTOR["types"][name]["cases"][case]["hex"]), np.uint8).reshape(2, -1)
    weight = importance.numpy() if case == "imatrix" else 1.0
    ours, other = ((weight * (decode(raw, kind, 256) - x.numpy()) ** 2).sum() for raw in (words, theirs))
    assert ours <= other * (1 + 1e-6)


@pytest.fixture(scope="module")
def problem():
    """W f32[64, 512] with a row of zeros and an outlier, and H of correlated inputs with a dead column."""
    g = torch.Generator().manual_seed(3)
    mix = torch.randn(512, 512, generator=g) / 512**0.5
    X = torch.randn(1024, 512, generator=g) @ (0.7 * mix + torch.eye(512)) * torch.rand(512, generator=g).exp()
    X[:, 77] = 0
    W = torch.randn(64, 512, generator=g) * 0.02
    W[3] = 0
    W[5, 100] = 1.0
    return W, 2 / 1024 * X.T @ X


@pytest.mark.parametrize("name", ggml.FITTED)
def test_feedback_loses_less_and_words_decode_to_what_was_meant(problem, name):
    W, H = problem
    kind = BY_NAME[name]
    with_it = ggml.solve(W, H, kind)
    plain = torch.from_numpy(decode(ggml.round_blocks(W, kind, H.diagonal()).numpy(), kind, 512).copy())
    assert torch.equal(torch.from_numpy(decode(with_it.words.numpy(), kind, 512).copy()), with_it.values)
    before, after = (float(energies(W - Q, H).sum()) for Q in (plain, with_it.values))
    assert after < 0.75 * before
    assert with_it.outcome == "gptq"
    assert with_it.loss == pytest.approx(after / float(energies(W, H).sum()))
    assert with_it.loss < with_it.rtn_loss


def test_refinement_never_raises_the_loss(problem):
    W, H = problem
    for name in ("Q5_0", "Q4_K", "Q6_K"):
        losses = [ggml.solve(W, H, BY_NAME[name], refine=passes).loss for passes in (0, 1, 2)]
        assert losses[0] > losses[1] > losses[2]


def test_widths_that_end_in_a_shorter_panel_are_taken(problem):
    W, H = problem
    found = ggml.solve(W[:, :352].contiguous(), H[:352, :352], BY_NAME["Q5_0"])
    assert found.loss < found.rtn_loss


def test_the_result_does_not_depend_on_threads(problem):
    W, H = problem
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = ggml.solve(W, H, BY_NAME["Q4_K"]).words
        torch.set_num_threads(2)
        assert torch.equal(ggml.solve(W, H, BY_NAME["Q4_K"]).words, one)
    finally:
        torch.set_num_threads(before)


def test_a_hessian_that_cannot_be_factored_gives_rounding_and_says_so():
    H = torch.zeros(64, 64)
    found = ggml.solve(torch.randn(32, 64), H, BY_NAME["Q8_0"])
    assert found.outcome == "rtn"


def test_what_float16_cannot_hold_is_refused():
    W = torch.full((2, 256), 1e10)
    with pytest.raises(NotQuantizable, match="past 65504"):
        ggml.solve(W, None, BY_NAME["Q6_K"])
    W[0, 0] = torch.nan
    with pytest.raises(NotQuantizable):
        ggml.solve(W, None, BY_NAME["Q4_0"])
