"""What clients and rules say of tiny models of many families: a table.

    python tools/list_proofs.py [--alarms] [FAMILY …]

Each family's model, with random weights, is judged under three plans (gptq, serve, none), which must give no error and
no warning; then it is quantized by rounding into compressed-tensors, and transformers loads the output: 0 missing, 0
unexpected, 0 of another shape, and every linear of the sample unpacked by its own library equal to ours. Without a
family, fifteen are taken; with --alarms only the plans are asked, of every family that transformers builds. Exit code 1
where a load is not whole or a rule speaks.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]

from healthy_models import FAMILIES, save  # type: ignore[import-not-found]  # noqa: E402

from doctor import api  # noqa: E402
from doctor.core.recipe import Recipe  # noqa: E402
from doctor.evaluate.clients.load_proof import prove_loading  # noqa: E402

FIFTEEN = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2", "cohere2", "glm4", "starcoder2"),
    *("qwen3_moe", "mixtral", "olmoe", "deepseek_v3"),
)
PLANS = ("quantize", "serve", "none")
OF_THE_PLAN = ("G319", "G335")  # what is true of GPTQ for a family, and not of its files


def alarms(folder: Path) -> list[str]:
    """What rules say of a sound model, under each plan."""
    said = []
    for goal in PLANS:
        recipe = Recipe(group_size=32, goal=goal)
        report = api.check(folder, recipe, ignore=OF_THE_PLAN, stage="header")
        said += [f"{goal}: {f.code} {f.message}" for f in report.findings if f.severity != "info"]
    return said


def proof(folder: Path, out: Path) -> tuple[str, bool]:
    """What transformers does with the model in 4 bits, and whether that is all that it must."""
    done = api.quantize(folder, out, Recipe(method="rtn", group_size=32, format="compressed-tensors"))
    if not done.output:
        return f"not quantized: {', '.join(sorted({f.code for f in done.findings if f.severity == 'error'}))}", False
    found = prove_loading(done.output)
    counts = f"missing {len(found.missing)}, unexpected {len(found.unexpected)}, other shape {len(found.mismatched)}"
    packed = f"{found.packed} packed, {found.compared - len(found.differing)} of {found.compared} unpacked equal"
    return f"{found.client}: {counts}, {packed}{found.refused or found.reason}", found.whole


def main() -> int:
    names = sys.argv[1:]
    if only := "--alarms" in names:
        names.remove("--alarms")
    broken, spoke = 0, 0
    families = names or (FAMILIES if only else FIFTEEN)
    for family in families:
        with tempfile.TemporaryDirectory(prefix="doctor-proofs-") as place:
            folder = save(family, Path(place) / "m")
            said = alarms(folder)
            told, whole = ("", True) if only else proof(folder, Path(place) / "o")
        spoke += bool(said)
        broken += not whole
        print(f"{family:<22} {len(said)} alarms  {told}", *(f"    {line}" for line in said), sep="\n", flush=True)
    print(f"{len(families)} families x {len(PLANS)} plans: {spoke} with a false alarm", end="")
    print("" if only else f"; {len(families) - broken} of {len(families)} outputs load whole")
    return int(bool(broken or spoke))


if __name__ == "__main__":
    sys.exit(main())
