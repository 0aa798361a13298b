"""G306 activation-dtype: the checkpoint is bfloat16 and the runtime's kernel computes in float16 only.

Why: such kernels refuse bfloat16 activations, and a cast of the whole model to float16 overflows in models
trained in bfloat16, Qwen1.5 and Gemma among them: logits turn to NaN and the reply to "!!!!".

Seen as:
- PyTorch: `expected scalar type Half but found BFloat16`
- vLLM: `torch.bfloat16 is not supported for quantization method awq`
- vLLM: `torch.bfloat16 is not supported for quantization method gptq`
- vLLM: `torch.bfloat16 is not supported for quantization method awq. Supported dtypes: [torch.float16]`
- vLLM: `torch.bfloat16 is not supported for quantization method gptq. Supported dtypes: [torch.float16]`

Do: choose a plan that a Marlin kernel takes (4 or 8 bits, groups of 32, 64 or 128, symmetric for GPTQ); set
float16 only after `doctor verify` has shown finite logits in it.

False alarms: a model that is sound in float16.

Fix safety: unsafe: the nearest plan that a bfloat16 kernel of the table takes. Where there is none, and for a
checkpoint that is quantized already, all bfloat16 tensors are cast to float16, and only by name: a weight that would
overflow is refused with the numbers, but activations may still overflow (O615), which `doctor verify` measures.

Sources: vllm-project/vllm issues 1823, 1941 and 14126; rules/tables/kernels.toml.
"""

from doctor.lint.rule import CastTensor, Fix, Place, SetJson, SetRecipe, finding, nearest_plan, rule
from doctor.lint.testing import tiny, tiny_gptq


@rule("G306", "warning", certainty="likely")
def activation_dtype(checkpoint, kernels, spec, recipe, layout, tensors):
    key = "dtype" if "dtype" in spec.config else "torch_dtype"
    stated = str(spec.config.get(key, "")).removeprefix("torch.")
    if not kernels or stated != "bfloat16" or any("bfloat16" in kernel.dtypes for kernel in kernels):
        return
    yield finding(
        f"{recipe.runtime}'s {kernels[0].name} kernel computes in {', '.join(kernels[0].dtypes)} and the checkpoint is bfloat16",
        at=Place("config.json", pointer=spec.at(key)),
        evidence={"kernel": kernels[0].name},
        fix=_fix(spec, recipe, layout, tensors, key),
        advice="choose 4 or 8 bits in symmetric groups of 32, 64 or 128, which a bfloat16 kernel takes",
    )


def _fix(spec, recipe, layout, tensors, key):
    found = None if layout.quantized else nearest_plan(recipe, layout, spec.n_kv_heads, dtype="bfloat16")
    if found:
        return Fix(found[0], tuple(SetRecipe(k, v) for k, v in found[1].items()), "unsafe")
    casts = tuple(CastTensor(n, "F16") for n, info in tensors.items() if info.dtype.name == "BF16")
    flag = SetJson("config.json", spec.at(key), "float16", spec.config[key])
    return Fix(
        f"cast {len(casts):,} tensors to float16", (*casts, flag), "unsafe", by_name=True, needs=("W201", "W205")
    )


def bad():
    case = tiny()
    case.recipe = case.recipe.with_field("runtime", "vllm").with_field("runtime_version", "0.9.0").with_field("bits", 3)
    return case, "vllm's ExLlama kernel computes in float16 and the checkpoint is bfloat16"


def good():
    case = tiny()
    case.recipe = case.recipe.with_field("runtime", "vllm")
    return case


def more():
    """Cases whose cures the example above does not show."""
    case = tiny_gptq()
    case.config["quantization_config"]["sym"] = False
    case.recipe = case.recipe.with_field("runtime", "vllm").with_field("runtime_version", "0.9.0")
    yield case
    case = tiny()
    case.recipe = case.recipe.with_field("runtime", "vllm").with_field("group_size", 16)
    yield case
