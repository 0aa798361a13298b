"""F022 adapter-without-base: the directory holds a LoRA adapter, not a model.

Why: an adapter is a small change to another model's weights. Alone it cannot be quantized or run.

Seen as:
- transformers: `no file named pytorch_model.bin, model.safetensors`
- AutoGPTQ: `does not appear to have a file named config.json`

Do: merge it into its base model: `doctor fix ADAPTER -o OUT --from BASE`, or `model.merge_and_unload()` of PEFT. W + scale * B @ A is
worked out in float32 and rounded once to the base's type; scale is lora_alpha / r, with use_rslora lora_alpha / sqrt(r).

False alarms: a full model that keeps its adapter beside it is not counted.

Fix safety: safe with `--from`, if every matrix of the adapter finds its weight there; else manual. What is more than LoRA (DoRA,
trained biases or whole modules, ranks by pattern, other kinds of adapter) is left to PEFT, and the finding says which it was.

Sources: huggingface/peft docs, "Model merging".

标题: 目录里是 LoRA 适配器，不是完整模型

原因: 适配器只是对另一个模型权重的小改动，单独既不能量化也不能运行。

处理: 合并进基座模型：`doctor fix ADAPTER -o OUT --from BASE`，或 PEFT 的 `model.merge_and_unload()`。W +
scale * B @ A 按 float32 计算，再一次性取整到基座的类型；scale 为 lora_alpha / r，use_rslora 时为 lora_alpha
/ sqrt(r)。

误报: 完整模型旁边放着自己的适配器，不计。

修复: 用 `--from` 且适配器的每个矩阵都能找到对应权重时安全；否则需手动。超出 LoRA 的部分（DoRA、训练过的偏置或
整个模块、按名字设定的秩、其他种类的适配器）交给 PEFT，发现中会写明是哪一种。
"""

import json
import re

from doctor.rule import AddLowRank, Fix, Place, Rebase, finding, rule
from doctor.testing import shard_bytes, tiny

ADAPTER = "adapter_config.json"
LORA = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")
# What an adapter may hold or mean beside B @ A; each changes the sum.
MORE = ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "layer_replication", "trainable_token_indices", "target_parameters",
        "lora_bias", "use_qalora", "corda_config", "eva_config", "megatron_config", "arrow_config", "alora_invocation_tokens")


@rule("F022", "error")
def adapter_without_base(checkpoint, files, json_files, base):
    if ADAPTER not in files or any(n.endswith(".safetensors") and not n.startswith("adapter_model") for n in files):
        return
    value = checkpoint.value(ADAPTER) or {}
    named = value.get("base_model_name_or_path")
    of = f" of {named}" if isinstance(named, str) and named else ""
    edits, why = _merge(checkpoint, value, base) if base is not None else ((), "")
    manual = f"merge it with PEFT's merge_and_unload(): {why}" if why else "merge the adapter into its base model and check that"
    fix = Fix(f"merge it into {base.text}: {len(edits) - 1:,} {'weight changes' if len(edits) == 2 else 'weights change'}", edits) if edits else Fix(manual, (), "manual")
    yield finding(f"a {value.get('peft_type', 'PEFT')} adapter{of}, without the model it changes",
                  at=Place(ADAPTER, pointer="/base_model_name_or_path"), evidence={"base": str(named)},
                  fix=fix)


def _merge(checkpoint, config, donor):
    """(edits, "") that make the base with the adapter in it, or ((), why doctor does not)."""
    if config.get("peft_type") != "LORA":
        return (), f"peft_type is {config.get('peft_type')}, not LORA"
    more = [k for k in MORE if config.get(k)] + ["bias"] * (config.get("bias") not in (None, "none"))
    if more:
        return (), f"adapter_config.json sets {', '.join(more)}"
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not all(isinstance(x, (int, float)) and not isinstance(x, bool) and x > 0 for x in (rank, alpha)):
        return (), f"r is {rank} and lora_alpha {alpha}; both must be numbers above 0"
    names = {n: LORA.fullmatch(n) for n in checkpoint.tensors}
    odd = sorted(n for n, match in names.items() if match is None)
    if odd or not names:
        return (), f"{odd[0]} is no matrix of a linear's LoRA" if odd else "the adapter has no tensor"
    base, edits = donor.checkpoint, [Rebase(donor.root)]
    for module in sorted({m["module"] for m in names.values()}):
        a, b = (next((n for n, m in names.items() if (m["module"], m["side"]) == (module, side)), None) for side in "AB")
        if a is None or b is None or f"{module}.weight" not in base.tensors:
            return (), f"{module} lacks " + ("lora_A or lora_B" if f"{module}.weight" in base.tensors else "its weight in the base")
        weight, low = base.tensors[f"{module}.weight"].shape, checkpoint.tensors[a].shape[0]
        product = (checkpoint.tensors[b].shape[0], checkpoint.tensors[a].shape[1])
        transposed = bool(config.get("fan_in_fan_out"))
        if low != rank or weight != (product[::-1] if transposed else product):
            return (), f"{module} is {list(weight)} in the base; B times A is {list(product)} of rank {low}, and r is {rank}"
        scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        edits.append(AddLowRank(f"{module}.weight", str(checkpoint.root), a, b, scale, transposed))
    return tuple(edits), ""


def bad():
    case = tiny()
    name = "base_model.model." + case.name("down").removesuffix(".weight")
    parts = {f"{name}.lora_A.weight": case.tensors[case.name("down")][:8], f"{name}.lora_B.weight": case.tensors[case.name("down")][:, :8]}
    case.files["adapter_model.safetensors"] = shard_bytes(parts, dict.fromkeys(parts, "BF16"))
    case.files[ADAPTER] = json.dumps({"peft_type": "LORA", "base_model_name_or_path": "org/base", "r": 8, "lora_alpha": 16}).encode()
    case.damage.append(lambda folder: [(folder / n).unlink() for n in ("model.safetensors", "config.json")])
    return case, "a LORA adapter of org/base, without the model it changes"


def good():
    return tiny()
