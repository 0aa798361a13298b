import json
from dataclasses import replace

import jsonschema
import numpy as np
import pytest

from doctor.api import check
from doctor.checkpoint.directory import Checkpoint
from doctor.cli.main import main
from doctor.core.recipe import Recipe
from doctor.core.store import Variant
from doctor.lint.engine import load_rules
from doctor.lint.testing import tiny, tiny_gptq
from doctor.model.spec import build_spec
from doctor.plan.groups import LAYOUT
from doctor.report import figures, render, screen
from doctor.report.figures import matrix
from doctor.report.formats import terminal
from doctor.scan.header import RECIPE, SPEC, header_facts

PLAN = Recipe(group_size=32)


def narrow():
    """tiny() with an MLP of 96: three groups of 32, which no even number of GPUs can share."""
    case = tiny("llama")
    case.config["intermediate_size"] = 96
    for name, codes in case.tensors.items():
        if ".mlp." in name:
            case.tensors[name] = codes[:, :96] if "down" in name else codes[:96]
    return case


def rows(case, folder, recipe=PLAN, **options):
    return check(case.write(folder), recipe, matrix=True, **options).extra["matrix"]


def cells(row):
    return {c["tp"]: c["codes"] for c in row["cells"]}


def test_each_cell_names_the_codes_in_the_way_and_padding_is_a_step(tmp_path):
    made = rows(narrow(), tmp_path)
    own = [r for r in made if "g32" in r["plan"]]
    assert [r["step"] for r in own] == ["as it is", "after padding"] and own[0]["plan"] == "gptq/awq 4-bit g32"
    assert cells(own[0])[1] == [] and cells(own[0])[2] == ["G302"]
    assert cells(own[1])[2] == []


def test_a_fix_that_changes_the_plan_is_no_step_towards_it(tmp_path):
    report = check(tiny("llama").write(tmp_path), Recipe(group_size=128))
    assert report.findings[0].code == "G301" and report.findings[0].fix.edits
    own = [r for r in rows(tiny("llama"), tmp_path) if "g128" in r["plan"]]
    assert own and all(cells(r)[1] == ["G301"] for r in own)


def test_cells_are_what_a_check_of_that_plan_finds(tmp_path):
    case = narrow()
    for row in rows(case, tmp_path):
        if row["step"] != "as it is":
            continue
        group = -1 if "per-channel" in row["plan"] else int(row["plan"].rsplit("g", 1)[1])
        for tp, codes in cells(row).items():
            found = check(tmp_path, Recipe(group_size=group, tp=tp))
            assert (
                sorted({f.code for f in found.findings if f.severity == "error" and not f.consequence_of}) == codes
            ), (row["plan"], tp)


def test_what_other_rules_found_stands_in_every_plan(tmp_path):
    case = tiny("llama")
    case.down()[0, 0] = 0x7FC0
    case.config["bos_token_id"] = None
    made = rows(case, tmp_path)
    assert all({"W201", "C101"} <= set(c) for r in made if r["step"] == "as it is" for c in cells(r).values())
    assert all("C101" not in c for r in made if r["step"] != "as it is" for c in cells(r).values())
    assert all("W201" in c for r in made for c in cells(r).values())


def test_a_width_that_awq_lacks_has_rows_of_gptq_alone(tmp_path):
    assert {r["plan"].split()[0] for r in rows(tiny("llama"), tmp_path, Recipe(group_size=32, bits=8))} == {"gptq"}


def test_the_number_of_gpus_that_was_asked_for_is_among_the_columns(tmp_path):
    for row in rows(narrow(), tmp_path / "m", replace(PLAN, tp=3)):
        assert [c["tp"] for c in row["cells"]] == [1, 2, 3, 4, 8]


def test_geometry_cuts_attention_by_whole_heads_and_copies_few_key_heads(tmp_path):
    checkpoint = Checkpoint.open(tiny("llama").write(tmp_path / "m"))
    spec = build_spec(checkpoint.value("config.json"), checkpoint.tensors)
    spec = replace(spec, n_heads=9, n_kv_heads=3, hidden=576)
    linears = tuple(x._replace(in_features=576, out_features=576) for x in spec.linears)
    found = {r["role"]: r["tp"] for r in figures.geometry(replace(spec, linears=linears), Recipe(group_size=64, tp=3))}
    assert found["q"] == found["o"] == found["k"] == [1, 3]
    found = {
        r["role"]: r["tp"]
        for r in figures.geometry(replace(spec, linears=linears, n_heads=16, n_kv_heads=2), Recipe(group_size=-1))
    }
    assert found["q"] == found["k"] == [1, 2, 4, 8, 16]


def test_a_packed_linear_counts_as_the_matrix_it_stands_for(tmp_path):
    plain, packed = (
        check(case.write(tmp_path / name), stage="header").summary["parameters"]
        for case, name in ((tiny("llama"), "a"), (tiny_gptq(), "b"))
    )
    assert packed == plain


