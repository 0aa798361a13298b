"""R3: what a real device computed, recorded by `make gpu`, must be what the host build computes: no contraction, so bit
for bit.

A golden names the hash of the source it was recorded from; one that is older than its source, or absent, is owed.
"""

import hashlib
import json

import host
import pytest
import torch

from doctor.quant.solve import cuda
from doctor.quant.solve.grid import Grid, GridParams, contiguous_groups, dequantize, quantize

pytestmark = pytest.mark.R3
GOLDENS = host.ROOT / "fixtures" / "goldens" / "cuda.json"


def source_hash(source):
    text = (host.CUDA / f"{source}.cu").read_text() + (host.CUDA / "core.cuh").read_text()
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def weights(n, k):
    """f32[n, k] from integers, the same on every machine and in every version of torch."""
    index = torch.arange(n * k, dtype=torch.int64)
    return (((index * 2654435761) % 65521).to(torch.float32) / 65521 - 0.5).reshape(n, k)


def run(source, engine, place):
    """{name: tensor} that the kernels of one source make of fixed inputs."""
    W = weights(70, 256).to(place)
    if source == "gptq_block":
        U = (torch.eye(256) + weights(256, 256).triu(1) / 64).to(place)
        rule = GridParams(4, 64, False, True, False, 0, torch.float16)
        codes, grid = cuda.round_columns(
            W.T.contiguous(),
            U,
            rule,
            contiguous_groups(256, 64).to(place),
            None,
            torch.ones(256, device=place),
            64,
            engine=engine,
        )
        # The second block follows a product of matrices, which no two libraries add up alike.
        return {
            "codes": codes[:128],
            "scale": grid.scale[:, :2].contiguous(),
            "zero": grid.zero[:, :2].contiguous(),
            **refined(engine, place),
        }
    if source == "grid_search":
        found = [
            cuda.fit(W, 3, width, sym, mse=True, engine=engine) for width in (32, 128, -1) for sym in (True, False)
        ]
        return {f"{name}{at}": getattr(grid, name) for at, grid in enumerate(found) for name in ("scale", "zero")}
    if source == "pack":
        codes = ((W + 0.5) * 15.99).to(torch.uint8)
        return {
            "columns": cuda.pack_columns(codes, 4, engine=engine),
            "awq": cuda.awq_words(codes[:64], engine=engine),
        }
    if source == "awq_difference":
        return {"D": cuda.awq_difference(W, W[0].abs() + 0.5, 4, 64, False, engine=engine)}
    if source == "kv_cache":
        codes, scales = cuda.kv_store(W.reshape(-1).half(), 4, engine=engine)
        return {"codes": codes, "scales": scales, "back": cuda.kv_load(codes, scales, 4, engine=engine)}
    found = cuda.health_scan(W, engine=engine)
    return {"counts": torch.tensor([v for k, v in found.items() if k not in ("sum", "sumsq")], dtype=torch.float64)}


def refined(engine, place):
    """{name: tensor} of gptq_refine on one block, whose first product H E is of small integers: every order of its sums
    gives the same bits.
    """
    W = (weights(70, 128) * 256).round() / 64
    R = (weights(128, 128) * 7).round()
    H = R @ R.T + 64 * torch.eye(128)
    start = Grid(torch.full((70, 2), 0.25), torch.full((70, 2), 8, dtype=torch.int32))
    codes = quantize(W, start, 4)
    E = (W - dequantize(codes, start)).T.contiguous()
    assert ((H @ E).abs() < 2**18).all() and ((E * 64).round() == E * 64).all(), "H E is not exact in float32"
    loss = torch.zeros(70, dtype=torch.float64, device=place)
    rule = GridParams(4, 64, True, True, False, 0, torch.float16)
    codes, grid = cuda.refine(
        E.to(place),
        H.to(place),
        codes.T.contiguous().to(place),
        Grid(start.scale.to(place), start.zero.to(place)),
        contiguous_groups(128, 64).to(place),
        rule,
        64,
        loss,
        engine=engine,
    )
    return {"refined codes": codes, "refined scale": grid.scale, "change of the loss": loss}


def digest(tensors):
    return {
        name: hashlib.sha256(t.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
        for name, t in tensors.items()
    }


def record(place):
    """The goldens of a device, for fixtures/goldens/cuda.json."""
    engine = cuda.engine_for(place)
    return {
        "device": torch.cuda.get_device_name(place),
        "sources": {
            source: {"source": source_hash(source), "digests": digest(run(source, engine, place))}
            for source in host.SOURCES
        },
    }


@pytest.mark.parametrize("source", host.SOURCES)
def test_the_host_build_reproduces_a_devices_bits(source, host_engine):
    if not GOLDENS.exists():
        pytest.skip(
            "owed: no golden was recorded on a device yet; run `make gpu` on one and commit fixtures/goldens/cuda.json"
        )
    golden = json.loads(GOLDENS.read_text())["sources"].get(source)
    assert golden, f"owed: {source} has no golden; run `make gpu` on a device"
    assert golden["source"] == source_hash(source), (
        f"owed: {source}.cu changed since its golden; run `make gpu` on a device"
    )
    assert digest(run(source, host_engine, torch.device("cpu"))) == golden["digests"]


@pytest.mark.parametrize("source", host.SOURCES)
def test_what_is_recorded_does_not_change_from_run_to_run(source, host_engine):
    first, second = (digest(run(source, host_engine, torch.device("cpu"))) for _ in range(2))
    assert first == second and all(len(value) == 16 for value in first.values())


def test_the_refinement_that_is_recorded_changes_codes_and_scales_and_lowers_the_loss(host_engine):
    found = refined(host_engine, torch.device("cpu"))
    start = quantize(
        (weights(70, 128) * 256).round() / 64,
        Grid(torch.full((70, 2), 0.25), torch.full((70, 2), 8, dtype=torch.int32)),
        4,
    )
    assert (found["refined codes"] != start.T).float().mean() > 0.01
    assert (found["refined scale"] != 0.25).any() and (found["change of the loss"] < 0).float().mean() > 0.9
