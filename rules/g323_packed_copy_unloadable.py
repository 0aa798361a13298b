"""G323 packed-copy-unloadable: transformers does not load packed linears of this family.

Why: transformers puts packed modules in the place of a class's linears. GPT-2's and GPT's linears are Conv1D, which it
leaves as they are; the loader of Kimi-Linear and OLMo-hybrid joins tensors that it does not find in a packed file; and
those of Molmo2, HRM and Ernie 4.5 VL cut stored tensors apart. Such a copy loads nowhere in transformers, whoever wrote
it. This is known from the family's name, so it is said before any work. Of a GPTQ file transformers takes the linears of
decoder layers alone: those of a vision tower (`--vision`) keep random numbers. Other families whose own code reads the
weight of a linear (Falcon, Mamba, RWKV, ModernBERT) are written with `"dequantize": true` in quantization_config:
transformers then unpacks their linears while it loads the file.

Seen as:
- transformers: `'Linear' object has no attribute 'weight'`
- transformers: `We encountered some issues during automatic conversion of the weights`

Do: write another format, as `--format gptq`, or name the runtime that will serve the copy, as `--runtime vllm`.

False alarms: another release of transformers may load it; the finding names the release that was asked.

Fix safety: no fix: how it will be served is the user's choice.

Sources: transformers 5.24 src/transformers/models/*/modeling_*.py (`_init_weights`), src/transformers/pytorch_utils.py (Conv1D),
src/transformers/utils/quantization_config.py (CompressedTensorsConfig); measured by tests/coverage.py.
"""

from doctor.lint.rule import Place, _, finding, rule, streams
from doctor.lint.testing import tiny

_REASONS = {
    "conv1d": _("its linears are Conv1D, which stay as they are"),
    "joined": _("its loader joins tensors that it does not find beside packed ones"),
    "split": _("its loader cuts stored tensors apart, which it does not do with packed ones"),
    "tower": _("it replaces the linears of decoder layers alone, and none of a vision tower's (--vision)"),
}
_FORMAT = _("write another format, as --format gptq, or name the runtime that will serve it, as --runtime vllm")
_OTHERWISE = {
    "conv1d": _FORMAT,
    "joined": _(
        "choose --scheme FP8_DYNAMIC, which it joins too, or name the runtime that will serve it, as --runtime vllm"
    ),
    "split": _FORMAT,
    "tower": _("write --format compressed-tensors, leave --vision out, or serve it with --runtime vllm"),
}


@rule("G323", "error", implied_by=("C147",))
def packed_copy_unloadable(checkpoint, config, recipe, goal, packed_loading):
    families = packed_loading.get(recipe.output_format)
    if goal != "quantize" or families is None or recipe.runtime not in ("", "transformers"):
        return
    family = str(config.get("model_type", ""))
    why = next((why for why in ("conv1d", "joined", "split") if family in families.get(why, ())), "")
    why = why or ("tower" if recipe.vision and families.get("tower") and "vision_config" in config else "")
    if why:
        yield finding(
            _(
                "transformers {version} does not load {format} files of {family}: {why}",
                version=packed_loading["transformers"],
                format=recipe.output_format,
                family=family,
                why=_REASONS[why],
            ),
            at=Place("config.json", pointer="/model_type"),
            evidence={"family": family, "format": recipe.output_format},
            advice=_("name the runtime that will serve it, as --runtime vllm") if streams(recipe) else _OTHERWISE[why],
        )


def bad():
    case = tiny()
    case.config["model_type"], case.config["architectures"] = "olmo_hybrid", ["OlmoHybridForCausalLM"]
    case.recipe = case.recipe.with_field("goal", "quantize").with_field("format", "compressed-tensors")
    return case, (
        "transformers 5.24 does not load compressed-tensors files of olmo_hybrid: its loader joins tensors that it does not "
        "find beside packed ones"
    )


def good():
    return tiny()
