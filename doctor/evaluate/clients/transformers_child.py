"""Loads a checkpoint with transformers on the meta device and prints, as JSON, what went where. Runs as a process of
its own.

    python -m doctor.evaluate.clients.transformers_child CHECKPOINT [--sample N --out FILE | --linears MODULES]

Nothing of the checkpoint runs: the class is transformers' own of the name in `architectures`, with remote code off. On
the meta device no weight is read, so a model of any size takes its headers' time. With --sample, N packed linears are
unpacked by compressed-tensors' own code, on the CPU, and written to FILE for the caller to compare.

Source: transformers src/transformers/modeling_utils.py (from_pretrained, output_loading_info); compressed-tensors
src/compressed_tensors/compressors/base.py (decompress).
"""

import argparse
import contextlib
import json
import os
import re
import sys
from collections.abc import Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from doctor.checkpoint.directory import Checkpoint
from doctor.edits.gguf_floats import GgufAsFloats
from doctor.quant.calibration.tokenizer import directory_of

PACKED, SCALE = "weight_packed", "weight_scale"
WORDS = "qweight"
SMALL = 2 << 30  # bytes: files that are read whole where a format's code needs values to load
EXPERT = re.compile(r"\.experts\.\d+\.")
# Scales of an FP8 cache, which engines read; transformers keeps its cache in 16 bits and passes them over.
CACHE_SCALE = re.compile(r"\.[qkv]_scale$")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--sample", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--linears", type=Path)
    options = parser.parse_args()
    os.environ.update(
        HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TORCHDYNAMO_DISABLE="1", TOKENIZERS_PARALLELISM="false"
    )
    with contextlib.redirect_stdout(sys.stderr):  # libraries print; stdout carries the answer alone
        answer = (
            linears(options.checkpoint, json.loads(options.linears.read_text()))
            if options.linears
            else ask(options.checkpoint, options.sample, options.out)
        )
    print(json.dumps(answer))


