"""Solved codes to the tensors of the recipe's format, and back to the weights that an engine computes with.

How a format packs is its own affair (doctor/formats); what this file adds are the CUDA kernels, which formats use for
tensors on a GPU once they were handed over here.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from doctor.core.recipe import Recipe
from doctor.formats.bits import use_kernels
from doctor.formats.grid import Grid
from doctor.formats.registry import format_of
from doctor.quant.solve import cuda

use_kernels(cuda)


def pack_linear(
    name: str, codes: torch.Tensor, grid: Grid, g_idx: torch.Tensor, recipe: Recipe
) -> dict[str, torch.Tensor]:
    """Tensors by full name of one quantized linear: codes u8[n, k], their grid and g_idx i32[k]."""
    parts = format_of(recipe).pack(codes, grid, g_idx, recipe.scheme)
    return {f"{name}.{part}": tensor for part, tensor in parts.items()}


def unpack_linear(
    name: str, tensors: Mapping[str, torch.Tensor], recipe: Recipe, shape: tuple[int, int] | None = None
) -> torch.Tensor:
    """W f32[n, k] that an engine computes from what pack_linear made. shape: [n, k], where the parts do not say it."""
    form = format_of(recipe)
    names = form.part_names or [n.removeprefix(f"{name}.") for n in tensors if n.startswith(f"{name}.")]
    parts = {part: tensors[f"{name}.{part}"] for part in names if f"{name}.{part}" in tensors}
    return form.unpack(parts, recipe.scheme, shape)
