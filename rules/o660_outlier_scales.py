"""O660 outlier-scales: the scales of one linear are a hundred times those of all others.

Why: scales are in proportion to weights, and the weights of a model's linears are of one order. Scales a hundred times
as large come from a factor that was applied twice, left out or stored as its reciprocal, or from another checkpoint;
the linear's outputs drown everything that is added to them. Clients load the file and say nothing.

Do: take the scales from another copy of the file, or quantize again.

False alarms: a model that was trained with linears of very different sizes. Of SmolLM2 and Gemma 3, in 4 bits and in
FP8, the largest scales are 2.4 times the median.

Fix safety: unsafe, and only with `--from`: the scales are taken from another copy of the quantized checkpoint.

Sources: run with transformers 5.23: FP8, INT8, GPTQ, AWQ and compressed-tensors files with the scales of one linear
times 1,000 load, and their logits are others.
"""

import math
from collections import defaultdict
from statistics import median

from doctor.lint.rule import Place, _, finding, rule, scale_tails, tensor_from_base
from doctor.lint.testing import encode, np, tiny_gptq

RATIO = 100.0
FEWEST = 4  # linears without which "all others" says little


@rule("O660", "warning", certainty="likely", implied_by=("O607", "W201"))
def outlier_scales(checkpoint, every_stats, tensors, base):
    sizes: dict[str, dict[str, float]] = defaultdict(dict)  # ending of a name -> tensor -> root mean square
    for name, stats in every_stats.items():
        tail = next((t for t in scale_tails() if name.endswith(t)), "")
        if tail and stats.n_finite and tensors[name].dtype.bits >= 16:  # 8-bit scales are multiplied by another one
            sizes[tail][name] = math.sqrt(stats.sumsq / stats.n_finite)
    for of in sizes.values():
        usual = median(of.values())
        for name, size in of.items():
            if len(of) >= FEWEST and 0 < usual * RATIO < size:
                yield finding(
                    _(
                        "scales in {tensor} are {ratio:,.0f} times those of the other linears",
                        tensor=name,
                        ratio=size / usual,
                    ),
                    at=Place(tensors[name].shard, tensor=name),
                    evidence={"rms": size, "median": usual, "linears": len(of)},
                    fix=tensor_from_base(base, tensors[name]),
                    advice=_("take the scales from another copy of the file, or quantize again"),
                )


def bad():
    case = good()
    name = case.packed("down") + ".scales"
    case.tensors[name] = encode(np.full(case.tensors[name].shape, 20.0), "F16")
    return case, f"scales in {name} are 1,000 times those of the other linears"


def good():
    case = tiny_gptq()
    for name in [n for n in case.tensors if n.endswith(".scales")]:
        case.tensors[name] = encode(np.full(case.tensors[name].shape, 0.02), "F16")
    return case
