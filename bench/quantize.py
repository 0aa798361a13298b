"""What one linear costs: `solve` natively, in torch alone, and AutoGPTQ's own code; the search for scales and
AutoAWQ's; in one process.

    python bench/quantize.py [--shapes 896x4864,4864x896,4096x4096] [--awq 896x896+128+128,...] [--repeat 3]

Processor seconds on one thread, Hessian given, 4 bits, groups of 128, min-max asymmetric grids, no act-order, no
refinement: the setting of the peer's defaults. The last columns are our own defaults (MSE grids, act-order, one
refinement), which the peer has no counterpart for. The peers are AutoGPTQ 0.7.1's own gptq.py and AutoAWQ 0.2.9's own
quantizer.py, in float32, fetched by `tests/clients/setup.sh peers`; nothing of them is replaced but what waits for a
card.
"""

import argparse
import os
import sys
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before the imports: SciPy's BLAS has threads of its own, which spin

import torch

from doctor.quant.solve import awq_search, awq_source
from doctor.quant.solve.gptq import solve
from doctor.quant.solve.hessian import Hessian
from doctor.quant.solve.losses import proxy_loss

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "clients"))
import ask_peer

PLAIN = {"group_size": 128, "sym": False, "act_order": False, "mse": False, "refine": 0, "zero_min": 0}


class Side(torch.nn.Module):
    """Linears that read one input; what they give stands side by side."""

    def __init__(self, weights):
        super().__init__()
        self.linears = torch.nn.ModuleList(torch.nn.Linear(*W.T.shape, bias=False) for W in weights)
        for linear, W in zip(self.linears, weights, strict=True):
            linear.weight = torch.nn.Parameter(W.clone(), requires_grad=False)

    def forward(self, x):
        return torch.cat([linear(x) for linear in self.linears], -1)


def peer(W, H):
    """Weights f32[n, k] as AutoGPTQ leaves them."""
    quantizer = ask_peer.auto_gptq_code()(Side([W]).linears[0])
    quantizer.quantizer.configure(4, perchannel=True, sym=False, mse=False)
    quantizer.H, quantizer.nsamples = H.clone(), 1
    quantizer.fasterquant(percdamp=0.01, group_size=128)
    return quantizer.layer.weight.data


def peer_scales(weights, X, ratios=20):
    """AutoAWQ's search with the first `ratios` of its 20. What it finds is of no use here: on a CPU its copy of the
    weights shares their memory, so each ratio starts from what the one before left.
    """
    code, side = ask_peer.autoawq_code("0.2.9"), Side(weights)
    code.range = lambda *args: range(ratios) if args == (20,) else range(*args)
    try:
        ask_peer.awq_quantizer(code, 128)._search_best_scale(side, None, list(side.linears), X, side)
    finally:
        del code.range


def scales(shapes, repeat):
    """Our search against the peer's on 32 x 512 tokens; the Hessian, which the later steps need too, is in our time."""
    source = awq_source.Source("norm", "norm.weight")
    print("AWQ: in x outs            peer s   ours s (x)   ratio chosen")
    for shape in shapes.split(","):
        k, *outs = map(int, shape.replace("+", "x").split("x"))
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(n, k, generator=generator) for n in outs]
        X = torch.randn(32 * 512, k, generator=generator) * torch.rand(k, generator=generator).mul_(3).exp_()
        tried = 20 if k < 2048 else 2  # each ratio is the same work
        first, _ = timed(lambda: [X @ W.T for W in weights], 1)
        theirs, _ = timed(lambda: peer_scales(weights, X, ratios=tried), repeat)
        theirs = first + (theirs - first) * 20 / tried

        def search():
            H = Hessian(k)
            H.add(X)
            return awq_search.find_scales(weights, H.take(), source, bits=4, group_size=128, sym=False, zero_min=0)[1]

        ours, ratio = timed(search, repeat)
        print(f"{shape:24} {theirs:7.2f}  {ours:7.2f} ({theirs / ours:.1f})   {ratio}", flush=True)


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
    print(
        "in x out      peer s   torch s (x)    native s (x)   loss / peer's | defaults: torch s  native s   loss / "
        "peer's"
    )
    for shape in options.shapes.split(","):
        k, n = map(int, shape.split("x"))
        W, H = example(k, n)
        theirs, Q = timed(lambda: peer(W, H), options.repeat)
        loss = proxy_loss(W, Q, H)
        slow, _ = timed(lambda: in_torch(lambda: solve(W, H, **PLAIN)), options.repeat)
        fast, ours = timed(lambda: solve(W, H, **PLAIN), options.repeat)
        slow_full, _ = timed(lambda: in_torch(lambda: solve(W, H)), options.repeat)
        fast_full, full = timed(lambda: solve(W, H), options.repeat)
        print(
            f"{shape:12} {theirs:7.2f}  {slow:7.2f} ({theirs / slow:.1f})  {fast:8.2f} ({theirs / fast:.1f})  "
            f"{proxy_loss(W, ours.weight(), H) / loss:12.4f}  |"
            f"          {slow_full:8.2f}  {fast_full:8.2f}   {proxy_loss(W, full.weight(), H) / loss:12.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
