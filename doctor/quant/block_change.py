"""Blocks of llama.cpp's types under other float16 scales: every code and every 6-bit factor stays.

A run that writes GGUF holds a change for each block, and not its words: words are changed as they are written.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from doctor.checkpoint.ggml_types import GgmlType

# Where a block keeps its float16 scale, and that of its minima (ggml-org/llama.cpp ggml/src/ggml-common.h).
HEADS = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
}
_MOST = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class BlockChange:
    """What becomes of the words of one linear. change f32[n, blocks or twice as many]: each scale is multiplied by 1 +
    that; the scales of all blocks, then those of their minima where the type has them.
    """

    kind: GgmlType
    change: torch.Tensor

    def cpu(self) -> BlockChange:
        return BlockChange(self.kind, self.change.cpu())

    def of(self, words: torch.Tensor, begin: int = 0) -> torch.Tensor:
        """The new words u8[rows, bytes of a row] of rows begin and on."""
        n, blocks = len(words), words.shape[1] // self.kind.nbytes
        new = words.clone().reshape(n, blocks, self.kind.nbytes)
        parts = self.change[begin : begin + n].split(blocks, 1)
        for at, part in zip(HEADS[self.kind.name], parts, strict=True):
            new[..., at : at + 2] = changed(head_of(words, self.kind, at), part)[..., None].view(torch.uint8)
        return new.reshape(words.shape)


NewValue = torch.Tensor | BlockChange  # of a tensor that tuning changes


def head_of(words: torch.Tensor, kind: GgmlType, at: int) -> torch.Tensor:
    """f16[n, blocks] that stands at this byte of each block of words u8[n, bytes of a row]."""
    blocks = words.reshape(len(words), -1, kind.nbytes)
    return blocks[..., at : at + 2].contiguous().view(torch.float16)[..., 0]


def changed(head: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """head f16 times 1 + change f32, in float16; it stays finite."""
    return (head.to(torch.float32) * (1 + change)).clamp_(-_MOST, _MOST).to(torch.float16)
