"""Kernels against the reference: R1 on the host build through the real launcher, R4 on a GPU. The same tests for
both.
"""

import packing as pack
import pytest
import torch
from judges import assert_close, energies, grid_of, judge_columns, judge_fit, judge_refined, problem

from doctor.quant.solve import columns, cuda, gptq, grid, grid_search, losses
from doctor.quant.solve.grid import Grid, GridParams, contiguous_groups
from doctor.scan import counters

F16 = torch.float16


def on(device, *tensors):
    moved = tuple(t.to(device) if isinstance(t, torch.Tensor) else t for t in tensors)
    return moved if len(moved) > 1 else moved[0]


def rules(bits, width, sym, mse=True, signed=False, zero_min=0, dtype=F16):
    return GridParams(bits, width, sym, mse, signed, zero_min, dtype)


def rounded(device, T, U, rule, groups, static, cost=None, width=0):
    """cuda.round_columns on the device, results on the CPU. T is kept."""
    engine, place = device
    static = static and Grid(*on(place, *static))
    codes, found = cuda.round_columns(
        T.clone().to(place), on(place, U), rule, on(place, groups), static, on(place, cost), width, engine=engine
    )
    return codes.cpu(), Grid(found.scale.cpu(), found.zero.cpu())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("width", [32, 64, 128, -1])
@pytest.mark.parametrize("sym", [True, False])
def test_static_grids_in_any_order_round_as_the_reference(device, bits, width, sym):
    k, n = 256, 40
    T, U, _cost = problem(k, n, seed=bits)
    static = grid_of(T, bits, width, sym)
    groups = contiguous_groups(k, width)[torch.randperm(k, generator=torch.Generator().manual_seed(1))]
    codes, found = rounded(device, T, U, rules(bits, width, sym), groups, static)
    judge_columns(T, U, codes, static, groups, bits)
    want, _ = columns.round_columns(T.clone(), U, rules(bits, width, sym), groups, static)
    assert (codes == want).all(0).float().mean() >= 0.85, "too few rows are the torch loop's to the last code"
    assert (found.scale == static.scale).all() and (found.zero == static.zero).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("width", [32, 64, 128, -1])
@pytest.mark.parametrize("sym", [True, False])
def test_grids_made_on_the_fly_are_the_references(device, bits, width, sym):
    k, n = 256, 33
    T, U, cost = problem(k, n, seed=10 + bits)
    groups, each = contiguous_groups(k, width), k if width == -1 else width
    rule = rules(bits, width, sym, mse=bits != 8)
    codes, found = rounded(device, T, U, rule, groups, None, cost, each)
    judge_columns(T, U, codes, found, groups, bits)
    _want, reference = columns.round_columns(T.clone(), U, rule, groups, None, cost, each)
    # Grids see the errors of earlier columns, so a tie in one changes the next: the first group's are free of that.
    assert (found.scale[:, 0] == reference.scale[:, 0]).float().mean() >= 0.9
    assert (found.scale == reference.scale).float().mean() >= 0.7
    assert_close(found.scale, reference.scale, 0.5 * reference.scale.abs() + 1e-7, "scales")


