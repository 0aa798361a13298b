"""The command line as a user meets it: exit codes, what goes where, errors without tracebacks, and no torch unless
needed.
"""

import json
import os
import re
import subprocess
import sys
import time

import click
import pytest

from doctor import api
from doctor.cli import main as cli
from doctor.cli.options import overrides, size_in_bytes
from doctor.core.errors import BadCheckpoint, DoctorError
from doctor.core.recipe import matches
from doctor.lint.testing import tiny, tiny_gptq

PLAN = ["--group-size", "32"]


@pytest.fixture
def run(capsys, plain_environment):
    """Run `doctor ARGS`: (exit code, stdout, stderr)."""

    def call(*args):
        with pytest.raises(SystemExit) as end:
            cli.main([str(a) for a in args])
            raise SystemExit(0)  # what the interpreter does after main returns
        out = capsys.readouterr()
        return end.value.code or 0, out.out, out.err

    return call


@pytest.fixture
def good(tmp_path):
    return tiny("llama").write(tmp_path / "good")


@pytest.fixture
def bad(tmp_path):
    case = tiny("llama")
    case.down()[3, 5] = 0x7FC0
    return case.write(tmp_path / "bad")


def test_a_ready_checkpoint_exits_0_in_two_lines(run, good):
    code, out, err = run("check", good, *PLAN)
    assert code == 0 and err == ""
    first, second = out.splitlines()
    assert first.startswith("✓ ready for gptq 4-bit g32   good · LlamaForCausalLM")
    assert "every byte read" in second


def test_findings_exit_1_and_name_the_place(run, bad):
    code, out, err = run("check", bad, *PLAN)
    assert code == 1 and err == ""
    assert "error[W201] 1 NaN among 8,192 values of model.layers.0.mlp.down_proj.weight" in out
    assert re.search(r"--> model\.safetensors : model\.layers\.0\.mlp\.down_proj\.weight\[3, 5\] \(byte [\d,]+\)", out)
    assert "✗ not ready for gptq 4-bit g32" in out and "--unsafe-fixes=W201" in out


def test_fail_on_decides_the_exit_code_and_not_the_findings(run, bad):
    for fail_on, want in (("never", 0), ("error", 1), ("warning", 1)):
        code, out, _ = run("check", bad, *PLAN, "--fail-on", fail_on)
        assert code == want and "W201" in out
        assert "not ready" in out


def test_fail_on_skipped_makes_silence_a_failure(run, good):
    assert run("check", good, *PLAN, "--stage", "header")[0] == 0
    assert run("check", good, *PLAN, "--stage", "header", "--fail-on-skipped")[0] == 1


def test_header_stage_reads_no_weights_and_says_so(run, bad):
    code, out, _ = run("check", bad, *PLAN, "--stage", "header")
    assert code == 0 and "(headers only)" in out and "weights not read" in out


def test_select_and_ignore_take_codes_families_and_commas(run, bad):
    assert run("check", bad, *PLAN, "--select", "F,G")[0] == 0
    assert run("check", bad, *PLAN, "--select", "F,W201", "--select", "G")[0] == 1
    code, out, _ = run("check", bad, *PLAN, "--select", "nonfinite-weight", "-v")
    assert code == 1 and "W202" not in out
    assert run("check", bad, *PLAN, "--ignore", "W201")[0] == 0


def test_the_default_plan_is_printed_and_said_to_be_the_default(run, bad):
    _, out, _ = run("check", bad)
    assert out.splitlines()[1].startswith(
        "recipe        gptq · 4 bit · group 128 · sym → 1 GPU   default recipe; --for"
    )
    _, out, _ = run("check", bad, "--for", "awq", "--tensor-parallel-size", "2", "--runtime", "vllm==0.9.1")
    assert out.splitlines()[1] == "recipe        awq · 4 bit · group 128 · asym → vllm 0.9.1, tensor parallel 2"


