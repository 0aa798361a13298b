"""Whether what `quantize` writes loads: a table of families and formats, each asked of the client that reads it.

    python tests/load_table.py [FAMILY,…] [--formats NAME,…] [--json FILE]

Each family is a tiny random model saved by transformers (helpers/healthy_models.py), written in each format, and given
to transformers' loader of the class that config.json names, on the meta device, or to llama.cpp for GGUF. missing,
unexpected and shape count parameters; packed counts the linears that the client took as packed; equal are the linears
whose weights the client's own library unpacks to the same bits, of those compared. A row with ○ was not asked: doctor
says before any work that this class would not load it, or the client lacks a library here. A row with △ is for another
client: `check` says before any work that this one refuses or misreads it, and who reads it. Exit code 1 where anything
else that was written does not load whole or differs.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent / "helpers"), str(Path(__file__).resolve().parent.parent)]

FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2", "granite", "cohere",
    "qwen2_moe", "qwen3_moe", "mixtral", "opt",
)  # fmt: skip
FORMATS: dict[str, dict[str, Any]] = {  # name -> fields of a recipe, or the scheme of that name
    "gptq": {"method": "gptq", "group_size": 32},
    "awq": {"method": "awq", "group_size": 32},
    "W4A16": {"group_size": 32},
    "W8A16": {"group_size": 32},
    "FP8_DYNAMIC": {},
    "INT8": {},
    "NVFP4A16": {},
    "MXFP4A16": {},
    "MXFP8A16": {},
}


def recipe_of(name: str) -> Any:
    from doctor.core.recipe import Recipe
    from doctor.formats.schemes import SCHEMES, fields_of

    fields = FORMATS.get(name, {})
    return Recipe(**fields_of(name, dict(fields))) if name in SCHEMES else Recipe(**fields)


def row(source: Path, name: str, folder: Path) -> dict[str, Any]:
    """What the client says of one family in one format."""
    from doctor.api import quantize
    from doctor.core.errors import DoctorError
    from doctor.evaluate.clients.load_proof import prove_loading

    out = folder / "out"
    try:
        result = quantize(source, out, recipe_of(name), rows=4, max_seq_length=32, ignore=["Q"])
    except DoctorError as error:
        return {"client": "doctor", "refused": "", "not_asked": str(error)[:160]}
    if not out.exists():
        said = "; ".join(f"{f.code} {f.message}" for f in result.report.findings if f.severity == "error")
        return {"client": "doctor", "refused": "", "not_asked": said[:160]}
    proof = prove_loading(out)
    return {
        "client": ", ".join(filter(None, (proof.client, proof.library))),
        "packed": proof.packed,
        "missing": len(proof.missing),
        "unexpected": len(proof.unexpected),
        "shape": len(proof.mismatched),
        "compared": proof.compared,
        "differing": len(proof.differing) + len(proof.misread),
        "said": next((f"{f.code} {f.message}" for f in result.report.findings if is_said(f)), ""),
        "refused": proof.refused,
        "not_asked": proof.reason,
    }


def is_said(found: Any) -> bool:
    """Whether a finding says that this client does not read what another one does."""
    return found.code == "G319" or (found.code in ("G322", "O617") and found.severity == "warning")


def whole(found: dict[str, Any]) -> bool:
    counts = ("missing", "unexpected", "shape", "differing")
    if found.get("said"):  # a client that is said to fail must fail
        return bool(found["refused"] or any(found[key] for key in counts))
    return not found["refused"] and not found["not_asked"] and not any(found[key] for key in counts)


def line(family: str, form: str, found: dict[str, Any]) -> str:
    if found.get("said"):
        return f"{family:12} {form:12} △ {found['said']}"
    if found["refused"] or found["not_asked"]:
        mark = "✗" if found["refused"] else "○"
        return f"{family:12} {form:12} {mark} {found['client']}: {found['refused'] or found['not_asked']}"
    equal = f"{found['compared'] - found['differing']} of {found['compared']}" if found["compared"] else "-"
    counts = f"{found['packed']:6} {found['missing']:7} {found['unexpected']:10} {found['shape']:5} {equal:>7}"
    return f"{family:12} {form:12} {'✓' if whole(found) else '✗'} {counts}  {found['client']}"


def main() -> None:
    from coverage import ask_here  # tests/coverage.py: this process asks transformers, importing it once
    from healthy_models import save

    from doctor.evaluate.clients import load_proof, rehearsal

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("families", nargs="?", default=",".join(FAMILIES))
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    load_proof.ask_child = rehearsal.ask_child = ask_here
    print(f"{'family':12} {'format':12}   packed missing unexpected shape   equal  client")
    rows = []
    for family in options.families.split(","):
        for form in options.formats.split(","):
            with tempfile.TemporaryDirectory(prefix="doctor-table-") as place:
                source = save(family, Path(place) / "model")
                found = row(source, form, Path(place))
            rows.append({"family": family, "format": form, **found})
            print(line(family, form, found), flush=True)
    said, unasked = [r for r in rows if r.get("said")], sum(bool(r["not_asked"]) for r in rows)
    loaded = sum(whole(r) for r in rows if not r.get("said"))
    equal = sum(r.get("compared", 0) - r.get("differing", 0) for r in rows)
    print(f"{loaded} of {len(rows) - unasked - len(said)} load whole, {equal} linears unpacked to the same bits")
    print(f"{len(said)} are for another client, {unasked} not asked")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    sys.exit(loaded + sum(map(whole, said)) + unasked < len(rows))


if __name__ == "__main__":
    main()