def test_a_quantized_checkpoint_has_one_plan_its_own(tmp_path):
    made = rows(tiny_gptq("llama"), tmp_path)
    assert {r["plan"] for r in made} == {"as stored: gptq 4-bit g32"}


def test_a_checkpoint_without_config_has_no_matrix(tmp_path):
    case = tiny("llama")
    del case.json["config.json"]
    assert rows(case, tmp_path) == []


def test_a_variant_answers_as_a_store_made_for_the_plan_would(tmp_path):
    checkpoint = Checkpoint.open(tiny("llama").write(tmp_path))
    base, other = header_facts(checkpoint, PLAN), Recipe(group_size=64, tp=2)
    variant, anew = Variant(base, RECIPE, other), header_facts(checkpoint, other)
    for name in ("recipe", "layout"):
        assert variant.value(name) == anew.value(name)
    assert variant.get(SPEC) is base.get(SPEC)
    assert base.get(LAYOUT).group_size == 32
    assert matrix(base, load_rules(), [])


@pytest.mark.parametrize("width", (60, 100))
def test_the_screen_shows_the_matrix_only_when_asked_and_ends_no_line_in_blanks(tmp_path, width):
    import io

    report = check(narrow().write(tmp_path), PLAN, matrix=True)
    out = io.StringIO()
    terminal.show([report], screen.console(out, width, no_color=True), matrix=True)
    assert "gptq/awq 4-bit g32" in out.getvalue() and "2+ GPUs G302" in out.getvalue()
    assert not [line for line in out.getvalue().splitlines() if line != line.rstrip()]
    assert "GPUs" not in render("full", [report])


def test_the_option_puts_it_into_every_format_that_has_room(tmp_path, capsys):
    narrow().write(tmp_path / "m")
    with pytest.raises(SystemExit):
        main(
            [
                "check",
                str(tmp_path / "m"),
                "--group-size",
                "32",
                "--config",
                "none",
                "--matrix",
                "-f",
                "full",
                "-f",
                f"json:{tmp_path / 'r.json'}",
                "-f",
                f"html:{tmp_path / 'r.html'}",
                "-f",
                f"markdown:{tmp_path / 'r.md'}",
            ]
        )
    assert "in the way" in capsys.readouterr().out
    from importlib.resources import files

    document = json.loads((tmp_path / "r.json").read_text())
    jsonschema.validate(document, json.loads(files("doctor.report.formats").joinpath("schema.json").read_text()))
    assert (
        document["extra"]["matrix"]
        and "after padding" in (tmp_path / "r.md").read_text()
        and "after padding" in (tmp_path / "r.html").read_text()
    )


def test_exponents_of_a_small_model_are_those_of_every_value(tmp_path):
    case = tiny()
    case.down()[3, 5:8] = [0x7FC0, 0x4980, 0]  # NaN, 2^20 and 0
    found = check(case.write(tmp_path), PLAN, figures=True).extra["exponents"]
    values = np.concatenate(
        [(codes.astype(np.uint32).ravel() << 16).view(np.float32) for codes in case.tensors.values()]
    )
    finite = values[np.isfinite(values)]
    own = np.floor(np.log2(np.abs(finite[finite != 0]))).astype(int)
    assert found["sampled"] == values.size and found["nonfinite"] == 1 and found["zeros"] == (finite == 0).sum()
    assert (
        found["low"] == own.min()
        and found["counts"] == np.bincount(own - own.min()).tolist()
        and found["counts"][-1] == 1
    )


def test_a_large_tensor_is_sampled_in_its_middle_and_headers_alone_have_no_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "SAMPLE", 32)
    case = tiny()
    folder = case.write(tmp_path)
    assert check(folder, PLAN, figures=True).extra["exponents"]["sampled"] == 32 * len(case.tensors)
    assert "exponents" not in check(folder, PLAN, figures=True, stage="header").extra


def test_a_receipt_of_doctor_is_shown_and_a_stranger_file_of_that_name_is_not(tmp_path):
    steps = [{"code": "C101", "title": "set it", "safety": "safe"}]
    for document, there in (
        ({"source": "a", "recipe": "gptq", "steps": steps}, True),
        ({"steps": "x"}, False),
        ({"steps": [3]}, False),
        ({}, False),
    ):
        folder = tiny().write(tmp_path / str(there) / str(len(str(document))))
        (folder / "doctor.json").write_text(json.dumps(document))
        extra = check(folder, PLAN, figures=True).extra
        assert extra.get("receipt") == (
            {"source": "a", "plan": "gptq", "steps": [["C101", "set it", "safe"]]} if there else None
        )


def test_a_named_scheme_stands_beside_plans_of_other_formats(tmp_path):
    recipe = Recipe("rtn", 4, 16, format="nvfp4-pack-quantized", activations="")
    plans = {row["plan"] for row in check(narrow().write(tmp_path), recipe, matrix=True).extra["matrix"]}
    assert any(plan.startswith("nvfp4-pack-quantized") and "g16" in plan for plan in plans)
    assert not any(plan.startswith("nvfp4-pack-quantized") and "g16" not in plan for plan in plans)