@pytest.mark.parametrize(
    "args, says",
    [
        (["check", "/nowhere/at/all"], "Error: /nowhere/at/all: No such file or directory."),
        (["check", "."], None),
        (["check", ".", "--bits", "5"], "Error: recipe: bits 5; must be 2, 3, 4 or 8."),
        (["check", ".", "--runtime", "tgi"], "runtime 'tgi'; must be one of"),
        (["check", ".", "--select", "Z9"], "Error: 'Z9': no rule has this code"),
        (["check", ".", "-f", "yaml"], "'yaml' is not one of full, concise, json"),
        (["check", ".", "-f", "json", "-f", "sarif"], "Only one format can go to stdout"),
        (["check", "--group-size", "x", "."], "is not a valid integer"),
        (["check"], "Missing argument 'CHECKPOINT...'"),
        (["chek"], "No such command 'chek'"),
        (["render", "/nowhere.json"], "Error: /nowhere.json: No such file or directory."),
        (["quantize", ".", "-o", "x", "--memory", "lots"], "'lots' is not a size"),
    ],
)
def test_what_cannot_be_done_exits_2_without_a_traceback(run, tmp_path, monkeypatch, args, says):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    code, out, err = run(*args)
    if says is not None:
        assert code == 2 and says in err and out == ""
    assert "Traceback" not in out + err


def test_a_hint_stands_on_its_own_line_and_debug_shows_the_traceback(run, monkeypatch):
    _, _, err = run("check", "/nowhere")
    assert err.splitlines()[1] == "Hint: Give a directory that holds config.json and *.safetensors."
    monkeypatch.setenv("DOCTOR_DEBUG", "1")
    _, _, err = run("check", "/nowhere")
    assert "Traceback" in err and "BadCheckpoint" in err and err.splitlines()[-1].startswith("Hint:")


def test_a_defect_of_ours_is_said_to_be_ours(run, good, monkeypatch):
    monkeypatch.setattr(api, "check", lambda *_, **__: 1 / 0)
    code, _out, err = run("check", good)
    assert (
        code == 2
        and "ZeroDivisionError" in err
        and "internal error (a bug in doctor)" in err
        and "Traceback" not in err
    )


def test_json_is_one_valid_document_also_on_failure(run, bad, monkeypatch):
    code, out, _ = run("check", bad, *PLAN, "-f", "json")
    assert code == 1 and json.loads(out)["ok"] is False and json.loads(out)["findings"][0]["code"] == "W201"
    code, out, err = run("check", "/nowhere", "-f", "json")
    assert code == 2 and json.loads(out)["error"]["type"] == "BadCheckpoint" and err.startswith("Error:")
    monkeypatch.setattr(api, "check", lambda *_, **__: 1 / 0)
    code, out, _ = run("check", bad, "-f", "json")
    assert code == 2 and json.loads(out)["error"]["type"] == "ZeroDivisionError"


def test_several_formats_go_to_files_and_one_to_stdout(run, bad, tmp_path):
    names = {
        "html": "r.html",
        "sarif": "r.sarif",
        "junit": "r.xml",
        "markdown": "r.md",
        "json": "r.json",
        "gitlab": "r.gl",
        "github": "r.gh",
    }
    code, out, err = run(
        "check", bad, *PLAN, "--concise", *(x for n, f in names.items() for x in ("-f", f"{n}:{tmp_path / f}"))
    )
    assert code == 1 and out.splitlines()[0].startswith(f"{bad}/model.safetensors: W201 1 NaN")
    for file in names.values():
        assert "W201" in (tmp_path / file).read_text() and f"Wrote {tmp_path / file}" in err


def test_a_report_that_cannot_be_written_is_an_error(run, good, tmp_path):
    code, _, err = run("check", good, *PLAN, "-f", f"html:{tmp_path}/no/such/dir/r.html")
    assert code == 2 and "Error:" in err and "No such file or directory" in err


def test_several_checkpoints_exit_with_the_worst(run, good, bad):
    code, out, _ = run("check", good, bad, *PLAN)
    assert code == 1 and "✓ ready" in out and "✗ not ready" in out
    code, out, _ = run("check", good, bad, *PLAN, "-f", "json")
    assert [r["ok"] for r in json.loads(out)["reports"]] == [True, False]


