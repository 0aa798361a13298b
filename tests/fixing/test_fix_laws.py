"""Laws that every fix of every rule keeps."""

import sys

import pytest

from doctor.api import fix
from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import BadCheckpoint


def every_rule():
    from doctor.lint.engine import load_rules

    return load_rules()


@pytest.mark.parametrize("entry", every_rule(), ids=lambda r: r.code)
def test_a_cure_removes_its_finding_adds_none_and_is_done_once(entry, tmp_path):
    """Cures that change the plan instead of the files are held to the same, by the plan that a quantizer's run would
    make.
    """
    from doctor.fixing.consent import Consent
    from doctor.fixing.plan import make_plan, refuse
    from doctor.lint.testing import shown_by

    for number, (case, healthy) in enumerate(shown_by(sys.modules[entry.module])):
        source = case.write(tmp_path / f"source{number}")
        base = healthy.write(tmp_path / f"base{number}") if healthy is not None else None
        facts = [(s, n, v) for (s, n), v in case.facts.items()]
        kept = {p.name: p.read_bytes() for p in source.iterdir() if p.is_file()}
        try:
            result = fix(
                source,
                tmp_path / f"out{number}",
                case.recipe,
                unsafe_fixes=[entry.code],
                only=[entry.code],
                donor=base,
                facts=facts,
            )
        except BadCheckpoint:
            assert base is not None  # an example without weights has no healthy twin to take them from
            continue
        assert {p.name: p.read_bytes() for p in source.iterdir() if p.is_file()} == kept
        in_run = make_plan(
            Checkpoint.open(source),
            case.recipe,
            every_rule(),
            Consent(codes=frozenset([entry.code]), only=frozenset([entry.code]), recipe=True),
            facts=facts,
        )
        refuse(in_run)
        cured = [f for step in in_run.steps for f in step.findings]
        assert not [f for f in in_run.after.findings if f in cured], in_run.after.findings
        if result.plan.steps:
            gone = {(f.subject, f.message) for step in result.plan.steps for f in step.findings}
            again = fix(
                tmp_path / f"out{number}",
                tmp_path / f"again{number}",
                case.recipe,
                unsafe_fixes=[entry.code],
                only=[entry.code],
                donor=base,
                facts=facts,
            )
            assert not again.plan.steps and not gone & {(f.subject, f.message) for f in again.report_before.findings}
