"""Results that a command saved with -f json: which command it was, and the result again."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from doctor.cli.output import Outputs, emit_advice, emit_kvcache, emit_table
from doctor.core.errors import DoctorError
from doctor.core.messages import _

_SCHEMA = re.compile(r'"schema":\s*"doctor\.(\w+)/')


def emitter(text: str, verbose: bool) -> Callable[[Outputs], None] | None:
    """What writes the result of kvcache, advise, compare or a list of recipes; None where the text is of another kind.

    Raises DoctorError where it is damaged. torch is not needed.
    """
    kind = _SCHEMA.search(text[:200])
    reader = _READERS.get(kind[1]) if kind else None
    if reader is None:
        return None
    try:
        document = json.loads(text)
    except ValueError as error:
        raise DoctorError(
            _("not JSON: {error}.", error=error), _("Make it again with the command that wrote it.")
        ) from None
    return reader(document, verbose)


def _kvcache(document: dict[str, Any], verbose: bool) -> Callable[[Outputs], None]:
    from doctor.evaluate.kvcache.kv_report import from_dict

    found = from_dict(document)
    return lambda outputs: emit_kvcache(found, outputs)


def _advice(document: dict[str, Any], verbose: bool) -> Callable[[Outputs], None]:
    from doctor.evaluate.advise.advice import from_dict

    found = from_dict(document)
    return lambda outputs: emit_advice(found, outputs, verbose)


def _ranking(document: dict[str, Any], verbose: bool) -> Callable[[Outputs], None]:
    from doctor.evaluate.ranking_report import from_dict
    from doctor.report.ranking_text import ranking_page

    found = from_dict(document)
    return lambda outputs: emit_table(ranking_page(found), outputs)


def _sweep(document: dict[str, Any], verbose: bool) -> Callable[[Outputs], None]:
    from doctor.quant.sweep import from_dict
    from doctor.report.sweep_text import sweep_page

    found = from_dict(document)
    return lambda outputs: emit_table(sweep_page(found), outputs)


_READERS = {"kvcache": _kvcache, "advice": _advice, "compare": _ranking, "sweep": _sweep}
