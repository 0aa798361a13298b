"""Proof that a fix which changes shapes leaves the model's outputs as they were: logits before and after, on fixed
token ids.

The mathematics (padding with zeros: new channels of the first matrices meet zeros in the second) says "equal"; the
program that runs the model is transformers' own, on the CPU in float32, fed from the source and from the view through
the edits, so that what is proved is the file and not our idea of it. Longer sums may be added in another order, so
"equal to float32 rounding" is demanded, and equality to the bit is said where it holds.
"""

import os
import re

import numpy as np

from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import DoctorError
from doctor.fixing.proof import PROOF_PROMPTS as PROMPTS
from doctor.fixing.proof import Proof

PROMPT_TOKENS = 16
# Float32 has 24 bits; sums over some 10^4 channels through some dozens of blocks lose about 6 of them. Above: not
# rounding.
RELATIVE_TOLERANCE = 2.0**-16
TRUNCATED_BLOCKS = 2
MEMORY_SHARE = 0.5  # of what is free: two models are never held at once, but loading holds a tensor twice
_BLOCK = re.compile(r"\.(\d+)\.")


class CannotBuild(Exception):
    """No model can be made of this checkpoint here; the text says why."""


def prove(source: Checkpoint, view: Checkpoint) -> Proof:
    """Compare the logits of two states of a checkpoint. Never raises for a model that cannot be run: the proof is "not
    run".
    """
    try:
        blocks = _blocks_that_fit(view)
        before = logits(source, blocks)
        after = logits(view, blocks, before.shape[-1])[
            ..., : before.shape[-1]
        ]  # a vocabulary may have grown: its old part is compared
    except CannotBuild as error:
        return Proof("not run", str(error))
    of = f", first {blocks} blocks only" if blocks is not None else ""
    if not (np.isfinite(before).all() and np.isfinite(after).all()):
        return Proof(
            "not run",
            f"logits are not finite ({(~np.isfinite(before)).sum():,} before, {(~np.isfinite(after)).sum():,} after){of}",
        )
    if before.shape != after.shape:
        return Proof(
            "differs",
            f"logits {list(before.shape)} before, {list(after.shape)} after{of}",
            prompts=PROMPTS,
            blocks=blocks,
        )
    difference, largest = float(np.abs(after - before).max()), float(np.abs(before).max())
    if difference == 0:
        status, detail = "equal", f"logits on {PROMPTS} fixed prompts are equal to the bit{of}"
    else:
        status = "agrees" if difference <= RELATIVE_TOLERANCE * largest else "differs"
        detail = (
            f"logits on {PROMPTS} fixed prompts differ by at most {difference:.2g}, the largest is {largest:.3g}{of}"
        )
    return Proof(status, detail, difference, largest, PROMPTS, blocks)


def prompts(vocabulary: int) -> np.ndarray:
    """Token ids int64[PROMPTS, PROMPT_TOKENS], spread over the vocabulary and the same on every machine."""
    rows, columns = np.arange(PROMPTS)[:, None], np.arange(PROMPT_TOKENS)[None, :]
    return ((rows * 7919 + columns * 104729 + 11) % vocabulary).astype(np.int64)


def logits(checkpoint: Checkpoint, blocks: int | None = None, vocabulary: int | None = None) -> np.ndarray:
    """Logits f32[PROMPTS, PROMPT_TOKENS, vocabulary] by transformers' model; `blocks` keeps only the first decoder
    blocks.

    vocabulary: draw the prompts from this many token ids; None for all rows of the embedding.

    Raises CannotBuild with the reason.
    """
    import torch

    model = _build(checkpoint, blocks)
    with torch.inference_mode():
        ids = prompts(vocabulary or model.get_input_embeddings().weight.shape[0])
        result = model(input_ids=torch.from_numpy(ids), use_cache=False).logits
    return result.float().numpy()


def _build(checkpoint: Checkpoint, blocks: int | None):
    import torch
    import transformers
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    document = dict(checkpoint.value("config.json") or {})
    kind = document.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise CannotBuild(f"transformers {transformers.__version__} has no model of type {kind!r}")
    if "auto_map" in document:
        document.pop("auto_map")  # code of the checkpoint is never run; the library's own class of this type is used
    level, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        config = CONFIG_MAPPING[kind].from_dict(_shortened(document, blocks))
        config._attn_implementation = "eager"
        state = {name: _tensor(checkpoint, name) for name in checkpoint.tensors if _wanted(name, blocks)}
        config_class = AutoModelForCausalLM._model_mapping[type(config)]
        model, said = config_class.from_pretrained(
            None, config=config, state_dict=state, dtype=torch.float32, output_loading_info=True
        )
    except DoctorError as error:
        raise CannotBuild(error.message) from None
    except Exception as error:  # whatever the library raises for a config it does not like is the reason
        raise CannotBuild(
            f"transformers {transformers.__version__} cannot build {kind}: {type(error).__name__}: {str(error)[:200]}"
        ) from error
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()
    lost = sorted(said["missing_keys"]) + sorted(map(str, said["mismatched_keys"]))
    if lost:
        raise CannotBuild(
            f"transformers {transformers.__version__} finds no fitting tensor for {lost[0]}"
            + (f" and {len(lost) - 1} more" if len(lost) > 1 else "")
        )
    return model.eval()


def _tensor(checkpoint: Checkpoint, name: str):
    """One tensor in float32, as torch sees its codes."""
    import torch

    dtype = checkpoint.tensors[name].dtype
    if dtype.torch is None:
        raise CannotBuild(f"{name}: torch has no {dtype.name}")
    codes = torch.from_numpy(np.array(checkpoint.load(name)))
    if dtype.is_float and codes.dtype not in (torch.float32, torch.float64):
        codes = codes.view(getattr(torch, dtype.torch))
    return codes.float() if dtype.is_float else codes


def _wanted(name: str, blocks: int | None) -> bool:
    number = _BLOCK.search(name)
    return blocks is None or number is None or int(number[1]) < blocks


def _shortened(document: dict, blocks: int | None) -> dict:
    if blocks is None:
        return document
    keys = [k for k in ("num_hidden_layers", "n_layer", "num_layers", "n_layers") if k in document]
    if not keys:
        raise CannotBuild("config.json names no number of blocks, and the whole model does not fit in memory")
    whole = document[keys[0]]
    short = {k: v[:blocks] if isinstance(v, list) and len(v) == whole else v for k, v in document.items()}
    return short | {k: blocks for k in keys}


def _blocks_that_fit(view: Checkpoint) -> int | None:
    """None where the whole model fits in memory in float32, else the number of first blocks that are compared."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * MEMORY_SHARE
    if _need(view, None) <= free:
        return None
    if _need(view, TRUNCATED_BLOCKS) <= free:
        return TRUNCATED_BLOCKS
    raise CannotBuild(
        f"{TRUNCATED_BLOCKS} blocks and the embeddings need {_need(view, TRUNCATED_BLOCKS) / 2**30:.1f} GiB in float32, "
        f"{free / 2**30:.1f} GiB may be used"
    )


def _need(checkpoint: Checkpoint, blocks: int | None) -> int:
    """Bytes of the tensors in float32."""
    return sum(4 * info.numel for name, info in checkpoint.tensors.items() if _wanted(name, blocks))
