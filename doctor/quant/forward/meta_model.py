"""Builds transformers' causal language model of a checkpoint's config with parameters on the meta device."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from doctor.checkpoint.directory import Checkpoint
from doctor.checkpoint.special_numbers import with_numbers
from doctor.core.errors import BadCheckpoint, NotQuantizable
from doctor.core.messages import _
from doctor.model.spec import ModelSpec
from doctor.quant.forward.text_model import HeadedModel, base_class_of

MOST_MODULES = 10_000  # layers, or experts of one layer, that a config may ask for


_DRAWS = ("normal_", "uniform_")  # and trunc_normal_, kaiming_uniform_, xavier_normal_ …


class _NoDraws(TorchFunctionMode):
    """Initial values of meta tensors are not drawn: there is nothing to fill, and torch imports sympy to say so (45
    MiB, 1 s).
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensor = args[0] if args else kwargs.get("tensor")
        if getattr(func, "__name__", "").endswith(_DRAWS) and tensor is not None and tensor.is_meta:
            return tensor
        return func(*args, **kwargs)


@contextmanager
def without_weights() -> Iterator[None]:
    """Parameters registered inside go to the meta device; buffers keep the values that constructors give them."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign,assignment]
    try:
        with _NoDraws():
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def build_model(checkpoint: Checkpoint, spec: ModelSpec) -> Any:
    """transformers' causal language model for the checkpoint's config: eval mode, parameters on meta.

    Raises NotQuantizable for a model_type that transformers does not define: a checkpoint's own code is never run.
    """
    import transformers

    config = checkpoint.value("config.json")
    if config is None:
        raise BadCheckpoint(
            _("{root}: config.json is absent or broken; quantizing needs the model's shape.", root=str(checkpoint.root))
        )
    stated = config.get("quantization_config")
    if stated is not None:
        method = (
            stated.get("quant_method", _("some method"))
            if isinstance(stated, dict)
            else _("{value!r}, which is no object", value=stated)
        )
        raise NotQuantizable(
            _("config.json#/quantization_config: this checkpoint is quantized already ({method}).", method=method),
            _("Quantize from the 16-bit original."),
        )
    _require_finite_work(spec.config)
    kind = str(spec.config.get("model_type") or config.get("model_type") or "")
    try:
        with without_weights(), torch.no_grad():
            return _language_model(text_config(config, spec)).eval()
    except NotQuantizable:
        raise
    except Exception as error:  # whatever the library raises for a config it does not like is the reason
        reason = " ".join(str(error).split())[:200].removesuffix(".")
        raise NotQuantizable(
            _(
                "config.json: transformers {version} cannot build {kind}: {error}: {reason}.",
                version=transformers.__version__,
                kind=kind,
                error=type(error).__name__,
                reason=reason,
            ),
            _("Run `doctor check`: rules C14x say what is wrong with config.json."),
        ) from error


def text_config(config: dict, spec: ModelSpec) -> Any:
    """transformers' config of the language model: the part that the whole model's own config class makes of it, or the
    part alone where transformers does not define the whole.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    section = spec.section(config)
    built = config_of(config if str(config.get("model_type") or "") in CONFIG_MAPPING else section)
    if getattr(built, "is_encoder_decoder", False):
        raise NotQuantizable(
            _(
                "config.json#/model_type: {kind} is an encoder and a decoder; one stack of layers is needed.",
                kind=built.model_type,
            ),
            _("Quantize a model with a decoder alone, or an encoder alone."),
        )
    return built.get_text_config(decoder=True)


