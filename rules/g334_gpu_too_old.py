"""G334 gpu-too-old: the runtime computes with this format on other graphics cards.

Why: kernels are written for what a card has: FP8 since compute capability 8.9, some mixtures on 9.0 alone. The engine asks
when it builds the first linear, and stops.

Seen as:
- vLLM: `Quantization scheme is not supported for the current GPU. Min capability:`
- vLLM: `is not supported for the current GPU. Minimum capability:`
- vLLM: `Bfloat16 is only supported on GPUs with compute capability of at least 8.0`

Do: take a format that the card has kernels for (`doctor advise model/ --gpu NAME` lists them), or another card.

False alarms: an engine with kernels from a plugin. Only vLLM's lists are known here; other runtimes are not judged.

Fix safety: no fix: the files are correct.

Sources: rules/tables/served.toml and stored.toml (get_min_capability of each scheme); rules/tables/gpus.toml;
vllm-project/vllm vllm/platforms/cuda.py, check_if_supports_dtype.
"""

from doctor.lint.rule import (
    Place,
    Unavailable,
    _,
    computes_on,
    finding,
    format_of,
    least_capability,
    rule,
    table,
)
from doctor.lint.testing import tiny

BFLOAT16 = 80


@rule("G334", "error", implied_by=("G331", "G332", "O620"))
def gpu_too_old(checkpoint, config, quantization_block, goal, recipe):
    if goal == "none":
        return
    if not recipe.gpu:
        raise Unavailable(_("no graphics card was named: --gpu asks for one"))
    if not recipe.runtime:
        raise Unavailable(_("no runtime was named: --runtime asks for one"))
    capability = table("gpus")[recipe.gpu]["capability"]
    raw = quantization_block[0] if quantization_block else None
    at = Place("config.json", pointer="/quantization_config" if raw else "/dtype")
    if goal == "quantize":
        raw, at = format_of(recipe).config(recipe), Place("")
    named = {"runtime": recipe.runtime, "gpu": recipe.gpu, "have": _dotted(capability)}
    if raw and computes_on(recipe, raw, capability) is False:
        least = least_capability(recipe, raw)
        yield finding(
            _("{runtime} computes with this format on compute capability {least}; {gpu} has {have}", least=_dotted(least), **named)
            if least > capability
            else _("{runtime} computes with this format on compute capability {least} alone; {gpu} has {have}", least=_dotted(least), **named),
            at=at,
            evidence={"capability": capability, "least": least},
            advice=_("`doctor advise` lists what {gpu} serves", gpu=recipe.gpu),
        )  # fmt: skip
    stated = config.get("dtype", config.get("torch_dtype"))
    if recipe.runtime == "vllm" and stated == "bfloat16" and capability < BFLOAT16:
        yield finding(
            _("dtype is bfloat16; {runtime} computes with it on 8.0 and up, and {gpu} has {have}", **named),
            at=Place("config.json", pointer="/dtype" if "dtype" in config else "/torch_dtype"),
            evidence={"capability": capability, "least": BFLOAT16},
            severity="warning",
            advice=_("serve it with --dtype half, if no weight or activation is too large for float16 (W205, O615)"),
        )


def _dotted(capability):
    return f"{capability / 10:.1f}"


def bad():
    case = tiny()
    case.recipe = case.recipe.with_field("goal", "quantize")
    for field, value in (("format", "compressed-tensors"), ("runtime", "vllm"), ("gpu", "t4")):
        case.recipe = case.recipe.with_field(field, value)
    case.config["torch_dtype"] = "bfloat16"
    return case, "dtype is bfloat16; vllm computes with it on 8.0 and up, and t4 has 7.5"


def good():
    case = tiny()
    for field, value in (("runtime", "vllm"), ("gpu", "h100")):
        case.recipe = case.recipe.with_field(field, value)
    return case
