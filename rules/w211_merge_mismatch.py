"""W211 merge-mismatch: merged weights are not base plus adapter.

Why: a merge that went wrong loads and answers. An adapter that was never added, was added twice, or with another scale gives a
model that nobody trained, and the quantizer is blamed for it.

Do: merge again from the base in its own type: PEFT's `merge_and_unload()`, or `doctor fix ADAPTER -o OUT --from BASE`.

False alarms: a model that was trained on after the merge; a base of another revision than the adapter's.

Fix safety: no fix here: `doctor fix ADAPTER -o OUT --from BASE` makes the right one.

Sources: huggingface/peft src/peft/tuners/lora/layer.py (get_delta_weight).
"""

from doctor.lint.rule import _, finding, listed, plural, rule
from doctor.lint.testing import MergedLinear, MergeProof, tiny

MOST_APART = 0.01  # share of values that may differ from the computed sum: ties and products that were rounded first
MERGED = (0.9, 1.1)  # times added; a scale that was rounded to 16 bits moves it by less than 0.01
SHOWN = 3


@rule("W211", "error")
def merge_mismatch(checkpoint, merge_proof):
    p = merge_proof
    if p.reason:
        yield finding(
            _("nothing was compared with the base and the adapter: {reason}", reason=p.reason), severity="warning"
        )
        return
    kinds: dict[str, list] = {kind: [] for kind in ("right", "absent", "times", "other", "problem")}
    for linear in p.linears:
        kinds[_kind(linear)].append(linear)
    total = len(p.linears)
    if absent := kinds["absent"]:
        yield finding(
            plural(
                "{n:,} of {total:,} linears of {adapter} was not merged: {names}",
                "{n:,} of {total:,} linears of {adapter} were not merged: {names}",
                len(absent),
                total=total,
                adapter=p.adapter,
                names=_names(absent),
            ),
            evidence={"linears": len(absent)},
        )
    if times := kinds["times"]:
        yield finding(
            plural(
                "{n:,} of {total:,} linears of {adapter} was added {share:.2f} times: {names}",
                "{n:,} of {total:,} linears of {adapter} were added {share:.2f} times: {names}",
                len(times),
                total=total,
                adapter=p.adapter,
                share=times[0].share,
                names=_names(times),
            ),
            evidence={"linears": len(times), "share": times[0].share},
        )
    if other := kinds["other"]:
        yield finding(
            plural(
                "{n:,} of {total:,} linears is not base plus adapter; {apart:.0%} of the values of {names} differ",
                "{n:,} of {total:,} linears are not base plus adapter; {apart:.0%} of the values of the first differ: {names}",
                len(other),
                total=total,
                apart=other[0].apart,
                names=_names(other),
            ),
            evidence={"linears": len(other), "apart": other[0].apart},
        )
    for linear in kinds["problem"][:1]:
        yield finding(
            _("{name} was not compared with its base: {problem}", name=linear.name, problem=linear.problem),
            evidence={"linears": len(kinds["problem"])},
        )
    if p.changed:
        yield finding(
            plural(
                "{n:,} tensor differs from {base} though the adapter does not touch it: {names}",
                "{n:,} tensors differ from {base} though the adapter does not touch them: {names}",
                len(p.changed),
                base=p.base,
                names=listed(p.changed[:SHOWN]),
            ),
            severity="warning",
            evidence={"tensors": len(p.changed)},
        )


def _kind(linear) -> str:
    """ "absent", "times", "other", "problem" or "right"; NaN is never right."""
    if linear.problem:
        return "problem"
    if linear.apart <= MOST_APART:
        return "right"
    if linear.unchanged or abs(linear.share) < 0.05:
        return "absent"
    if not MERGED[0] <= linear.share <= MERGED[1] and linear.share == linear.share:
        return "times"
    return "other"


def _names(linears) -> object:
    return listed(linear.name for linear in linears[:SHOWN])


def _compared(share, apart):
    case = tiny()
    linear = MergedLinear(case.name("down"), share=share, apart=apart)
    case.put("checkpoint:", "merge_proof", MergeProof("base", "lora", (linear,)))
    return case


def bad():
    case = _compared(share=2.0, apart=0.7)
    return case, f"1 of 1 linears of lora was added 2.00 times: {case.name('down')}"


def good():
    return _compared(share=1.0, apart=0.0)
