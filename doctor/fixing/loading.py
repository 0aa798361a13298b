"""The client's loader on what was staged, before it appears under its name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from doctor.core.errors import PlanRefused
from doctor.core.finding import Finding
from doctor.core.messages import Message, _
from doctor.core.recipe import Recipe
from doctor.core.records import LOAD_PROOF, LoadProof
from doctor.core.store import Store
from doctor.lint.engine import judge
from doctor.lint.rule import Rule
from doctor.plan.loading import load_problem

Load = Callable[[Path], LoadProof]  # what a client does with the checkpoint in a directory


def proved(load: Load, staged: Path, source: Path, output: Path, recipe: Recipe, model_type: str) -> LoadProof:
    """What the client does with the staged files.

    Raises PlanRefused where they do not load whole and the source does, or could not be asked about: then the edits are
    to blame. A source that does not load either is written, and the rules say what is wrong with it.
    """
    proof = load(staged)
    problem = load_problem(proof, recipe, model_type)
    if proof.whole or (problem is not None and problem.severity not in ("", "error")):
        return proof
    before = load(source) if not proof.reason else proof
    if not proof.reason and (before.whole or before.reason):
        raise PlanRefused(
            _(
                "{output}: {problem}.",
                output=output,
                problem=problem.message if problem else ", ".join(proof.differing),
            ),
            _("Nothing was written. The source is as it was; choose fixes one by one with --only."),
        )
    return proof


def judged_proof(proof: LoadProof, store: Store, rules: Iterable[Rule]) -> tuple[list[Finding], Message]:
    """(what the rules say of a client's loading of a finished directory, a note of what was proved)."""
    store.put(LOAD_PROOF, proof)
    findings, _runs = judge(store, [rule for rule in rules if LOAD_PROOF.name in rule.facts])
    if proof.reason:
        return findings, _("not proved to load: {reason}", reason=proof.reason)
    return findings, _(
        "load proof: {client} loads it whole as {name}"
        if proof.whole
        else "load proof: {client} does not load it whole as {name}",
        client=proof.client,
        name=proof.architecture,
    )
