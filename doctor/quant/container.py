"""The recipe as a run takes it: with the bits that a mixture gives single linears, and refused where the container
cannot hold the model.
"""

from __future__ import annotations

import os

from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import PlanRefused
from doctor.core.messages import _
from doctor.core.recipe import Recipe, is_kept
from doctor.formats.registry import format_of
from doctor.model.gguf_names import unwritable
from doctor.model.gguf_tokenizer import tokenizer_metadata
from doctor.model.spec import ModelSpec, build_spec
from doctor.plan.mixture import with_mixture
from doctor.quant.calibration.tokenizer import encoder
from doctor.quant.distributed import size
from doctor.quant.solve import ggml


def prepared(checkpoint: Checkpoint, recipe: Recipe) -> Recipe:
    """The recipe as a run takes it. Raises PlanRefused for what the container cannot hold, before any work."""
    if not format_of(recipe).in_blocks:
        return recipe
    config = checkpoint.value("config.json")
    if config is None:
        return recipe
    reason = unwritable(config)
    if reason:
        raise PlanRefused(_("config.json: {reason}.", reason=reason), _("Choose another --scheme, or --format."))
    if not ggml.usable():
        raise PlanRefused(
            _("the native library is absent or turned off: types of GGUF are computed in it."),
            _("Reinstall the package where gcc or clang is, or unset DOCTOR_NATIVE."),
        )
    if size() > 1:
        raise PlanRefused(
            _("GGUF is written by one process, and {n} were started.", n=size()), _("Start it without torchrun.")
        )
    spec = build_spec(config, checkpoint.tensors)
    embedding = checkpoint.tensors.get(spec.embed_tensor or "")
    if embedding is not None:  # a tokenizer that cannot be written is refused before the first layer, too
        tokenizer_metadata(checkpoint, embedding.shape[0], encoder(checkpoint))
    recipe = with_mixture(recipe, spec)
    _require_whole_stacks(recipe, spec)
    return recipe


def _require_whole_stacks(recipe: Recipe, spec: ModelSpec) -> None:
    """Raises PlanRefused where the experts of a layer would not have one type: they are one tensor of the file."""
    found: dict[tuple[int | None, str], tuple[str, int]] = {}
    for linear in spec.linears:
        if linear.expert is not None:
            bits = 0 if is_kept(recipe, linear.name) else recipe.for_linear(linear.name).bits
            name, first = found.setdefault((linear.block, linear.role), (linear.name, bits))
            if bits != first:
                raise PlanRefused(
                    _(
                        "{linear}: would have {bits} bits and {other} {first}; in GGUF the experts of a layer are one "
                        "tensor.",
                        linear=linear.name,
                        bits=bits or 16,
                        other=name,
                        first=first or 16,
                    ),
                    _("Give a pattern that all of them match."),
                )


def require_importance(recipe: Recipe, imatrix: str | os.PathLike | None) -> None:
    """Raises PlanRefused where a run of this recipe measures no importance of columns for llama-quantize."""
    if imatrix is None:
        return
    if not format_of(recipe).in_blocks or not recipe.solver.calibrated:
        raise PlanRefused(
            _("--imatrix {file}: needs a calibrated run of a GGUF scheme.", file=os.fspath(imatrix)),
            _("Add --scheme Q4_K_M, say, without --for rtn."),
        )
    if os.path.exists(imatrix) or not os.path.isdir(os.path.dirname(os.path.abspath(imatrix))):
        raise PlanRefused(
            _("--imatrix {file}: exists already, or its directory does not.", file=os.fspath(imatrix)),
            _("Name a new file in a directory that exists."),
        )
