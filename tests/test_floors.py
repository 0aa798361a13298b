"""The house's floors: an import only goes down, rules speak to two modules, and a check never pays for torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = {
    0: ("errors", "lazy", "dtypes", "jsontext", "recipe", "tables", "host", "packed"),
    1: ("native", "shard", "edits", "spec", "checkpoint", "hub", "made", "taken", "view", "swap", "writer"),
    2: ("facts", "base", "stats", "scan", "builtin", "machine", "placement", "special", "layout", "lora", "stacks"),
    3: ("rule", "testing"),
    4: ("engine", "plan", "explain", "pictures", "config"),
    5: ("quant", "evaluate", "lean"),
    6: ("api", "cli", "help_zh", "__main__", "report", "__init__"),
}
FLOOR = {name: floor for floor, names in FLOORS.items() for name in names}
HEAVY = {"torch", "transformers"}


def imports(path):
    """(module, is lazy) of every import of a file; lazy = inside a function."""
    tree = ast.parse(path.read_text())
    top = {id(n) for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)) for n in ast.walk(n)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in top
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{a.name}" for a in node.names] if node.module == "doctor" else [node.module]
            names = [n for n in names if n != "doctor.__version__"]  # a string of the package itself, which imports nothing
            for name in names:
                yield name, id(node) in top


def floor_of(module):
    part = module.split(".")[1] if module.startswith("doctor.") else "__init__"
    return FLOOR.get(part)


def own_files():
    return sorted(p for p in (ROOT / "doctor").rglob("*.py"))


def floor_name(path):
    return path.relative_to(ROOT / "doctor").parts[0].removesuffix(".py")


def test_every_module_has_a_floor():
    unknown = {floor_name(p) for p in own_files()} - FLOOR.keys()
    assert not unknown, f"give these modules a floor: {unknown}"


@pytest.mark.parametrize("path", own_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_only_go_down(path):
    mine = FLOOR[floor_name(path)]
    for module, _ in imports(path):
        if module.split(".")[0] in HEAVY:
            assert mine >= 5, f"{path.name} imports {module}; torch and transformers begin at floor 5"
        if not module.startswith("doctor.") or module.startswith("doctor.rules"):
            continue
        floor = floor_of(module)
        assert floor is not None and floor <= mine, f"{path.name} (floor {mine}) imports {module} (floor {floor})"


@pytest.mark.parametrize("path", sorted((ROOT / "rules").glob("*.py")), ids=lambda p: p.name)
def test_rules_import_rule_and_testing_alone(path):
    for module, _ in imports(path):
        if module.startswith("doctor"):
            assert module in ("doctor.rule", "doctor.testing"), f"{path.name} imports {module}"


def test_no_circles_among_top_level_imports():
    graph = {}
    for path in own_files():
        if path.name == "__init__.py":
            continue
        name = "doctor." + str(path.relative_to(ROOT / "doctor").with_suffix("")).replace("/", ".")
        graph[name] = {m for m, lazy in imports(path) if m.startswith("doctor.") and not lazy}
    state = {}

    def visit(node, trail):
        if state.get(node) == "done" or node not in graph:
            return
        assert node not in trail, f"circle: {' → '.join([*trail, node])}"
        for child in graph[node]:
            visit(child, [*trail, node])
        state[node] = "done"

    for node in graph:
        visit(node, [])


@pytest.mark.parametrize("arguments", (["--help"], ["rules"], ["explain", "W201"], ["check", "{tiny}"]))
def test_these_commands_import_no_torch(arguments, tmp_path):
    from doctor.testing import tiny

    tiny().write(tmp_path)
    arguments = [a.format(tiny=tmp_path) for a in arguments]
    code = ("import sys\nfrom doctor.cli import main\n"
            f"try:\n    main({arguments!r})\nexcept SystemExit:\n    pass\n"
            "assert 'torch' not in sys.modules and 'transformers' not in sys.modules, 'imported'\n")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr


def test_cuda_is_no_package():
    assert not list((ROOT / "cuda").rglob("*.py")), "a Python file in cuda/ shadows NVIDIA's package"


def test_no_build_switches_off_nan():
    for path in [ROOT / "setup.py", ROOT / "pyproject.toml", *(ROOT / "cuda").rglob("*"), *(ROOT / "doctor").rglob("*.py")]:
        if path.is_file():
            text = path.read_text(errors="replace")
            for flag in ("-ffast-math", "-Ofast", "--use_fast_math", "-ffinite-math-only"):
                assert flag not in text, f"{path}: {flag}"