def test_a_rule_that_crashes_is_ours_and_exits_2(run, good, tmp_path):
    rules = tmp_path / "rules"
    rules.mkdir()
    (rules / "w990_crashes.py").write_text(
        '"""W990 crashes: it crashes."""\nfrom doctor.lint.rule import rule\n\n\n@rule("W990", "error")\n'
        "def crashes(tensor, numel):\n    yield 1 / 0\n"
    )
    try:
        code, out, _ = run("check", good, *PLAN, "--rules", rules)
        assert code == 2 and "☠ W990 crashed" in out and "✓ ready" not in out
        assert run("check", good, *PLAN, "--rules", rules, "--fail-on", "never")[0] == 2
    finally:
        from doctor.lint.rule import RULES

        RULES.pop("W990", None)
        sys.modules.pop("doctor_extra_rules.w990_crashes", None)


def test_interruption_exits_130(run, good, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "check", stop)
    code, _, err = run("check", good)
    assert code == 130 and "Interrupted" in err and "Traceback" not in err


def test_every_option_comes_from_the_environment_too(run, bad, monkeypatch):
    monkeypatch.setenv("DOCTOR_FAIL_ON", "never")
    monkeypatch.setenv("DOCTOR_GROUP_SIZE", "32")
    code, out, _ = run("check", bad)
    assert code == 0 and "group 32" in out


def test_statistics_counts_by_code(run, bad):
    code, out, _ = run("check", bad, *PLAN, "--statistics")
    assert code == 1 and out.splitlines() == ["     1  W201  error   nonfinite-weight"]


def test_verbose_lists_every_rule_with_its_reason(run, good):
    _, out, _ = run("check", good, *PLAN, "-v", "--stage", "header")
    assert "W201" in out and "needs values, but only header was asked for" in out


def test_render_makes_another_format_from_a_saved_report(run, bad, tmp_path):
    saved = tmp_path / "doctor.json"
    run("check", bad, *PLAN, "-f", f"json:{saved}")
    _, direct, _ = run("check", bad, *PLAN, "-f", "gitlab")
    code, again, _ = run("render", saved, "-f", "gitlab")
    assert code == 0 and json.loads(again) == json.loads(direct)
    code, _, err = run("render", saved, "-f", f"html:{tmp_path / 'r.html'}")
    assert code == 0 and "Weights, layer by layer" in (tmp_path / "r.html").read_text()
    saved.write_text("{}")
    code, _, err = run("render", saved)
    assert code == 2 and "not a report" in err


def test_explain_shows_a_page_for_codes_and_names(run):
    code, out, _ = run("explain", "w201")
    assert (
        code == 0
        and "nonfinite-weight" in out
        and "Why it matters" in out
        and "ValueError: Hessian is not invertible" in out
    )
    assert run("explain", "nonfinite-weight")[1] == out
    assert run("explain", "W201", "-f", "markdown")[1].startswith("# W201 nonfinite-weight")


def test_explain_finds_rules_by_a_pasted_error_and_by_stdin(run, monkeypatch):
    code, out, _ = run("explain", "ValueError:", "Hessian", "is", "not", "invertible")
    assert code == 0 and "W201" in out and "doctor check CKPT --select" in out
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("Traceback\n  File x\nValueError: Hessian is not invertible\n"))
    code, out, _ = run("explain", "-")
    assert code == 0 and "W201" in out


def test_explain_of_an_unknown_message_names_three_and_exits_1(run):
    code, out, _ = run("explain", "an entirely different matter")
    assert code == 1 and len(re.findall(r"^  [A-Z]\d{3}  ", out, re.M)) == 3


def test_rules_are_listed_in_three_forms(run):
    assert "W201" in run("rules")[1]
    data = json.loads(run("rules", "-f", "json", "--select", "W")[1])
    assert {r["code"][0] for r in data} == {"W"} and data[0]["page"]["Why"]
    table = run("rules", "-f", "markdown")[1]
    assert "| W201 | nonfinite-weight | error | certain | values |" in table


def test_version_and_help_exit_0(run):
    code, out, _ = run("--version")
    assert code == 0 and out.startswith("doctor 0.1.0") and "telemetry" in out
    for command in ("check", "fix", "quantize", "verify", "kvcache", "explain", "rules", "render"):
        code, out, _ = run(command, "--help")
        assert code == 0 and out.startswith(f"Usage: doctor {command}"), command
        assert command in run("--help")[1]


# the other doors: the words that reach doctor.api


class Called(DoctorError):
    """Carries what a function was called with out of the command."""

    def __init__(self, args, options):
        super().__init__("called")
        self.args, self.options = args, options


