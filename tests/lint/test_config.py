import hashlib
import json
import random
import re
import time
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest

from doctor.api import check, fix
from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import DoctorError
from doctor.core.finding import Finding, Place
from doctor.core.recipe import Recipe
from doctor.lint import config, trust
from doctor.lint import suppress as suppression
from doctor.lint.config import Config, Selection, choose
from doctor.lint.engine import load_rules
from doctor.lint.suppress import Suppression
from doctor.lint.testing import tiny
from doctor.report import render
from doctor.report.formats import json_report

RECIPE = Recipe(group_size=32)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A working directory with `ck`, whose first down_proj holds a NaN, and `base`, the same without."""
    spoilt = tiny()
    spoilt.down()[0, 0] = 0x7FC0
    spoilt.write(tmp_path / "ck")
    tiny().write(tmp_path / "base")
    git(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "own"))
    return tmp_path


def git(folder):
    """What makes a directory a project of the user."""
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("ref: refs/heads/main\n")


def write(folder, text, name="doctor.toml"):
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def suppress(code="W201", **more):
    return Config(suppress=(Suppression(code, "known", **{"file": "/x/doctor.toml", **more}),))


def codes(findings):
    return [f.code for f in findings]


# files


def test_the_nearest_file_upward_wins_and_is_not_merged(tmp_path):
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    git(tmp_path)
    write(tmp_path, 'ignore = ["K"]\nfail-on = "info"\n')
    write(tmp_path / "a", '[tool.doctor]\nignore = ["G"]\n', "pyproject.toml")
    write(inner, "[tool.other]\nx = 1\n", "pyproject.toml")
    found = config.load(inner)
    assert (
        found.file == tmp_path / "a" / "pyproject.toml" and found.selection.ignore == ("G",) and found.fail_on is None
    )
    assert config.load(tmp_path).fail_on == "info"


def test_doctor_toml_comes_before_pyproject_in_one_directory(tmp_path):
    git(tmp_path)
    write(tmp_path, 'ignore = ["K"]\n')
    write(tmp_path, '[tool.doctor]\nignore = ["G"]\n', "pyproject.toml")
    assert config.load(tmp_path).selection.ignore == ("K",)


def test_a_directory_that_holds_a_checkpoint_is_never_the_configuration(project):
    write(project / "ck", 'ignore = ["W"]\n')
    assert config.load(project / "ck").file is None
    write(project, 'ignore = ["K"]\n')
    assert config.load(project / "ck").selection.ignore == ("K",)


def test_every_key_is_read(tmp_path):
    (tmp_path / "mine").mkdir()
    path = write(
        tmp_path,
        """
