"""Fixes become a plan: composed in any order, refused where they clash, carried out only when nothing new comes of
them.
"""

import itertools
import sys

import pytest

from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import DoctorError, PlanRefused
from doctor.edits.kinds import PadTensor, RemoveJson, ReplaceNonfinite, SetJson, SetRecipe
from doctor.fixing.assess import assess
from doctor.fixing.consent import Consent
from doctor.fixing.describe import diff_lines, fold_names
from doctor.fixing.edit_set import compose
from doctor.fixing.plan import make_plan, refuse
from doctor.lint.engine import load_rules
from doctor.lint.rule import RULES
from doctor.lint.testing import tiny
from doctor.scan.value_facts import STATS

# One file of rules for these tests: each looks at a key that no real checkpoint has, so all other rules stay silent.
RULE_FILE = '''"""{code} {name}: a rule for tests.

Why: -
Do: -
False alarms: -
Fix safety: -
Sources: -
"""

from doctor.lint.rule import Place, finding, rule, Fix, SetJson, RemoveJson, MISSING, PadTensor, SetRecipe


@rule("{code}", "warning")
def check(checkpoint, config{more}):
{body}
'''


@pytest.fixture
def plan_of(tmp_path):
    """plan_of(case, {code: body}, consent): the plan of a case under all rules and these, which are forgotten again."""
    made, runs = [], itertools.count()

    def forget():
        for code, name in made:
            RULES.pop(code, None)
            sys.modules.pop(f"doctor_extra_rules.{name}", None)

    def run(case, bodies, consent=None):
        forget()
        number = next(runs)
        folder = tmp_path / f"rules{number}"
        folder.mkdir()
        for code, body in bodies.items():
            lines = "\n".join("    " + line for line in body.strip().splitlines())
            name = f"{code.lower()}_for_tests_{tmp_path.name.replace('-', '_')}_{number}"
            (folder / f"{name}.py").write_text(
                RULE_FILE.format(
                    code=code,
                    name="for-tests",
                    body=lines,
                    more="".join(f", {fact}" for fact in ("tensors", "recipe") if fact in body),
                )
            )
            made.append((code, name))
        rules = load_rules([folder])
        source = Checkpoint.open(case.write(tmp_path / "source"))
        return make_plan(source, case.recipe, rules, consent)

    yield run
    forget()


def sets(value, key="x_test", safety="safe", **more):
    extra = "".join(f", {k}={v!r}" for k, v in more.items())
    return f'''
if config.get("{key}") != {value!r}:
    yield finding("x is wrong", at=Place("config.json", "/{key}"),
                  fix=Fix("set x", (SetJson("config.json", "/{key}", {value!r}, config.get("{key}", MISSING)),),
                          "{safety}"{extra}))
'''


# compose

EDITS = [
    ("A1", SetJson("a.json", "/x", 1)),
    ("B1", SetJson("a.json", "/x", 1)),
    ("A1", PadTensor("t", 0, 8)),
    ("C1", PadTensor("t", 1, 8)),
    ("D1", ReplaceNonfinite("t")),
]


def test_compose_gives_the_same_in_any_order_and_once_for_all():
    results = {tuple(compose(order)) for order in itertools.permutations(EDITS)}
    assert len(results) == 1
    (only,) = results
    assert len(only) == 4 and [type(e).__name__ for e in only] == [
        "ReplaceNonfinite",
        "PadTensor",
        "PadTensor",
        "SetJson",
    ]
    assert tuple(compose([("Z9", e) for e in only] * 2)) == only


@pytest.mark.parametrize(
    "one, other, message",
    [
        (SetJson("c.json", "/x", 1), SetJson("c.json", "/x", 2), r"c.json#/x: B1 wants 2, A1 wants 1"),
        (SetJson("c.json", "/x", 1), RemoveJson("c.json", "/x"), r"B1 wants it removed, A1 wants 1"),
        (
            SetJson("c.json", "/x", {"y": 1}),
            SetJson("c.json", "/x/y", 2),
            r"c.json#/x/y: B1 wants 2, A1 wants \{\"y\": 1\}",
        ),
        (PadTensor("t", 0, 8), PadTensor("t", 0, 16, blocks=2), r"tensor:t:axis0: B1 wants 16 in 2 parts, A1 wants 8"),
        (ReplaceNonfinite("t"), ReplaceNonfinite("t", 1.0), r"tensor:t:values: B1 wants ReplaceNonfinite\(1.0\)"),
    ],
)
def test_two_edits_on_one_target_are_refused_naming_both_rules_and_values(one, other, message):
    with pytest.raises(PlanRefused, match=message):
        compose([("A1", one), ("B1", other)])


