"""F022 adapter-without-base: the directory holds a LoRA adapter, not a model.

Why: an adapter is a small change to another model's weights. Alone it cannot be quantized or run.

Seen as:
- transformers: `no file named pytorch_model.bin, model.safetensors`
- AutoGPTQ: `does not appear to have a file named config.json`

Do: merge it into its base model (`model.merge_and_unload()` of PEFT) and check the result.

False alarms: a full model that keeps its adapter beside it is not counted.

Fix safety: manual; merging needs the base model.

Sources: huggingface/peft docs, "Model merging".
"""

import json

from doctor.rule import Fix, Place, finding, rule
from doctor.testing import shard_bytes, tiny

ADAPTER = "adapter_config.json"


@rule("F022", "error")
def adapter_without_base(checkpoint, files, json_files):
    if ADAPTER not in files or any(n.endswith(".safetensors") and not n.startswith("adapter_model") for n in files):
        return
    value = checkpoint.value(ADAPTER) or {}
    base = value.get("base_model_name_or_path")
    of = f" of {base}" if isinstance(base, str) and base else ""
    yield finding(f"a {value.get('peft_type', 'PEFT')} adapter{of}, without the model it changes",
                  at=Place(ADAPTER, pointer="/base_model_name_or_path"), evidence={"base": str(base)},
                  fix=Fix("merge the adapter into its base model and check that", (), "manual"))


def bad():
    case = tiny()
    name = "base_model.model." + case.name("down").removesuffix(".weight")
    parts = {f"{name}.lora_A.weight": case.tensors[case.name("down")][:8], f"{name}.lora_B.weight": case.tensors[case.name("down")][:, :8]}
    case.files["adapter_model.safetensors"] = shard_bytes(parts, dict.fromkeys(parts, "BF16"))
    case.files[ADAPTER] = json.dumps({"peft_type": "LORA", "base_model_name_or_path": "org/base"}).encode()
    case.damage.append(lambda folder: [(folder / n).unlink() for n in ("model.safetensors", "config.json")])
    return case, "a LORA adapter of org/base, without the model it changes"


def good():
    return tiny()
