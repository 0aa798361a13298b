"""Grids of 2 and 3 bits: symmetric, symmetric with scales of both signs, asymmetric; and passes of refinement.

    python bench/low_bits.py .cache/smollm2 [--bits 3,2] [--group-size 64] [--rows 12]

Two decoder layers of the unquantized model give the Hessians of calibration rows and of held-out rows (text_rows.py,
512 tokens each). 64 rows of each linear are quantized under the first with doctor's defaults, and judged by tr(E H E^T)
under the second. Printed is the geometric mean over linears, the symmetric grid with one pass = 1.
"""

import argparse
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from damping import hessians, sampled
from text_rows import calibration_rows, heldout_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from doctor.quant.solve import gptq

LAYERS = (1, 6)
HELD_OUT = 8
GRIDS = {"symmetric": {}, "signed": {"signed": True}, "asymmetric": {"sym": False}}
PASSES = (1, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--bits", default="3,2")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--rows", type=int, default=12)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    model.model.layers = model.model.layers[: max(LAYERS) + 1]
    seen = hessians(model, LAYERS, calibration_rows(tokenizer, options.rows))
    unseen = hessians(model, LAYERS, heldout_rows(tokenizer, HELD_OUT))
    tries = [(name, passes) for passes in PASSES for name in GRIDS]
    print("| bits | " + " | ".join(f"{name}, {passes}" for name, passes in tries) + " |")
    print("|---:" * (len(tries) + 1) + "|")
    for bits in map(int, options.bits.split(",")):
        logs: dict[tuple[str, int], list[float]] = {one: [] for one in tries}
        for key, W in sampled(model, LAYERS):
            for name, passes in tries:
                how = {"bits": bits, "group_size": options.group_size, "refine": passes, **GRIDS[name]}
                E = W - gptq.solve(W, seen[key].clone(), **how).weight()
                logs[name, passes].append(math.log(float(((E @ unseen[key]) * E).sum())))
        first = logs[tries[0]]
        means = [math.exp(sum(a - b for a, b in zip(log, first, strict=True)) / len(log)) for log in logs.values()]
        print(f"| {bits} | " + " | ".join(f"{mean:.3f}" for mean in means) + " |", flush=True)


if __name__ == "__main__":
    main()