select = ["W", "G"]
extend-select = ["C101"]
ignore = ["K501"]
fail-on = "warning"
rules = ["mine"]
[recipe]
method = "awq"
group-size = 64
runtime = "vllm==0.9"
keep = ["lm_head"]
damp = 0
[[suppress]]
code = "W204"
where = "model.layers.{1,2}.mlp.down_proj.weight"
reason = "kept in 16 bits"
until = 2027-03-01
sha256 = "%s"
"""
        % ("aB" * 32),
    )
    found = config.read(path)
    assert found.selection == Selection(("W", "G"), ("C101",), ("K501",)) and found.rules_dirs == (tmp_path / "mine",)
    assert found.recipe() == Recipe(
        method="awq", group_size=64, runtime="vllm", runtime_version="0.9", keep=("lm_head",), damp=0
    )
    (entry,) = found.suppress
    assert (entry.until, entry.sha256, entry.line) == (date(2027, 3, 1), "ab" * 32, 13)
    assert found.lines["recipe.group_size"] == 9 and found.lines["ignore"] == 4


@pytest.mark.parametrize(
    "text, says",
    [
        ('fail-on = "never"\nignroe = ["K"]\n', r"doctor.toml:2: unknown key ignroe; did you mean ignore\?"),
        ("ignore = [1]\n", "doctor.toml:1: ignore is a list; it must be a list of strings"),
        ('ignore = "K"\n', r"doctor.toml:1: ignore is a string \(K\); it must be a list of strings"),
        ('\nfail-on = "fatal"\n', "doctor.toml:2: fail-on is 'fatal'; it must be one of error"),
        (
            "[recipe]\nbits = 4\ntp = true\n",
            r"doctor.toml:3: recipe.tp is true or false \(True\); it must be a whole number",
        ),
        ("[recipe]\nbits = 5\n", "doctor.toml:2: recipe: bits 5; must be 2, 3, 4 or 8"),
        ("[recipe]\nbitz = 4\n", r"doctor.toml:2: unknown key recipe.bitz; did you mean bits\?"),
        (
            '[[suppress]]\ncode = "W201"\nreason = "a"\n[[suppress]]\ncode = "W202"\n',
            "doctor.toml:4: suppress has no reason",
        ),
        ('[[suppress]]\nreason = "a"\n', "doctor.toml:1: suppress has no code"),
        (
            '[[suppress]]\ncode = "W201"\nreason = "a"\n\nuntil = "2027-01-01"\n',
            "doctor.toml:5: suppress.until is a string .* a date",
        ),
        (
            '[[suppress]]\ncode = "W201"\nreason = "a"\nsha256 = "12"\n',
            "doctor.toml:4: suppress.sha256 is not a SHA-256",
        ),
        ('[[suppress]]\ncode = "W201"\nreason = "a"\nwhere = "{9-1}"\n', "doctor.toml:4: .*9-1 is not a range"),
        ('rules = ["absent"]\n', "doctor.toml:1: rules names .*absent, which is no directory"),
        ('fail-on = "error"\nignore = \n', "doctor.toml:2:10: not TOML"),
        ("suppress = 3\n", "doctor.toml:1: suppress is a whole number"),
    ],
)
def test_what_is_wrong_is_said_with_file_and_line(tmp_path, text, says):
    with pytest.raises(DoctorError, match=says):
        config.read(write(tmp_path, text))


def test_any_text_gives_a_configuration_or_an_error_of_ours(tmp_path):
    """Values of every type at every key, tables in the wrong place, lines left out."""
    draw = random.Random(5)
    lines = [
        'select = ["F"]',
        'ignore = ["K501"]',
        'fail-on = "error"',
        "[recipe]",
        "bits = 4",
        'keep = ["a"]',
        "damp = 0.01",
        "[[suppress]]",
        'code = "W201"',
        'where = "a.{0-3}.*"',
        'reason = "r"',
        "until = 2027-01-01",
    ]
    values = (
        "1",
        "true",
        '"x"',
        "[1]",
        '["a"]',
        "{a=1}",
        "2027-01-01",
        "1.5",
        "nan",
        "-1",
        "[[1]]",
        "2027-01-01T00:00:00Z",
        "00:00:01",
    )
    odd = (
        "[suppress]",
        "[[recipe]]",
        "x=1",
        "[recipe.x]",
        "suppress = 1",
        "\0",
        '"recipe".tp = "z"',
        "select.x=1",
        "[a",
    )
    ended = {True: 0, False: 0}
    for _ in range(400):
        text = list(lines)
        for _ in range(draw.randint(1, 3)):
            at = draw.randrange(len(text))
            if "=" in text[at] and draw.random() < 0.8:
                text[at] = text[at].partition("=")[0] + "= " + draw.choice(values)
            else:
                text[at : at + draw.randint(0, 1)] = [draw.choice(odd)]
        path = write(tmp_path, "\n".join(text))
        try:
            config.read(path)
            ended[True] += 1
        except DoctorError as error:
            assert error.message.startswith(str(path)), error.message
            ended[False] += 1
    assert all(ended.values()), ended


def test_a_line_is_found_below_the_table_of_pyproject(tmp_path):
    path = write(tmp_path, "[tool.x]\nignore = 1\n[tool.doctor]\nignore = 1\n", "pyproject.toml")
    with pytest.raises(DoctorError, match=r"pyproject.toml:4: ignore is"):
        config.read(path)


# selection


def test_layers_add_and_take_away_and_the_later_wins():
    rules = load_rules()

    def chosen(*layers):
        return {r.code for r in choose(rules, layers)}

    every = {r.code for r in rules}
    assert chosen() == every
    assert chosen(Selection(ignore=("W",)), Selection(extend_select=("W201",))) == {c for c in every if c[0] != "W"} | {
        "W201"
    }
    assert chosen(Selection(extend_select=("W201",)), Selection(select=("G",), ignore=("G302",))) == {
        c for c in every if c[0] == "G"
    } - {"G302"}
    assert "K501" not in chosen(Selection(ignore=("K501",)), Selection(ignore=("G302",)))
    with pytest.raises(DoctorError, match="no rule is left"):
        chosen(Selection(select=("W201",), ignore=("W",)))
    with pytest.raises(DoctorError, match="'W9'"):
        chosen(Selection(ignore=("W9",)))


# suppression


@pytest.mark.parametrize(
    "where, name, fits",
    [
        ("model.layers.{1,2}.mlp.down_proj.weight", "model.layers.2.mlp.down_proj.weight", True),
        ("model.layers.{1,2}.mlp.down_proj.weight", "model.layers.12.mlp.down_proj.weight", False),
        ("*layers.{0-3}.*", "model.layers.3.mlp.down_proj.weight", True),
        ("*layers.{0-3}.*", "model.layers.30.mlp.down_proj.weight", False),
        ("*layers.{0-3}*", "model.layers.13.x", False),
        ("*.{gate,up}_proj.weight", "model.layers.7.mlp.up_proj.weight", True),
        ("*.{gate,up}_proj.weight", "model.layers.7.mlp.down_proj.weight", False),
        ("*.mlp.*", "model.layers.7.mlp.up_proj.weight", True),
        ("*a*b*c*", "xxaxxbxxc", True),
        ("*a*b*c*", "xxaxxcxxb", False),
        ("lm_head.weigh?", "lm_head.weight", True),
        ("a.b", "axb", False),
        ("w[0]", "w[0]", True),
        ("config.json#/bos_token_id", "config.json#/bos_token_id", True),
    ],
)
def test_a_pattern_fits_the_names_it_says(where, name, fits):
    place = Place("config.json", pointer="/bos_token_id") if "#" in name else Place("model.safetensors", tensor=name)
    entry = Suppression("W201", "r", where)
    assert entry.matches(Finding("m", place, code="W201")) is fits
    assert not entry.matches(Finding("m", place, code="W202"))


def test_a_hostile_pattern_costs_no_time():
    entry = Suppression("W201", "r", "*a" * suppression.MAX_STARS + "b")
    assert not entry.matches(Finding("m", Place("f", tensor="a" * 20_000), code="W201"))
    with pytest.raises(DoctorError, match="9 stars"):
        suppression.place_pattern("*a" * 9)


def test_five_thousand_suppressions_are_read_and_tried_in_two_seconds(project):
    """Each with its own pattern and none that fits; before, each looked for its line from the start of the file."""
    entry = '[[suppress]]\ncode = "W201"\nwhere = "*a{}*e*e*e*e*e*e*"\nreason = "known"\n\n'
    file = write(project, "".join(entry.format(i) for i in range(5000)))
    started = time.process_time()
    report = check("ck", RECIPE, config=config.read(file))
    seconds = time.process_time() - started
    unused = [f for f in report.findings if f.code == "S001"]
    assert codes(report.findings).count("W201") == 1 and len(unused) == 5000
    assert (unused[0].where.line, unused[-1].where.line) == (1, 5 * 4999 + 1)
    assert seconds < 2, f"{seconds:.2f} s of CPU"


def test_a_suppressed_finding_is_kept_in_the_report_and_not_shown(project):
    report = check("ck", RECIPE, config=suppress(where="*.mlp.*"))
    assert report.ok and not report.findings and codes(report.suppressed) == ["W201"]
    assert "W201" not in render("concise", [report]).replace("suppressed", "") and "1 suppressed" in render(
        "concise", [report]
    )
    assert "1 suppressed" in render("full", [report]) and "1 suppressed" in render("markdown", [report])
    data = json.loads(render("json", [report]))
    assert data["suppressed"][0]["suppression"] == {
        "reason": "known",
        "origin": "/x/doctor.toml:1",
        "from_checkpoint": False,
    }
    (result,) = json.loads(render("sarif", [report]))["runs"][0]["results"]
    assert result["ruleId"] == "W201" and result["suppressions"] == [
        {"kind": "external", "status": "accepted", "justification": "known"}
    ]
    assert json_report.from_dict(data).suppressed == [
        replace(report.suppressed[0], evidence=data["suppressed"][0]["evidence"])
    ]


def test_a_suppression_that_matches_nothing_is_a_finding_where_it_stands(project):
    report = check("base", RECIPE, config=suppress(line=7))
    (item,) = report.findings
    assert (item.code, item.severity, item.where.file, item.where.line) == (
        "S001",
        "warning",
        "/x/doctor.toml",
        7,
    ) and report.ok
    assert "/x/doctor.toml:7:1: S001 the suppression of W201 matches no finding" in render("concise", [report])
    assert "file=/x/doctor.toml,line=7" in render("github", [report])
    assert (
        json.loads(render("sarif", [report]))["runs"][0]["results"][0]["locations"][0]["physicalLocation"][
            "artifactLocation"
        ]["uri"]
        == "/x/doctor.toml"
    )


def test_a_rule_that_did_not_run_gives_no_unused_suppression(project):
    assert not check("base", RECIPE, config=suppress(), stage="header").findings
    assert not check("base", RECIPE, config=suppress(), select=["G"]).findings


def test_a_suppression_that_names_no_rule_is_said(project):
    assert "names no rule" in check("base", RECIPE, config=suppress("W999"), select=["G"]).findings[0].message


def test_after_its_date_it_is_a_finding_again(project):
    entry = Suppression("W201", "known", until=date(2026, 3, 1), file="/x/doctor.toml")
    report = check("ck", RECIPE, config=Config())
    last, after = (
        suppression.suppress([entry], report.findings, report.runs, Checkpoint.open("ck"), day)
        for day in (date(2026, 3, 1), date(2026, 3, 2))
    )
    assert not last.findings and not last.own
    assert codes(after.findings) == ["W201"] and not after.suppressed
    assert "ended on 2026-03-01: 1 finding is shown again" in after.own[0].message and after.own[0].severity == "info"


def test_a_hash_ties_a_suppression_to_one_file_and_only_that_file_is_hashed(project, monkeypatch):
    digest = hashlib.sha256(Path("ck/model.safetensors").read_bytes()).hexdigest()
    hashed = []
    real = Checkpoint.sha256
    monkeypatch.setattr(Checkpoint, "sha256", lambda self, name: hashed.append(name) or real(self, name))
    assert codes(check("ck", RECIPE, config=suppress(sha256=digest)).suppressed) == ["W201"] and hashed == [
        "model.safetensors"
    ]
    other = check("ck", RECIPE, config=suppress(sha256="0" * 64))
    assert codes(other.findings) == ["W201", "S001"] and "for sha256 000000000000…" in other.findings[1].message
    check("ck", RECIPE, config=suppress())
    assert len(hashed) == 2


def test_the_checkpoints_own_file_may_suppress_where_it_is_trusted_and_is_counted(project):
    own = write(project / "ck", '[[suppress]]\ncode = "W201"\nreason = "trust me"\n')
    trust.allow(own)
    report = check("ck", RECIPE, config=Config())
    assert report.ok and report.suppressed[0].suppression["from_checkpoint"]
    assert "1 suppressed (1 by the checkpoint itself)" in " ".join(render("full", [report]).split())
    assert codes(check("ck", RECIPE, config=Config(reads_checkpoint=False)).findings) == ["W201"]
    assert codes(check("ck", RECIPE).findings) == ["W201"]
    own.write_text(own.read_text() + "# changed\n")
    assert codes(check("ck", RECIPE, config=Config()).findings) == ["W201", "S002"]


@pytest.mark.parametrize(
    "text, says",
    [
        ('ignore = ["W"]\nselect = ["G"]\n', "it sets ignore, select; it may only suppress"),
        ("[recipe]\ngroup_size = 64\n", "it sets recipe; it may only suppress"),
        ("ignore = [", "was not followed: .*not TOML: "),
        ('[[suppress]]\ncode = "W201"\n', "was not followed: .*suppress has no reason"),
        ('[[suppress]]\ncode = "W201"\nreason="x"\nwhere = "%s"\n' % ("*" + "x*" * 40), "41 stars"),
        ("a = " + "[" * 4000, "doctor.toml was not followed: "),
    ],
)
def test_the_checkpoints_own_file_may_do_nothing_else(project, text, says):
    trust.allow(write(project / "ck", text))
    report = check("ck", RECIPE, config=Config())
    assert codes(report.findings) == ["W201", "S002"] and not report.ok
    assert re.search(says, report.findings[1].message), report.findings[1].message


def test_fix_leaves_what_is_suppressed_alone(tmp_path):
    case = tiny()
    case.config["bos_token_id"] = None
    case.write(tmp_path / "ck")
    assert fix(tmp_path / "ck", tmp_path / "out", RECIPE, dry_run=True).plan.steps
    done = fix(tmp_path / "ck", tmp_path / "out", RECIPE, dry_run=True, config=suppress("C101"))
    assert not done.plan.steps and not done.report.findings and codes(done.report.suppressed) == ["C101"]


def test_one_configuration_for_two_checkpoints_is_used_if_one_of_them_needs_it(project):
    reports = [check(name, RECIPE, config=suppress()) for name in ("ck", "base")]
    assert codes(reports[1].findings) == ["S001"]
    suppression.settle(reports)
    assert not reports[0].findings and not reports[1].findings


# baselines


def test_a_baseline_parts_new_unchanged_and_gone(project):
    more = tiny()
    for block in (0, 1):
        more.down(block)[0, 0] = 0x7FC0
    more.write(project / "more")
    ck, base = check("ck", RECIPE), check("base", RECIPE)
    report = check("more", RECIPE, baseline=ck)
    assert [f.baseline_state for f in report.findings] == ["unchanged", "new"] and not report.ok and not report.gone
    assert "1 new since ck" in render("full", [report]) and "new error[W201]" in render("full", [report])
    states = {r["baselineState"] for r in json.loads(render("sarif", [report]))["runs"][0]["results"]}
    assert states == {"unchanged", "new"}
    same = check("ck", RECIPE, baseline=ck)
    assert same.ok and same.findings and "not ready" in render("full", [same])
    better = check("base", RECIPE, baseline=ck)
    assert better.ok and codes(better.gone) == ["W201"] and "0 new, 1 gone since ck" in render("concise", [better])
    assert json.loads(render("sarif", [better]))["runs"][0]["results"][0]["baselineState"] == "absent"
    assert check("ck", RECIPE, baseline=base).findings[0].baseline_state == "new"


def test_a_saved_report_is_a_baseline_too(project):
    saved = json_report.read(render("json", [check("ck", RECIPE)]))[0]
    assert check("ck", RECIPE, baseline=saved).findings[0].baseline_state == "unchanged"


# the command line


def run(capsys, *arguments):
    from doctor.cli.main import main

    try:
        main(list(arguments))
        code = 0
    except SystemExit as error:
        code = error.code
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_flags_win_over_the_environment_and_it_over_the_file(project, capsys, monkeypatch):
    write(project, "[recipe]\ngroup_size = 32\ntp = 2\nbits = 8\n")
    monkeypatch.setenv("DOCTOR_TP", "4")
    monkeypatch.setenv("DOCTOR_BITS", "3")
    code, out, _ = run(capsys, "check", "base", "--show-settings", "--bits", "2")
    lines = {line.split()[0]: line.split()[1:] for line in out.splitlines()}
    assert code == 0
    assert lines["recipe.bits"] == ["2", "--bits"] and lines["recipe.tp"] == ["4", "DOCTOR_TP"]
    assert lines["recipe.group_size"] == ["32", "doctor.toml:2"] and lines["recipe.method"] == ['"gptq"', "built", "in"]


def test_the_file_gives_the_plan_and_the_threshold(project, capsys):
    write(project, 'fail-on = "never"\nignore = ["W"]\n[recipe]\ngroup_size = 32\nruntime = "vllm==0.9"\n')
    code, out, _ = run(capsys, "check", "ck", "--concise")
    assert code == 0 and "gptq 4-bit g32" in out and "W201" not in out
    code, out, _ = run(capsys, "check", "ck", "--concise", "--config", "none", "--group-size", "32")
    assert code == 1 and "W201" in out
    code, out, _ = run(capsys, "check", "ck", "--concise", "--extend-select", "W201", "--fail-on", "error")
    assert code == 1 and "W201" in out


def test_a_wrong_file_ends_with_2_and_help_works_all_the_same(project, capsys):
    write(project, "ignor = 1\n")
    code, _, err = run(capsys, "check", "base")
    assert code == 2 and "doctor.toml:1: unknown key ignor" in err
    assert run(capsys, "check", "--help")[0] == 0


def test_baselines_on_the_command_line(project, capsys):
    plan = ("--group-size", "32", "--config", "none")
    run(capsys, "check", "ck", *plan, "-f", "json:ck.json")
    assert run(capsys, "check", "ck", *plan, "--baseline", "ck.json")[0] == 0
    code, out, _ = run(capsys, "check", "ck", *plan, "--baseline", "base")
    assert code == 1 and "1 new since base" in out
    code, _, err = run(capsys, "check", "ck", "--config", "none", "--baseline", "ck.json")
    assert "ck.json was made for gptq 4-bit g32, this run is for gptq 4-bit g128" in err
    assert run(capsys, "check", "ck", *plan, "--baseline", "absent.json")[0] == 2


def test_statistics_count_by_code(project, capsys):
    code, out, _ = run(capsys, "check", "ck", "--group-size", "32", "--config", "none", "--statistics")
    assert code == 1 and out.split()[:3] == ["1", "W201", "error"]


def test_explain_knows_the_engines_own_codes(capsys):
    code, out, _ = run(capsys, "explain", "S001")
    assert code == 0 and "unused-suppression" in out


def test_the_documentation_shows_every_key_and_its_example_is_read(tmp_path):
    text = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text(encoding="utf-8")
    example = text.partition("```toml\n")[2].partition("```")[0]
    (tmp_path / "lint" / "rules").mkdir(parents=True)
    found = config.read(write(tmp_path, example))
    assert (
        set(found.lines) | {"recipe", "suppress"} >= set(config.TOP_TYPES)
        and found.suppress[0].until
        and found.recipe().runtime_version == "0.9"
    )
    assert all(f"`{key}`" in text for key in config.SUPPRESS_TYPES)


def test_a_field_without_a_flag_holds_in_the_plan_of_a_check_too(project, capsys):
    write(project, '[recipe]\ngroup_size = 48\nkeep = ["*"]\n')
    assert run(capsys, "check", "base", "--select", "G301")[0] == 0
    assert "recipe.keep" in run(capsys, "check", "base", "--show-settings")[1]
    write(project, "[recipe]\ngroup_size = 48\n")
    assert run(capsys, "check", "base", "--select", "G301")[0] == 1


@pytest.mark.parametrize("how", ("flag", "file"))
def test_rules_of_a_directory_run_beside_ours(project, capsys, monkeypatch, how):
    from doctor.lint import engine, rule, suppress
    from doctor.lint.rule import RULES

    load_rules()
    for module in (engine, rule, suppress):
        monkeypatch.setattr(module, "RULES", dict(RULES) if module is engine else engine.RULES)
    (project / "mine").mkdir()
    (project / "mine" / f"w99{len(how)}_own_{how}.py").write_text(
        f'"""W99{len(how)} own-{how}: invented.\n\nWhy: a test.\nDo: nothing.\n"""\nfrom doctor.lint.rule import '
        f"finding, rule\n\n\n"
        f'@rule("W99{len(how)}", "error")\ndef check(tensor, numel):\n    yield finding("seen")\n'
    )
    if how == "file":
        trust.allow(write(project, 'rules = ["mine"]\n'))
    code, out, _ = run(
        capsys,
        "check",
        "base",
        "--group-size",
        "32",
        "--select",
        f"own-{how}",
        *(("--rules", "mine") if how == "flag" else ()),
        "--concise",
    )
    assert code == 1 and f"W99{len(how)}" in out and "seen" in out
