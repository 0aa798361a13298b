"""Calibration rows with images and sound: conversations that name files, through the checkpoint's own processor.

The processor is transformers' class of the name in the checkpoint's configs; code of a checkpoint is never run, and
nothing is fetched: an address of the web is refused. Each conversation is one row, whole: cutting it would part an
image from its places.
"""

from __future__ import annotations

import hashlib
import wave
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import BadCheckpoint, DoctorError
from doctor.core.lazy_numpy import np
from doctor.core.messages import _
from doctor.quant.calibration.tokenizer import TOKENIZER_FILES, directory_of

PROCESSOR_FILES = (
    *TOKENIZER_FILES,
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
)
KINDS = ("image", "audio")
IDS = "input_ids"


class SeenRow(list):
    """The ids of a row with images or sound, and `inputs`: all that the processor made of it, tensors by name."""

    def __init__(self, inputs: Mapping[str, Any]):
        super().__init__(inputs[IDS][0].tolist())
        self.inputs = dict(inputs)

    def __repr__(self) -> str:
        """What tells it from rows of the same ids with other images."""
        digest = hashlib.sha256()
        for name, value in sorted(self.inputs.items()):
            digest.update(name.encode() + value.contiguous().numpy().tobytes())
        return f"{list(self)} {digest.hexdigest()}"


def shows_more_than_text(messages: Iterable[Any]) -> bool:
    """Whether a conversation names an image or a sound."""
    return any(_kind(item) for message in messages for item in _items(message))


def seen_rows(checkpoint: Checkpoint, conversations: list[list], folder: Path, name: str, count: int) -> list[SeenRow]:
    """At most `count` rows of conversations with images or sound. folder: where their relative paths begin; name: what
    they were read from. Raises DoctorError, BadCheckpoint.
    """
    processor = _load_processor(checkpoint, name)
    rate = getattr(getattr(processor, "feature_extractor", None), "sampling_rate", None)
    found = []
    for messages in conversations[:count]:
        loaded = [_with_files(message, folder, name, rate) for message in messages]
        try:
            inputs = processor.apply_chat_template(loaded, tokenize=True, return_dict=True, return_tensors="pt")
        except Exception as error:  # whatever a processor raises for what it cannot take
            raise DoctorError(
                _(
                    "{name}: {processor} refuses a conversation: {why}",
                    name=name,
                    processor=type(processor).__name__,
                    why=_first(error),
                )
            ) from error
        found.append(SeenRow({key: value for key, value in inputs.items() if hasattr(value, "numel")}))
    return found


def _items(message: Any) -> Iterator[Mapping[str, Any]]:
    content = message.get("content") if isinstance(message, Mapping) else None
    for item in content if isinstance(content, list) else ():
        if isinstance(item, Mapping):
            yield item


def _kind(item: Mapping[str, Any]) -> str:
    return next((kind for kind in KINDS if str(item.get("type", "")).startswith((kind, f"input_{kind}"))), "")


def _with_files(message: Any, folder: Path, name: str, rate: int | None) -> Any:
    """A message with its images and sounds loaded."""
    if not isinstance(message, Mapping) or not isinstance(message.get("content"), list):
        text = message.get("content") if isinstance(message, Mapping) else None
        return {**message, "content": [{"type": "text", "text": text}]} if isinstance(text, str) else message
    content = []
    for item in message["content"]:
        kind = _kind(item) if isinstance(item, Mapping) else ""
        if not kind:
            content.append(item)
            continue
        path = _path(item, kind, folder, name)
        content.append({"type": kind, kind: _image(path) if kind == "image" else read_sound(path, rate)})
    return {**message, "content": content}


def _path(item: Mapping[str, Any], kind: str, folder: Path, name: str) -> Path:
    given = next((item[key] for key in (kind, f"{kind}_url", "path", "url") if item.get(key)), None)
    given = given.get("url") if isinstance(given, Mapping) else given
    if not isinstance(given, str):
        raise DoctorError(
            _(
                "{name}: an {kind} without a path; must be {example}.",
                name=name,
                kind=kind,
                example=f'{{"type": "{kind}", "{kind}": "FILE"}}',
            )
        )
    if "://" in given or given.startswith("data:"):
        raise DoctorError(
            _("{name}: {address}: an address; must be the path of a file.", name=name, address=given[:80]),
            _("Download it first: nothing is fetched."),
        )
    return folder / given


def _image(path: Path) -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise DoctorError(
            _("{path}: reading images needs Pillow, which is not installed.", path=str(path)),
            _("Install it: pip install 'checkpoint-doctor[vision]'."),
        ) from None
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # broken images raise OSError, SyntaxError, ValueError, DecompressionBombError …
        raise DoctorError(_("{path}: not a readable image: {why}.", path=str(path), why=_first(error))) from None


def read_sound(path: Path, rate: int | None) -> Any:
    """f32[samples] between -1 and 1 of a 16-bit WAV file, its channels averaged."""
    try:
        with wave.open(str(path), "rb") as file:
            channels, width, own = file.getnchannels(), file.getsampwidth(), file.getframerate()
            raw = file.readframes(file.getnframes())
    except (OSError, EOFError, wave.Error) as error:
        raise DoctorError(_("{path}: not a readable WAV file: {why}.", path=str(path), why=_first(error))) from None
    if width != 2 or (rate is not None and own != rate):
        raise DoctorError(
            _(
                "{path}: {bits} bits at {own} Hz; must be 16 bits at {rate} Hz.",
                path=str(path),
                bits=8 * width,
                own=own,
                rate=rate or own,
            ),
            _("Convert it, for example with ffmpeg."),
        )
    return (np.frombuffer(raw, np.int16).reshape(-1, channels).mean(1) / 32768).astype(np.float32)


def _load_processor(checkpoint: Checkpoint, name: str) -> Any:
    """transformers' processor of the checkpoint. Raises BadCheckpoint where there is none."""
    from transformers import AutoProcessor

    with directory_of(checkpoint, PROCESSOR_FILES, "doctor-processor-") as folder:
        try:
            try:
                found = AutoProcessor.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            except ImportError:  # a part for videos, whose libraries images do not need
                found = _without_video(checkpoint, folder)
        except Exception as error:
            raise BadCheckpoint(
                _(
                    "{root}: its processor cannot be loaded for {text}: {why}.",
                    root=str(checkpoint.root),
                    text=name,
                    why=_first(error),
                ),
                _("Add the processor's files; pip install 'checkpoint-doctor[vision]' brings what images need."),
            ) from error
    if not hasattr(found, "image_processor") and not hasattr(found, "feature_extractor"):
        raise BadCheckpoint(
            _(
                "{root}: has a tokenizer and no processor; {text} has images or sound.",
                root=str(checkpoint.root),
                text=name,
            ),
            _("Calibrate on text, or add the model's preprocessor_config.json."),
        )
    return found


def _without_video(checkpoint: Checkpoint, folder: Path) -> Any:
    import transformers
    from transformers import AutoImageProcessor, AutoTokenizer

    stated = [checkpoint.value(file) or {} for file in PROCESSOR_FILES if file.endswith("config.json")]
    known = next(filter(None, (getattr(transformers, str(s.get("processor_class")), None) for s in stated)), None)
    if known is None:
        raise BadCheckpoint(_("no file names a processor class of transformers"))
    options = {"trust_remote_code": False, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    template = next((s["chat_template"] for s in stated if s.get("chat_template")), tokenizer.chat_template)
    return known(
        image_processor=AutoImageProcessor.from_pretrained(folder, **options),
        tokenizer=tokenizer,
        chat_template=template,
    )


def _first(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200].removesuffix(".")
