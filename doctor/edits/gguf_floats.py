"""A GGUF model seen as the floating-point checkpoint that transformers computes with: one weight file, config.json and
the tokenizer's files, made of the file's tensors and metadata. Nothing is written.

A wrong permutation or base frequency in the file therefore shows as a wrong model. Blocks are decoded in float32, in
llama.cpp's order, and rounded once to the dtype of the view. The directory's other files are not part of it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from doctor.checkpoint.codecs import nonfinite_mask, to_codes
from doctor.checkpoint.directory import Checkpoint, Entry, JsonFile
from doctor.checkpoint.dtypes import stored_float
from doctor.checkpoint.gguf import GgufModel, GgufTensor
from doctor.checkpoint.safetensors import Shard, ShardFile, TensorInfo
from doctor.core.errors import BadCheckpoint, PlanRefused
from doctor.core.messages import Message, _, listed
from doctor.core.recipe import Scheme
from doctor.edits.arithmetic import new_info
from doctor.edits.kinds import DecodeGguf, Edit
from doctor.edits.overlay import EditedCheckpoint
from doctor.edits.shard_layout import EditedFile, PlannedTensor, lay_out
from doctor.edits.stored import Decoding, Stored
from doctor.formats.ggml_blocks import can_decode, decode
from doctor.formats.registry import KNOWN
from doctor.model.gguf_names import ROPE_FREQS, Architecture, architecture_in, config_of, unpermuted_rows
from doctor.model.gguf_tokenizer_json import as_text, special_ids, tokenizer_documents

WEIGHTS = "model.safetensors"
_SLAB_BYTES = 8 << 20  # of blocks decoded at once
_GROUPS = {"Q6_K": 16, "Q2_K": 16, "Q3_K": 16}  # elements that share a scale, where they are not 32
_TOKENIZERS: WeakKeyDictionary[Checkpoint, dict[str, bytes]] = WeakKeyDictionary()  # of models that are still open
_ASYMMETRIC = ("Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K")


class GgufAsFloats(EditedCheckpoint):
    """The one GGUF model of `source` as a checkpoint of plain tensors in `dtype`.

    tokenizer: whether to make its files, which takes seconds where there are many tokens. without_tokenizer: why there
    are none, "" where there are. Raises BadCheckpoint for several models,
    and for one that is broken or of an architecture or a type that is not read.
    """

    carries_folders = False

    def __init__(self, source: Checkpoint, dtype: str = "F32", tokenizer: bool = True):
        super().__init__(source)
        self.model, self.only, self.gguf = _only_model(source), None, ()
        self.edits = (DecodeGguf(self.model.name, dtype),)
        self.dtype = dtype
        self.without_tokenizer: Message | str = ""
        rope = self.model.tensors.get(ROPE_FREQS)
        config = config_of(self.model, None if rope is None else _decoded(source, rope).reshape(-1).tolist())
        known = architecture_in(self.model)
        assert known is not None  # config_of() found it
        self.stored = _stored(self.model, known)
        self.json, self.entries, self.problems = {}, {}, []
        config |= {"torch_dtype": stored_float(dtype), **special_ids(self.model.metadata)}
        self._put("config.json", (json.dumps(config, indent=2) + "\n").encode())
        if tokenizer:
            self._put_tokenizer()
        self._place(known, config)
        self.changed = set(self.entries)

    @property
    def name(self) -> str:
        return self.source.name

    def _put(self, name: str, raw: bytes) -> None:
        self.json[name], self.entries[name] = JsonFile(name, raw), Entry(name, len(raw))

    def _put_tokenizer(self) -> None:
        try:
            documents = _TOKENIZERS.get(self.source)
            if documents is None:
                made = tokenizer_documents(self.model.metadata, self.model.name)
                documents = {name: as_text(document) for name, document in made.items()}
                _TOKENIZERS[self.source] = documents
        except BadCheckpoint as error:
            self.without_tokenizer = error.message
            return
        for name, raw in documents.items():
            self._put(name, raw)

    def _place(self, known: Architecture, config: dict[str, Any]) -> None:
        """The weight file."""
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        planned = []
        for name, tensor in self.stored.items():
            values = _Values(
                self.source,
                tensor,
                new_info(name, self.dtype, tensor.shape)._replace(shard=WEIGHTS),
                known.heads_of(name, heads, kv_heads),
                known.shift_of(name),
            )
            planned.append(PlannedTensor(values.info, values.info, self.edits, values))
        self.shards[WEIGHTS], self.pieces[WEIGHTS] = lay_out(Shard(WEIGHTS, 0, 0), planned)
        self.entries[WEIGHTS] = Entry(WEIGHTS, self.shards[WEIGHTS].size)

    def path(self, name: str) -> Path:
        raise BadCheckpoint(_("{file}: is not on disk; it is made of {source}.", file=name, source=self.model.name))

    def open_file(self, shard: str) -> ShardFile:
        return EditedFile(self.source.path(self.model.files[0].name), shard, self.pieces[shard])

    @property
    def decoding(self) -> Decoding:
        """How the linears inside decoder layers are stored, for what judges a second rounding."""
        found = [
            Stored(_info(tensor), name, tensor.shape, KNOWN["gguf"], _scheme(tensor))
            for name, tensor in self.stored.items()
            if tensor.name.startswith("blk.") and _in_blocks(tensor)
        ]
        return Decoding(tuple(found), self.edits, self.dtype, self.notes)

    @property
    def notes(self) -> tuple[Message, ...]:
        """What a copy of this view lacks."""
        return (_("without a tokenizer: {reason}", reason=self.without_tokenizer),) if self.without_tokenizer else ()


@dataclass
class _Values:
    """One tensor by leading rows, in transformers' order of rows. heads: by how many its rows are permuted, 0 for none.
    shift: what the file added to its values.
    """

    source: Checkpoint
    tensor: GgufTensor
    info: TensorInfo
    heads: int
    shift: float

    def rows(self, begin: int, end: int) -> np.ndarray:
        """Codes of rows [begin, end). Raises PlanRefused where the dtype does not hold a finite value."""
        if len(self.tensor.shape) < 2:
            values = _decoded(self.source, self.tensor).reshape(-1)
            values = (unpermuted_rows(values, self.heads) if self.heads else values)[begin:end]
        else:
            head = self.tensor.shape[0] // self.heads if self.heads else 1  # rows that are permuted together
            first, last = begin // head * head, -(-end // head) * head
            values = _decoded(self.source, self.tensor, first, last)
            if self.heads:
                values = unpermuted_rows(values, (last - first) // head)
            values = values[begin - first : end - first]
        values = np.ascontiguousarray(values - np.float32(self.shift) if self.shift else values)
        codes = to_codes(values, self.info.dtype.name)
        lost = int((nonfinite_mask(codes, self.info.dtype.name) & np.isfinite(values)).sum())
        if lost:
            raise PlanRefused(
                _(
                    "{tensor}: {count:,} values are too large for {dtype}.",
                    tensor=self.info.name,
                    count=lost,
                    dtype=self.info.dtype.name,
                ),
                _("Write bf16."),
            )
        return codes


def _decoded(source: Checkpoint, tensor: GgufTensor, first: int = 0, last: int | None = None) -> np.ndarray:
    """f32[last - first, ...]: leading rows of a tensor, as the file orders them."""
    assert tensor.type is not None  # the model is whole
    width = tensor.shape[-1] if tensor.shape else 1
    inner = math.prod(tensor.shape[1:-1])  # rows of the last axis in a leading row
    count = (tensor.shape[0] if len(tensor.shape) > 1 else 1) * inner
    first, last = first * inner, count if last is None else last * inner
    row = width // tensor.type.block * tensor.type.nbytes
    step = max(_SLAB_BYTES // max(row, 1), 1)
    values = np.empty((last - first, width), np.float32)
    with source.open_file(tensor.file) as file:
        for at in range(first, last, step):
            raw = np.empty((min(step, last - at), row), np.uint8)
            file.read_into(tensor.begin + at * row, raw.reshape(-1).data)
            values[at - first : at - first + len(raw)] = decode(raw, tensor.type, width)
    return values.reshape(-1, *tensor.shape[1:])


def _only_model(source: Checkpoint) -> GgufModel:
    if len(source.gguf) != 1:
        raise BadCheckpoint(
            _(
                "{root}: holds {n} GGUF models: {names}.",
                root=str(source.root),
                n=len(source.gguf),
                names=listed(model.name for model in source.gguf),
            ),
            _("Give one of the files."),
        )
    model = source.gguf[0]
    if not model.whole:
        raise BadCheckpoint(_("{file}: is broken or not whole.", file=model.name), _("Run `doctor check` on it."))
    unread = sorted({t.type.name for t in model.tensors.values() if t.type is not None and not can_decode(t.type)})
    if unread:
        raise BadCheckpoint(
            _(
                "{file}: holds tensors of type {types}, which are not decoded here.",
                file=model.name,
                types=listed(unread),
            ),
            _("Install the package gguf, which decodes more types: pip install gguf"),
        )
    return model


def _stored(model: GgufModel, known: Architecture) -> dict[str, GgufTensor]:
    """transformers' name -> the tensor in the file, or that part of a stack. Raises BadCheckpoint for one that has no
    place in the model.
    """
    found = {}
    for tensor in model.tensors.values():
        experts = tensor.shape[0] if len(tensor.shape) == 3 else 0
        names = known.names_of(tensor.name, experts)
        if not names and tensor.name != ROPE_FREQS:
            raise BadCheckpoint(
                _(
                    "{file}: tensor {name} has no place in {architecture}.",
                    file=model.name,
                    name=tensor.name,
                    architecture=known.transformers_class,
                )
            )
        if experts:
            size = tensor.nbytes // experts
            for i, name in enumerate(names):
                found[name] = tensor._replace(shape=tensor.shape[1:], begin=tensor.begin + i * size)
        elif names:  # a gate of one row is stored without that axis
            flat = len(tensor.shape) == 1 and names[0].endswith("shared_expert_gate.weight")
            found[names[0]] = tensor._replace(shape=(1, *tensor.shape)) if flat else tensor
    return found


def _in_blocks(tensor: GgufTensor) -> bool:
    return tensor.type is not None and not tensor.type.is_float and len(tensor.shape) > 1


def _info(tensor: GgufTensor) -> TensorInfo:
    return new_info(tensor.name, "U8", (tensor.nbytes,))._replace(shard=tensor.file)


def _scheme(tensor: GgufTensor) -> Scheme:
    """What a type is as a grid of integers: its bits, the elements of a scale, and whether it has minima."""
    assert tensor.type is not None
    name = tensor.type.name
    bits = next(int(letter) for letter in name if letter.isdigit())
    return Scheme(bits, _GROUPS.get(name, 32), name not in _ASYMMETRIC)


def opened_from(checkpoint: Checkpoint) -> Path:
    """What another process opens to see this checkpoint, or what it is made of: a directory, or a GGUF model's first
    file.
    """
    source = checkpoint.source if isinstance(checkpoint, GgufAsFloats) else checkpoint
    return source.path(source.gguf[0].files[0].name) if source.gguf else source.root


def read_through(source: Checkpoint, edits: Sequence[Edit]) -> EditedCheckpoint:
    """`source` as it will be after `edits`, which may decode a GGUF model."""
    how = next((edit for edit in edits if isinstance(edit, DecodeGguf)), None)
    return EditedCheckpoint(source, edits) if how is None else GgufAsFloats(source, how.dtype)
