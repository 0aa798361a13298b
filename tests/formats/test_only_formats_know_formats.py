"""No file outside doctor/formats compares the name of a format, and none outside doctor/core/methods.py that of a
method: they ask the object. A name may be written down (a default, an example, what quantization_config is to say), not
judged.
"""

import ast
from pathlib import Path

import pytest

from doctor.core.methods import METHODS
from doctor.formats.registry import KNOWN

ROOT = Path(__file__).parents[2]
NAMES = {*KNOWN, *METHODS, *(m for f in KNOWN.values() for m in f.quant_methods), "gemm", "gemv", "pack-quantized"}
PARTS = {part for form in KNOWN.values() for part in form.part_names} - {"weight"}
ITS_OWN = ("doctor/formats/", "doctor/core/methods.py")
EXAMPLES = ("bad", "good", "more", "tiny_gptq", "tiny_exl2", "tiny_packed")  # functions that build files of one format
# file: (what is compared, why it is no format of weights)
ALLOWED = {
    "doctor/evaluate/kvcache/quantizers.py": ({"fp8"}, "how a cache stores keys and values, not weights"),
    "rules/c144_rope_schema.py": ({"su"}, "a kind of rotary embedding"),
    "rules/o625_packed_parts_incomplete.py": (
        {"q_weight", "q_scale", "q_scale_max", "q_groups", "q_invperm"},
        "its example builds an EXL2 file",
    ),
    "rules/o647_exl2_groups_unsound.py": ({".q_groups"}, "a rule of this format alone"),
    "rules/f005_foreign_format.py": ({"gguf"}, "what a file begins with that is called .safetensors"),
}


def judged(tree):
    """(line, name) of every name of a format that decides something."""
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef) and function.name in EXAMPLES
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if id(node) in inside:
            continue
        if isinstance(node, ast.Compare):
            held = [node.left, *node.comparators]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("startswith", "endswith"):
            held = [*node.args]
        elif isinstance(node, ast.MatchValue):
            held = [node.value]
        elif isinstance(node, ast.Dict) and sum(named(k) is not None for k in node.keys) > 1:
            held = [k for k in node.keys if k]  # a table by format is a comparison in disguise
        else:
            continue
        for part in held:
            for leaf in ast.walk(part) if isinstance(part, (ast.Tuple, ast.List, ast.Set)) else [part]:
                name = named(leaf)
                if name is not None:
                    yield leaf.lineno, name


def named(node):
    value = getattr(node, "value", None) if isinstance(node, ast.Constant) else None
    return value if isinstance(value, str) and (value in NAMES or value.strip(".") in PARTS) else None


def sources():
    found = [*sorted((ROOT / "doctor").rglob("*.py")), *sorted((ROOT / "rules").glob("*.py"))]
    return [p for p in found if not str(p.relative_to(ROOT)).startswith(ITS_OWN)]


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_no_other_file_compares_a_formats_or_methods_name(path):
    allowed, _why = ALLOWED.get(str(path.relative_to(ROOT)), (set(), ""))
    assert not [found for found in judged(ast.parse(path.read_text(encoding="utf-8"))) if found[1] not in allowed]


@pytest.mark.parametrize(
    "text, names",
    [
        ('x = 1 if form == "awq" else 2', ["awq"]),
        ('if method in ("gptq", "rtn"): pass', ["gptq", "rtn"]),
        ('if name.endswith((".qzeros", ".g_idx")): pass', [".qzeros", ".g_idx"]),
        ('UNITS = {"gptq": 1, "awq": 2}', ["gptq", "awq"]),
        ('match form:\n    case "fp8":\n        pass', ["fp8"]),
        ('block = {"quant_method": "awq", "version": "gemm"}', []),
        ('def bad():\n    return x == "awq"', []),
    ],
)
def test_the_test_sees_each_way_to_compare(text, names):
    assert [name for _line, name in judged(ast.parse(text))] == names
