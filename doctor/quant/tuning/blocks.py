"""Tuning of linears in llama.cpp's blocks, as the parts of a run that writes GGUF hold them.

Codes stay, and so do the 6-bit factors of K types. What changes are the float16 numbers of a block of 32 or 256
weights: the scale, of which its weights are multiples, and in some types that of the minima, which are added to runs
of 32.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from doctor.checkpoint.directory import Checkpoint
from doctor.checkpoint.dtypes import DTYPES
from doctor.checkpoint.ggml_types import GgmlType
from doctor.checkpoint.safetensors import TensorInfo
from doctor.formats.ggml_blocks import decode
from doctor.quant.block_change import HEADS, BlockChange, changed, head_of
from doctor.quant.dequantize import FloatView
from doctor.quant.gguf_output import IMPORTANCE, source_of
from doctor.quant.tuning.parameters import Scales

RUN = 32  # weights that share a minimum


@dataclass(frozen=True, kw_only=True)
class BlockScales(Scales):
    """The float16 scales of one linear's blocks. scale is 1, f32[n, blocks or twice as many]: of all blocks' scales,
    then of their minima's where the type has those. heads f16, alike: what is stored.

    levels f32[n, k + k / RUN]: weights without minima, then the minimum of each run; of types without minima f32[n, k],
    the weights.
    """

    heads: torch.Tensor
    kind: GgmlType

    @classmethod
    def of(cls, tensor: str, words: torch.Tensor, kind: GgmlType, device: torch.device | str) -> BlockScales:
        """The scales of words u8[n, bytes of a row], on the device."""
        heads = torch.cat([head_of(words, kind, at) for at in HEADS[kind.name]], 1).to(device)
        bits = 8 * kind.nbytes // kind.block
        scale = torch.ones_like(heads, dtype=torch.float32)
        return cls(tensor=tensor, scale=scale, bits=bits, heads=heads, kind=kind)

    def weight(self, change: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
        of_scale, *of_low = (1 + change).split(self._blocks, 1)
        width = self._blocks * self.kind.block
        W = of_scale.repeat_interleave(self.kind.block, 1).mul_(levels[:, :width])
        for factor in of_low:
            low = factor.repeat_interleave(self.kind.block // RUN, 1).mul_(levels[:, width:])
            W.view(len(W), -1, RUN).add_(low[..., None])
        return W

    def gradient(self, slope: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
        n, width = slope.shape
        runs = slope.view(n, -1, RUN).sum(-1)  # before slope is overwritten
        found = [slope.mul_(levels[:, :width]).view(n, self._blocks, -1).sum(-1)]
        if levels.shape[1] > width:
            found.append(runs.mul_(levels[:, width:]).view(n, self._blocks, -1).sum(-1))
        return torch.cat(found, 1)

    def stored(self, change: torch.Tensor) -> BlockChange:
        """What becomes of the words that are stored."""
        return BlockChange(self.kind, change)

    def rounded(self, change: torch.Tensor) -> torch.Tensor:
        head, new = self.heads.to(torch.float32), changed(self.heads, change).to(torch.float32)
        return torch.where(head != 0, new / head - 1, 0.0)

    @property
    def _blocks(self) -> int:
        """Of a row."""
        return self.scale.shape[1] // len(HEADS[self.kind.name])


def levels_of(words: torch.Tensor, kind: GgmlType) -> torch.Tensor:
    """What the weights of words u8[n, bytes of a row] are made of, f32, as BlockScales says."""
    width = words.shape[1] // kind.nbytes * kind.block
    parts: list[torch.Tensor] = []
    for at in HEADS[kind.name]:
        alone = words.reshape(len(words), -1, kind.nbytes).clone()
        for other in HEADS[kind.name]:
            if other != at:
                alone[..., other : other + 2] = 0
        values = decode(alone.reshape(words.shape).numpy(), kind, width)
        parts.append(torch.from_numpy((values[:, ::RUN] if parts else values).copy()))
    return torch.cat(parts, 1)


class BlockParts(FloatView):
    """A view of the parts of a run that writes GGUF: `.weight` in place of words."""

    def __init__(self, source: Checkpoint):
        super().__init__(source)
        self.tensors: dict[str, TensorInfo] = {}
        self._packed: dict[str, tuple[TensorInfo, GgmlType]] = {}
        for info in source.tensors.values():
            name, kind = source_of(info.name)
            if kind is not None:
                shape = (info.shape[0], info.shape[1] // kind.nbytes * kind.block)
                self._packed[name] = info, kind
                self.tensors[name] = info._replace(name=name, dtype=DTYPES["F32"], shape=shape)
            elif not name.endswith(f".{IMPORTANCE}"):
                self.tensors[name] = info
        self.modules = sorted(name.removesuffix(".weight") for name in self._packed)

    @staticmethod
    def are(checkpoint: Checkpoint) -> bool:
        """Whether a checkpoint is such parts."""
        return any(source_of(name)[1] is not None for name in checkpoint.tensors)

    def load(self, name: str) -> np.ndarray:
        """Codes of a stored tensor; float32 values of a weight in blocks [out_features, in_features]."""
        if name not in self._packed:
            return self.source.load(name)
        info, kind = self._packed[name]
        return decode(self.source.load(info.name), kind, self.tensors[name].shape[1])

    def load_on(self, name: str, device: torch.device | str) -> torch.Tensor | None:
        """f32[out_features, in_features] of a weight in blocks; None for a stored tensor that is not lent."""
        if name in self.lent:
            return self.lent[name].to(device)
        return torch.from_numpy(self.load(name)).to(device) if name in self._packed else None

    def codes(self, module: str, device: torch.device | str) -> tuple[torch.Tensor, Scales]:
        """(levels, scales of its blocks) of a linear."""
        info, kind = self._packed[f"{module}.weight"]
        words = torch.from_numpy(np.array(self.source.load(info.name)))
        return levels_of(words, kind).to(device), BlockScales.of(info.name, words, kind, device)