def test_keys_with_a_common_beginning_are_different_targets():
    assert (
        len(
            compose(
                [
                    ("A1", SetJson("c.json", "/x", 1)),
                    ("B1", SetJson("c.json", "/xy", 2)),
                    ("B1", SetJson("d.json", "/x", 3)),
                ]
            )
        )
        == 3
    )


# the loop


def test_a_healthy_checkpoint_gives_an_empty_plan(plan_of):
    plan = plan_of(tiny(), {})
    assert not plan.steps and not plan.waiting and not plan.files_written and not plan.problems


def test_safe_fixes_go_and_unsafe_ones_wait_for_the_users_word(plan_of):
    bodies = {"C190": sets(5), "C191": sets(6, "y_test", "unsafe"), "C192": sets(7, "z_test", "unsafe", by_name=True)}
    for consent, gone in (
        (Consent(), {"C190"}),
        (Consent(unsafe=True), {"C190", "C191"}),
        (Consent(codes=frozenset({"C192"})), {"C190", "C192"}),
        (Consent(unsafe=True, only=frozenset({"C191"})), {"C191"}),
    ):
        plan = plan_of(tiny(), bodies, consent)
        assert {s.code for s in plan.steps} == gone
        assert {s.code for s in plan.optional} == set(bodies) - gone
        assert plan.overlay.changed == {"config.json"} and plan.files_written == ["config.json"]
        assert plan.bytes_to_write == len(plan.overlay.json["config.json"].raw)


def test_a_fix_that_uncovers_another_finding_is_followed_by_its_fix(plan_of):
    plan = plan_of(
        tiny(),
        {
            "C190": sets(5),
            "C191": 'if config.get("x_test") == 5:\n'
            + "\n".join("    " + x for x in sets(6, "y_test").strip().splitlines()),
        },
    )
    assert [s.code for s in plan.steps] == ["C190", "C191"] and not plan.problems
    assert plan.overlay.value("config.json")["y_test"] == 6 and plan.steps[1].after == 1


def test_two_wishes_for_one_key_let_the_first_win_and_the_other_is_reported(plan_of):
    plan = plan_of(tiny(), {"C190": sets(5), "C191": sets(6)})
    assert [s.code for s in plan.steps] == ["C190"]
    (loser,) = plan.waiting
    assert loser.code == "C191" and "config.json#/x_test: C191 wants 6, C190 wants 5" in loser.waits


def test_a_fix_that_does_not_cure_stops_the_plan(plan_of):
    plan = plan_of(tiny(), {"C190": sets(5).replace('config.get("x_test") != 5', "True")})
    assert plan.problems == ["C190 is still there after its fix: x is wrong"]
    with pytest.raises(PlanRefused, match=r"C190 is still there after its fix: x is wrong.*Nothing was written"):
        refuse(plan)


def test_a_finding_that_a_fix_causes_stops_the_plan(plan_of):
    plan = plan_of(
        tiny(),
        {
            "C190": sets(5),
            "C191": (
                'if config.get("x_test") == 5:\n    yield finding("five is bad", at=Place("config.json", "/x_test"))'
            ),
        },
    )
    assert plan.problems == ["C191 appears because of the fixes: five is bad"]


def test_a_rule_that_a_fix_makes_crash_stops_the_plan(plan_of):
    plan = plan_of(
        tiny(), {"C190": sets(5), "C191": 'if config.get("x_test") == 5:\n    raise KeyError("x")\nyield from ()'}
    )
    assert plan.problems == ["C191 crashed on the fixed checkpoint, so it cannot be judged"]
    before = plan_of(tiny(), {"C190": sets(5), "C191": 'raise KeyError("x")\nyield from ()'})
    assert not before.problems and [s.code for s in before.steps] == ["C190"]


def test_fixes_that_never_rest_are_our_bug_and_said(plan_of):
    body = """
n = sum(k.startswith("x_test") for k in config)
yield finding(f"{n} is not enough", at=Place("config.json", f"/x_test{n}"),
              fix=Fix("one more", (SetJson("config.json", f"/x_test{n}", 1, MISSING),)))
"""
    with pytest.raises(
        DoctorError,
        match=r"after 10 passes fixes still bring new fixes \(C190\). This is an internal error \(a bug in doctor\)",
    ):
        plan_of(tiny(), {"C190": body})


