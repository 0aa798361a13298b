"""O656 plain-linears-unlisted: 16-bit linears are on no list that the reader takes them from.

Why: transformers builds packed linears from a list alone: all modules but modules_to_not_convert (AWQ), or those in
modules_in_block_to_quantize (GPTQ, through optimum, which does not know "dynamic"). A linear in 16 bits that the list
does not tell apart gets packed parameters that no file has: they keep what memory held, and the reply is NaN or stops.
vLLM reads the headers of the files instead, but for AWQ only where modules_to_not_convert is empty.

Seen as:
- vLLM: `There is no module or parameter named 'layers.0.mlp.down_proj.weight' in LlamaModel`
- transformers: `model.layers.0.mlp.down_proj.qweight | MISSING`

Do: name the linears in that list.

False alarms: a runtime that is none of the two. Published GPTQ files often name these linears in "dynamic" alone,
which GPTQModel and vLLM read: without --runtime they are healthy, with --runtime transformers they are not. Where no
list names them and vLLM reads the headers, it is a note without --runtime.

Fix safety: safe: the list says what the tensors are.

Sources: run with transformers 5.24, optimum 2.3, gptqmodel 7.7 and vLLM 0.32; huggingface/optimum
optimum/gptq/quantizer.py (convert_model); huggingface/transformers src/transformers/integrations/awq.py;
vllm-project/vllm vllm/model_executor/layers/quantization/auto_awq.py (maybe_update_config).
"""

from doctor.lint.rule import KNOWN, LOST_DATA, MISSING, Fix, Place, SetJson, _, finding, plural, rule, word_tails
from doctor.lint.testing import encode, np, tiny_gptq


@rule("O656", "error", implied_by=(*LOST_DATA, "O614", "F075", "G331"))
def plain_linears_unlisted(checkpoint, quantization_block, tensors, spec, recipe):
    form = quantization_block and next((f for f in KNOWN.values() if f.claims(quantization_block[0])), None)
    if not form or not form.plain_key:
        return
    raw, file, pointer = quantization_block
    packed = {name.rpartition(".")[0] for name in tensors if name.endswith(word_tails())}
    inside = [x for x in spec.linears if x.block is not None and x.name not in packed]
    wide = [x.name for x in inside if tensors[x.tensor].dtype.bits >= 16]
    plain = [name for name in wide if not form.listed_as_plain(raw, name)]
    if not recipe.runtime and form.headers_tell(raw):
        excluded = form.excluded(raw)  # by GPTQ's "dynamic", which some readers know
        plain = [name for name in plain if not excluded(name)]
    if not packed or not plain or name_of_reader(form, raw, recipe) is None:
        return
    stated = form.with_plain(raw, sorted(packed), wide)
    fix = Fix(
        _("set {key} to what the tensors are", key=form.plain_key),
        (SetJson(file, f"{pointer}/{form.plain_key}", stated, expect=raw.get(form.plain_key, MISSING)),),
    )
    yield finding(
        plural(
            "{n:,} linear is stored in 16 bits, and {key} does not say so ({first}): {reader} takes it as packed",
            "{n:,} linears are stored in 16 bits, and {key} does not say so (first {first}): {reader} takes them as packed",
            len(plain),
            first=plain[0],
            key=form.plain_key,
            reader=name_of_reader(form, raw, recipe),
        ),
        at=Place(file, pointer=pointer or None),
        severity="info" if not recipe.runtime and form.headers_tell(raw) else "",
        evidence={"linears": plain[:100]},
        fix=fix,
        advice=_("name them in the list"),
    )


def name_of_reader(form, raw, recipe):
    """Who reads them wrongly, None where this runtime does not."""
    if form.headers_tell(raw):
        return "transformers" if recipe.runtime in ("", "transformers") else None
    return recipe.runtime or "transformers"


def bad():
    case = tiny_gptq()
    case.recipe = case.recipe.with_field("goal", "serve").with_field("runtime", "transformers")
    name = case.packed("down")
    columns, rows = case.tensors[f"{name}.qweight"].shape
    for tail in ("qweight", "qzeros", "scales", "g_idx"):
        del case.tensors[f"{name}.{tail}"], case.dtypes[f"{name}.{tail}"]
    values = np.random.default_rng(3).normal(0, 0.02, (rows, columns * 8))
    case.tensors[f"{name}.weight"], case.dtypes[f"{name}.weight"] = encode(values, "F16"), "F16"
    return case, (
        f"1 linear is stored in 16 bits, and modules_in_block_to_quantize does not say so ({name}): "
        "transformers takes it as packed"
    )


def good():
    return tiny_gptq()
