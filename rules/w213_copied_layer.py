"""W213 copied-layer: a decoder layer holds the same weights as another one.

Why: training never makes two layers equal. A script that renamed or merged shards wrote one layer twice, and the layer that
belongs there is lost: the model still talks, worse. Calibration then measures the wrong layer.

Do: compare the layers with the source. Where a merge stacked layers on purpose (`passthrough` of mergekit), go on.

False alarms: models that were stacked on purpose and not trained after it. Layers that share their weights by design are
stored once and are not reported.

Fix safety: no fix: the layer that belongs there is not in the files.

Sources: arcee-ai/mergekit mergekit/merge_methods/passthrough.py.
"""

import re

from doctor.lint.rule import Place, _, finding, rule
from doctor.lint.testing import tiny

LINEARS = 2  # equal linears that two layers must have at least
NUMBER = re.compile(r"\.(\d+)\.")


@rule("W213", "warning", certainty="likely", implied_by=("W201", "W202", "W208", "F004"))
def copied_layer(checkpoint, spec, tensors, every_stats):
    """Exact sums, squares and bounds stand for the bytes: two matrices that were trained apart never share them all."""
    layers: dict[tuple[str, int], dict[str, tuple]] = {}
    for linear in spec.linears:
        stats = every_stats.get(linear.tensor)
        if linear.block is None or stats is None:
            continue
        match = NUMBER.search(linear.tensor)
        stem = linear.tensor[: match.start()] if match else ""
        print_of = (tensors[linear.tensor].shape, stats) if stats.n_finite and stats.min < stats.max else ()
        layers.setdefault((stem, linear.block), {})[NUMBER.sub(".", linear.tensor, count=1)] = print_of
    first: dict[tuple, int] = {}
    for (stem, block), prints in sorted(layers.items()):
        key = (stem, *sorted(prints.items()))
        if len(prints) < LINEARS or not all(prints.values()):
            continue
        other = first.setdefault(key, block)
        if other != block:
            yield finding(
                _(
                    "{stem}.{layer} holds the weights of {stem}.{other}: all {n} linears are equal",
                    stem=stem,
                    layer=block,
                    other=other,
                    n=len(prints),
                ),
                at=Place("", tensor=next(x.tensor for x in spec.linears if x.block == block)),
                evidence={"layer": block, "same_as": other, "linears": len(prints)},
                advice=_("compare the layers with the source, unless a merge stacked them on purpose"),
            )


def bad():
    case = tiny()
    stem = case.name("down").partition(".0.")[0]
    linears = [x for x in case.spec.linears if x.block == 0]
    for linear in linears:
        case.tensors[linear.tensor.replace(f"{stem}.0.", f"{stem}.1.")] = case.tensors[linear.tensor].copy()
    return case, f"{stem}.1 holds the weights of {stem}.0: all {len(linears)} linears are equal"


def good():
    return tiny()
