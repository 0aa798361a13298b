"""One square for a Hessian and its factor, by tiles and by chunks of rows."""

import os

import pytest
import torch

from doctor.core.errors import MachineError
from doctor.core.recipe import DAMP, DAMP_MAX
from doctor.quant.solve import cpu, gptq, hessian, square
from doctor.quant.solve.gptq import solve
from doctor.quant.solve.hessian import Hessian
from doctor.quant.solve.mapped import Mapped
from doctor.quant.solve.numerics import tiles_of
from doctor.quant.solve.square import Square, factor_in_place
from doctor.scan import native

pytestmark = pytest.mark.skipif(native.level() is None, reason="needs the native library")


def example(n, k, rows=None):
    generator = torch.Generator().manual_seed(5)
    X = torch.randn(rows or 2 * k, k, generator=generator) * torch.rand(k, generator=generator).mul_(3).exp_()
    H = X.T @ X * (2 / len(X))
    return torch.randn(n, k, generator=generator), ((H + H.T) / 2).contiguous()


def same(one, other):
    return all(map(torch.equal, (one.codes, *one.grid[:2]), (other.codes, *other.grid[:2])))


@pytest.mark.parametrize("tile", [32, 50, 200])
def test_a_factor_by_tiles_is_as_near_as_lapacks_and_leaves_the_other_triangle_alone(tile):
    _, H = example(1, 200)
    H += 0.01 * H.diagonal().mean() * torch.eye(200)
    true = torch.linalg.cholesky(H.double())
    whole, tiled = H.clone(), H.clone()
    assert factor_in_place(whole) == factor_in_place(tiled, tile) == 0
    assert torch.equal(tiled.triu(1), H.triu(1)) and torch.equal(whole.triu(1), H.triu(1))
    assert (tiled.tril() - true).norm() <= 2 * (whole.tril() - true).norm()


def test_the_minor_that_fails_is_counted_over_all_tiles():
    H = torch.eye(100)
    H[70, 70] = -1
    assert factor_in_place(H.clone()) == factor_in_place(H.clone(), 32) == 71


@pytest.mark.parametrize(
    "options",
    [{}, {"act_order": False}, {"scattered": True}, {"bits": 3, "sym": False}, {"group_size": 66}, {"refine": 0}],
)
def test_chunks_of_rows_and_of_the_square_change_no_code(monkeypatch, options):
    W, H = example(150, 330 if "group_size" in options else 384)
    want = solve(W, H, **options)
    monkeypatch.setattr(gptq, "LOOP_BYTES", 4 * 384 * 64)
    monkeypatch.setattr(cpu, "PACKED_BYTES", 1)
    got = solve(W.to(torch.float64), H, **options)
    assert want.outcome == got.outcome == "gptq" and got.loss == pytest.approx(want.loss, rel=1e-5)
    # where scales are fitted after all codes, torch's products of fewer rows may differ in the last bit
    assert same(got, want) or ("group_size" in options and (got.codes != want.codes).float().mean() < 0.01)


def test_weights_are_cast_where_they_are_used():
    W, H = example(70, 256)
    assert same(solve(W.bfloat16(), H), solve(W.bfloat16().float(), H))


def test_a_square_is_the_matrix_again_after_its_factor():
    W, H = example(40, 256, rows=100)
    held = Square(H.clone())
    for options in ({}, {"damp": 1e-9}, {"scattered": True}):
        assert same(solve(W, held, **options), solve(W, H, **options))
    assert held.factored and not torch.equal(held.values, H)
    E = W[:3]
    assert torch.allclose(held.product(E), E @ H, rtol=1e-5, atol=1e-4)
    assert torch.equal(held.strip(64, 100), H[64:100, 64:]) and torch.equal(held.columns(64, 100), H[:, 64:100])
    assert torch.equal(held.column(70), H[70]) and torch.equal(held.matrix(), H)


def test_linears_that_share_an_input_share_its_factor(monkeypatch):
    W, H = example(64, 256)
    held, factored = Square(H.clone()), []
    real = square.factor_in_place
    monkeypatch.setattr(square, "factor_in_place", lambda *given: factored.append(1) or real(*given))
    first, second = solve(W, held), solve(2 * W, held)
    assert len(factored) == 1 and same(first, solve(W, H)) and same(second, solve(2 * W, H))
    solve(W, held, act_order=False)
    assert len(factored) == 4


def test_more_digits_are_tried_by_tiles_too(monkeypatch):
    W, H = example(40, 256, rows=100)
    whole = solve(W, H, damp=1e-8)
    monkeypatch.setattr(square, "TILE", 60)
    tiled = solve(W, H, damp=1e-8)
    assert [a.precision for a in tiled.attempts][:2] == ["float32", "float64"] and tiled.outcome == "gptq"
    assert [(a.damp, a.outcome) for a in tiled.attempts] == [(a.damp, a.outcome) for a in whole.attempts]
    assert (whole.codes != tiled.codes).float().mean() < 0.01


