"""Says why a parameter of transformers' model has no tensor of its own: lost, shared, or made of others."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import NotQuantizable
from doctor.core.messages import Message, _
from doctor.quant.forward.parameter_names import ParameterNames, transforms_of

_LAYER = re.compile(r"\.(\d+)\.")


def unfollowed(
    name: str, base: nn.Module, class_name: str, names: ParameterNames, checkpoint: Checkpoint
) -> NotQuantizable:
    """Why the parameter `name` of the base model has no tensor: the class shares it between layers, transformers makes
    it of tensors with other names, or the checkpoint lost it.
    """
    other = _shared_with(name, base, names)
    if other is not None:
        return NotQuantizable(
            _(
                "{name}: {model} shares this parameter with {other}, and the checkpoint stores it once; one linear of "
                "several layers is not followed here.",
                name=name,
                model=class_name,
                other=other,
            ),
            elsewhere(class_name),
        )
    made = _made_of(name, base, checkpoint)
    if made is not None:
        source, operations = made
        return NotQuantizable(
            _(
                "{name}: {model} has this parameter, and transformers makes it of {source} by {operations}, which is "
                "not followed here.",
                name=name,
                model=class_name,
                source=source,
                operations=operations,
            ),
            elsewhere(class_name),
        )
    return NotQuantizable(
        _("{name}: {model} has this parameter, the checkpoint has no tensor for it.", name=name, model=class_name),
        _("Run `doctor check`: rules F05x compare the tensors with config.json."),
    )


def unfollowed_experts(i: int, layer: nn.Module, class_name: str, stored: int) -> NotQuantizable:
    """Layer i's experts are `stored` separate linears, and the class joins them in a form that is not known here."""
    for module in layer.modules():
        stacks = {name: list(p.shape) for name, p in module._parameters.items() if p is not None and p.dim() == 3}
        if stacks:
            return NotQuantizable(
                _(
                    "layer {i}: the checkpoint has {n:,} separate linears of experts, and transformers' {module} joins "
                    "them as {stacks}, a form that is not followed here.",
                    i=i,
                    n=stored,
                    module=type(module).__name__,
                    stacks=", ".join(f"{name} {shape}" for name, shape in stacks.items()),
                ),
                elsewhere(class_name),
            )
    return NotQuantizable(
        _(
            "layer {i}: the checkpoint has {n:,} separate linears of experts, and transformers' {module} has no "
            "modules of their names.",
            i=i,
            n=stored,
            module=type(layer).__name__,
        ),
        elsewhere(class_name),
    )


def elsewhere(class_name: str) -> Message:
    return _("Serve it in 16 bits, or take a quantizer that names {model}.", model=class_name)


def _shared_with(name: str, base: nn.Module, names: ParameterNames) -> str | None:
    """The parameter that the class ties `name` to, where the checkpoint has that one."""
    for path, module in base.named_modules():
        ties = getattr(module, "_tied_weights_keys", None)
        prefix = f"{path}." if path else ""
        if not isinstance(ties, dict) or not name.startswith(prefix):  # a list before transformers 5
            continue
        for pattern, target in ties.items():
            inside = name.removeprefix(prefix)
            match = re.search(pattern, inside)
            other = f"{prefix}{inside[: match.start()]}{target}{inside[match.end() :]}" if match else name
            if other != name and names.find(other) is not None:
                return other
    return None


def _made_of(name: str, base: nn.Module, checkpoint: Checkpoint) -> tuple[str, str] | None:
    """(a tensor of the checkpoint, operations) that transformers makes the parameter `name` of; None where it makes it
    of none that is there.
    """
    try:
        from transformers.core_model_loading import WeightConverter
    except ImportError:  # transformers before 5 makes no parameter of others
        return None

    kinds = [(checkpoint.value("config.json") or {}).get("model_type"), getattr(base.config, "model_type", None)]
    layer = _LAYER.search(name)
    for item in transforms_of([*kinds, type(base).__name__]):
        if not isinstance(item, WeightConverter) or not _targets(item.target_patterns, name):
            continue
        for source in sorted(checkpoint.tensors):
            place = _LAYER.search(source)
            if layer is not None and (place is None or place[1] != layer[1]):
                continue
            if item.rename_source_key(source)[1] is not None:
                return source, ", ".join(type(operation).__name__ for operation in item.operations)
    return None


def _targets(patterns: Iterable[str], name: str) -> bool:
    """Whether the parameter `name` is one that a converter with these target patterns makes."""
    wanted = [re.escape(pattern.strip("^$.")).replace(r"\\1", ".*") for pattern in patterns]
    return any(re.search(rf"(?:^|\.){pattern}(?:\.|$)", name) for pattern in wanted)
