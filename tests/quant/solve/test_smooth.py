"""SmoothQuant's factors: one loud channel is spread, and the output keeps more of its digits."""

import torch

from doctor.quant.solve.awq_source import Source
from doctor.quant.solve.smooth import smooth_scales

NORM = Source("norm", "x")


def rounded(X, W):
    """Y of inputs rounded to int8 a token, and weights a row."""
    token, row = X.abs().amax(1, keepdim=True) / 127, W.abs().amax(1, keepdim=True) / 127
    return ((X / token).round() * token) @ ((W / row).round() * row).T


def linear(loud=40.0, k=64):
    rng = torch.Generator().manual_seed(0)
    X, W = torch.randn(512, k, generator=rng), torch.randn(96, k, generator=rng) * 0.1
    X[:, 3] *= loud
    return X, W


def smoothed(X, W, source=NORM):
    H = 2 / len(X) * X.T @ X
    return smooth_scales([W], source, H=H, channels=X.abs().amax(0))


def test_a_loud_channel_is_spread_over_the_weights():
    X, W = linear()
    s, note = smoothed(X, W)
    assert note.startswith("max(x)^") and s[3] == s.max() and s[3] > 4 * s.median()
    before, after = ((rounded(a, b) - X @ W.T).square().mean() for a, b in ((X, W), (X / s, W * s)))
    assert after < 0.3 * before


def test_even_channels_are_left_alone_or_nearly_so():
    X, W = linear(loud=1.0)
    s, _note = smoothed(X, W)
    before, after = ((rounded(a, b) - X @ W.T).square().mean() for a, b in ((X, W), (X / s, W * s)))
    assert after < 1.02 * before


def test_channels_that_no_row_reached_keep_their_factor_of_one():
    X, W = linear()
    X[:, 5], W[:, 6] = 0, 0
    s, _note = smoothed(X, W)
    assert s[5] == s[6] == 1 and torch.isfinite(s).all()


def test_channels_of_a_shared_source_get_one_factor():
    X, W = linear()
    source = Source("rows", "v", repeat=2, head=16)
    s, _note = smoothed(X, W, source)
    assert s.shape == (32,) and source.spread(s).shape == (64,) and s[3] == s.max()
