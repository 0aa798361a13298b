"""C140 config-missing: no config.json.

Why: only config.json states shapes, heads, norms and rotary positions. Weights without it cannot be loaded as a model.

Seen as:
- transformers: `does not appear to have a file named config.json`
- vLLM: `ValueError: No supported config format found in`

Do: fetch config.json of the same revision.

False alarms: a single weight file that is checked alone is not counted.

Fix safety: unsafe, and only with `--from`: the donor's file is used. Else manual: a config cannot be derived from
shapes alone.

Sources: transformers src/transformers/configuration_utils.py.
"""

from doctor.lint.rule import Place, _, finding, from_base, rule
from doctor.lint.testing import tiny


@rule("C140", "error", implied_by=("F019", "F020", "F022", "G330"))
def config_missing(checkpoint, files, base):
    if "config.json" not in files and not checkpoint.only:
        yield finding(
            _("no config.json among the files"),
            at=Place("config.json"),
            evidence={"files": len(files)},
            fix=from_base(base, "config.json", _("fetch config.json of the same revision")),
        )


def bad():
    case = tiny()
    del case.json["config.json"]
    return case, "no config.json among the files"


def good():
    return tiny()
