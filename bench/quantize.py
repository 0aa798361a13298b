"""What one linear costs: `solve` natively, in torch alone, and the loop that AutoGPTQ made common, in one process.

    python bench/quantize.py [--shapes 896x4864,4864x896,4096x4096] [--awq 896x896+128+128,...] [--repeat 3]

Processor seconds on one thread, Hessian given, 4 bits, groups of 128, min-max asymmetric grids, no act-order, no refinement: the
setting of the peer's defaults. The last columns are our own defaults (MSE grids, act-order, one refinement), which the
peer has no counterpart for. The peer's algorithm is written here from the paper's pseudocode as its users run it:
three factorizations, rows of W, a Python loop over columns with a rank-1 update of the rest of the block. So is AutoAWQ's search.
"""
import argparse
import os
import time

os.environ["OMP_NUM_THREADS"] = "1"     # before the imports: SciPy's BLAS has threads of its own, which spin

import torch

from doctor.quant import awq
from doctor.quant.gptq import proxy_loss, solve
from doctor.quant.hessian import Hessian

PLAIN = {"group_size": 128, "sym": False, "act_order": False, "mse": False, "refine": 0, "zero_min": 0}


def peer(W, H, bits=4, group=128, damp=0.01, block=128):
    """Weights f32[n, k] as the peer's loop leaves them."""
    W, H = W.clone(), H.clone()
    top = 2**bits - 1
    dead = torch.diag(H) == 0
    H[dead, dead] = 1
    W[:, dead] = 0
    index = torch.arange(len(H))
    H[index, index] += damp * torch.mean(torch.diag(H))
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    Q = torch.zeros_like(W)
    scale = zero = None
    for begin in range(0, W.shape[1], block):
        end = min(begin + block, W.shape[1])
        part, errors, corner = W[:, begin:end].clone(), torch.zeros(len(W), end - begin), U[begin:end, begin:end]
        for i in range(end - begin):
            w = part[:, i]
            if (begin + i) % group == 0:
                span = W[:, begin + i:begin + i + group]
                low, high = span.min(1).values.clamp_max(0), span.max(1).values.clamp_min(0)
                scale = ((high - low) / top).unsqueeze(1)
                zero = torch.round(-low.unsqueeze(1) / scale)
            q = scale * (torch.clamp(torch.round(w.unsqueeze(1) / scale) + zero, 0, top) - zero)
            q = q.flatten()
            Q[:, begin + i] = q
            error = (w - q) / corner[i, i]
            part[:, i:] -= error.unsqueeze(1).matmul(corner[i, i:].unsqueeze(0))
            errors[:, i] = error
        W[:, end:] -= errors.matmul(U[begin:end, end:])
    return Q


def peer_scales(weights, X, bits=4, group=128, ratios=20, of=20):
    """AutoAWQ's search for scales, as its users run it: for each ratio, scale, round, and run every row of X through all linears."""
    wanted = [X @ W.T for W in weights]
    size, top, best, chosen = X.abs().mean(0), 2**bits - 1, float("inf"), None
    for step in range(ratios):
        s = size.pow(step / of).clamp(min=1e-4)
        s = s / (s.max() * s.min()).sqrt()
        loss = 0.0
        for W, want in zip(weights, wanted, strict=True):
            scaled = (W * s).reshape(-1, group)
            low, high = scaled.amin(1, keepdim=True), scaled.amax(1, keepdim=True)
            scale = (high - low).clamp(min=1e-5) / top
            zero = (-torch.round(low / scale)).clamp(0, top)
            rounded = ((torch.clamp(torch.round(scaled / scale) + zero, 0, top) - zero) * scale).reshape(W.shape)
            loss += (want - X @ (rounded / s).T).float().pow(2).sum().item()
        if loss < best:
            best, chosen = loss, step / of
    return chosen


def scales(shapes, repeat):
    """Our search against the peer's on 32 x 512 tokens; the Hessian, which the later steps need too, is in our time."""
    source = awq.Source("norm", "norm.weight")
    print("AWQ: in x outs            peer s   ours s (x)   ratio of the peer, ours")
    for shape in shapes.split(","):
        k, *outs = map(int, shape.replace("+", "x").split("x"))
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(n, k, generator=generator) for n in outs]
        X = torch.randn(32 * 512, k, generator=generator) * torch.rand(k, generator=generator).mul_(3).exp_()
        tried = 20 if k < 2048 else 2       # each ratio is the same work
        first, _ = timed(lambda: [X @ W.T for W in weights], 1)
        theirs, best = timed(lambda: peer_scales(weights, X, ratios=tried), repeat)
        theirs = first + (theirs - first) * 20 / tried

        def search():
            H = Hessian(k)
            H.add(X)
            return awq.find_scales(weights, H.matrix(), source, bits=4, group_size=128, sym=False, zero_min=0)[1]

        ours, ratio = timed(search, repeat)
        print(f"{shape:24} {theirs:7.2f}  {ours:7.2f} ({theirs / ours:.1f})   {best if tried == 20 else 'not looked for'}, {ratio}", flush=True)


def example(k, n):
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(n, k, generator=generator)
    X = torch.randn(k + 512, k, generator=generator) * torch.rand(k, generator=generator).mul_(3).exp_()
    return W, X.T @ X * (2 / len(X))


def timed(work, repeat):
    best = float("inf")
    for _ in range(repeat):
        before = time.process_time()
        found = work()
        best = min(best, time.process_time() - before)
    return best, found


def in_torch(work):
    os.environ["DOCTOR_NATIVE"] = "0"
    try:
        return work()
    finally:
        del os.environ["DOCTOR_NATIVE"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="896x4864,4864x896,4096x4096", help="in x out, comma-separated")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--awq", default="896x896+128+128,4096x4096+1024+1024", help="in x out+out+out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.awq:
        scales(options.awq, options.repeat)
    if not options.shapes:
        return
    print("in x out      peer s   torch s (x)    native s (x)   loss / peer's | defaults: torch s  native s   loss / peer's")
    for shape in options.shapes.split(","):
        k, n = map(int, shape.split("x"))
        W, H = example(k, n)
        theirs, Q = timed(lambda: peer(W, H), options.repeat)
        loss = proxy_loss(W, Q, H)
        slow, _ = timed(lambda: in_torch(lambda: solve(W, H, **PLAIN)), options.repeat)
        fast, ours = timed(lambda: solve(W, H, **PLAIN), options.repeat)
        slow_full, _ = timed(lambda: in_torch(lambda: solve(W, H)), options.repeat)
        fast_full, full = timed(lambda: solve(W, H), options.repeat)
        print(f"{shape:12} {theirs:7.2f}  {slow:7.2f} ({theirs / slow:.1f})  {fast:8.2f} ({theirs / fast:.1f})  {proxy_loss(W, ours.weight(), H) / loss:12.4f}  |"
              f"          {slow_full:8.2f}  {fast_full:8.2f}   {proxy_loss(W, full.weight(), H) / loss:12.4f}", flush=True)


if __name__ == "__main__":
    main()