@pytest.fixture
def called(monkeypatch):
    def install(name):
        def spy(*args, **options):
            seen.append((args, options))
            raise Called(args, options)

        monkeypatch.setattr(api, name, spy, raising=False)

    seen = []
    return install, seen


def test_unsafe_fixes_never_swallow_the_next_word(run, called, good):
    install, seen = called
    install("fix")
    for given, want in ((["--unsafe-fixes"], ("all",)), (["--unsafe-fixes=W201,G302"], ("W201", "G302")), ([], ())):
        run("fix", *given, good, "-o", "out", "--only", "C101,C105", "--dry-run")
        args, options = seen[-1]
        assert options["unsafe_fixes"] == want and options["only"] == ("C101", "C105") and options["dry_run"] is True
        assert args[0].name == "good" and str(args[1]) == "out" and args[2].group_size == 128


def test_quantize_passes_the_recipe_and_leaves_defaults_to_the_function(run, called, good):
    install, seen = called
    install("quantize")
    run(
        "quantize",
        good,
        "-o",
        "out",
        "--method",
        "awq",
        "--group-size",
        "64",
        "--damp",
        "0.02",
        "--keep",
        "lm_head",
        "--rows",
        "7",
        "--memory",
        "2GiB",
        "--no-mse",
    )
    args, options = seen[-1]
    recipe = args[2]
    assert (recipe.method, recipe.group_size, recipe.damp, recipe.keep, recipe.mse, recipe.act_order) == (
        "awq",
        64,
        0.02,
        ("lm_head",),
        False,
        True,
    )
    assert (
        options["rows"] == 7
        and options["memory"] == 2 << 30
        and "max_seq_length" not in options
        and "calibration" not in options
    )


def test_keep_is_split_at_commas_outside_braces_only(run, called, good):
    install, seen = called
    install("quantize")
    run(
        "quantize",
        good,
        "-o",
        "out",
        "--keep",
        "lm_head, *.{0,1}.*{q,k}_proj,*down_proj",
        "--keep",
        "router gate",
        "--keep",
        "{a, b}",
    )
    assert seen[-1][0][2].keep == ("lm_head", "*.{0,1}.*{q,k}_proj", "*down_proj", "router", "gate", "{a, b}")
    assert matches("*.{0,1}.*{q,k}_proj", "model.layers.1.self_attn.k_proj")


@pytest.mark.parametrize("flag", ["--ignore", "--ignore-linears", "--keep"])
def test_linears_are_left_out_by_the_fields_word_and_by_the_old_one(run, called, good, flag):
    install, seen = called
    install("quantize")
    _, _, err = run("quantize", good, "-o", "out", f"{flag}=lm_head", "--override", "*down*:bits=8")
    assert (seen[-1][0][2].keep, seen[-1][0][2].bits_for) == (("lm_head",), ("*down*=8",))
    assert ("--keep is now --ignore; the next release drops the old name" in err) == (flag == "--keep")


def test_old_names_stand_in_the_environment_too_but_in_no_help_page(run, called, good, monkeypatch):
    install, seen = called
    install("quantize")
    monkeypatch.setenv("DOCTOR_BITS_FOR", "*q_proj=8")
    monkeypatch.setenv("DOCTOR_IGNORE", "K501")  # rules, for check; no linear
    run("quantize", good, "-o", "out")
    assert seen[-1][0][2].bits_for == ("*q_proj=8",) and seen[-1][0][2].keep == ()
    for command in ("check", "quantize"):
        page = run(command, "--help")[1]
        assert not re.search("--keep|--bits-for|--room|--ignore-", page)


def test_rules_are_left_out_by_their_full_name_and_the_old_name_of_capacity_works(run, bad, tmp_path):
    assert run("check", bad, *PLAN, "--ignore-rules", "W201")[0] == 0
    code, _, err = run("check", bad, *PLAN, "--ignore", "W201", "--room", tmp_path)
    assert code == 0 and "--room is now --capacity" in err


@pytest.mark.parametrize(
    "given, read",
    [("a:bits=8", ("a=8",)), ("{0,1}.*=2", ("{0,1}.*=2",)), ("a:bits=x", None), ("a", None), (":bits=4", None)],
)
def test_an_override_is_a_pattern_and_its_bits(given, read):
    if read is None:
        with pytest.raises(click.BadParameter, match="must be PATTERN:bits=B"):
            overrides([given])
    else:
        assert overrides([given]) == read