@pytest.mark.parametrize(
    "n, k, width",
    [
        (333, 128, 128),
        (1000, 96, 32),
        (333, 328, -1),
        (5, 1000, -1),
        (1, 32, 32),
        (129, 144, 48),
        (7, 200, 8),
        (64, 256, 256),
    ],
)
@pytest.mark.parametrize("static", [True, False])
def test_ragged_shapes_round_as_the_reference(device, n, k, width, static):
    """Rows that fill no block of threads, one group, k = group, widths and blocks that 16 and 4 do not divide."""
    T, U, cost = problem(k, n, seed=n + k, spikes=n > 3)
    groups, each = contiguous_groups(k, width), k if width == -1 else width
    rule = rules(4, width, True)
    given = grid_of(T, 4, width, True) if static else None
    codes, found = rounded(device, T, U, rule, groups, given, cost, 0 if static else each)
    judge_columns(T, U, codes, found, groups, 4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("static", [True, False])
def test_a_weight_that_is_not_finite_spoils_its_own_row_only(device, bad, static):
    T, U, cost = problem(128, 40)
    clean = grid_of(T, 4, 64, True)
    T[70, 17] = bad
    groups = contiguous_groups(128, 64)
    codes, found = rounded(
        device, T, U, rules(4, 64, True), groups, clean if static else None, cost, 0 if static else 64
    )
    judge_columns(T, U, codes, found, groups, 4)
    others = torch.arange(40) != 17
    assert torch.isfinite(found.scale[others]).all()
    if not static:
        assert not torch.isfinite(found.scale[17, 1]), "a grid fitted to a NaN must not look like one"


def test_errors_reach_the_later_blocks(device):
    """Three blocks, the last of one column: what a block owes the rest is paid by the product between launches."""
    T, U, _cost = problem(257, 50, spikes=False)
    static = grid_of(T, 3, -1, False)
    groups = contiguous_groups(257, -1)
    codes, _ = rounded(device, T, U, rules(3, -1, False), groups, static)
    judge_columns(T, U, codes, static, groups, 3)
    assert (codes != grid.quantize(T.T, static, 3).T).float().mean() > 0.05, (
        "no correction changed a code: nothing was tested"
    )


def hessian_of(U):
    return torch.linalg.inv(U.to(torch.float64).T @ U.to(torch.float64)).to(torch.float32)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    "n, k, width", [(40, 256, 32), (33, 128, 128), (7, 200, 8), (130, 192, 64), (5, 144, 48), (1, 100, -1)]
)
@pytest.mark.parametrize("kind", ["symmetric", "asymmetric", "signed"])
def test_a_refinement_is_the_references(device, bits, n, k, width, kind):
    """With scales where a group fits a block, without where it does not; the change of the loss is what it says."""
    engine, place = device
    T, U, cost = problem(k, n, seed=bits + n)
    H, rule = hessian_of(U), rules(bits, width, kind != "asymmetric", signed=kind == "signed")
    groups = contiguous_groups(k, width)
    static = grid_of(T, bits, width, kind != "asymmetric", mse=True, weight=cost, signed=kind == "signed")
    codes = grid.quantize(T.T, static, bits).T.contiguous()
    inside = width if cuda.fits(width) else 0
    E = T - grid.dequantize(codes.T, static).T
    change = torch.zeros(n, dtype=torch.float64)
    there, moved = change.to(place), codes.clone().to(place)
    got, found = cuda.refine(
        E.to(place).contiguous(),
        H.to(place),
        moved,
        Grid(*on(place, *static)),
        groups.to(place),
        rule,
        inside,
        there,
        engine=engine,
    )
    found = Grid(found.scale.cpu(), found.zero.cpu())
    assert (found.scale != static.scale).any() == bool(inside)
    before, after = judge_refined(T, H, (codes, static), (got.cpu(), found), groups, bits, inside)
    assert_close(there.cpu(), after - before, 1e-4 * before.max().item(), "the change of the loss")


@pytest.mark.parametrize("static", [True, False])
def test_the_loop_adds_up_the_loss(device, static):
    engine, place = device
    T, U, cost = problem(200, 40)
    given = grid_of(T, 4, 40, True) if static else None
    groups = contiguous_groups(200, 40)
    loss = torch.full((40,), 2.0, dtype=torch.float64).to(place)
    codes, found = cuda.round_columns(
        T.clone().to(place),
        U.to(place),
        rules(4, 40, True),
        groups.to(place),
        given and Grid(*on(place, *given)),
        cost.to(place),
        0 if static else 40,
        loss,
        engine=engine,
    )
    E = T - grid.dequantize(codes.cpu().T, Grid(found.scale.cpu(), found.zero.cpu())).T
    want = energies(E, hessian_of(U))
    assert_close(loss.cpu() - 2, want, 1e-3 * want.max().item(), "the loss")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("width", [32, 64, 128, -1, 48])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("kind", ["minmax", "mse", "weighted", "signed"])
