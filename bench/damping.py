"""How much damping a Hessian of few calibration rows wants: the proxy loss on text that it has not seen.

    python bench/damping.py .cache/smollm2 [--rows 4,8,32] [--damp 0.01,0.05,0.1,0.2] [--group-size 64]

Five decoder layers of the unquantized model give the Hessians of calibration rows and of held-out rows (text_rows.py,
512 tokens each). 64 rows of each linear are quantized under the first, with doctor's defaults but for the damping, and
judged by tr(E H E^T) under the second. Printed is the geometric mean over linears, the first damping = 1.
"""

import argparse
import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from text_rows import calibration_rows, heldout_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from doctor.quant.solve import gptq
from doctor.quant.solve.hessian import Hessian

SHARED = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}  # who reads whose input
HELD_OUT = 16
SAMPLE = 64  # rows of a weight


@torch.no_grad()
def hessians(model, layers, rows) -> dict[str, torch.Tensor]:
    """H f32[k, k] of every linear of the layers that does not share another's input, by path."""
    sums, hooks = {}, []
    for i in layers:
        for path, module in model.model.layers[i].named_modules():
            if isinstance(module, torch.nn.Linear) and path.rpartition(".")[2] not in SHARED:
                sums[f"{i}.{path}"] = Hessian(module.in_features)
                add = sums[f"{i}.{path}"].add
                hooks.append(module.register_forward_pre_hook(lambda _module, args, add=add: add(args[0])))
    for row in rows:
        model.model(torch.tensor([row]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return {path: found.take() for path, found in sums.items()}


def sampled(model: torch.nn.Module, layers: Iterable[int]) -> Iterator[tuple[str, torch.Tensor]]:
    """(key of its Hessian, about SAMPLE of its rows f32[rows, k]) of every linear of these decoder layers."""
    for i in layers:
        for path, module in model.model.layers[i].named_modules():
            if isinstance(module, torch.nn.Linear):
                owner, _dot, role = path.rpartition(".")
                W = module.weight.detach()[:: max(1, len(module.weight) // SAMPLE)].contiguous()
                yield f"{i}.{owner}.{SHARED.get(role, role)}", W


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--rows", default="4,8,32")
    parser.add_argument("--damp", default="0.01,0.05,0.1,0.2")
    parser.add_argument("--group-size", type=int, default=64)
    options = parser.parse_args()
    damps = [float(x) for x in options.damp.split(",")]
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    count = len(model.model.layers)
    layers = sorted({round(share * (count - 1) / 4) for share in range(5)})
    unseen = hessians(model, layers, heldout_rows(tokenizer, HELD_OUT))
    print("| calibration rows | " + " | ".join(f"damp {d:g}" for d in damps) + " |")
    print("|---:" * (len(damps) + 1) + "|")
    for rows in map(int, options.rows.split(",")):
        seen = hessians(model, layers, calibration_rows(tokenizer, rows))
        logs: list[list[float]] = [[] for _damp in damps]
        for key, W in sampled(model, layers):
            for log, damp in zip(logs, damps, strict=True):
                options_of = {"group_size": options.group_size, "damp": damp, "damp_max": max(damp, 0.1)}
                E = W - gptq.solve(W, seen[key].clone(), **options_of).weight()
                log.append(math.log(float(((E @ unseen[key]) * E).sum())))
        means = [math.exp(sum(a - b for a, b in zip(log, logs[0], strict=True)) / len(log)) for log in logs]
        print(f"| {rows} | " + " | ".join(f"{mean:.3f}" for mean in means) + " |", flush=True)


if __name__ == "__main__":
    main()
