"""What kind of thing a directory is, said before anything is judged: a decoder language model, an adapter, a pipeline.

From names of files and config.json alone. The words are those that a screen prints; a report keeps the key.
"""

import re
from collections.abc import Mapping
from typing import Any, Final

from doctor.checkpoint.directory import Checkpoint
from doctor.core.facts import fact
from doctor.core.messages import Message, _
from doctor.core.tables import table
from doctor.model.lora import ADAPTER
from doctor.model.spec import TEXT_KEYS

KINDS: Final[Mapping[str, Message]] = {
    "decoder": _("decoder LM"),
    "multimodal": _("multimodal LM"),
    "encoder-decoder": _("encoder-decoder model"),
    "encoder": _("encoder"),
    "two-encoders": _("pair of encoders for texts and images"),
    "vision": _("vision model"),
    "audio": _("audio model"),
    "custom": _("model of custom code"),
    "unknown": _("model of a kind that is not known"),
    "adapter": _("adapter without its base model"),
    "pipeline": _("diffusers pipeline"),
    "component": _("part of a diffusers pipeline"),
    "mlx": _("model quantized by MLX"),
    "state-dict": _("tensors without config.json"),
    "memory": _("model in memory"),
    "gguf": _("GGUF file"),
    "onnx": _("ONNX model"),
    "pickle": _("pickled weights, not opened"),
    "configuration": _("configuration without weights"),
    "empty": _("empty directory"),
    "other": _("no checkpoint"),
}
HALVES: Final = ("encoder-decoder", "audio")  # kinds that may be an encoder and a decoder; config.json says so
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".npz")
_DECODES = re.compile(r"(ForCausalLM|LMHeadModel)")
_SPEAKS = re.compile(r"(ForCausalLM|LMHeadModel|ForConditionalGeneration|ForVision2Seq)$")
_OTHER_SENSES = ("vision_config", "audio_config", "image_config", "speech_config", "video_config")
_VISION = frozenset({"image_size", "patch_size", "num_channels", "depths", "embed_dims", "backbone"})
_SOUNDS = {"num_codebooks", "audio_channels"}  # a decoder of sound alone: MusicGen's
_AUDIO = frozenset({"num_mel_bins", "conv_dim", "num_conv_pos_embeddings", "sampling_rate", "codebook_size"})


def directory_kind(checkpoint: Checkpoint) -> str:
    """A key of KINDS."""
    if checkpoint.no_files:
        return "memory"
    names, config = checkpoint.entries, checkpoint.value("config.json")
    pipeline = checkpoint.value("model_index.json")
    if pipeline is not None and "_class_name" in pipeline:
        return "pipeline"
    if checkpoint.tensors:
        if ADAPTER in names and not any(n.startswith("model") and n.endswith(".safetensors") for n in names):
            return "adapter"
        if config is None:
            return "state-dict"
        if _in_mlx_words(checkpoint, config):
            return "mlx"
        return "component" if "_diffusers_version" in config else _of_config(config)
    for kind, tails in (("gguf", (".gguf",)), ("onnx", (".onnx", ".onnx_data")), ("pickle", _PICKLES)):
        if any(n.endswith(tails) for n in names):
            return kind
    if ADAPTER in names:
        return "adapter"
    return "configuration" if config is not None else "other" if names else "empty"


def _in_mlx_words(checkpoint: Checkpoint, config: Mapping[str, Any]) -> bool:
    """Whether weights are MLX's: words of 32 bits under a weight's own name, and `quantization` in config.json. Biases,
    in the plural, are there in one of its modes alone.
    """
    return isinstance(config.get("quantization"), dict) and any(
        info.dtype.name == "U32" and name.endswith(".weight") for name, info in checkpoint.tensors.items()
    )


def _of_config(config: Mapping[str, Any]) -> str:
    """The kind of model that config.json describes."""
    stated = config.get("architectures")
    name = stated[0] if isinstance(stated, list) and stated and isinstance(stated[0], str) else ""
    if config.get("is_encoder_decoder") is True and not _DECODES.search(name):
        return "audio" if _AUDIO & config.keys() else "encoder-decoder"
    text = any(isinstance(config.get(key), dict) for key in TEXT_KEYS)
    if any(isinstance(config.get(key), dict) for key in _OTHER_SENSES) and (text or "vocab_size" in config):
        classes = _relatives(config, name)
        speaks = any(map(_SPEAKS.search, [name, *classes])) or not classes
        return "multimodal" if speaks else "two-encoders"
    if config.keys() >= _SOUNDS:
        return "audio"
    if _DECODES.search(name):
        return "decoder"
    if _AUDIO & config.keys() and not text:
        return "audio"
    if _VISION & config.keys() and "vocab_size" not in config and not text:
        return "vision"
    classes = _relatives(config, name)
    if "ForMaskedLM" in name or any(c.endswith("ForMaskedLM") for c in classes):
        return "encoder"
    if any(map(_DECODES.search, classes)):
        return "decoder"
    return "custom" if config.get("auto_map") else "unknown"


def _relatives(config: Mapping[str, Any], name: str) -> list[str]:
    """The classes of transformers' module that has the model_type, or without one the class `name`."""
    model_type = config.get("model_type")
    for types, classes in table("classes")["modules"].values():
        if model_type in types or (not model_type and name in classes):
            return classes
    return []


@fact("checkpoint", cost="header")
def kind(checkpoint, json_files) -> str:
    """What the directory is: a key of directory_kind.KINDS."""
    return directory_kind(checkpoint)
