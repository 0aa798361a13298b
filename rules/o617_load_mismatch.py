"""O617 load-mismatch: the client does not load this checkpoint whole.

Why: the class that config.json names builds its own list of parameters. What the files hold under other names is dropped,
what they lack is set to random values, and the model answers with noise; most clients only warn.

Seen as:
- transformers: `Some weights of the model checkpoint were not used when initializing`
- transformers: `were not initialized from the model checkpoint`
- transformers: `The following layers were not sharded`
- vLLM: `There is no module or parameter named`

Do: compare the names below with the files. A linear that the client expects packed and the files hold plain must stand in
the exclude list of quantization_config, under the client's name for it; the reverse must leave it.

False alarms: none known: the names are the client's own answer.

Fix safety: no fix: which side is wrong is not known here.

Sources: transformers src/transformers/modeling_utils.py (from_pretrained, output_loading_info).
"""

from doctor.lint.rule import _, finding, plural, rule
from doctor.lint.testing import change, compared

SHOWN = 3  # names of each kind in the message; the evidence has the counts


@rule("O617", "error")
def load_mismatch(checkpoint, load_proof):
    p = load_proof
    if p.whole or p.reason:
        return
    evidence = {kind: len(getattr(p, kind)) for kind in ("missing", "unexpected", "mismatched", "differing")}
    if p.refused:
        yield finding(
            _(
                "{client} refuses to load it as {name}: {error}",
                client=p.client,
                name=p.architecture or "?",
                error=p.refused,
            ),
            evidence={"error": p.refused},
        )
        return
    if evidence["missing"] or evidence["unexpected"] or evidence["mismatched"]:
        first = [*p.missing[:SHOWN], *p.unexpected[:SHOWN], *p.mismatched[:SHOWN]]
        yield finding(
            _(
                "{client} loads it as {name} with {missing:,} parameters missing, {unexpected:,} unexpected and {mismatched:,} of "
                "another shape, first {first}",
                client=p.client, name=p.architecture, first=", ".join(first[:SHOWN]),
                missing=len(p.missing), unexpected=len(p.unexpected), mismatched=len(p.mismatched),
            ),
            evidence=evidence,
        )  # fmt: skip
    if p.differing:
        yield finding(
            plural(
                "{library} unpacks {names} to other values than doctor",
                "{library} unpacks {n} of {compared} sampled linears to other values than doctor: {names}",
                len(p.differing),
                library=p.library, compared=p.compared, names=", ".join(p.differing[:SHOWN]),
            ),
            evidence=evidence,
        )  # fmt: skip


def bad():
    case = compared()
    change(case, "checkpoint:", "load_proof", missing=("model.layers.0.mlp.down_proj.weight",))
    return case, (
        "transformers 5 loads it as LlamaForCausalLM with 1 parameters missing, 0 unexpected and 0 of another shape, first "
        "model.layers.0.mlp.down_proj.weight"
    )


def good():
    return compared()
