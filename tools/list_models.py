"""Writes docs/models.md: what becomes of each model family, beside the families that other quantizers name.

    python tests/coverage.py --all --json rows.json && python tools/list_models.py rows.json
    python tools/list_models.py --peers GPTQModel=CLONE llm-compressor=CLONE

Numbers are those of tests/coverage.py on tiny random checkpoints. A name of another program is a key of its own table,
read from a clone of its repository by the last form, which runs none of its code, and kept in tools/peer_families.json.
llm-compressor takes other families too, by transformers' classes; its table has those that need code of their own.
"""

import argparse
import ast
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "helpers"))

from healthy_models import FAMILIES, UNKNOWN  # noqa: E402
from tiny_classes import CLASSES  # noqa: E402

PAGE = ROOT / "docs" / "models.md"
PEERS = ROOT / "tools" / "peer_families.json"
TABLES = {  # program -> file of its table, and the name that the table has there
    "GPTQModel": ("gptqmodel/models/auto.py", "MODEL_MAP"),
    "llm-compressor": ("src/llmcompressor/modeling/moe/conversion_mappings.py", "ARCH_TO_IMPORT_PATHS"),
}
HEAD = """# Models

What `quantize` does with each family, as `python tests/coverage.py --all` measured it: a tiny random checkpoint of the
class, GPTQ in 4 bits and groups of 32 in the compressed-tensors format, loaded in the class that config.json names.
Where `check` refuses that and takes FP8_DYNAMIC, and for models of an encoder and a decoder, weights are rounded
without calibration. Where 4 bits cost a tiny random model too much, 8 bits are written, whose outputs must correlate
0.99. The scheme stands behind the outcome. Written by `tools/list_models.py`.

**works**: written, loads whole, computes what the source does. **other client**: written, and read by another engine
than transformers. **refusal**: `check` says that it cannot be quantized, and why. **unloadable**: the class does not
load what was written whole, or its outputs correlate less than 0.8 with the source's. **not built**: transformers
builds the class only with a library that was absent. **not run**: a family of the rules' tests without a measurement.
Packed and kept count linears; the correlation is that of outputs with the source's; the last column is the commit that
was measured: rows that the last run did not reach keep theirs.
"""


def model_type(row: dict) -> str:
    if "kind" in row:
        return row["kind"]
    import transformers

    stated = CLASSES[row["name"]].architecture if row["name"] in CLASSES else row.get("class", "")
    known = getattr(transformers, stated, None)
    found = getattr(getattr(known, "config_class", None), "model_type", "")
    return found or row["name"]


def read_peers(clones: dict[str, Path]) -> None:
    """Write PEERS from the commits at which the clones stand."""
    known = json.loads(PEERS.read_text()) if PEERS.exists() else {}
    for program, clone in clones.items():
        path, name = TABLES[program]
        git = ["git", "-C", str(clone)]
        text = subprocess.run([*git, "show", f"HEAD:{path}"], capture_output=True, text=True, check=True).stdout
        commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        known[program] = {"commit": commit.stdout.strip(), "file": path, "table": name, "families": keys_of(text, name)}
    PEERS.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


def keys_of(source: str, name: str) -> list[str]:
    """The keys of the dictionary `name` of a module's source. Raises ValueError where it has none."""
    for node in ast.parse(source).body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        if any(isinstance(t, ast.Name) and t.id == name for t in targets) and isinstance(node.value, ast.Dict):
            return sorted(str(key.value) for key in node.value.keys if isinstance(key, ast.Constant))
    raise ValueError(f"{name} is no dictionary of this module")


def earlier_rows() -> list[dict]:
    """Measured rows of the page as it stands: each keeps the commit that was measured."""
    text = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    keys = ("name", "class", "outcome", "packed", "kept", "correlation", "", "", "commit")
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")
    ]
    rows = [dict(zip(keys, found, strict=True)) for found in cells[1:] if len(found) == len(keys)]
    return [row | {"kind": row["class"]} for row in rows if row["outcome"] != "not run"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", type=Path, help="answers of tests/coverage.py")
    parser.add_argument("--peers", nargs="+", default=[], metavar="PROGRAM=CLONE", help="read their tables again")
    options = parser.parse_args()
    read_peers({name: Path(clone) for name, _equals, clone in (text.partition("=") for text in options.peers)})
    found = [row for path in options.rows for row in json.loads(path.read_text())]
    rows = list({row["name"]: row for row in found}.values())  # of two measurements the later file's
    if not rows:
        return 0 if options.peers else parser.error("no answers of tests/coverage.py")
    peers = json.loads(PEERS.read_text())
    theirs = {program: set(table["families"]) for program, table in peers.items()}
    lines, seen, counts = [HEAD], set(), {}
    ours: set[str] = set()
    lines += ["| model | model_type | outcome | packed | kept | correlation | GPTQModel | llm-compressor | commit |"]
    lines += ["|---|---|---|---:|---:|---:|---|---|---|"]
    measured = {row["name"] for row in rows} | {model_type(row) for row in rows}
    rows += [row for row in earlier_rows() if row["name"] not in measured]
    measured = {row["name"] for row in rows} | {model_type(row) for row in rows}
    rows += [{"name": kind, "outcome": "not run"} for kind in (*FAMILIES, *UNKNOWN) if kind not in measured]
    for row in rows:
        kind = model_type(row)
        if (row["name"], kind) in seen or (row["name"] == kind and any(kind == k for _n, k in seen)):
            continue
        seen.add((row["name"], kind))
        if row["outcome"] != "not run":
            ours |= {kind, kind.removesuffix("_text")}
        counts[row["outcome"]] = counts.get(row["outcome"], 0) + 1
        cells = [str(row.get(key, "")) for key in ("packed", "kept", "correlation")]
        named = ["yes" if {kind, kind.removesuffix("_text")} & names else "" for names in theirs.values()]
        outcome = f"{row['outcome']} ({row['scheme']})" if row.get("scheme") else row["outcome"]
        cells = [row["name"], kind, outcome, *cells, *named, row.get("commit", "")]
        lines.append("| " + " | ".join(cells) + " |")
    total = ", ".join(f"{n} {outcome}" for outcome, n in sorted(counts.items()))
    lines += ["", f"{sum(counts.values())} rows: {total}."]
    for name, names in theirs.items():
        absent = sorted(names - ours)
        rows_here = len(names) - len(absent)
        lines += [
            "",
            f"{name} ({peers[name]['file']}, commit {peers[name]['commit']}) names {len(names)} families, of which "
            f"{rows_here} were run. Not: {', '.join(absent)}.",
        ]
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(lines[-5], lines[-3], lines[-1], sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
