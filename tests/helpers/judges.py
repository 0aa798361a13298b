"""What a kernel's output must be, step by step in float64: judged on its own decisions, so that one tie that fell the
other way does not excuse the rest of a row.
"""

import torch

from doctor.quant.solve.grid_search import rounding_error

TIE = 2e-4  # of a step: nearer to a tie than this, either code is right
EPS = 2.0**-24


def assert_close(got, want, tolerance, what):
    """NaN and Inf must stand at the same places; elsewhere abs(got - want) <= tolerance. Fails on NaN by
    construction.
    """
    got, want = got.to(torch.float64), want.to(torch.float64)
    finite = torch.isfinite(want)
    assert (torch.isfinite(got) == finite).all(), f"{what}: finite in other places"
    off = (got - want).abs()[finite]
    allowed = torch.as_tensor(tolerance, dtype=torch.float64).expand_as(want)[finite]
    assert not (~(off <= allowed)).any(), f"{what}: off by up to {off.max().item():.3g}"


def judge_columns(T, U, codes, grid, groups, bits):
    """Every code of GPTQ follows from the codes before it in its row.

    T f32[k, n] as it was, codes u8[k, n], grid Grid of [n, G], groups i32[k]. With e_i = (w_i - q_i) / U_ii, the weight
    that was rounded is w_j = T_j - sum of e_i U_ij over i < j: that is U^T e = T - Q, one triangular system in float64.
    """
    T, U = T.to(torch.float64), U.to(torch.float64)
    scale, zero = grid.scale.to(torch.float64).T[groups.long()], grid.zero.to(torch.float64).T[groups.long()]
    Q = (codes.to(torch.float64) - zero) * scale
    rows = torch.isfinite(T).all(0)
    assert rows.any(), "no row is finite: nothing is judged"
    e = torch.linalg.solve_triangular(U.T.contiguous(), (T - Q)[:, rows], upper=False)
    w = Q[:, rows] + e * U.diagonal()[:, None]
    exact = w / scale[:, rows] + zero[:, rows]
    chosen, top = codes.to(torch.float64)[:, rows], 2**bits - 1
    # The float32 sums that w is made of err by some units of the largest partial sum.
    reach = (e.abs().T @ U.abs()).T + T[:, rows].abs()
    slack = 0.5 + TIE + 64 * EPS * reach / scale[:, rows]
    clamped = exact.clamp(0, top)
    off = (chosen - clamped).abs()
    wrong = ~(off <= slack)
    assert not wrong.any(), (
        f"{int(wrong.sum())} of {wrong.numel()} codes do not follow from those before them, first at column "
        f"{int(wrong.any(1).to(torch.uint8).argmax())}; off by {off[wrong].max().item():.2f}"
    )


def judge_fit(W, grid, want, weight, bits, share=0.995):
    """The grid found is the reference's in `share` of the groups, and elsewhere as good: float32 sums decide
    near-ties.
    """
    n, k = W.shape
    groups = grid.scale.shape[1]
    assert torch.isfinite(grid.scale).all()
    same = (grid.scale == want.scale) & (grid.zero == want.zero)
    assert same.float().mean() >= share, f"only {same.float().mean():.4f} of the grids are the reference's"
    part = W.to(torch.float64).reshape(n, groups, k // groups)
    cost = None if weight is None else weight.to(torch.float64).reshape(1, groups, k // groups)
    error = [
        rounding_error(
            part, cost, g.scale.to(torch.float64)[..., None], g.zero.to(torch.float64)[..., None], bits, torch.float16
        )[..., 0]
        for g in (grid, want)
    ]
    assert not (~(error[0] <= error[1] * (1 + 1e-4) + 1e-30)).any(), "a grid is worse than the reference's"


def energies(E, H):
    """e H e^T of each column of E [k, n], in float64."""
    E, H = E.to(torch.float64), H.to(torch.float64)
    return ((H @ E) * E).sum(0)


def refined(T, H, codes, grid, groups, bits, width):
    """(codes u8[k, n], scale f64[G, n]) of one pass of coordinate descent in float64, written from its definition: each
    code in turn to its best value given all others; width > 0: then the scale of each run of `width` columns to its
    best float16 value, where that gains.
    """
    T, H, groups = T.to(torch.float64), H.to(torch.float64), groups.long()
    scale, zero = grid.scale.T.to(torch.float64).clone(), grid.zero.T.to(torch.float64)
    level = codes.to(torch.float64) - zero[groups]
    E = T - level * scale[groups]
    for j in range(len(T)):
        s, z = scale[groups[j]], zero[groups[j]]
        best = level[j] * s + H[j] @ E / H[j, j]
        new = ((best / s).round() + z).clamp(0, 2**bits - 1) - z
        E[j] += (level[j] - new) * s
        level[j] = new
        if width and (j + 1) % width == 0:
            own = slice(j + 1 - width, j + 1)
            q = torch.zeros_like(T)
            q[own] = level[own]
            against = (q * (H @ q)).sum(0)
            free = torch.where(against > 0, s + (q * (H @ E)).sum(0) / against, 0 * s)
            free = (free.to(torch.float32) * s.sign()).clamp_max(65504).half().to(torch.float64).clamp_min(
                2.0**-24
            ) * s.sign()
            moved = E - q * (free - s)
            better = (energies(moved, H) < energies(E, H)) & (against > 0) & (free * s > 0)
            E = torch.where(better, moved, E)
            scale[groups[j]] = torch.where(better, free, s)
    return (level + zero[groups]).to(torch.uint8), scale


def judge_refined(T, H, before, after, groups, bits, width):
    """No row loses, most rows are the reference's to the last code and scale, and the rest are as good. before, after:
    (codes, grid).
    """
    want, scale = refined(T, H, *before, groups, bits, width)
    index = groups.long()
    loss = [
        energies(
            T
            - (codes.to(torch.float64) - grid.zero.T.to(torch.float64)[index]) * grid.scale.T.to(torch.float64)[index],
            H,
        )
        for codes, grid in (before, after)
    ]
    best = energies(T - (want.to(torch.float64) - before[1].zero.T.to(torch.float64)[index]) * scale[index], H)
    assert not (~(loss[1] <= loss[0] * (1 + 1e-5))).any(), "a row is worse than before"
    assert not (~((loss[1] - best).abs() <= 0.03 * best)).any(), "a row is not as good as the reference's"
    assert abs(float(loss[1].sum() / best.sum()) - 1) <= 1e-3
    same = (after[0] == want).all(0) & (scale.to(torch.float32) == after[1].scale.T).all(0)
    assert same.float().mean() >= 0.75, f"only {same.float().mean():.3f} of the rows are the reference's"
    return loss


def problem(k, n, seed=0, spikes=True):
    """(T f32[k, n], U f32[k, k], cost f32[k]): weights with an outlier row and column, and a factor of a correlated
    Hessian.
    """
    from doctor.quant.solve.factor import factorise

    g = torch.Generator().manual_seed(seed)
    T = torch.randn(k, n, generator=g) * 0.02
    if spikes:
        T[k // 3] *= 12
        T[:, n // 2] *= 30
        T[0, 0] = 0.0
    X = torch.randn(3 * k, k, generator=g) @ (torch.eye(k) + 0.3 * torch.randn(k, k, generator=g) / k**0.5)
    U, info = factorise(2 / len(X) * X.T @ X, 0.01)
    assert info == 0
    return T, U, U.diagonal() ** -2


def grid_of(T, bits, width, sym, **rules):
    from doctor.quant.solve.grid_search import fit

    return fit(T.T.contiguous(), bits, width, sym, **rules)
