"""What measures and explains, and writes no weight: `verify`, `kvcache`, `advise`, `explain`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Unpack

from doctor.checkpoint.directory import Checkpoint
from doctor.lint.engine import Report, load_rules

if TYPE_CHECKING:
    from doctor.core.options import AdviseOptions, KvcacheOptions, VerifyOptions
    from doctor.evaluate.advise.advise import Advice
    from doctor.evaluate.kvcache.study import KvReport


def verify(
    original: str | os.PathLike[str], quantized: str | os.PathLike[str], **options: Unpack[VerifyOptions]
) -> Report:
    """Compare a quantized checkpoint with its original; for the options see doctor.evaluate.verify.verify."""
    from doctor.quant.early import require_comparable

    first, second = Checkpoint.open(original), Checkpoint.open(quantized)
    require_comparable(first, second, options.get("text"))  # before torch is imported
    from doctor.evaluate.verify import verify as run

    options.setdefault("load_proof", os.environ.get("DOCTOR_LOAD_PROOF") != "0")
    return run(first, second, **options)


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
