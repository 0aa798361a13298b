"""C159 rope-scale-unread: converter does not read linear RoPE scaling from config.json.

Why: ExLlamaV2's converter takes the scale only from its own option. Without it, calibration runs on positions that the
model was not trained for, and the quantized layers fit other activations than serving has.

Do: pass the factor to the converter: `-rs FACTOR`.

False alarms: a newer version of the runtime that reads it. Nothing is wrong with the checkpoint.

Fix safety: no fix: the file is right.

Sources: turboderp/exllamav2 doc/convert.md.
"""

from doctor.lint.rule import Place, _, finding, rule
from doctor.lint.testing import tiny

UNREAD = {"exllamav2": ("linear",)}  # runtime -> kinds of scaling that it takes only from an option


@rule("C159", "info", certainty="likely")
def rope_scale_unread(checkpoint, spec, recipe, files):
    for key in ("rope_scaling", "rope_parameters"):
        block = spec.config.get(key)
        if not isinstance(block, dict):
            continue
        kind, factor = block.get("rope_type", block.get("type")), block.get("factor")
        if kind in UNREAD.get(recipe.runtime, ()) and isinstance(factor, (int, float)) and factor != 1:
            yield finding(
                _(
                    "{key} of type {kind!r} has factor {factor}; the converter of {runtime} does not read it",
                    key=key,
                    kind=kind,
                    factor=factor,
                    runtime=recipe.runtime,
                ),
                at=Place("config.json", pointer=spec.at(key)),
                evidence={"factor": factor},
                advice=_("give its converter -rs {factor}", factor=factor),
            )
            return


def bad():
    case = tiny()
    case.recipe = case.recipe.with_field("runtime", "exllamav2")
    case.config["rope_scaling"] = {"rope_type": "linear", "factor": 4.0}
    return case, "rope_scaling of type 'linear' has factor 4.0; the converter of exllamav2 does not read it"


def good():
    case = tiny()
    case.config["rope_scaling"] = {"rope_type": "linear", "factor": 4.0}
    return case
