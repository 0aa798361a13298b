"""C171 unknown-quantization-method: quant_method is a name that no reader knows.

Why: readers look quant_method up in a list before they look at any tensor, and stop where it is not there. Nobody can say
what the tensors hold, so nothing of them is judged.

Seen as:
- transformers: `Unknown quantization type, got`
- vLLM: `Unknown quantization method`

Do: correct the spelling; or ask who wrote the file for the program that reads it. If the weights are plain floats,
remove quantization_config.

False alarms: a method that a plugin registers, or one newer than this version. Custom code (auto_map) is not judged.

Fix safety: safe where the weights are plain floats: removing the entry changes no value. Else manual.

Sources: transformers src/transformers/quantizers/auto.py; vllm-project/vllm
vllm/model_executor/layers/quantization/__init__.py; rules/tables/stored.toml.
"""

from difflib import get_close_matches

from doctor.lint.rule import KNOWN, Fix, Place, RemoveJson, SetJson, _, finding, quantized, rule, table
from doctor.lint.testing import tiny

ALIKE = 0.8  # share of equal letters above which a name is taken for a misspelling of another


@rule("C171", "error", implied_by=("F075",))
def unknown_quantization_method(checkpoint, config, tensors, quantization_block):
    if quantization_block is None or config.get("auto_map"):
        return
    raw, file, pointer = quantization_block
    method = raw.get("quant_method")
    known = {m for rows in table("stored").values() for row in rows for m in row["methods"]}
    known |= {m for form in KNOWN.values() for m in form.quant_methods}
    if not isinstance(method, str) or method in known or method.lower() in known:
        return
    yield finding(
        _("quant_method is {method!r}, which no reader knows", method=method[:40]),
        at=Place(file, pointer=f"{pointer}/quant_method"),
        evidence={"method": method[:40]},
        fix=_fix(raw, file, pointer, method, known, next(quantized(tensors.values()), None) is None),
    )


def _fix(raw, file, pointer, method, known, plain):
    if plain and pointer:
        return Fix(_("remove quantization_config: all weights are plain"), (RemoveJson(file, pointer, raw),))
    near = get_close_matches(method.lower(), sorted(known), 1, ALIKE)
    if near:
        edit = SetJson(file, f"{pointer}/quant_method", near[0], method)
        return Fix(_('set "{key}": {value}', key="quant_method", value=near[0]), (edit,), "unsafe")
    return Fix(_("ask who wrote the file for the program that reads it"), (), "manual")


def bad():
    case = tiny()
    case.config["quantization_config"] = {"quant_method": "superquant", "bits": 4}
    return case, "quant_method is 'superquant', which no reader knows"


def good():
    return tiny()
