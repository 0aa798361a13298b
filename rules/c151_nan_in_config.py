"""C151 nan-in-config: config file contains NaN.

Why: Python reads and writes NaN, but the JSON standard does not allow it, and readers in C++, Rust or JavaScript stop
at it. A NaN in a scale or an epsilon also makes every output NaN.

Seen as:
- tokenizers: `Exception: expected value at line`
- llama.cpp: `parse error`

Do: write the number, or null.

False alarms: Infinity is not counted: state-space models use it as an open limit.

Fix safety: unsafe, and only with `--from`: the number is taken from the donor. Else manual: the intended number is not
in the file.

Sources: RFC 8259 section 6.
"""

from doctor.lint.rule import Place, _, finding, rule, value_from_base
from doctor.lint.testing import tiny

READ = ("config.json", "generation_config.json", "tokenizer_config.json", "quantize_config.json")


@rule("C151", "warning")
def nan_in_config(checkpoint, json_files, base):
    for name in READ:
        file = json_files.get(name)
        if file is None or file.value is None or "NaN" not in file.non_standard:
            continue
        pointer = next((p for p in (file.doc.non_standard if file.doc else ()) if _is_nan(file.value, p)), None)
        yield finding(
            _("{file} contains NaN at {pointer}", file=name, pointer=pointer)
            if pointer
            else _("{file} contains NaN at an unknown place", file=name),
            at=Place(name, pointer=pointer),
            fix=value_from_base(
                base if pointer else None,
                name,
                pointer or "",
                float("nan"),
                _("write the number that was meant, or null"),
            ),
        )


def _is_nan(value, pointer):
    """Whether readers find NaN there: a later member of the same key may have replaced it."""
    for part in pointer.split("/")[1:]:
        if isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        elif isinstance(value, dict):
            value = value.get(part.replace("~1", "/").replace("~0", "~"))
        else:
            return False
    return value != value


def bad():
    case = tiny()
    case.config["initializer_range"] = float("nan")
    return case, "config.json contains NaN at /initializer_range"


def good():
    return tiny()


def donor():
    """The checkpoint of --from that has the number."""
    case = tiny()
    case.config["initializer_range"] = 0.02
    return case