def test_grids_are_the_references(device, bits, width, sym, kind):
    engine, place = device
    T, _, cost = problem(384, 11, seed=3)
    W = T.T.contiguous()
    W[3] = W[3].abs()
    W[4] = -W[4].abs()
    W[5] = 0.0
    weight = cost if kind in ("weighted", "signed") else None
    options = dict(mse=kind != "minmax", weight=weight, signed=kind == "signed" and sym, zero_min=bits == 4)
    want = grid_search.fit(W, bits, width, sym, **options)
    options["weight"] = None if weight is None else weight.to(place)
    found = cuda.fit(W.to(place), bits, width, sym, **options, engine=engine)
    found = Grid(found.scale.cpu(), found.zero.cpu())
    if kind == "minmax":
        assert (found.scale == want.scale).all() and (found.zero == want.zero).all()
    judge_fit(W, found, want, weight, bits, 0.9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_are_values_of_their_stored_dtype(device, dtype):
    engine, place = device
    W = torch.randn(9, 128, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-9, 0)[:, None]
    found = cuda.fit(W.to(place), 4, 32, True, mse=True, scale_dtype=dtype, engine=engine).scale.cpu()
    assert (found.to(dtype).to(torch.float32) == found).all() and (found > 0).all()
    want = grid_search.fit(W, 4, 32, True, mse=True, scale_dtype=dtype).scale
    # float32 keeps the last digit of a sum that was added up in another order.
    assert ((found - want).abs() <= want * (1e-6 if dtype == torch.float32 else 0)).float().mean() > 0.9


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("width", [64, -1])
def test_a_group_that_is_not_finite_gets_no_finite_scale(device, bad, width):
    engine, place = device
    W = torch.randn(4, 256)
    W[2, 200] = bad
    found = cuda.fit(W.to(place), 4, width, False, mse=True, engine=engine).scale.cpu()
    spoiled = torch.zeros_like(found, dtype=torch.bool)
    spoiled[2, 3 if width == 64 else 0] = True
    assert (torch.isfinite(found) == ~spoiled).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("m, c", [(32, 1), (333, 65), (1000, 129), (31, 7), (96, 130)])
def test_bit_streams_are_the_packers(device, bits, m, c):
    engine, place = device
    codes = torch.randint(0, 2**bits, (m, c), dtype=torch.uint8, generator=torch.Generator().manual_seed(m))
    codes[-1] = 2**bits - 1
    assert torch.equal(cuda.pack_columns(codes.to(place), bits, engine=engine).cpu(), pack.pack_columns(codes, bits))
    assert torch.equal(cuda.pack_rows(codes.to(place), bits, engine=engine).cpu(), pack.pack_rows(codes, bits))
    turned = codes.T.contiguous().T
    assert torch.equal(cuda.pack_columns(turned.to(place), bits, engine=engine).cpu(), pack.pack_columns(codes, bits))


@pytest.mark.parametrize("n, columns", [(8, 1), (32, 33), (1000, 5), (1032, 3)])
def test_awq_words_are_the_packers(device, n, columns):
    engine, place = device
    codes = torch.randint(0, 16, (n, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))
    assert torch.equal(cuda.awq_words(codes.to(place), engine=engine).cpu(), pack.awq_words(codes))


def packable(n, k, width, bits, zero_min):
    W = torch.randn(n, k, generator=torch.Generator().manual_seed(bits))
    found = grid_search.fit(W, bits, width, False, zero_min=zero_min)
    return grid.quantize(W, found, bits), found


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("order", ["neighbours", "scattered", "none"])
def test_gptq_words_become_the_references_weights(device, bits, version, order):
    engine, place = device
    codes, found = packable(96, 160, 32, bits, 1)
    g_idx = contiguous_groups(160, 32)
    if order == "scattered":
        g_idx = g_idx[torch.randperm(160, generator=torch.Generator().manual_seed(0))]
    packed = pack.gptq_pack(codes, found, g_idx, bits, version=version)
    if order == "none":
        packed["g_idx"] = None
    want = pack.gptq_dequantize(**packed, bits=bits, version=version)
    moved = {name: None if t is None else t.to(place) for name, t in packed.items()}
    assert torch.equal(cuda.gptq_dequantize(**moved, bits=bits, version=version, engine=engine).cpu(), want)


@pytest.mark.parametrize("n, k, width", [(32, 32, 32), (1056, 64, 64), (96, 136, -1)])
def test_awq_words_become_the_references_weights(device, n, k, width):
    engine, place = device
    codes, found = packable(n, k, width, 4, 0)
    packed = pack.awq_pack(codes, found)
    want = pack.awq_dequantize(**packed)
    moved = {name: t.to(place) for name, t in packed.items()}
    assert torch.equal(cuda.awq_dequantize(**moved, engine=engine).cpu(), want)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("n, k, width", [(333, 96, 32), (7, 1000, -1)])
def test_compressed_tensors_words_become_the_references_weights(device, bits, sym, n, k, width):
    engine, place = device
    W = torch.randn(n, k, generator=torch.Generator().manual_seed(bits))
    found = grid_search.fit(W, bits, width, sym)
    packed = pack.compressed_pack(grid.quantize(W, found, bits), found, bits, sym)
    want = pack.compressed_dequantize(**packed, bits=bits)
    moved = {name: t.to(place) if name != "weight_shape" else t for name, t in packed.items()}
    assert torch.equal(cuda.compressed_dequantize(**moved, bits=bits, engine=engine).cpu(), want)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("n, width, dtype", [(33, 32, torch.float32), (5, 128, torch.bfloat16), (3, -1, torch.float16)])
def test_awq_differences_are_the_references(device, bits, sym, n, width, dtype):
    engine, place = device
    k = 384
    g = torch.Generator().manual_seed(bits)
    W, s = torch.randn(n, k, generator=g).mul_(0.02).to(dtype), torch.rand(k, generator=g) * 3 + 0.2
    scaled = W.to(torch.float32) * s
    found = grid_search.fit(scaled, bits, width, sym)
    want = grid.dequantize(grid.quantize(scaled, found, bits), found) / s - W.to(torch.float32)
    got = cuda.awq_difference(W.to(place), s.to(place), bits, width, sym, engine=engine).cpu()
    assert_close(got, want, 1e-6, "D")
    W[1, 5] = float("nan")
    spoiled = ~torch.isfinite(cuda.awq_difference(W.to(place), s.to(place), bits, width, sym, engine=engine).cpu())
    assert spoiled[1, 5] and not spoiled[[0, *range(2, n)]].any()


def hadamard_f16(x):
    """32-point Hadamard of the last axis, every sum rounded to float16, in the order of ExLlamaV2's shuffles."""
    lane = torch.arange(32)
    for step in (1, 2, 4, 8, 16):
        x = torch.where((lane & step) > 0, -x, x) + x[..., lane ^ step]
    return x


def kv_reference(x, bits):
    """(codes u8[count], scales f16[count/32], what is read back f16) of f16 x, in torch's float16."""
    half = 2 ** (bits - 1)
    turned = hadamard_f16(x.reshape(-1, 32, 2).transpose(1, 2)).transpose(1, 2).reshape(-1, 32)
    absmax = turned.abs().amax(1, keepdim=True)
    share = (turned / absmax).to(torch.float32) * half + half
    share = share.to(F16).to(torch.float32).round()
    codes = torch.where(share.isnan(), 0, share).clamp(0, 2 * half - 1)
    scales = (absmax / half).to(F16)
    back = ((codes - half).to(F16) * scales).reshape(-1, 32, 2)
    back = hadamard_f16(back.transpose(1, 2)).transpose(1, 2).reshape(-1) * torch.tensor(1 / 32, dtype=F16)
    return codes.to(torch.uint8).reshape(-1), scales.reshape(-1), back


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("count", [64, 512, 64 * 33])
def test_a_cached_key_reads_back_as_exllamav2s(device, bits, count):
    engine, place = device
    x = torch.randn(count, generator=torch.Generator().manual_seed(count))
    x[5] = 140.0  # a key bias, the case that breaks 4 bits
    x[-32:] *= 1e-6  # subnormal in float16
    x = x.to(F16)
    want_codes, want_scales, want = kv_reference(x, bits)
    codes, scales = cuda.kv_store(x.to(place), bits, engine=engine)
    assert torch.equal(scales.cpu(), want_scales)
    fields = codes.cpu() if bits == 8 else torch.stack([codes.cpu() & 15, codes.cpu() >> 4], 1).reshape(-1)
    assert torch.equal(fields, want_codes)
    assert torch.equal(cuda.kv_load(codes, scales, bits, engine=engine).cpu(), want)


def test_zeros_and_overflow_in_the_cache_are_exllamav2s(device):
    engine, place = device
    x = torch.zeros(128, dtype=F16)
    x[64:] = 3000.0  # 32 times that is past 65504
    for bits in (4, 8):
        codes, scales = cuda.kv_store(x.to(place), bits, engine=engine)
        back = cuda.kv_load(codes, scales, bits, engine=engine).cpu()
        assert (back[:64] == 0).all() and torch.isinf(scales.cpu()[2]) and not torch.isfinite(back[64:]).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 255, 10_007])