def linears(folder: Path, modules: list[str]) -> dict[str, Any]:
    """Every Linear of the class that config.json names, built without weights, with those of the files' modules that
    are loaded into it; or error.
    """
    import torch
    import transformers
    from transformers import AutoConfig

    try:
        with described(folder) as place:
            config = AutoConfig.from_pretrained(place, trust_remote_code=False, local_files_only=True)
        if getattr(config, "quantization_config", None) is not None:
            del config.quantization_config
        names = getattr(config, "architectures", None) or [""]
        with torch.device("meta"):
            model = getattr(transformers, names[0])(config)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {first_line(error)}"}
    found: dict[str, list[str]] = {n: [] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    with contextlib.suppress(ImportError, AttributeError, TypeError):  # another release's loader: no sources
        for source, target in targets(model, modules):
            if target in found:
                found[target].append(source)
    return {"linears": found}


@contextlib.contextmanager
def described(path: Path) -> Iterator[Path]:
    """The directory itself; for a GGUF file one with the config.json that its metadata gives."""
    if path.is_dir():
        yield path
        return
    view = GgufAsFloats(Checkpoint.open(path), tokenizer=False)
    with directory_of(view, ["config.json"], "doctor-config-") as folder:
        yield folder


def targets(model: Any, modules: list[str]) -> list[tuple[str, str]]:
    """(module of the files, module of the class that its weight is loaded into), by the loader's own renames."""
    from transformers.conversion_mapping import WeightConverter, WeightRenaming, get_model_conversion_mapping
    from transformers.core_model_loading import rename_source_key

    conversions = get_model_conversion_mapping(model)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    state = model.state_dict()
    found = []
    for module in modules:
        name, _pattern = rename_source_key(f"{module}.weight", renamings, converters, model.base_model_prefix, state)
        if name not in state:
            name, _pattern = rename_source_key(f"{module}.weight", [], [], model.base_model_prefix, state)
        found.append((module, name.removesuffix(".weight")))
    return found


def ask(folder: Path, sample: int, out: Path | None) -> dict[str, Any]:
    """Names missing, unexpected and mismatched, and packed: linears that the client took as packed; or error and its
    kind.
    """
    import transformers
    from transformers import AutoConfig

    answer: dict[str, Any] = {"client": f"transformers {transformers.__version__}", "class": ""}
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        names = getattr(config, "architectures", None) or []
        found = getattr(transformers, names[0], None) if names else None
        if found is None:
            return answer | {"kind": "no class", "error": names[0] if names else ""}
        answer["class"] = names[0]
        if find_spec("accelerate") is None:  # transformers raises a ValueError, which says nothing against the files
            return answer | {"kind": "library", "error": "the meta device needs it (`pip install accelerate`)"}
        ask_for_plain_backend(config)
        model, info = load_headers(found, folder, config)
    except (ImportError, PackageNotFoundError) as error:
        return answer | {"kind": "library", "error": first_line(error)}
    except Exception as error:
        # A file may be larger than what the machine maps at once; that says nothing against it.
        full = isinstance(error, MemoryError) or "Cannot allocate memory" in str(error)
        return answer | {
            "kind": "machine" if full else "refused",
            "error": f"{type(error).__name__}: {first_line(error)}",
        }
    cached = (getattr(config, "quantization_config", None) or {}).get("kv_cache_scheme") is not None
    answer |= {
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(k for k in info["unexpected_keys"] if not (cached and CACHE_SCALE.search(k))),
        "mismatched": sorted(str(m[0]) if isinstance(m, (tuple, list)) else str(m) for m in info["mismatched_keys"]),
    }
    packed = [name for name, module in model.named_modules() if hasattr(module, PACKED) or has_scale_beside(module)]
    answer["packed"] = len(packed)
    if sample and packed and out is not None:
        answer["libraries"] = {"compressed-tensors": version("compressed-tensors")}
        write_sample(folder, model, packed, sample, out)
    packed = [name for name, module in model.named_modules() if hasattr(module, WORDS)]
    answer["packed"] += len(packed)
    if sample and packed and out is not None:
        answer["libraries"] = {"gptqmodel": version("gptqmodel")}
        write_gptq_sample(folder, model, packed, sample, out)
    return answer


def load_headers(found: Any, folder: Path, config: Any) -> tuple[Any, Any]:
    """(model on the meta device, loading_info) of a class, without a byte of its weights.

    transformers reads every tensor, joins experts on the CPU and only then drops the values: a mixture of 470 GB takes
    as long as its disk. Here its loader gets tensors of the same shape and type that hold nothing. Where a step of it
    needs values, a small model is loaded as it is.
    """
    whole = {"output_loading_info": True, "trust_remote_code": False, "local_files_only": True, "use_safetensors": True}
    load = partial(found.from_pretrained, folder, config=config, device_map={"": "meta"}, **whole)
    with values_left_out() as patched:
        try:
            return load()
        except Exception:
            if not patched or sum(path.stat().st_size for path in folder.glob("*.safetensors")) > SMALL:
                raise
    return load()


@contextlib.contextmanager
def values_left_out() -> Iterator[bool]:
    """Let transformers' loader make tensors from the shapes and types of headers; False where it has another form."""
    import torch

    try:
        from safetensors.torch import _TYPES as types
        from transformers import core_model_loading as loading

        read = loading._materialize_copy
    except (ImportError, AttributeError):
        yield False
        return

    def described(tensor: Any, device: Any = None, dtype: Any = None) -> Any:
        if hasattr(tensor, "get_shape") and tensor.get_dtype() in types:
            tensor = torch.empty(tensor.get_shape(), dtype=types[tensor.get_dtype()], device="meta")
            return tensor if dtype is None else tensor.to(dtype)
        return read(tensor, device, dtype)

    loading._materialize_copy = described
    try:
        yield True
    finally:
        loading._materialize_copy = read


def has_scale_beside(module: Any) -> bool:
    """Whether compressed-tensors keeps this linear's codes under the weight's own name, FP8 and INT8."""
    stated = getattr(module, "quantization_scheme", None)
    weight = getattr(module, "weight", None)
    if getattr(stated, "weights", None) is None or weight is None or not hasattr(module, SCALE):
        return False
    return weight.element_size() == 1


def ask_for_plain_backend(config: Any) -> None:
    """Ask gptqmodel for its kernels in plain torch, where it will read the linears."""
    from importlib.util import find_spec

    from doctor.formats.registry import KNOWN

    if find_spec("gptqmodel") is None:
        return
    stated = getattr(config, "quantization_config", None)
    if not isinstance(stated, dict):
        return
    form = next((f for f in KNOWN.values() if f.claims(stated)), None)
    if form is not None and form.plain_backend:
        config.quantization_config = {**stated, "backend": form.plain_backend}


def write_gptq_sample(folder: Path, model: Any, packed: list[str], sample: int, out: Path) -> None:
    """Weights [out, in] of GPTQ linears as gptqmodel's torch kernel unpacks them; nothing for its other kernels."""
    import torch
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization.config import FORMAT
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module
    from safetensors.torch import save_file

    stated = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config", {})
    files = shards_of(folder)
    stored = {name.removesuffix(f".{WORDS}") for name in files if name.endswith(f".{WORDS}")}
    form = FORMAT(stated.get("checkpoint_format") or stated.get("format") or FORMAT.GPTQ.value)
    found = {}
    for name in packed[:: max(1, len(packed) // sample)][:sample]:
        module, source = model.get_submodule(name), stored_name(name, stored)
        if source is None or not isinstance(module, TorchLinear):
            continue
        sizes = {key: getattr(module, key) for key in ("bits", "group_size", "sym", "in_features", "out_features")}
        linear = TorchLinear(**sizes, desc_act=bool(stated.get("desc_act")), format=form)
        for part in parts_of(source, files):
            if getattr(linear, part, None) is not None:  # the bias is none of a linear's that is made without one
                getattr(linear, part).data.copy_(read(folder, files, f"{source}.{part}"))
        if form == FORMAT.GPTQ:
            convert_gptq_v1_to_v2_format_module(linear, bits=linear.bits, pack_dtype=torch.int32)
        linear.eval()
        linear.post_init()
        found[source] = linear.dequantize_weight().T.contiguous()
    if found:
        save_file(found, out)


def write_sample(folder: Path, model: Any, packed: list[str], sample: int, out: Path) -> None:
    """Weights [out, in] of linears spread over the model, by the name under which the files hold them."""
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.compressors.format import infer_module_format
    from safetensors.torch import save_file

    files = shards_of(folder)
    stored = {name.rpartition(".")[0] for name in files if name.endswith((f".{PACKED}", f".{SCALE}"))}
    found = {}
    for name in packed[:: max(1, len(packed) // sample)][:sample]:
        module = model.get_submodule(name)
        source = stored_name(name, stored)
        if source is None:
            continue
        scheme = module.quantization_scheme
        form = scheme.format or infer_module_format(type(module), scheme)  # as decompress_module chooses it
        compressor: Any = BaseCompressor.get_value_from_registry(getattr(form, "value", form))
        state = {part: read(folder, files, f"{source}.{part}") for part in parts_of(source, files)}
        found[source] = compressor.decompress(state, scheme)["weight"].contiguous()
    save_file(found | joined_experts(folder, model), out)


def joined_experts(folder: Path, model: Any) -> dict[str, Any]:
    """Weights [out, in] of packed experts as transformers unpacks them before it joins them into one tensor, by the
    name under which the files hold them: two for each shape that their codes have. {} where it joins none.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
        from transformers.integrations.compressed_tensors import CompressedTensorsDequantize
    except ImportError:  # another release, which joins none or by other code
        return {}
    conversions = get_model_conversion_mapping(model)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    files, state, unpack = shards_of(folder), model.state_dict(), CompressedTensorsDequantize(model.hf_quantizer)
    found = {}
    for source in experts_by_shape(folder, files):
        target, pattern = rename_source_key(f"{source}.weight", renamings, converters, model.base_model_prefix, state)
        if pattern is None or target not in state:
            continue
        pattern = pattern.removesuffix(".weight")
        given = {f"{pattern}.{part}": [read(folder, files, f"{source}.{part}")] for part in parts_of(source, files)}
        for weight in unpack.convert(given, [], [], full_layer_name=target, model=model).values():
            found[source] = weight[0].contiguous()
    return found


def experts_by_shape(folder: Path, files: dict[str, str]) -> list[str]:
    """The first and the last expert of the files whose codes have a shape, for each shape."""
    from safetensors import safe_open

    ends: dict[tuple[int, ...], list[str]] = {}
    for file in sorted(set(files.values())):
        with safe_open(folder / file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118 - a shard is no dict
                source, _dot, part = name.rpartition(".")
                if EXPERT.search(name) and part in (PACKED, "weight") and f"{source}.{SCALE}" in files:
                    ends.setdefault(tuple(shard.get_slice(name).get_shape()), []).append(source)
    return [source for names in ends.values() for source in dict.fromkeys((names[0], names[-1]))]


def shards_of(folder: Path) -> dict[str, str]:
    """Tensor name -> file, from the headers."""
    from safetensors import safe_open

    files: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as shard:
            files |= dict.fromkeys(shard.keys(), path.name)
    return files


def stored_name(module: str, stored: set[str]) -> str | None:
    """The name of a module in the files: its own, or the one with the longest common end that is unique."""
    if module in stored:
        return module
    parts = module.split(".")
    for start in range(1, len(parts) - 1):
        tail = "." + ".".join(parts[start:])
        same = [name for name in stored if f".{name}".endswith(tail)]
        if len(same) == 1:
            return same[0]
    return None


def parts_of(source: str, files: dict[str, str]) -> list[str]:
    return [name.removeprefix(f"{source}.") for name in files if name.rpartition(".")[0] == source]


def read(folder: Path, files: dict[str, str], name: str) -> Any:
    from safetensors import safe_open

    with safe_open(folder / files[name], framework="pt") as shard:
        return shard.get_tensor(name)


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]


if __name__ == "__main__":
    main()