def test_facts_are_listed_by_word_and_scope(run):
    data = json.loads(run("facts", "-f", "json")[1])
    assert {f["name"] for f in data} >= {"config", "n_nan", "hessian"} and all(f["doc"] for f in data)
    assert {f["scope"] for f in json.loads(run("facts", "--scope", "linear", "-f", "json")[1])} == {"linear"}
    assert run("facts", "n_nan", "-f", "markdown")[1].splitlines()[2:] == [
        "| `n_nan` | tensor | values | Values that are NaN. |"
    ]
    assert "Values that are NaN." in run("facts", "n_nan")[1]


def test_verify_and_kvcache_pass_their_options(run, called):
    install, seen = called
    install("verify")
    install("kvcache")
    run("verify", "a", "b", "--text", "t.txt", "--rows", "3")
    assert seen[-1][0] == ("a", "b") and {k: str(v) for k, v in seen[-1][1].items() if k != "progress"} == {
        "text": "t.txt",
        "rows": "3",
        "device": "auto",
    }
    run("kvcache", "a", "--context", "4k", "--memory", "24GB", "--measure")
    assert (
        seen[-1][1].pop("progress")
        and seen[-1][1].pop("say")
        and seen[-1][1]
        == {
            "context": 4096,
            "batch": 1,
            "memory": 24 * 10**9,
            "measure": True,
            "device": "auto",
        }
    )


@pytest.mark.parametrize(
    "text, size",
    [("24GB", 24 * 10**9), ("1.5 GiB", 3 << 29), ("512m", 512 * 10**6), ("200000000", 2 * 10**8), ("", None)],
)
def test_sizes_are_read_as_people_write_them(text, size):
    assert size_in_bytes(text) == size


# processes of their own


def shell(*args, **options):
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, timeout=120, **options)


