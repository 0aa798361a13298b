"""A model that a program holds, checked without a file: what `save_pretrained` would write, judged before.

A model of transformers is seen under the names, ties and configuration that its own saving code gives it, so that a
finding here is one that the saved files would have. Other modules and mappings are seen as they are.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from doctor.checkpoint.dtypes import CODE_NUMPY, DTYPES
from doctor.checkpoint.memory import SHARD, HeldTensor, MemoryCheckpoint
from doctor.core.errors import BadCheckpoint
from doctor.core.finding import Finding
from doctor.core.messages import Message, _
from doctor.core.options import InMemory
from doctor.core.recipe import Recipe
from doctor.lint.baseline import compare_with
from doctor.lint.config import rules_of
from doctor.lint.engine import Report, judge, locate
from doctor.scan.header import header_facts
from doctor.scan.scan import scan
from doctor.scan.summary import summary

TORCH_NAMES = {d.torch: d.name for d in DTYPES.values() if d.torch is not None}
NUMPY_NAMES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "int16": "I16", "uint16": "U16", "int32": "I32", "uint32": "U32",
    "int64": "I64", "uint64": "U64", "float16": "F16", "float32": "F32", "float64": "F64", "bfloat16": "BF16",
    "complex64": "C64",
}  # fmt: skip
WRAPPERS = ("module", "_orig_mod")  # of DistributedDataParallel and DataParallel, and of torch.compile
ADAPTED = "peft_config"  # of a model with adapters: its names are not those of a checkpoint


def memory_checkpoint(model: InMemory, config: Any = None) -> MemoryCheckpoint:
    """The checkpoint that a module or a mapping of tensors (torch or NumPy) would be saved as.

    config: the model's configuration, a mapping or one of transformers; None takes that of a model of transformers.
    Raises BadCheckpoint for tensors without values here: on the meta device, or held in parts by several processes.
    """
    documents = {} if config is None else {"config.json": _config_text(config)}
    if isinstance(model, Mapping):
        return MemoryCheckpoint("state_dict", _held(_without_aliases(model, config)), documents)
    if not _is(model, "nn.Module"):
        raise TypeError(f"check: {type(model).__name__} is no path, torch module or mapping of tensors")
    module = _unwrapped(model)
    name = type(module).__name__
    tensors: Mapping[str, Any] = module.state_dict()
    if _saves_whole(module):
        _require_values(tensors)
        tensors = _as_saved(module, dict(tensors))
        documents = _documents(module, name) | documents
    else:
        tensors = _without_aliases(tensors, config)
    return MemoryCheckpoint(name, _held(tensors), documents)


def check_in_memory(
    model: InMemory,
    recipe: Recipe | None = None,
    *,
    model_config: Any = None,
    select: Iterable[str] = (),
    extend_select: Iterable[str] = (),
    ignore: Iterable[str] = (),
    rules_dirs: Iterable[Path] = (),
    fail_on: str = "error",
    progress: Callable[[int], None] = lambda n: None,
    baseline: Report | None = None,
) -> Report:
    """Judge a module or a mapping of tensors. Nothing is written, and no finding carries a fix: those are of files.

    recipe: None judges the tensors alone, without a plan to quantize. model_config: see memory_checkpoint. The others
    are those of doctor.check.
    """
    started = time.perf_counter()
    recipe = recipe or Recipe(goal="none")
    rules = rules_of(rules_dirs, None, select, extend_select, ignore)
    checkpoint = memory_checkpoint(model, model_config)
    store = header_facts(checkpoint, recipe)
    scanned = scan(checkpoint, store, progress)
    findings, runs = judge(store, rules)
    report = Report(
        checkpoint=checkpoint.name,
        recipe=recipe,
        findings=[_of_memory(f) for f in locate(findings, checkpoint)],
        runs=runs,
        summary=summary(checkpoint, store),
        skipped_tensors=scanned.skipped,
        bytes_read=scanned.bytes_read,
        fail_on=fail_on,
    )
    report.summary |= {"selected": len(rules)} if tuple(select) else {}
    if baseline is not None:
        compare_with(report, baseline)
    report.seconds = time.perf_counter() - started
    return report


def _of_memory(finding: Finding) -> Finding:
    """Without the fix, and without advice that names a file to copy again."""
    advice = finding.advice
    if isinstance(advice, Message) and SHARD in advice.values.values():
        advice = ""
    return replace(finding, fix=None, advice=advice)


def _is(value: Any, name: str) -> bool:
    """Whether it is of this class of torch, which whoever has one has imported: arrays are checked without torch."""
    kind: Any = sys.modules.get("torch")
    for part in name.split("."):
        kind = getattr(kind, part, None)
    return kind is not None and isinstance(value, kind)


def _unwrapped(model: Any) -> Any:
    """The module inside what training wraps around it."""
    inner = next((m for m in (model._modules.get(name) for name in WRAPPERS) if m is not None), None)
    return _unwrapped(inner) if inner is not None and len(model._modules) == 1 else model


def _saves_whole(module: Any) -> bool:
    """Whether it is a model of transformers whose saving code gives plain weights: not a quantized or adapted one."""
    return (
        hasattr(module, "save_pretrained")
        and hasattr(getattr(module, "config", None), "to_json_string")
        and getattr(module, "hf_quantizer", None) is None
        and not hasattr(module, ADAPTED)
    )


def _as_saved(module: Any, tensors: dict[str, Any]) -> Mapping[str, Any]:
    """The tensors under the names of the files: ties stored once, stacked experts taken apart. transformers 4 keeps the
    names of its modules.
    """
    from transformers import modeling_utils

    for name in getattr(module, "_keys_to_ignore_on_save", None) or ():
        tensors.pop(name, None)
    untied = getattr(modeling_utils, "remove_tied_weights_from_state_dict", None)
    if untied is None:
        return _without_aliases(tensors, module.config)
    from transformers.core_model_loading import revert_weight_conversion

    saved: Mapping[str, Any] = revert_weight_conversion(module, untied(tensors, module))
    return saved


def _documents(module: Any, name: str) -> dict[str, str]:
    """config.json and generation_config.json as `save_pretrained` writes them."""
    stated = copy.deepcopy(module.config)
    stated.architectures = [name]
    found = {"config.json": _config_text(stated, str(module.dtype).removeprefix("torch."))}
    if getattr(module, "generation_config", None) is not None and module.can_generate():
        found["generation_config.json"] = module.generation_config.to_json_string()
    return found


def _config_text(config: Any, dtype: str = "") -> str:
    if isinstance(config, Mapping):
        return json.dumps(config, indent=2)
    stated = json.loads(config.to_json_string())
    return json.dumps(stated | ({"dtype": dtype} if dtype else {}), indent=2)


def _without_aliases(tensors: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """The tensors, of those that are one in memory only the first, unless the configuration says that none are tied."""
    stated = (
        config.get("tie_word_embeddings")
        if isinstance(config, Mapping)
        else getattr(config, "tie_word_embeddings", None)
    )
    if stated is False:
        return dict(tensors)
    kept: dict[str, Any] = {}
    met: set[tuple] = set()
    for name, tensor in tensors.items():
        place = _place(tensor)
        if place is None or place not in met:
            kept[name] = tensor
        met |= {place} if place is not None else set()
    return kept


def _place(tensor: Any) -> tuple | None:
    """Where a tensor lies in memory, None where that says nothing: it is empty, or has no values here."""
    if not _is(tensor, "Tensor") or not tensor.numel() or tensor.is_meta or held_in_parts(tensor):
        return None
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def held_in_parts(tensor: Any) -> bool:
    """Whether other processes hold the rest of it: a DTensor, or a parameter under DeepSpeed's ZeRO stage 3."""
    return hasattr(tensor, "full_tensor") or hasattr(tensor, "ds_shape")


