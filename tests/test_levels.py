"""The house's levels: an import, one inside a function included, goes down from wing to wing, and inside a wing there
is no circle.
"""

import ast
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the ground up. A wing may import those before it; a file of a wing in turn those of its own wing, without a
# circle.
WINGS = (
    "core",
    "checkpoint",
    "formats",
    "model",
    "plan",
    "scan",
    "edits",
    "lint",
    "rules",
    "fixing",
    "quant",
    "evaluate",
    "locale",
    "report",
    "api",
    "cli",
)
LEVEL = {wing: level for level, wing in enumerate(WINGS)}
HEAVY = {"torch", "transformers"}
MAY_BE_HEAVY = {"formats", "quant", "evaluate"}  # the wings that compute on tensors
MOST_LINES = 400


def own_files():
    return [*sorted((ROOT / "doctor").rglob("*.py")), *sorted((ROOT / "rules").rglob("*.py"))]


def module_of(path: Path) -> str:
    name = str(path.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__")
    return f"doctor.{name}" if name.startswith("rules") else name


def wing_of(module: str) -> str:
    """The wing of a module; the package itself and its __main__ stand on top of all."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in LEVEL else "cli"


@cache
def modules() -> dict[str, Path]:
    return {module_of(path): path for path in own_files()}


@cache
def imports(path: Path) -> tuple[tuple[str, str, bool], ...]:
    """(module, name or "", whether inside a function) of every import of a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {
        id(n)
        for f in ast.walk(tree)
        if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for n in ast.walk(f)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, "", id(node) in inside) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.append(
                    (whole, "", id(node) in inside)
                    if whole in modules()
                    else (node.module, alias.name, id(node) in inside)
                )
    return tuple(found)


def arrows():
    """(importing module, imported module) of every import among our own."""
    for module, path in modules().items():
        for target, _, _ in imports(path):
            if target.startswith("doctor."):
                yield module, target


def test_every_file_lies_in_a_wing():
    homeless = [
        m for m in modules() if m.count(".") == 1 and wing_of(m) == "cli" and m not in ("doctor.__main__", "doctor.cli")
    ]
    assert not homeless
    assert {p.name for p in (ROOT / "doctor").glob("*.py")} <= {"__init__.py", "__main__.py"}


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_go_down(module):
    level = LEVEL[wing_of(module)]
    for target, _, _ in imports(modules()[module]):
        if target.startswith("doctor."):
            assert LEVEL[wing_of(target)] <= level, f"{module} imports {target}, which lies above it"


@pytest.mark.parametrize("module", sorted(modules()))
def test_heavy_libraries_begin_where_tensors_are_computed_on(module):
    heavy = {target for target, _, _ in imports(modules()[module]) if target.split(".")[0] in HEAVY}
    assert not heavy or wing_of(module) in MAY_BE_HEAVY, f"{module} imports {', '.join(heavy)}"


def test_there_is_no_circle():
    graph: dict[str, set[str]] = {}
    for module, target in arrows():
        graph.setdefault(module, set()).add(target)
    done: set[str] = set()

    def visit(node, trail):
        assert node not in trail, f"circle: {' → '.join([*trail[trail.index(node) :], node])}"
        if node not in done:
            for child in sorted(graph.get(node, ())):
                visit(child, [*trail, node])
            done.add(node)

    for node in sorted(graph):
        visit(node, [])


@pytest.mark.parametrize("module", sorted(modules()))
def test_no_private_name_leaves_its_file(module):
    for target, name, _ in imports(modules()[module]):
        assert not (target.startswith("doctor") and name.startswith("_") and name not in ("_", "__version__")), (
            f"{module} imports {target}.{name}"
        )


@pytest.mark.parametrize("path", own_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_is_read_in_one_sitting(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


@pytest.mark.parametrize("path", sorted((ROOT / "rules").glob("[a-z]*.py")), ids=lambda p: p.name)
def test_rules_import_rule_and_testing_alone(path):
    for target, _, _ in imports(path):
        if target.startswith("doctor"):
            assert target in ("doctor.lint.rule", "doctor.lint.testing"), f"{path.name} imports {target}"


def test_how_many_arrows_there_are(record_property):
    """Between wings, counted once a pair: what a reader of the picture in ARCHITECTURE.md has to follow."""
    pairs = Counter((wing_of(a), wing_of(b)) for a, b in arrows() if wing_of(a) != wing_of(b))
    record_property("arrows", len(pairs))
    assert 0 < len(pairs) <= len(WINGS) * (len(WINGS) - 1) // 2


@pytest.mark.parametrize("arguments", (["--help"], ["rules"], ["explain", "W201"], ["check", "{tiny}"]))
def test_these_commands_import_no_torch(arguments, tmp_path):
    from doctor.lint.testing import tiny

    tiny().write(tmp_path)
    arguments = [a.format(tiny=tmp_path) for a in arguments]
    code = (
        "import sys\nfrom doctor.cli.main import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules, 'imported'\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr


def test_cuda_is_no_package():
    assert not list((ROOT / "cuda").rglob("*.py")), "a Python file in cuda/ shadows NVIDIA's package"


def test_no_build_switches_off_nan():
    sources = [*(ROOT / "cuda").rglob("*"), *(ROOT / "cpu").rglob("*"), *(ROOT / "doctor").rglob("*.py")]
    for path in [ROOT / "setup.py", ROOT / "pyproject.toml", *sources]:
        if path.is_file():
            text = path.read_text(errors="replace")
            for flag in ("-ffast-math", "-Ofast", "--use_fast_math", "-ffinite-math-only"):
                assert flag not in text, f"{path}: {flag}"