def test_a_scan_counts_what_the_cpu_counts(device, dtype, count):
    engine, place = device
    x = torch.randn(count, generator=torch.Generator().manual_seed(count)) * 0.1
    for at, value in enumerate((float("nan"), float("inf"), -float("inf"), 0.0, 1e-8, 66000.0, 3e-8, -0.0, -1e30)):
        if count > 100:
            x[at * 11 + 3] = value
    x = x.to(dtype)
    got = cuda.health_scan(x.to(place), engine=engine)
    want = counters.scan(x.view(torch.uint8).numpy(), {torch.float32: "F32", F16: "F16", torch.bfloat16: "BF16"}[dtype])
    assert {key: got[key] for key in got if key not in ("sum", "sumsq")} == {
        key: getattr(want, key) for key in got if key not in ("sum", "sumsq")
    }
    wide = x.to(torch.float64)
    finite = torch.isfinite(wide)
    assert_close(
        torch.tensor([got["sum"], got["sumsq"]], dtype=torch.float64),
        torch.stack([wide[finite].sum(), wide[finite].square().sum()]),
        1e-6 * wide[finite].square().sum().clamp_min(wide[finite].abs().sum()).item() + 1e-12,
        "sums",
    )


def test_a_layer_end_to_end_has_the_references_loss(device):
    """gptq.solve with the kernels in the place of its loop and its search."""
    engine, place = device
    g = torch.Generator().manual_seed(5)
    W = torch.randn(96, 256, generator=g) * 0.02
    X = torch.randn(700, 256, generator=g) @ (torch.eye(256) + torch.randn(256, 256, generator=g) / 16)
    H = 2 / 700 * X.T @ X
    want = gptq.solve(W, H, refine=0)
    order = torch.argsort(H.diagonal(), descending=True, stable=True)
    from doctor.quant.solve.factor import factorise

    U, _ = factorise(H[order][:, order], 0.01)
    cost = torch.empty(256)
    cost[order] = U.diagonal() ** -2
    static = cuda.fit(W.to(place), 4, 128, True, mse=True, weight=cost.to(place), zero_min=1, engine=engine)
    codes, found = cuda.round_columns(
        W[:, order].T.contiguous().to(place),
        U.to(place),
        rules(4, 128, True),
        contiguous_groups(256, 128)[order].to(place),
        static,
        engine=engine,
    )
    Q = grid.dequantize(codes.cpu()[torch.argsort(order)].T, Grid(found.scale.cpu(), found.zero.cpu()))
    loss = losses.proxy_loss(W, Q, H)
    assert abs(loss / want.loss - 1) <= 2e-3 and loss < 0.8 * want.rtn_loss
