"""Proof that a fix which changes shapes leaves the model's outputs as they were: logits before and after, on fixed
token ids.

The mathematics (padding with zeros: new channels of the first matrices meet zeros in the second) says "equal"; the
program that runs the model is transformers' own, on the CPU in float32, fed from the source and from the view through
the edits, so that what is proved is the file and not our idea of it. Longer sums may be added in another order, so
"equal to float32 rounding" is demanded, and equality to the bit is said where it holds.
"""

import os
import re
from typing import Literal

import numpy as np

from doctor.checkpoint.directory import Checkpoint
from doctor.checkpoint.special_numbers import with_numbers
from doctor.core.errors import DoctorError
from doctor.core.messages import Message, _, plural
from doctor.fixing.proof import PROOF_PROMPTS as PROMPTS
from doctor.fixing.proof import Proof

PROMPT_TOKENS = 16
# Float32 has 24 bits; sums over some 10^4 channels through some dozens of layers lose about 6 of them. Above: not
# rounding.
RELATIVE_TOLERANCE = 2.0**-16
TRUNCATED_LAYERS = 2
MEMORY_SHARE = 0.5  # of what is free: two models are never held at once, but loading holds a tensor twice
_LAYER = re.compile(r"\.(\d+)\.")


class CannotBuild(Exception):
    """No model can be made of this checkpoint here; `reason` says why."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


def prove(source: Checkpoint, view: Checkpoint) -> Proof:
    """Compare the logits of two states of a checkpoint. Never raises for a model that cannot be run: the proof is "not
    run".
    """
    try:
        layers = _layers_that_fit(view)
        before = logits(source, layers)
        # A vocabulary may have grown: its old part is compared.
        after = logits(view, layers, before.shape[-1])[..., : before.shape[-1]]
    except CannotBuild as error:
        return Proof("not run", error.reason)
    if not (np.isfinite(before).all() and np.isfinite(after).all()):
        detail = _(
            "logits are not finite ({before:,} before, {after:,} after)",
            before=int((~np.isfinite(before)).sum()),
            after=int((~np.isfinite(after)).sum()),
        )
        return Proof("not run", _of_layers(detail, layers))
    if before.shape != after.shape:
        detail = _("logits {before} before, {after} after", before=str(before.shape), after=str(after.shape))
        return Proof("differs", _of_layers(detail, layers), prompts=PROMPTS, blocks=layers)
    status: Literal["equal", "agrees", "differs"]
    difference, largest = float(np.abs(after - before).max()), float(np.abs(before).max())
    if difference == 0:
        status, detail = "equal", _("logits on {n} fixed prompts are equal to the bit", n=PROMPTS)
    else:
        status = "agrees" if difference <= RELATIVE_TOLERANCE * largest else "differs"
        detail = _(
            "logits on {n} fixed prompts differ by at most {difference:.2g}, the largest is {largest:.3g}",
            n=PROMPTS,
            difference=difference,
            largest=largest,
        )
    return Proof(status, _of_layers(detail, layers), difference, largest, PROMPTS, layers)


def _of_layers(detail: Message, layers: int | None) -> Message:
    """The same, with how much of the model it was about."""
    return detail if layers is None else _("{result}, first {n} decoder layers only", result=detail, n=layers)


def prompts(vocabulary: int) -> np.ndarray:
    """Token ids int64[PROMPTS, PROMPT_TOKENS], spread over the vocabulary and the same on every machine."""
    rows, columns = np.arange(PROMPTS)[:, None], np.arange(PROMPT_TOKENS)[None, :]
    return ((rows * 7919 + columns * 104729 + 11) % vocabulary).astype(np.int64)


def logits(checkpoint: Checkpoint, layers: int | None = None, vocabulary: int | None = None) -> np.ndarray:
    """Logits f32[PROMPTS, PROMPT_TOKENS, vocabulary] by transformers' model; `layers` keeps only the first decoder
    layers.

    vocabulary: draw the prompts from this many token ids; None for all rows of the embedding.

    Raises CannotBuild with the reason.
    """
    import torch

    model = _build(checkpoint, layers)
    with torch.inference_mode():
        ids = prompts(vocabulary or model.get_input_embeddings().weight.shape[0])
        result = model(input_ids=torch.from_numpy(ids), use_cache=False).logits
    return result.float().numpy()


def _build(checkpoint: Checkpoint, layers: int | None):
    import torch
    import transformers
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    document = dict(checkpoint.value("config.json") or {})
    kind = document.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise CannotBuild(
            _("transformers {version} has no model of type {kind}", version=transformers.__version__, kind=repr(kind))
        )
    if "auto_map" in document:
        document.pop("auto_map")  # code of the checkpoint is never run; the library's own class of this type is used
    level, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        config = CONFIG_MAPPING[kind].from_dict(with_numbers(_shortened(document, layers)))
        config._attn_implementation = "eager"
        state = {name: _tensor(checkpoint, name) for name in checkpoint.tensors if _wanted(name, layers)}
        config_class = AutoModelForCausalLM._model_mapping[type(config)]
        model, said = config_class.from_pretrained(
            None, config=config, state_dict=state, dtype=torch.float32, output_loading_info=True
        )
    except DoctorError as error:
        raise CannotBuild(error.message) from None
    except Exception as error:  # whatever the library raises for a config it does not like is the reason
        raise CannotBuild(
            _(
                "transformers {version} cannot build {kind}: {error}",
                version=transformers.__version__,
                kind=kind,
                error=f"{type(error).__name__}: {str(error)[:200]}",
            )
        ) from error
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()
    lost = sorted(said["missing_keys"]) + sorted(map(str, said["mismatched_keys"]))
    if lost:
        raise CannotBuild(
            plural(
                "transformers {version} finds no fitting tensor for {first}",
                "transformers {version} finds no fitting tensor for {first} and {more} more",
                len(lost),
                version=transformers.__version__,
                first=lost[0],
                more=len(lost) - 1,
            )
        )
    return model.eval()


def _tensor(checkpoint: Checkpoint, name: str):
    """One tensor in float32, as torch sees its codes."""
    import torch

    dtype = checkpoint.tensors[name].dtype
    if dtype.torch is None:
        raise CannotBuild(_("{tensor}: torch has no {dtype}", tensor=name, dtype=dtype.name))
    codes = torch.from_numpy(np.array(checkpoint.load(name)))
    if dtype.is_float and codes.dtype not in (torch.float32, torch.float64):
        codes = codes.view(getattr(torch, dtype.torch))
    return codes.float() if dtype.is_float else codes


def _wanted(name: str, layers: int | None) -> bool:
    number = _LAYER.search(name)
    return layers is None or number is None or int(number[1]) < layers


def _shortened(document: dict, layers: int | None) -> dict:
    if layers is None:
        return document
    keys = [k for k in ("num_hidden_layers", "n_layer", "num_layers", "n_layers") if k in document]
    if not keys:
        raise CannotBuild(
            _("config.json names no number of decoder layers, and the whole model does not fit in memory")
        )
    whole = document[keys[0]]
    short = {k: v[:layers] if isinstance(v, list) and len(v) == whole else v for k, v in document.items()}
    return short | {k: layers for k in keys}


def _layers_that_fit(view: Checkpoint) -> int | None:
    """None where the whole model fits in memory in float32, else how many first layers are compared."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * MEMORY_SHARE
    if _need(view, None) <= free:
        return None
    if _need(view, TRUNCATED_LAYERS) <= free:
        return TRUNCATED_LAYERS
    raise CannotBuild(
        _(
            "{n} decoder layers and the embeddings need {need:.1f} GiB in float32, {free:.1f} GiB may be used",
            n=TRUNCATED_LAYERS,
            need=_need(view, TRUNCATED_LAYERS) / 2**30,
            free=free / 2**30,
        )
    )


def _need(checkpoint: Checkpoint, layers: int | None) -> int:
    """Bytes of the tensors in float32."""
    return sum(4 * info.numel for name, info in checkpoint.tensors.items() if _wanted(name, layers))
