"""The language model of a config that AutoModelForCausalLM does not know: transformers' base class under a head.

Most vision and audio models are such: `Qwen2VLForConditionalGeneration` holds a `Qwen2VLTextModel`, which has no class
with a head of its own. The base class is transformers' own; only the head, one matrix, is put on here.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import torch
from torch import nn

from doctor.core.errors import NotQuantizable
from doctor.core.messages import _


class HeadedModel(nn.Module):
    """A base model and the head over its last hidden states, with the interface of transformers' causal models."""

    base_model_prefix = "model"

    def __init__(self, base: Any, config: Any):
        super().__init__()
        self.model, self.config = base, config
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def forward(
        self,
        input_ids: torch.Tensor,
        use_cache: bool = False,
        logits_to_keep: int | torch.Tensor = 0,
        past_key_values: Any = None,
    ) -> Any:
        """An object with `logits` [rows, length, vocabulary] and the cache. logits_to_keep: how many of the last
        positions, 0 for all, or the numbers int64[n] of those that are wanted.
        """
        from transformers.modeling_outputs import CausalLMOutputWithPast

        name = cache_argument(self.model)
        cache = {} if past_key_values is None else {name: past_key_values}
        out = self.model(input_ids=input_ids, use_cache=use_cache, **cache)
        wanted = slice(-logits_to_keep or None, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, wanted])
        logits = logits / (getattr(self.config, "logits_scaling", None) or 1)
        cap = getattr(self.config, "final_logit_softcapping", None)
        return CausalLMOutputWithPast(
            logits=torch.tanh(logits / cap) * cap if cap else logits, past_key_values=getattr(out, name, None)
        )


def cache_argument(model: nn.Module) -> str:
    """The name under which forward takes a key/value cache, and its output returns it: releases of transformers
    differ.
    """
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def base_class_of(config: Any) -> type:
    """transformers' base model of a config: AutoModel's, else the one of the config's own modeling file.

    Raises NotQuantizable where there is none.
    """
    from transformers import MODEL_MAPPING, PreTrainedModel

    known = MODEL_MAPPING.get(type(config), None)
    if isinstance(known, type):
        return known
    module = importlib.import_module(type(config).__module__.replace(".configuration_", ".modeling_"))
    found: list[Any] = [
        value
        for name, value in vars(module).items()
        if isinstance(value, type)
        and issubclass(value, PreTrainedModel)
        and value.__module__ == module.__name__
        and getattr(value, "config_class", None) is type(config)
        and name.endswith("Model")
        and not name.endswith("PreTrainedModel")
    ]
    if not found:
        raise NotQuantizable(
            _("config.json: transformers has no language model of a {config} alone.", config=type(config).__name__),
            _("Quantize a model whose language model transformers can build."),
        )
    return found[0]
