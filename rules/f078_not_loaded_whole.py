"""F078 not-loaded-whole: transformers does not load these files whole.

Why: the class that config.json names makes its own list of parameters. One that no tensor fills gets random numbers, and
the model answers with noise; transformers prints one line and goes on. Engines that make their list in another way stop,
or do the same.

Seen as:
- transformers: `were not initialized from the model checkpoint`
- transformers: `newly initialized`
- transformers: `We encountered some issues during automatic conversion of the weights`
- transformers: `size mismatch for`

Do: compare the names below with those in the files. If they are there under other names, rename them; if they are not, fetch
the shard that holds them, or name in config.json the class that the files were saved from.

False alarms: none known: the names are transformers' own answer. Another release of it may have other names. A runtime that
reads other names than transformers is a warning.

Fix safety: no fix: which side is wrong is not known here.

Sources: transformers src/transformers/modeling_utils.py (from_pretrained, output_loading_info).
"""

from doctor.lint.rule import LOST_DATA, Unavailable, _, finding, listed, load_problem, plural, readers_of, rule
from doctor.lint.testing import LoadProof, change, rehearsed

SHOWN = 3  # names in the message; the evidence has the counts


@rule("F078", "error", implied_by=(*LOST_DATA, "F050", "F053", "F061", "C147", "O619", "G319"))
def not_loaded_whole(checkpoint, rehearsal, spec, recipe, tensors, quantization_block=None):
    proof = rehearsal.source
    if quantization_block and "transformers" not in readers_of(_method(*quantization_block)):
        raise Unavailable(_("transformers does not read files of this format"))
    if proof is None or proof.reason:
        raise Unavailable(proof.reason if proof else _("transformers was not asked about the files"))
    if quantization_block and proof.refused:  # without a GPU transformers unpacks FP8 and MXFP4 by other code
        raise Unavailable(
            _("{client} refuses the files on this machine: {error}", client=proof.client, error=proof.refused)
        )
    lost = [*proof.missing, *proof.mismatched]
    if quantization_block:
        problem = load_problem(proof, recipe, spec.model_type, tensors) if lost else None
        if problem:
            yield finding(problem.message, severity=problem.severity, evidence=problem.evidence)
        return
    values = {"client": proof.client, "name": proof.architecture}
    evidence = {kind: len(getattr(proof, kind)) for kind in ("missing", "unexpected", "mismatched")}
    severity = "" if recipe.runtime in ("", "transformers") else "warning"
    advice = _("rename the tensors, fetch those that are lost, or name the class that the files were saved from")
    if proof.refused:
        text = _("{client} refuses to load these files as {name}: {error}", error=proof.refused, **values)
        yield finding(text, severity=severity, advice=advice)
    elif lost:
        text = plural(
            "{client} loads these files as {name} without {n:,} of its parameters, {first}",
            "{client} loads these files as {name} without {n:,} of its parameters, first {first}",
            len(lost),
            first=listed(lost[:SHOWN]),
            **values,
        )
        yield finding(text, severity=severity, evidence=evidence, advice=advice)


def _method(raw, file, _pointer):
    """The quant_method that transformers goes by, which is the one in config.json."""
    return raw.get("quant_method") if file == "config.json" else None


def bad():
    case = good()
    lost = LoadProof("transformers 5", "LlamaForCausalLM", missing=("model.layers.0.mlp.down_proj.weight",))
    change(case, "checkpoint:", "given_rehearsal", source=lost)
    return case, (
        "transformers 5 loads these files as LlamaForCausalLM without 1 of its parameters, "
        "model.layers.0.mlp.down_proj.weight"
    )


def good():
    return rehearsed()
