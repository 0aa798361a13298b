"""G306 activation-dtype: bfloat16 checkpoint, but the runtime's kernel computes in float16 only.

Why: such kernels refuse bfloat16 activations. A cast of the whole model to float16 overflows in models trained in
bfloat16, Qwen1.5 and Gemma among them: the logits become NaN and the reply "!!!!".

Seen as:
- PyTorch: `expected scalar type Half but found BFloat16`
- vLLM: `torch.bfloat16 is not supported for quantization method awq`
- vLLM: `torch.bfloat16 is not supported for quantization method gptq`
- vLLM: `torch.bfloat16 is not supported for quantization method awq. Supported dtypes: [torch.float16]`
- vLLM: `torch.bfloat16 is not supported for quantization method gptq. Supported dtypes: [torch.float16]`

Do: choose a recipe that a Marlin kernel supports (4 or 8 bits, groups of 32, 64 or 128, symmetric for GPTQ). Set
float16 only after `doctor verify` has shown finite logits in float16.

False alarms: a model that works in float16.

Fix safety: unsafe: the nearest recipe that a bfloat16 kernel of the table supports. Where there is none, and for a
checkpoint that is already quantized, all bfloat16 tensors are cast to float16, and only by name. A weight that would
overflow is refused with its numbers, but activations may still overflow (O615), which `doctor verify` measures.

Sources: vllm-project/vllm issues 1823, 1941 and 14126; rules/tables/kernels.toml.
"""

from doctor.lint.rule import CastTensor, Fix, Place, SetJson, SetRecipe, _, finding, listed, nearest_plan, plural, rule
from doctor.lint.testing import tiny, tiny_gptq


@rule("G306", "warning", certainty="likely")
def activation_dtype(checkpoint, kernels, spec, recipe, layout, tensors):
    key = "dtype" if "dtype" in spec.config else "torch_dtype"
    stated = str(spec.config.get(key, "")).removeprefix("torch.")
    if not kernels or stated != "bfloat16" or any("bfloat16" in kernel.dtypes for kernel in kernels):
        return
    yield finding(
        _(
            "{runtime}'s {kernel} kernel computes in {dtypes}, and the checkpoint is bfloat16",
            runtime=recipe.runtime,
            kernel=kernels[0].name,
            dtypes=listed(kernels[0].dtypes),
        ),
        at=Place("config.json", pointer=spec.at(key)),
        evidence={"kernel": kernels[0].name},
        fix=_fix(spec, recipe, layout, tensors, key),
        advice=_("choose 4 or 8 bits in symmetric groups of 32, 64 or 128, which a bfloat16 kernel supports"),
    )


def _fix(spec, recipe, layout, tensors, key):
    found = None if layout.quantized else nearest_plan(recipe, layout, spec.n_kv_heads, dtype="bfloat16")
    if found:
        return Fix(found[0], tuple(SetRecipe(k, v) for k, v in found[1].items()), "unsafe")
    casts = tuple(CastTensor(n, "F16") for n, info in tensors.items() if info.dtype.name == "BF16")
    flag = SetJson("config.json", spec.at(key), "float16", spec.config[key])
    return Fix(
        plural("cast {n:,} tensor to float16", "cast {n:,} tensors to float16", len(casts)),
        (*casts, flag),
        "unsafe",
        by_name=True,
        needs=("W201", "W205"),
    )


def bad():
    case = tiny()
    case.recipe = case.recipe.with_field("runtime", "vllm").with_field("runtime_version", "0.9.0").with_field("bits", 3)
    return case, "vllm's ExLlama kernel computes in float16, and the checkpoint is bfloat16"


def good():
    case = tiny()
    case.recipe = case.recipe.with_field("runtime", "vllm")
    return case


def more():
    """Cases whose fixes the example above does not show."""
    case = tiny_gptq()
    case.config["quantization_config"]["sym"] = False
    case.recipe = case.recipe.with_field("runtime", "vllm").with_field("runtime_version", "0.9.0")
    yield case
    case = tiny()
    case.recipe = case.recipe.with_field("runtime", "vllm").with_field("group_size", 16)
    yield case