@pytest.mark.parametrize(
    "args",
    [
        ["--help"],
        ["explain", "W201"],
        ["explain", "Hessian is not invertible"],
        ["rules"],
        ["check", "CK", "--stage", "header"],
        ["check", "CK", "-f", "html"],
    ],
)
def test_looking_never_imports_torch(args, good):
    args = [str(good) if a == "CK" else a for a in args]
    code = (
        "import sys\nfrom doctor.cli.main import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'scipy'} & set(sys.modules)\nsys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = shell("-c", code, *args)
    assert done.returncode == 0, done.stderr


def test_help_imports_neither_numpy_nor_rich():
    done = shell("-X", "importtime", "-m", "doctor", "--help")
    assert done.returncode == 0
    names = {
        line.rsplit("|", 1)[-1].strip().split(".")[0]
        for line in done.stderr.splitlines()
        if line.startswith("import time:")
    }
    assert not names & {"rich", "jinja2", "torch", "yaml", "numpy"}, names & {
        "rich",
        "jinja2",
        "torch",
        "yaml",
        "numpy",
    }


def test_piped_output_has_no_escapes_and_forced_colour_has(bad):
    plain = shell("-m", "doctor", "check", str(bad), *PLAN)
    assert plain.returncode == 1 and "\x1b" not in plain.stdout and plain.stderr == ""
    colour = shell("-m", "doctor", "check", str(bad), *PLAN, env={**os.environ, "FORCE_COLOR": "1"})
    assert "\x1b[" in colour.stdout
    assert "\x1b[3" not in shell("-m", "doctor", "check", str(bad), *PLAN, env={**os.environ, "NO_COLOR": "1"}).stdout


def test_a_terminal_that_knows_no_unicode_still_gets_its_findings(bad):
    done = shell("-m", "doctor", "check", str(bad), *PLAN, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 1 and "error[W201]" in done.stdout and "UnicodeEncodeError" not in done.stderr


def test_a_closed_pipe_is_no_traceback(bad):
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m doctor rules -f json | head -c 10; exit ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
    )
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


def test_a_missing_checkpoint_raises_in_python_as_it_prints_in_the_shell():
    with pytest.raises(BadCheckpoint, match="No such file or directory"):
        api.check("/nowhere")


def test_header_stage_of_three_hundred_tensors_is_quick(tmp_path):
    case = tiny("llama")
    name = case.name("down")
    for i in range(280):
        case.tensors[f"extra.{i}.weight"] = case.tensors[name]
        case.dtypes[f"extra.{i}.weight"] = case.dtypes[name]
    path = case.write(tmp_path / "many")
    api.check(path, case.recipe, stage="header")  # rules loaded, files warm
    start = time.perf_counter()
    api.check(path, case.recipe, stage="header")
    assert time.perf_counter() - start < 0.5


def test_explain_answers_a_message_that_no_checkpoint_causes(run):
    code, out, _ = run("explain", "KeyError: 'attention_mask'")
    assert code == 0 and "AutoGPTQ 0.7.1 records" in out and "doctor quantize" in out and "no rule quotes" not in out


def test_explain_reads_the_order_of_the_minor_and_names_the_commands_that_decide(run):
    code, out, _ = run("explain", "linalg.cholesky: (the leading minor of order 18163 is not positive-definite)")
    text = " ".join(out.split())
    assert code == 0 and "Order 18,163: H breaks at input column 18,162" in text
    assert (
        "start with doctor check CKPT --select W201" in text
        and "after that doctor quantize CKPT -o OUT --calibration FILE" in text
    )
    assert "all of H is NaN" in run("explain", "leading minor of order 1 is not positive-definite")[1]


@pytest.fixture
def stored(tmp_path):
    """A checkpoint that states gptq, 4 bits, groups of 32 of itself."""
    return str(tiny_gptq().write(tmp_path / "stored"))


def test_a_quantized_checkpoint_is_judged_against_the_plan_it_states(run, stored, tmp_path):
    run("check", stored, "--config", "none", "-f", f"json:{tmp_path / 'r.json'}", "-f", "full", "--tp", "2")
    recipe = json.loads((tmp_path / "r.json").read_text())["recipe"]
    assert (recipe["method"], recipe["bits"], recipe["group_size"], recipe["sym"], recipe["tp"]) == (
        "gptq",
        4,
        32,
        True,
        2,
    )


def test_a_plan_that_contradicts_what_is_stored_is_said(run, stored):
    said = "stored states gptq 4-bit g32 sym of itself and is judged so; gptq 4-bit g128 sym was asked for"
    _, out, err = run("check", stored, "--config", "none", "--group-size", "128")
    assert said in err and "ready to serve: gptq 4-bit g32" in out
    for flags in ((), ("--group-size", "32"), ("--runtime", "vllm")):
        _, out, err = run("check", stored, "--config", "none", *flags)
        assert "of itself" not in err and "ready to serve: gptq 4-bit g32" in out


def test_fix_and_the_python_door_take_the_stored_plan_too(run, stored, tmp_path):
    from doctor import api
    from doctor.lint.config import read

    assert "of itself" not in run("fix", stored, "-o", str(tmp_path / "a"), "--dry-run", "--config", "none")[2]
    assert (
        "was asked for"
        in run("fix", stored, "-o", str(tmp_path / "a"), "--dry-run", "--config", "none", "--group-size", "64")[2]
    )
    assert "serve: gptq 4-bit g32" in run("check", stored, "--fix", "-o", str(tmp_path / "b"), "--config", "none")[1]
    assert (
        api.check(stored).recipe.group_size
        == api.fix(stored, tmp_path / "c", dry_run=True).report.recipe.group_size
        == 32
    )
    (tmp_path / "doctor.toml").write_text("[recipe]\ngroup-size = 64\n")
    assert api.check(stored, config=read(tmp_path / "doctor.toml")).recipe.group_size == 64


def test_linears_of_other_widths_leave_the_plan_of_the_rest(run, stored):
    path = os.path.join(stored, "config.json")
    with open(path) as file:
        config = json.load(file)
    config["quantization_config"]["dynamic"] = {"+:.*down_proj": {"bits": 8}}
    with open(path, "w") as file:
        json.dump(config, file)
    assert "serve: gptq 4-bit g32" in run("check", stored, "--config", "none")[1]


def test_the_list_of_commands_says_what_each_command_says_of_itself():
    from doctor.cli.main import cli

    for name, line in cli.commands.lines.items():
        assert cli.commands[name].get_short_help_str(100) == line
