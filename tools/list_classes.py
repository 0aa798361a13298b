"""Writes rules/tables/classes.json: the model_types and model classes of the transformers that is installed.

Read from its source files without importing a model: the mappings of the auto classes, and `__all__` of every modeling
file. `--check` writes nothing and exits 1 where the file is of another version.
"""

import ast
import json
import sys
from pathlib import Path

FILE = Path(__file__).parents[1] / "rules" / "tables" / "classes.json"


def exported(file: Path) -> list[str]:
    """Names in `__all__` of a Python file that name a model, not a base class for several."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and any(getattr(t, "id", "") == "__all__" for t in node.targets):
            names = ast.literal_eval(node.value)
            return [n for n in names if n[0].isupper() and not n.endswith(("PreTrainedModel", "PretrainedModel"))]
    return []


def listed() -> str:
    """The text of the file: one line a module."""
    import transformers
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, model_type_to_module_name

    models = Path(transformers.__file__).parent / "models"
    modules: dict[str, list[list[str]]] = {}
    for model_type in CONFIG_MAPPING_NAMES:
        modules.setdefault(model_type_to_module_name(model_type), [[], []])[0].append(model_type)
    for file in sorted(models.rglob("modeling_*.py")):
        if file.parent.name in modules:
            modules[file.parent.name][1] += exported(file)
    for name, mapping in vars(modeling_auto).items():
        for model_type, classes in mapping.items() if name.startswith("MODEL_") and name.endswith("_NAMES") else ():
            module = modules.get(model_type_to_module_name(model_type))
            if module is not None:
                module[1] += [classes] if isinstance(classes, str) else list(classes)
    lines = [
        f" {json.dumps(name)}: {json.dumps([sorted(types), sorted(set(classes))])}"
        for name, (types, classes) in sorted(modules.items())
    ]
    version = ".".join(transformers.__version__.split(".")[:2])
    return f'{{"transformers": "{version}", "modules": {{\n' + ",\n".join(lines) + "\n}}\n"


def main(arguments: list[str]) -> int:
    text = listed()
    if "--check" in arguments:
        return 0 if FILE.is_file() and FILE.read_text(encoding="utf-8") == text else 1
    FILE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
