"""C146 absent-code: auto_map names a Python file that is missing.

Why: with trust_remote_code, transformers looks for the file and stops. Without it, the model cannot be loaded unless
its model_type is built in.

Seen as:
- transformers: `does not appear to have a file named configuration_`
- transformers: `Could not locate the modeling_`

Do: copy the .py files from where the model came from; or remove auto_map if transformers knows the model_type.

False alarms: names of the form `repo--file.Class` refer to another repository and are not counted.

Fix safety: unsafe where transformers has this family built in: auto_map is then not needed. doctor runs no code of a
checkpoint.

Sources: transformers src/transformers/dynamic_module_utils.py.
"""

from doctor.lint.rule import Fix, Place, RemoveJson, _, finding, rule
from doctor.lint.testing import tiny

REMOTE_ONLY = ("baichuan", "chatglm", "internlm2", "qwen")


@rule("C146", "warning")
def absent_code(checkpoint, files, config, spec):
    for file in ("config.json", "tokenizer_config.json"):
        mapping = (checkpoint.value(file) or {}).get("auto_map")
        for name, target in mapping.items() if isinstance(mapping, dict) else ():
            for one in target if isinstance(target, list) else [target]:
                module = one.partition(".")[0] if isinstance(one, str) and "--" not in one else None
                if module and f"{module}.py" not in files:
                    known = file == "config.json" and spec.family is not None and spec.family not in REMOTE_ONLY
                    fix = (
                        Fix(
                            _("remove auto_map: transformers knows this family"),
                            (RemoveJson(file, "/auto_map", mapping),),
                            "unsafe",
                        )
                        if known
                        else Fix(_("copy {module}.py from where the model came from", module=module), (), "manual")
                    )
                    yield finding(
                        _(
                            "{name} is {target} in {file}; {module}.py is missing",
                            name=name,
                            target=one,
                            file=file,
                            module=module,
                        ),
                        at=Place(file, pointer=f"/auto_map/{name}"),
                        evidence={"module": module},
                        fix=fix,
                    )


def bad():
    case = tiny()
    case.config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    return case, "AutoModelForCausalLM is modeling_own.OwnForCausalLM in config.json; modeling_own.py is missing"


def good():
    return tiny()
