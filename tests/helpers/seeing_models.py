"""Tiny models that see or hear with a processor of transformers' own beside them, and conversations about files.

Only Pillow is needed: processors are built of parts without the one for videos.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from tiny_classes import CLASSES, save_class

QWEN = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
IDEFICS = ("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
GEMMA = ("<image_soft_token>", "<start_of_image>", "<end_of_image>")


class Sight(NamedTuple):
    """processor, images: classes. tokens: special ones, the image's first. mark: what the chat template writes for an
    image. ids: keys of config.json for tokens, by their place. options: of the image processor; own: of the processor.
    """

    processor: str
    images: str
    tokens: tuple[str, ...]
    mark: str
    ids: Mapping[str, int]
    options: Mapping[str, Any] = MappingProxyType({})
    own: Mapping[str, Any] = MappingProxyType({})
    named: Mapping[str, int] = MappingProxyType({})  # attributes of the tokenizer, by place


QWEN_IDS = {"image_token_id": 0, "video_token_id": 1, "vision_start_token_id": 2, "vision_end_token_id": 3}
QWEN_MARK = "<|vision_start|><|image_pad|><|vision_end|>"
PATCHES = {"patch_size": 16, "merge_size": 2, "min_pixels": 32 * 32, "max_pixels": 64 * 64}
SMALL = {"size": {"height": 32, "width": 32}}
EDGES = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 32}, "do_image_splitting": False}
SIGHTS = {
    "Qwen2.5-VL": Sight("Qwen2_5_VLProcessor", "Qwen2VLImageProcessorPil", QWEN, QWEN_MARK, QWEN_IDS, PATCHES),
    "Qwen3-VL": Sight("Qwen3VLProcessor", "Qwen2VLImageProcessorPil", QWEN, QWEN_MARK, QWEN_IDS, PATCHES),
    "Gemma3": Sight(
        "Gemma3Processor",
        "Gemma3ImageProcessorPil",
        GEMMA,
        "<start_of_image>",
        {"image_token_index": 0, "image_token_id": 0, "boi_token_index": 1, "eoi_token_index": 2},
        SMALL,
        {"image_seq_length": 4},
        {"image_token": 0, "boi_token": 1, "eoi_token": 2},
    ),
    "LLaVA": Sight(
        "LlavaProcessor",
        "CLIPImageProcessorPil",
        ("<image>",),
        "<image>",
        {"image_token_index": 0, "image_token_id": 0},
        {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}},
        {"patch_size": 16, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
    ),
    "Idefics3": Sight(
        "Idefics3Processor",
        "Idefics3ImageProcessorPil",
        IDEFICS,
        "<image>",
        {"image_token_id": 0},
        EDGES,
        {"image_seq_len": 1},
    ),
}  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}{% for c in m.content %}{% if c.type == 'image' %}MARK{% else %}{{ c.text }}"
    "{% endif %}{% endfor %}{% endfor %}"
)


@contextmanager
def videos_are_not_asked_for() -> Iterator[None]:
    """transformers demands a processor for videos too, whose library torchvision is not needed here."""
    from transformers import processing_utils

    known = processing_utils.ProcessorMixin.check_argument_for_proper_class
    patched = lambda self, name, argument: None if argument is None else known(self, name, argument)  # noqa: E731
    processing_utils.ProcessorMixin.check_argument_for_proper_class = patched
    try:
        yield
    finally:
        processing_utils.ProcessorMixin.check_argument_for_proper_class = known


def save_seeing(name: str, folder: Path, dtype: str = "bfloat16") -> Path:
    """A tiny vision model of CLASSES whose tokenizer knows its image tokens, with its processor's files."""
    import transformers
    from transformers import AutoTokenizer

    sight, row = SIGHTS[name], CLASSES[name]
    config = {**row.config, **{key: 96 + place for key, place in sight.ids.items()}}
    text = {**config.get("text_config", {}), "vocab_size": 128}
    save_class(row._replace(config={**config, "text_config": text}), folder, dtype)
    tokenizer = AutoTokenizer.from_pretrained(
        folder, extra_special_tokens={attribute: sight.tokens[place] for attribute, place in sight.named.items()}
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(sight.tokens)})
    tokenizer.chat_template = TEMPLATE.replace("MARK", sight.mark)
    images = getattr(transformers, sight.images)(**sight.options)
    if sight.tokens == QWEN:  # its processor cannot be saved without the part for videos
        tokenizer.save_pretrained(folder)
        images.save_pretrained(folder)
        path = folder / "preprocessor_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "processor_class": sight.processor}))
        return folder
    template = tokenizer.chat_template
    known = getattr(transformers, sight.processor)
    known(image_processor=images, tokenizer=tokenizer, chat_template=template, **sight.own).save_pretrained(folder)
    return folder


def save_hearing(folder: Path, dtype: str = "bfloat16") -> Path:
    """A tiny Qwen2-Audio that hears two seconds, its tokenizer with tokens for sound, and its processor's files."""
    import transformers
    from transformers import AutoTokenizer

    config = {
        "audio_token_index": 96,
        "text_config": {"vocab_size": 128},
        "audio_config": {"max_source_positions": 100},
    }
    save_class(CLASSES["Qwen2-Audio"]._replace(config=config), folder, dtype)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"]})
    ears = transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=2)
    template = TEMPLATE.replace("image", "audio").replace("MARK", "<|audio_bos|><|AUDIO|><|audio_eos|>")
    transformers.Qwen2AudioProcessor(ears, tokenizer, chat_template=template).save_pretrained(folder)
    return folder


def sounds(folder: Path, count: int) -> Path:
    """A .jsonl of conversations about sounds of a second at 16 kHz, which are in the folder too."""
    import wave

    import numpy as np

    rng, rows = np.random.default_rng(0), []
    for number in range(count):
        with wave.open(str(folder / f"{number}.wav"), "wb") as file:
            file.setparams((1, 2, 16000, 0, "NONE", ""))
            file.writeframes(rng.integers(-9000, 9000, 16000).astype(np.int16).tobytes())
        words = " ".join(str(x) for x in rng.integers(10, 99, 12))
        content = [{"type": "text", "text": words}, {"type": "audio", "audio": f"{number}.wav"}]
        rows.append(json.dumps({"messages": [{"role": "user", "content": content}]}))
    path = folder / "heard.jsonl"
    path.write_text("\n".join(rows))
    return path


def conversations(folder: Path, count: int = 6) -> Path:
    """A .jsonl of conversations about images, which are in the folder too."""
    import numpy as np
    from PIL import Image

    rng, rows = np.random.default_rng(0), []
    for number in range(count):
        Image.fromarray(rng.integers(0, 256, (40, 48, 3), np.uint8)).save(folder / f"{number}.png")
        words = " ".join(str(x) for x in rng.integers(10, 99, 12))
        content = [
            {"type": "text", "text": words},
            {"type": "image", "image": f"{number}.png"},
            {"type": "text", "text": words[::-1]},
        ]
        rows.append(json.dumps({"messages": [{"role": "user", "content": content}]}))
    path = folder / "seen.jsonl"
    path.write_text("\n".join(rows))
    return path
