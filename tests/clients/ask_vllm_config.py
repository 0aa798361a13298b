"""Asks vLLM's own decision functions which modules of a quantized checkpoint it would take as packed. Runs in vLLM's
environment.

python tests/clients/ask_vllm_config.py NAMES CHECKPOINT… : for each checkpoint one line, the JSON of those of its names
(NAMES, a file with the JSON of a list for each checkpoint) that vLLM takes as packed.

A name is that of the files. The model's class says how vLLM calls it (hf_to_vllm_mapper) and what it joins
(packed_modules_mapping); its quantization class then reads quantization_config, and is asked as its get_quant_method
asks.
"""

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType


class Absent(ModuleType):
    """In place of torchvision, which modules of image processors import and no decision about linears asks for."""

    def __init__(self, name: str):
        super().__init__(name)
        self.__path__: list[str] = []

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def stand_in_for_torchvision() -> None:
    if find_spec("torchvision") is None:
        import transformers  # noqa: F401 - which must first see that the library is absent

        inside = ("", ".transforms", ".transforms.v2", ".transforms.v2.functional", ".io", ".ops")
        sys.modules |= {name: Absent(name) for name in (f"torchvision{part}" for part in inside)}


def taken(folder: Path, names: list[str]) -> list[str]:
    from vllm.model_executor.layers.quantization.auto_awq import AutoAWQConfig
    from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQConfig
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
    from vllm.model_executor.layers.quantization.compressed_tensors.utils import should_ignore_layer
    from vllm.model_executor.layers.quantization.utils.gptq_utils import get_dynamic_override, is_layer_gptq_quantized
    from vllm.model_executor.layers.quantization.utils.quant_utils import is_layer_skipped
    from vllm.model_executor.models import ModelRegistry

    config = json.loads((folder / "config.json").read_text())
    stated = config["quantization_config"]
    model = ModelRegistry.models[config["architectures"][0]].load_model_cls()
    mapper, joined = getattr(model, "hf_to_vllm_mapper", None), getattr(model, "packed_modules_mapping", {})
    if mapper is not None:  # what it stacks is no rename: vLLM's configure_quant_config leaves that out
        mapper = mapper.get_rename_mapper()
    kinds = {"gptq": AutoGPTQConfig, "awq": AutoAWQConfig, "compressed-tensors": CompressedTensorsConfig}
    method = stated["quant_method"]
    quant = kinds[method].from_config(stated)
    quant.packed_modules_mapping = joined
    if method != "compressed-tensors":
        quant.maybe_update_config(str(folder))
    if mapper is not None:
        quant.apply_vllm_mapper(mapper)

    def packed(name: str) -> bool:
        mapped = mapper.apply_list([name]) if mapper is not None else [name]
        stem, _dot, last = (mapped[0] if mapped else name).rpartition(".")
        whole = next((fused for fused, parts in joined.items() if last in parts and len(parts) > 1), last)
        prefix = f"{stem}.{whole}" if stem else whole
        if method == "compressed-tensors":
            return not should_ignore_layer(prefix, ignore=quant.ignore, fused_mapping=joined)
        if method == "awq":
            return not is_layer_skipped(prefix, quant.modules_to_not_convert, joined, match_mode="substring")
        if get_dynamic_override(quant, layer_name=prefix) == False:  # noqa: E712 - as vLLM asks
            return False
        return is_layer_gptq_quantized(prefix, quant.modules_in_block_to_quantize, joined)

    return [name for name in names if packed(name)]


if __name__ == "__main__":
    stand_in_for_torchvision()
    for folder, names in zip(map(Path, sys.argv[2:]), json.loads(Path(sys.argv[1]).read_text()), strict=True):
        print("ANSWER " + json.dumps(taken(folder, names)))