def _require_values(tensors: Mapping[str, Any]) -> None:
    """Raise BadCheckpoint for the first tensor whose values are not here."""
    for name, tensor in tensors.items():
        if not _is(tensor, "Tensor"):
            continue
        if tensor.is_meta:
            raise BadCheckpoint(
                _("{tensor}: is on the meta device, which holds no values.", tensor=name),
                _("Load the weights first."),
            )
        if held_in_parts(tensor):
            raise BadCheckpoint(
                _("{tensor}: is held in parts by several processes; must be whole.", tensor=name),
                _("Give a gathered state dict, as `accelerator.get_state_dict(model)` makes it."),
            )


def _held(tensors: Mapping[str, Any]) -> dict[str, HeldTensor]:
    """Raises BadCheckpoint for what is no tensor or array, or of a dtype that safetensors has none for."""
    _require_values(tensors)
    found = {}
    for name, tensor in tensors.items():
        if _is(tensor, "Tensor"):
            dtype = TORCH_NAMES.get(str(tensor.dtype).removeprefix("torch."))
            raw = partial(_torch_bytes, tensor)
        elif isinstance(tensor, np.ndarray):
            dtype = NUMPY_NAMES.get(tensor.dtype.name)
            raw = partial(_numpy_bytes, tensor)
        else:
            if name.endswith("_extra_state"):  # of a module that keeps other things than tensors
                continue
            raise BadCheckpoint(
                _("{name}: is {kind}; must be a tensor or an array.", name=str(name), kind=type(tensor).__name__)
            )
        if dtype is None or dtype not in CODE_NUMPY:
            raise BadCheckpoint(
                _("{tensor}: its dtype {dtype} is none of safetensors.", tensor=name, dtype=str(tensor.dtype))
            )
        found[str(name)] = HeldTensor(dtype, tuple(tensor.shape), raw)
    return found


def _torch_bytes(tensor: Any) -> np.ndarray:
    plain = tensor.detach().to("cpu").resolve_conj().resolve_neg().contiguous()
    flat: np.ndarray = plain.reshape(-1).view(sys.modules["torch"].uint8).numpy()
    return flat


def _numpy_bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False).reshape(-1).view(np.uint8)