def config_of(stated: Mapping[str, Any]) -> Any:
    """transformers' config of a config.json, or of a part of one. Raises NotQuantizable where it is not defined."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = str(stated.get("model_type") or "")
    if kind not in CONFIG_MAPPING:
        raise NotQuantizable(
            _(
                "config.json#/model_type: {kind!r} is not defined in transformers {version}.",
                kind=kind,
                version=transformers.__version__,
            ),
            _("Install a transformers that has it: code that comes with a checkpoint is never run."),
        )
    return CONFIG_MAPPING[kind].from_dict(
        with_numbers({k: v for k, v in stated.items() if k not in ("auto_map", "quantization_config")})
    )


def build_whole(checkpoint: Checkpoint, attention_of: str) -> Any:
    """The class that config.json names, towers and all: eval mode, parameters on meta. Raises NotQuantizable where
    transformers has no such class.
    """
    import transformers

    config = checkpoint.value("config.json") or {}
    name = str(next(iter(config.get("architectures") or []), ""))
    known: Any = getattr(transformers, name, None)
    if known is None:
        raise NotQuantizable(
            _(
                "config.json#/architectures: transformers {version} has no {name}.",
                version=transformers.__version__,
                name=name,
            ),
            _("Calibrate on text."),
        )
    with without_weights(), torch.no_grad():
        return known._from_config(config_of(config), attn_implementation=attention_of, dtype=torch.float32).eval()


def _language_model(config: Any) -> Any:
    """The causal model of a language model's config, or its base model under a head of our own."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    config.use_cache = False
    options = {"attn_implementation": attention(config), "dtype": torch.float32}
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM.from_config(config, **options, trust_remote_code=False)
    base: Any = base_class_of(config)
    return HeadedModel(base._from_config(config, **options), config)


def _require_finite_work(section: dict) -> None:
    """Raises NotQuantizable for a number of layers or experts that transformers would build one by one for hours."""
    for key, value in section.items():
        if (
            re.fullmatch(r"(num|n)_.*(layers?|experts)", key)
            and isinstance(value, (int, float))
            and not value <= MOST_MODULES
        ):
            raise NotQuantizable(
                _(
                    "config.json#/{key}: {value:,}; must be a whole number up to {most:,}.",
                    key=key,
                    value=value,
                    most=MOST_MODULES,
                ),
                _("Correct it in config.json."),
            )


def attention(config) -> str:
    """The attention that computes what the model defines: eager where it has a softcap, which sdpa does not know, or no
    sdpa at all.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    defined = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None) or base_class_of(config)
    softcap = getattr(config, "attn_logit_softcapping", None)
    return "eager" if softcap or not getattr(defined, "_supports_sdpa", True) else "sdpa"


def find_decoder_layers(base: nn.Module, spec: ModelSpec) -> tuple[str, nn.ModuleList]:
    if spec.n_layers is None:
        raise NotQuantizable(
            _("config.json does not say how many decoder layers {model} has.", model=type(base).__name__),
            _("Run `doctor check`: rules C14x say what is wrong with config.json."),
        )
    found = [(name, m) for name, m in base.named_modules() if isinstance(m, nn.ModuleList) and len(m) == spec.n_layers]
    found = [(name, m) for name, m in found if not re.search(r"\.\d+\.", f".{name}.")]
    if not found:
        raise NotQuantizable(
            _("{model} has no list of {layers} decoder layers.", model=type(base).__name__, layers=spec.n_layers)
        )
    sizes = [sum(p.numel() for p in layers.parameters()) for _name, layers in found]
    largest = sizes.index(max(sizes))
    name, layers = found[largest]
    beside = [
        other for (other, part), size in zip(found, sizes, strict=True)
        if other != name and other.rpartition(".")[0] == name.rpartition(".")[0] and 4 * size > sizes[largest]
        and any(isinstance(m, nn.Linear) for m in part.modules())
    ]  # fmt: skip
    if beside:  # XLM: attentions, ffns
        raise NotQuantizable(
            _(
                "{model} has the linears of its layers in several lists ({lists}); one list of decoder layers is "
                "needed.",
                model=type(base).__name__,
                lists=", ".join([name, *beside]),
            ),
            _("Quantize a model whose decoder layers are modules of their own."),
        )
    return name, layers
