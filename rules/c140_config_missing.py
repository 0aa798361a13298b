"""C140 config-missing: there is no config.json.

Why: shapes, heads, norms and the positions' rotation stand only there. Weights without it are numbers without a model.

Seen as:
- transformers: `does not appear to have a file named config.json`
- vLLM: `ValueError: No supported config format found in`

Do: fetch config.json of the same revision.

False alarms: a single weight file that is checked by itself is not counted.

Fix safety: unsafe, and only with `--from`: the base's file is taken. Else manual; a config is not made up from shapes
alone.

Sources: transformers src/transformers/configuration_utils.py.
"""

from doctor.lint.rule import Place, finding, from_base, rule
from doctor.lint.testing import tiny


@rule("C140", "error", implied_by=("F019", "F020", "F022"))
def config_missing(checkpoint, files, base):
    if "config.json" not in files and not checkpoint.only:
        yield finding(
            "no config.json among the files",
            at=Place("config.json"),
            evidence={"files": len(files)},
            fix=from_base(base, "config.json", "fetch config.json of the same revision"),
        )


def bad():
    case = tiny()
    del case.json["config.json"]
    return case, "no config.json among the files"


def good():
    return tiny()
