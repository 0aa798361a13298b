"""Kernels on a GPU beside what the device can do: prints the table for bench/RESULTS.md, and can record goldens.

    python bench/gpu.py             measure
    python bench/gpu.py --record    also write fixtures/goldens/cuda.json, which the host build must then reproduce

Every figure is the median of REPEATS timed by events, after warm-up, on buffers larger than the second-level cache where
memory is the bound. The share is of the copy bandwidth measured in the same run, not of a data sheet.
"""

import json
import sys
from pathlib import Path

import torch

from doctor.quant import gptq, grid, kernels
from doctor.quant.gptq import _Rules
from doctor.quant.grid import contiguous_groups

ROOT = Path(__file__).resolve().parent.parent
REPEATS = 20
SIDE = 4096


def milliseconds(work, repeats=REPEATS, prepare=None):
    """Median of `repeats` runs of work(); prepare() is not timed."""
    times = []
    for turn in range(repeats + 3):
        if prepare:
            prepare()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        if turn >= 3:
            times.append(begin.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def columns_by_torch(T, U, scale, zero, top):
    """One column at a time with a rank-1 correction of the whole block: how the first implementations do it."""
    for begin in range(0, len(T), 128):
        block = T[begin:begin + 128].clone()
        errors = torch.empty_like(block)
        for j in range(len(block)):
            g = (begin + j) // 128
            code = (block[j] / scale[g]).round().add(zero[g]).clamp(0, top)
            errors[j] = (block[j] - (code - zero[g]) * scale[g]) / U[begin + j, begin + j]
            block[j:] -= U[begin + j, begin + j:begin + len(block)][:, None] * errors[j][None]
        T[begin + 128:] -= U[begin:begin + 128, begin + 128:].T @ errors


def rows(device):
    """(what, milliseconds, bytes moved or None, floating-point operations or None) of every measurement."""
    g = torch.Generator(device).manual_seed(0)
    n = k = SIDE
    big, other = torch.empty(2, 1 << 28, dtype=torch.float32, device=device)
    yield "copy 1 GiB", milliseconds(lambda: other.copy_(big)), 2 * big.nbytes, None
    del big, other
    W = torch.randn(n, k, device=device, generator=g) * 0.02
    X = torch.randn(16384, k, device=device, generator=g)
    H = 2 / len(X) * X.T @ X
    U, _ = gptq.factorise_with_escalation(H, 0.01, 0.1)
    cost = U.diagonal() ** -2
    static = kernels.fit(W, 4, 128, True, mse=True, weight=cost, zero_min=1)
    groups, rule = contiguous_groups(k, 128, device), _Rules(4, 128, True, True, False, 1, torch.float16)
    T = W.T.contiguous()
    work = T.clone()
    ours = milliseconds(lambda: kernels.round_columns(work, U, rule, groups, static), prepare=lambda: work.copy_(T))
    yield "columns of 4096 x 4096, kernels and products", ours, None, 2 * n * k * k
    one = work[:128].contiguous()
    small = U[:128, :128].contiguous()
    yield ("one block of 128 columns, kernel alone",
           milliseconds(lambda: kernels.round_columns(one, small, rule, groups[:128], grid.Grid(static.scale[:, :1], static.zero[:, :1]))),
           n * 128 * (4 + 4 + 1), n * 128 * 128)
    scale, zero = static.scale.T.contiguous(), static.zero.T.to(torch.float32)
    yield ("columns of 4096 x 4096, torch column by column",
           milliseconds(lambda: columns_by_torch(work, U, scale, zero, 15), 2, lambda: work.copy_(T)), None, 2 * n * k * k)
    yield ("grid search, 4 bits, groups of 128", milliseconds(lambda: kernels.fit(W, 4, 128, True, mse=True, weight=cost)), W.nbytes, None)
    codes = grid.quantize(W, static, 4)
    across = codes.T.contiguous()
    yield "pack, GPTQ order", milliseconds(lambda: kernels.pack_columns(across, 4)), n * k * 1.5, None
    yield "pack, compressed-tensors order", milliseconds(lambda: kernels.pack_rows(codes, 4)), n * k * 1.5, None
    yield "pack, AWQ order", milliseconds(lambda: kernels.awq_words(across.T)), n * k * 1.5, None
    from doctor.quant import pack
    packed = pack.gptq_pack(codes, static, groups, 4)
    yield "dequantize, GPTQ order", milliseconds(lambda: kernels.gptq_dequantize(**packed, bits=4)), n * k * 4.5, None
    s = torch.rand(k, device=device) + 0.5
    yield "AWQ difference", milliseconds(lambda: kernels.awq_difference(W, s, 4, 128, False)), 2 * W.nbytes, None
    x = torch.randn(32768 * 1024, device=device).half()
    for bits in (4, 8):
        yield (f"KV cache store, {bits} bits, 32K tokens of 8 x 128", milliseconds(lambda: kernels.kv_store(x, bits)),
               x.nbytes + x.numel() * (bits + 0.5) / 8, None)
        kept = kernels.kv_store(x, bits)
        yield (f"KV cache load, {bits} bits", milliseconds(lambda: kernels.kv_load(*kept, bits)),
               x.nbytes + x.numel() * (bits + 0.5) / 8, None)
    half = torch.randn(1 << 28, device=device).to(torch.bfloat16)
    yield "health scan, 512 MiB bf16 (waits for its result)", milliseconds(lambda: kernels.health_scan(half)), half.nbytes, None
    del half
    Xb = X.to(torch.bfloat16)
    yield "X^T X, float32", milliseconds(lambda: X.T @ X, 5), None, 2 * len(X) * k * k
    try:
        yield "X^T X, bf16 in, float32 out", milliseconds(lambda: torch.mm(Xb.T, Xb, out_dtype=torch.float32), 5), None, 2 * len(X) * k * k
    except (TypeError, RuntimeError) as error:
        print(f"mm with out_dtype: not in this torch ({str(error).splitlines()[0]})")
    damped = H + 0.01 * H.diagonal().mean() * torch.eye(k, device=device)
    yield "Cholesky of 4096 (potrf)", milliseconds(lambda: torch.linalg.cholesky(damped), 5), None, k**3 / 3
    yield "gptq.solve of 4096 x 4096, end to end", milliseconds(lambda: gptq.solve(W, H), 3), None, None


def main():
    reason = kernels.available("cuda")
    if reason:
        print(f"no GPU here: {reason}. Nothing was measured.")
        return 3
    device = torch.device("cuda", torch.cuda.current_device())
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, CUDA {torch.version.cuda}, median of {REPEATS}\n")
    print("| what | ms | GB/s | share of copy | TFLOP/s |\n|---|---|---|---|---|")
    copy = None
    for what, ms, moved, flops in rows(device):
        rate = moved / ms / 1e6 if moved else None
        copy = copy or rate
        print(f"| {what} | {ms:.3f} | {f'{rate:.0f}' if rate else ''} | {f'{rate / copy:.2f}' if rate else ''} | "
              f"{f'{flops / ms / 1e9:.1f}' if flops else ''} |")
    if "--record" in sys.argv:
        sys.path.insert(0, str(ROOT / "tests" / "cuda"))
        from test_goldens import GOLDENS, record

        GOLDENS.parent.mkdir(parents=True, exist_ok=True)
        GOLDENS.write_text(json.dumps(record(device), indent=1) + "\n")
        print(f"\nrecorded {GOLDENS.relative_to(ROOT)}: commit it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
