"""What a client's loading of a quantized checkpoint means for a plan: nothing, a warning, or an error."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from doctor.core.facts import fact
from doctor.core.messages import Message, _, listed
from doctor.core.recipe import Recipe, is_kept
from doctor.core.records import LoadProof
from doctor.core.tables import table
from doctor.formats.registry import KNOWN
from doctor.model.templates import fused_layouts_of

_EXPERT = re.compile(r"\.experts\.\d+\.")
_EXPERTS_INPUTS = re.compile(r"\.experts\.\d+\..*\.input_(?:global_)?scale$")
_SHOWN = 3  # names in the message; the evidence has the counts


class LoadProblem(NamedTuple):
    """severity: "error", or "warning" where another client than the one that was asked is known to read it."""

    severity: str
    message: Message
    evidence: dict[str, object]


@fact("checkpoint")
def packed_loading(checkpoint) -> dict[str, Any]:
    """Families that transformers does not load from packed files: rules/tables/packed_loading.toml."""
    return table("packed_loading")


@fact("checkpoint")
def unfollowed(checkpoint) -> dict[str, Any]:
    """Families whose decoder layers quantize does not run one after another: rules/tables/unfollowed.toml."""
    return table("unfollowed")


def loading_options(form: str, model_type: str) -> dict[str, Any]:
    """Keys of quantization_config without which transformers does not load this family from a format's files. What
    holds for one format of compressed-tensors holds for all whose codes stand under a name of their own.
    """
    own = KNOWN.get(form)
    if own is not None and own.words == KNOWN["compressed-tensors"].words:
        form = "compressed-tensors"
    options = table("packed_loading").get(form, {}).get("options", {})
    return {key: True for key, families in options.items() if model_type in families}


def load_problem(proof: LoadProof, recipe: Recipe, model_type: str, tensors: Iterable[str] = ()) -> LoadProblem | None:
    """What a client that does not load a checkpoint whole says; None where it does, or was not asked. tensors: names in
    the checkpoint, which tell whether it has experts.
    """
    if proof.reason:
        return None
    name = proof.architecture or "?"
    if proof.refused:
        return _refused(proof, recipe, name, bool(readers_of_joined(recipe, tensors)))
    names = [*proof.missing, *proof.unexpected, *proof.mismatched]
    if not names:
        return _misread(proof, recipe) if proof.misread else None
    if all(_EXPERTS_INPUTS.search(name) for name in names):
        message = _(
            "{client} passes over the input scales of experts ({n:,}, first {first}): it computes them with 16-bit "
            "inputs",
            client=proof.client,
            n=len(names),
            first=names[0],
        )
        return LoadProblem("warning", message, {"unexpected": len(names)})
    evidence: dict[str, object] = {kind: len(getattr(proof, kind)) for kind in ("missing", "unexpected", "mismatched")}
    readers = readers_of_experts(model_type, recipe.output_format, names)
    if not readers and recipe.runtime != "transformers" and all("expert" in name for name in names):
        readers = readers_of_joined(recipe, tensors)
    if readers:
        message = _(
            "{client} has no linears for the experts of {model}, so it loads them as {name} with random values; "
            "{readers} can read them",
            client=proof.client,
            model=model_type,
            name=name,
            readers=listed(readers),
        )
        return LoadProblem("warning", message, evidence)
    message = _(
        "{client} loads it as {name} with {missing:,} parameters missing, {unexpected:,} unexpected and "
        "{mismatched:,} of another shape, first {first}",
        client=proof.client,
        name=name,
        first=", ".join(names[:_SHOWN]),
        missing=len(proof.missing),
        unexpected=len(proof.unexpected),
        mismatched=len(proof.mismatched),
    )
    return LoadProblem("error" if recipe.runtime in ("", "transformers") else "warning", message, evidence)


def _refused(proof: LoadProof, recipe: Recipe, name: str, read: bool) -> LoadProblem:
    """read: another runtime is known to load the file."""
    other = recipe.runtime not in ("", "transformers") or (read and not recipe.runtime)
    message = _("{client} refuses to load it as {name}: {error}", client=proof.client, name=name, error=proof.refused)
    return LoadProblem("warning" if other else "error", message, {"error": proof.refused})


def _misread(proof: LoadProof, recipe: Recipe) -> LoadProblem:
    """Experts whose values are right in the file, and wrong in transformers alone."""
    message = _(
        "{client} loads packed experts as {name} with wrong values ({first}): it joins them into one tensor and "
        "unpacks them otherwise than their format; serve it with vLLM",
        client=proof.client,
        name=proof.architecture,
        first=", ".join(proof.misread[:_SHOWN]),
    )
    severity = "error" if recipe.runtime == "transformers" else "warning"
    return LoadProblem(severity, message, {"misread": len(proof.misread)})


def readers_of_joined(recipe: Recipe, tensors: Iterable[str]) -> list[str]:
    """Runtimes that read the experts among these tensors in this format, where transformers, which joins them into one
    tensor, is known not to (rules/tables/published.toml); else [].
    """
    form = recipe.output_format
    if not any(_EXPERT.search(name) and not is_kept(recipe, name.rpartition(".")[0]) for name in tensors):
        return []
    return next(
        (
            row["read_by"]
            for row in table("published")["misread"]
            if row["runtime"] == "transformers"
            and "read_by" in row
            and (
                form in row["formats"]
                or recipe.activations in row.get("activations", ())
                or (not recipe.sym and form in row.get("asymmetric", ()))
            )
        ),
        [],
    )


def readers_of_experts(model_type: str, form: str, names: Iterable[str]) -> list[str]:
    """Runtimes that read unfused experts of this family in this format, where all of the names are of such experts and
    transformers is none of them; else [].
    """
    names = list(names)
    for entry in fused_layouts_of(model_type):
        readers = entry["read_by"].get(form, [])
        linear = re.escape(entry["linear"]).replace(r"\{e\}", r"\d+").replace(r"\{role\}", "(gate|up|down)")
        module = entry["linear"].partition(".{e}")[0]
        stacked = (entry["gate_up"], entry["down"], f"{module}.gate_up_proj", f"{module}.down_proj")
        fused = "|".join(map(re.escape, stacked))
        inside = re.compile(rf"layers\.\d+\.(?:{linear}\.|(?:{fused})(?:_bias)?(?:$|\.))")
        if readers and "transformers" not in readers and all(inside.search(name) for name in names):
            return list(readers)
    return []