def test_of_a_square_in_files_more_digits_are_summed_in_tiles_and_stored_in_float32(tmp_path, monkeypatch):
    W, H = example(40, 256, rows=100)
    monkeypatch.setattr(square, "TILE", 60)
    file = Mapped(tmp_path, 256)
    file.values.copy_(H)
    whole = solve(W, H, damp=1e-8)
    monkeypatch.setattr(Square, "_through_tiles", None)  # holds a second square of twice the bytes
    in_files = solve(W, Square(file.values, file), damp=1e-8)
    assert [a.precision for a in in_files.attempts][:2] == ["float32", "float64"] and in_files.outcome == "gptq"
    assert in_files.loss == pytest.approx(whole.loss, rel=0.02)


def test_where_no_index_of_lapack_reaches_tiles_are_used(monkeypatch):
    W, H = example(40, 300)
    whole = solve(W, H, group_size=50)
    monkeypatch.setattr(square, "LAPACK_MOST", 299)
    monkeypatch.setattr(square, "TILE", 128)
    tiled = solve(W, H, group_size=50)
    assert tiled.loss == pytest.approx(whole.loss, rel=1e-3) and tiled.attempts == whole.attempts
    assert (whole.codes != tiled.codes).float().mean() < 0.01


def test_nan_in_a_square_is_refused_before_its_factor():
    held = Square(torch.full((8, 8), torch.nan))
    attempts = held.factorise(DAMP, DAMP_MAX, 1.0)
    assert [a.outcome for a in attempts] == ["non-finite"] and not held.factored


def test_a_square_in_files_gives_the_same_factor_and_keeps_its_matrix(tmp_path, monkeypatch):
    W, H = example(70, 384)
    X = torch.randn(500, 384, generator=torch.Generator().manual_seed(3))
    in_memory, on_disk = Hessian(384), Hessian(384, file=Mapped(tmp_path, 384))
    monkeypatch.setattr(square, "TILE", 100)
    monkeypatch.setattr(hessian, "TILE", 100)
    monkeypatch.setattr(hessian, "tiles_of", lambda k: tiles_of(k, 100))
    monkeypatch.setattr(square, "LAPACK_MOST", 383)  # so that both factor by the same tiles
    for H in (in_memory, on_disk):
        H.add(X[:300])
        H.add(X[300:])
    one, two = Square(in_memory.take()), Square(on_disk.take(), on_disk.file)
    assert (one.matrix() - two.matrix()).abs().max() < 1e-5 * one.diagonal().max()
    two.values.copy_(one.matrix())
    two = Square(two.values, on_disk.file)
    before = two.values.clone()
    for options in ({}, {"scattered": True}, {"act_order": False}):
        got, want = solve(W, two, **options), solve(W, one, **options)
        assert same(got, want) and got.loss == pytest.approx(want.loss, rel=1e-4)
    assert torch.equal(two.matrix(), before) and not list(tmp_path.iterdir())


def test_a_disk_without_room_for_a_square_is_named(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(MachineError, match=r"no file of 160,000 bytes for a Hessian of 200 columns .*No space left"):
        Mapped(tmp_path, 200)


def file_pages():
    """Bytes of files and shared memory that this process has mapped and holds."""
    with open("/proc/self/status") as file:
        held = dict(line.split(":") for line in file)
    return sum(int(held[name].split()[0]) for name in ("RssFile", "RssShmem")) * 1024


def test_of_a_square_in_files_a_process_holds_rows_and_never_the_whole(tmp_path, monkeypatch):
    k, held = 2560, []
    for module in (square, hessian):
        monkeypatch.setattr(module, "TILE", 256)
        monkeypatch.setattr(module, "tiles_of", lambda k, tile=256: tiles_of(k, tile))
    forget = Mapped.forget

    def counted(self):
        held.append(file_pages())
        forget(self)

    monkeypatch.setattr(Mapped, "forget", counted)

    def through(k):
        H = Hessian(k, file=Mapped(tmp_path, k))
        H.add(torch.randn(64, k, generator=torch.Generator().manual_seed(3)))
        two = Square(H.take(), H.file)
        assert two.factorise(0.1, 0.1, float(two.diagonal().mean()))[-1].outcome == "ok"
        two.pivots()
        held.append(file_pages())
        assert two.finite()
        two.strip(0, 128), two.strip(k - 128, k)
        held.append(file_pages())

    through(512)  # so that libraries are loaded
    before = file_pages()
    held.clear()
    through(k)
    assert len(held) > 100
    assert max(held) - before < 0.8 * 4 * k * k  # a page of each row is half of it at this size
