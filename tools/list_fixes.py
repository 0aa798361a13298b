"""Prints the table of fixes: rule, what its fix does, how safe it is, and its proof.

The table is computed: each rule's examples are checked, without and with a healthy twin as a donor (`--from`), and the
findings show what would be done. A rule without a fix is listed with the reason from its page.
"""

import re
import sys
import tempfile
from pathlib import Path

JUDGED = "the copy is read again under all rules: this finding is gone and none is new"
# What each kind of edit is held to beside that.
PROOFS = {
    "PadTensor": "logits before and after, on fixed prompts",
    "GrowRows": "logits of the old tokens before and after",
    "TakeTensor": "blake2b of the base's tensor, in the receipt",
    "TakeFile": "sha256 of the base's file, on the copy",
    "RenameTensor": "bytes are copied, no name is given twice",
    "NameFormat": "bytes are copied, the header is read again",
    "RenameFile": "the files are linked, no byte is written but the index's",
    "DropFile": "the source keeps it",
    "CastTensor": "a value that would become Inf is refused",
    "Dequantize": "the numbers that engines compute with, by the packers' vectors",
    "AddLowRank": "against the sum in float64",
    "ShiftZeros": "a field that would wrap is refused",
    "DropTensor": "nothing else is touched",
    "ReplaceNonfinite": "only NaN and Inf change",
    "RebuildIndex": "the shards' own headers",
    "GroupsInOrder": "what desc_act false means",
    "ClampTensor": "only values beyond float16 change",
    "EqualZeros": "what sym true means",
}
TEXT_ONLY = {"SetJson", "RemoveJson", "CleanJson", "ReplaceText"}


def main() -> None:
    print("| rule | fix | safety | proof, or why there is no fix |\n|---|---|---|---|")
    fixed = total = 0
    for entry in _rules():
        rows = list(dict.fromkeys(_rows(entry)))
        total, fixed = total + 1, fixed + bool(rows)
        if not rows:
            print(f"| {entry.code} {entry.name} | - | - | {_cell(_reason(entry))} |")
        for title, safety, kinds in rows:
            print(f"| {entry.code} {entry.name} | {_cell(title)} | {safety} | {_proof(kinds)} |")
    print(f"\n{fixed} of {total} rules have a fix that doctor carries out. For all: {JUDGED}.")


def _reason(entry) -> str:
    """The first sentence of what the page says of its fix, from where the reason begins."""
    text = " ".join(entry.section("Fix safety").split())
    text = re.sub(r"^(manual|no fix|no fix here)[:;] ", "", text)
    return text.rstrip(".")


def _rules():
    from doctor.lint.engine import load_rules

    return load_rules()


def _rows(entry):
    """(title, safety, kinds of edits) of each fix that the rule's examples get."""
    from doctor.checkpoint.directory import Checkpoint
    from doctor.core.facts import CHECKPOINT
    from doctor.edits.donor import Donor
    from doctor.fixing.assess import assess
    from doctor.fixing.consent import Consent
    from doctor.lint.testing import shown_by

    for case, healthy in shown_by(sys.modules[entry.module]):
        with tempfile.TemporaryDirectory() as folder:
            source = Checkpoint.open(case.write(Path(folder) / "bad"))
            facts = [(s, n, v) for (s, n), v in case.facts.items()] + [(CHECKPOINT, "asked", frozenset({entry.code}))]
            if healthy is not None:
                facts.append(
                    (CHECKPOINT, "base", Donor(Checkpoint.open(healthy.write(Path(folder) / "base")), source, "BASE"))
                )
            for item in assess(source, case.recipe, _rules(), facts=facts).findings:
                fix = item.fix
                if item.code == entry.code and Consent(recipe=True).can_carry_out(fix):
                    text = fix.title + (" (`--from`)" if "BASE" in fix.title else "")
                    yield text, "by name" if fix.by_name else fix.safety, frozenset(type(e).__name__ for e in fix.edits)


def _proof(kinds: frozenset) -> str:
    if kinds <= TEXT_ONLY:
        return "weights untouched, every byte linked"
    if kinds <= {"SetRecipe", "Keep"}:
        return "the run is judged again with it"
    return "; ".join(PROOFS[k] for k in sorted(kinds) if k in PROOFS)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    main()
