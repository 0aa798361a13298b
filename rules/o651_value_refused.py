"""O651 value-refused: quantization_config holds a value that its reader refuses.

Why: engines read quantization_config before any weight. A key that they need and do not find, a scheme that they know
no code for, or one that they have dropped stops them at once, whatever the weights are.

Seen as:
- vLLM: `Sparsity support has been removed from compressed-tensors`
- vLLM: `GPTQ group activation ordering (desc_act=True) is no longer supported`
- vLLM: `Compressed-tensors group/dynamic activation ordering`
- vLLM: `Currently supported kv cache quantization is num_bits=8, type=float`
- vLLM: `Invalid strategy for compressed-tensors KV cache`
- vLLM: `in the model's quantization config`
- vLLM: `The block-wise quantization only supports dynamic activation scheme`
- vLLM: `Unsupported activation scheme`
- vLLM: `ModelOpt currently only supports`

Do: state the value that the reader takes, where the tensors allow it; else quantize again, or serve elsewhere.

False alarms: a runtime other than the one that the message names. Without --runtime what only one runtime refuses is a
note.

Fix safety: safe where the value says nothing of the tensors: a sparsity_config of format dense, desc_act where g_idx is
in order, activation_scheme where no input_scale is stored. Else no fix.

Sources: vllm-project/vllm 0.32.0 vllm/model_executor/layers/quantization (compressed_tensors.py, fp8.py, auto_gptq.py,
auto_awq.py, modelopt.py, utils/gptq_utils.py), pull requests 45312, 51189 and 51190; vllm-project/compressed-tensors
0.20 src/compressed_tensors/quantization/quant_args.py.
"""

from doctor.lint.rule import (
    KNOWN,
    MISSING,
    Fix,
    Place,
    RemoveJson,
    SetJson,
    _,
    finding,
    newest,
    rule,
    version_before,
)
from doctor.lint.testing import tiny_gptq


@rule("O651", "error", implied_by=("F075", "C153", "G331"))
def value_refused(checkpoint, quantization_block, goal, recipe, tensors, packed_words=None):
    if quantization_block is None or goal == "quantize":
        return
    raw, file, pointer = quantization_block
    form = next((f for f in KNOWN.values() if f.claims(raw)), None)
    if form is None:
        return
    orders = [seen for name, seen in (packed_words or {}).items() if form.index and name.endswith(f".{form.index}")]
    for refused in form.refused(raw):
        reader, version = refused.reader, recipe.runtime_version
        if reader and recipe.runtime not in ("", reader):
            continue
        if refused.since and version and version_before(version, refused.since):
            continue
        at = pointer + refused.pointer
        values = {"key": at.removeprefix(pointer).strip("/").replace("/", "."), "found": refused.found}
        who = {"reader": reader, "version": version or newest(reader), "must": refused.must}
        yield finding(
            _message(refused, values, who),
            at=Place(file, pointer=at if refused.found else pointer or None),
            severity="info" if reader and not recipe.runtime else "",
            evidence={"reader": reader, "since": refused.since},
            fix=_fix(refused, raw, file, at, tensors, orders),
            advice=_("state what the reader takes, where the tensors allow it"),
        )


def _message(refused, values, who):
    if not refused.reader:
        return (
            _("{key} is {found}; must be {must}", **values, must=refused.must)
            if refused.found
            else _("{key} is not stated; must be {must}", **values, must=refused.must)
        )
    if not refused.found:
        return _("{key} is not stated; {reader} {version} needs it", **values, **who)
    return _("{key} is {found}; {reader} {version} wants {must}", **values, **who)


def _fix(refused, raw, file, at, tensors, words):
    """Only where the tensors say that the value changes nothing."""
    same, key = refused.instead, refused.pointer.strip("/")
    if same is None or (same.unless and any(name.endswith(same.unless) for name in tensors)):
        return None
    old = raw.get(key, MISSING)
    if same.value is None:
        return Fix(_("remove {key}", key=key), (RemoveJson(file, at, old),))
    if same.ordered and not (words and all(seen.rising for seen in words)):
        return None
    shown = str(same.value).lower()
    return Fix(_("set {key} to {value}", key=key, value=shown), (SetJson(file, at, same.value, expect=old),))


def bad():
    case = tiny_gptq()
    case.recipe = case.recipe.with_field("goal", "serve").with_field("runtime", "vllm")
    case.config["quantization_config"]["desc_act"] = True
    return case, "desc_act is true; vllm 0.32.0 wants false, but for group_size -1"


def good():
    case = tiny_gptq()
    case.recipe = case.recipe.with_field("goal", "serve").with_field("runtime", "vllm")
    return case
