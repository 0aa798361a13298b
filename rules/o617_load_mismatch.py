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

from doctor.lint.rule import finding, load_problem, plural, rule
from doctor.lint.testing import change, compared

SHOWN = 3  # names in the message; the evidence has the counts


@rule("O617", "error")
def load_mismatch(checkpoint, load_proof, spec, recipe, tensors):
    problem = load_problem(load_proof, recipe, spec.model_type, tensors)
    if problem:
        yield finding(problem.message, severity=problem.severity, evidence=problem.evidence)
    if load_proof.differing:
        yield finding(
            plural(
                "{library} unpacks {names} to other values than doctor",
                "{library} unpacks {n} of {compared} sampled linears to other values than doctor: {names}",
                len(load_proof.differing),
                library=load_proof.library,
                compared=load_proof.compared,
                names=", ".join(load_proof.differing[:SHOWN]),
            ),
            evidence={"differing": len(load_proof.differing)},
        )


def bad():
    case = compared()
    change(case, "checkpoint:", "load_proof", missing=("model.layers.0.mlp.down_proj.weight",))
    return case, (
        "transformers 5 loads it as LlamaForCausalLM with 1 parameters missing, 0 unexpected and 0 of another shape, first "
        "model.layers.0.mlp.down_proj.weight"
    )


def good():
    return compared()
