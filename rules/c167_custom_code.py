"""C167 custom-code: model or tokenizer needs code from this directory.

Why: auto_map names Python files of the checkpoint. transformers and vLLM run them only with trust_remote_code, with the
rights of whoever starts the program; llama.cpp does not read them. doctor never runs them: what they compute is not
judged.

Seen as:
- transformers: `requires you to execute the configuration file in that repo`
- transformers: `contains custom code which must be executed to correctly load the model`
- vLLM: `Please pass the argument `trust_remote_code=True``

Do: read the named files before you allow them. Where transformers has the model built in, remove auto_map.

False alarms: none known; this is a note.

Fix safety: manual: only you know whether the code is needed.

Sources: transformers src/transformers/dynamic_module_utils.py, `resolve_trust_remote_code`.
"""

from doctor.lint.rule import Fix, Place, _, finding, listed, rule
from doctor.lint.testing import tiny


@rule("C167", "info", implied_by=("C146",))
def custom_code(checkpoint, files):
    for file in ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"):
        mapping = (checkpoint.value(file) or {}).get("auto_map")
        targets = mapping.values() if isinstance(mapping, dict) else ()
        names = {one for target in targets for one in (target if isinstance(target, list) else [target])}
        sources = sorted({_source(name) for name in names if isinstance(name, str)})
        if sources and any(s in files or "--" in s for s in sources):
            yield finding(
                _("auto_map in {file} names code to run: {sources}", file=file, sources=listed(sources)),
                at=Place(file, pointer="/auto_map"),
                evidence={"files": len(sources)},
                fix=Fix(_("read the files before you pass trust_remote_code"), (), "manual"),
            )


def _source(name):
    """`modeling_own.OwnForCausalLM` -> `modeling_own.py`; code of another repository keeps that one's name."""
    repository, _mark, local = name.rpartition("--")
    file = local.partition(".")[0] + ".py"
    return f"{repository}--{file}" if repository else file


def bad():
    case = tiny()
    case.config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    case.files["modeling_own.py"] = b"class OwnForCausalLM: ...\n"
    return case, "auto_map in config.json names code to run: modeling_own.py"


def good():
    return tiny()
