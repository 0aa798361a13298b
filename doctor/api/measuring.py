"""What measures and explains, and writes no weight: `verify`, `compare`, `kvcache`, `advise`, `explain`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Unpack

from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import DoctorError
from doctor.core.messages import _
from doctor.lint.engine import Report, load_rules

if TYPE_CHECKING:
    from doctor.core.options import AdviseOptions, CompareOptions, KvcacheOptions, VerifyOptions
    from doctor.evaluate.advise.advice import Advice
    from doctor.evaluate.kvcache.study import KvReport
    from doctor.evaluate.ranking_report import Ranking


def verify(
    original: str | os.PathLike[str], quantized: str | os.PathLike[str], **options: Unpack[VerifyOptions]
) -> Report:
    """Compare a quantized checkpoint with its original; for the options see doctor.evaluate.verify.verify."""
    from doctor.evaluate.clients.harness import require_harness
    from doctor.quant.early import require_comparable

    first, second = Checkpoint.open(original), Checkpoint.open(quantized)
    require_comparable(first, second, options.get("text"))  # before torch is imported
    others = [name for name in options.get("tasks", ()) if name != "choices"]
    given = options.get("client_python")
    python = _from_anywhere(os.fspath(given)) if given else None
    options["client_python"] = python
    require_harness(others, python)
    from doctor.evaluate.verify import verify as run

    options.setdefault("load_proof", os.environ.get("DOCTOR_LOAD_PROOF") != "0")
    return run(first, second, **options)


def _from_anywhere(program: str) -> str:
    """The same program for a child that runs in another directory. A name alone is looked up in PATH."""
    return os.path.abspath(program) if os.sep in program else program


def compare(
    quantized: Sequence[str | os.PathLike[str]], original: str | os.PathLike[str], **options: Unpack[CompareOptions]
) -> Ranking:
    """Which of several quantized models is closest to their original; see doctor.evaluate.ranking.rank."""
    from doctor.quant.early import require_comparable

    source, others = Checkpoint.open(original), [Checkpoint.open(path) for path in quantized]
    if not others:
        raise DoctorError(_("compare: no quantized model; must be one or more."))
    for name, least in (("rows", 1), ("context", 2)):
        value = options.get(name, least)
        if not isinstance(value, int) or value < least:
            raise DoctorError(
                _("{option} {value}: must be {least} or more.", option=f"--{name}", value=value, least=least)
            )
    for other in others:  # before torch is imported
        require_comparable(source, other, options.get("text"))
    from doctor.evaluate.ranking import rank

    return rank(others, source, **options)


def kvcache(path: str | os.PathLike[str] | Checkpoint, **options: Unpack[KvcacheOptions]) -> KvReport:
    """Size and error of a model's key/value cache; for the options see doctor.evaluate.kvcache.study.kvcache."""
    from doctor.quant.early import require_cached

    checkpoint = path if isinstance(path, Checkpoint) else Checkpoint.open(path)
    require_cached(checkpoint, **options)  # before torch is imported
    from doctor.evaluate.kvcache.study import kvcache as run

    return run(checkpoint, **options)


def advise(path: str | os.PathLike[str] | Checkpoint, **options: Unpack[AdviseOptions]) -> Advice:
    """What a checkpoint can be served with in so much memory; see doctor.evaluate.advise.advise.advise."""
    from doctor.evaluate.advise.advise import advise as run

    return run(path, **options)


def explain(what: str) -> str:
    """Markdown of the page of a rule, by code or name; for the text of an error, of the rules that it points to."""
    from doctor.locale.rule_pages import pages_for

    return pages_for(what, load_rules())
