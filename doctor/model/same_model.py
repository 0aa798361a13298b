"""Whether two checkpoints can be one model, quantized and not."""

from __future__ import annotations

from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import NotQuantizable
from doctor.core.messages import _


def require_same_model(original: Checkpoint, quantized: Checkpoint) -> None:
    """Raises NotQuantizable where the two configs cannot be of one model. Vocabularies may differ: quantizers pad
    them.
    """
    configs = [c.value("config.json") or {} for c in (original, quantized)]
    for key in ("model_type", "hidden_size", "num_hidden_layers"):
        a, b = (c.get(key) for c in configs)
        if a is not None and b is not None and a != b:
            raise NotQuantizable(
                _(
                    "{original} and {quantized} are not one model: {key} is {there} there and {here} here.",
                    original=original.name,
                    quantized=quantized.name,
                    key=key,
                    there=a,
                    here=b,
                ),
                _("Give a model and what was quantized from it."),
            )