def test_a_fix_waits_for_what_it_needs_on_its_own_tensors_only(plan_of):
    case = tiny()
    case.down()[0, 0] = 0x7FC0
    body = """
name = "{name}"
if tensors[name].shape[1] == 128:
    yield finding("too narrow", at=Place("", tensor=name),
                  fix=Fix("grow", (PadTensor(name, 1, 160), SetJson("config.json", "/x_test", 1, MISSING)),
                          "safe", needs=("W201",)))
"""
    blocked = plan_of(case, {"C190": body.format(name=case.name("down"))}, Consent(only=frozenset({"C190"})))
    assert not blocked.steps and blocked.waiting[0].waits == "waits for W201"
    assert blocked.waiting[0].tensors == [(case.name("down"), "BF16", (64, 128), (64, 160))]


def test_edits_that_do_not_fit_the_files_are_told_and_the_others_go_on(plan_of):
    stale = sets(6, "y_test").replace('config.get("y_test", MISSING)', "41")
    plan = plan_of(tiny(), {"C190": sets(5), "C191": stale})
    assert [s.code for s in plan.steps] == ["C190"]
    assert plan.waiting[0].waits == "config.json#/y_test: no value; the edit expects 41."


def test_edits_of_the_recipe_are_for_a_quantizers_run(plan_of):
    body = """
if recipe.damp < 0.05:
    yield finding("damp too low", at=Place("config.json"), fix=Fix("more damp", (SetRecipe("damp", 0.05),)))
"""
    on_disk = plan_of(tiny(), {"C190": body})
    assert not on_disk.steps and [f.code for f in on_disk.for_you] == ["C190"]
    in_run = plan_of(tiny(), {"C190": body}, Consent(recipe=True))
    assert (
        in_run.steps[0].edits == [SetRecipe("damp", 0.05)] and in_run.recipe.damp == 0.05 and not in_run.after.findings
    )


def test_only_edited_tensors_are_read_again(plan_of):
    case = tiny()
    case.shards = 2
    case.down()[0, 0] = 0x7FC0
    plan = plan_of(case, {}, Consent(codes=frozenset({"W201"})))
    assert [s.code for s in plan.steps] == ["W201"] and not plan.after.findings
    assert plan.before.bytes_read == plan.source.total_bytes and plan.after.bytes_read == case.down().nbytes


def test_a_partial_look_says_what_a_whole_one_says(plan_of, tmp_path):
    case = tiny()
    case.down()[0, 0] = 0x7FC0
    case.tensors[case.name("up", 1)][:] = 0
    plan = plan_of(case, {}, Consent(codes=frozenset({"W201"})))
    whole = assess(plan.overlay, plan.recipe, load_rules())
    assert [(f.code, f.message) for f in whole.findings] == [(f.code, f.message) for f in plan.after.findings] != []
    for subject in whole.store.subjects("tensor"):
        assert whole.store.get(STATS, subject) == plan.after.store.get(STATS, subject)


# what is shown


def test_diffs_are_minimal_numbered_and_cut():
    assert diff_lines("a\nb\nc\n", "a\nx\nc\n") == ["@@ -2,1 +2,1 @@", "-b", "+x"]
    assert diff_lines("", "{}\n") == ["@@ -1,0 +1,1 @@", "+{}"]
    long = diff_lines("\n".join(map(str, range(5000))), "\n".join(map(str, range(5000, 10000))))
    assert len(long) == 40 and long[-1] == "and 9,962 more lines"
    (_, old, new) = diff_lines("x" * 1000 + "1" + "y" * 1000, "x" * 1000 + "2" + "y" * 1000)
    assert len(old) < 170 and "x1y" in old and "x2y" in new


def test_names_fold_into_ranges_only_where_that_says_the_same():
    names = [f"l.{i}.mlp.experts.{e}.up" for i in range(2) for e in range(4)]
    assert fold_names(names) == ["l.{0-1}.mlp.experts.{0-3}.up"]
    assert fold_names(names[:-1]) == sorted(names[:-1])
    assert fold_names(["l.0.up", "l.2.up", "norm"]) == ["l.{0,2}.up", "norm"]
