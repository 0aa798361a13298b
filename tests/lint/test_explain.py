"""Whatever of an error a user pastes, the rule whose defect it is comes first."""

import re

import pytest
from click.testing import CliRunner

from doctor.cli.main import cli
from doctor.lint import explain
from doctor.lint.engine import load_rules
from doctor.lint.readings import read
from doctor.lint.rule import Rule, write_page
from doctor.locale import rule_pages

RULES = load_rules()
QUOTES = [(r.code, s.text) for r in RULES for s in r.seen_as]


def made(code, *quotes, name="made-up", cost="values"):
    doc = write_page(code, name, "a title", {"Seen as": "\n".join(f"- Tool: ``{q}``" for q in quotes)})
    return Rule(code, name, "a title", "error", "certain", "tensor", cost, (), lambda *_: (), doc)


LIBRARY = [
    made("W901", "ValueError: Hessian is not invertible", name="nonfinite"),
    made("G901", "must be divisible by tensor parallel size", name="heads"),
    made(
        "G902",
        "The input size is not aligned with the quantized weight shape. This can be caused by too large tensor "
        "parallel size.",
        name="groups",
    ),
    made("F901", "Error while deserializing header: MetadataIncompleteBuffer", name="cut"),
    made("F902", "size mismatch for {key}: copying a param with shape torch.Size([4, 8])", name="shape", cost="header"),
]


def codes(text, rules=LIBRARY):
    return [m.rule.code for m in explain.search(text, rules)]


@pytest.mark.parametrize("code, quote", QUOTES, ids=lambda x: x[:30])
def test_every_quoted_message_finds_its_own_rule_first(code, quote):
    matches = explain.search(quote, RULES)
    best = [m.rule.code for m in matches if m.score == matches[0].score]
    assert code in best


@pytest.mark.parametrize("code, quote", [q for q in QUOTES if len(q[1]) >= 25][::3], ids=lambda x: x[:30])
def test_every_long_quote_is_found_inside_a_log(code, quote):
    log = "\n".join(
        [
            "INFO 11-23 19:00:01 [loader.py:42] Loading weights took 3.21 seconds",
            "Traceback (most recent call last):",
            '  File "/usr/lib/python3/site-packages/vllm/worker.py", line 1021, in load_model',
            "    self.model = get_model(config)",
            f"(EngineCore pid=4711) {quote}",
            "",
            "During handling of the above exception, another exception occurred:",
            "Killed",
        ]
    )
    assert code in [m.rule.code for m in explain.search(log, RULES)]


@pytest.mark.parametrize(
    "text, code",
    [
        ("ValueError: Hessian is not invertible", "W901"),
        ("hessian is not invertible", "W901"),
        (
            '  File "/home/u/q.py", line 333, in <module>\n    raise ValueError("Hessian is not invertible")\n'
            "ValueError: Hessian is not invertible\n",
            "W901",
        ),
        ("\x1b[31mERROR\x1b[0m 2026-01-02T10:11:12 ValueError:   Hessian is\tnot invertible", "W901"),
        ("AssertionError: 14 must be divisible by tensor parallel size 8", "G901"),
        ("safetensors_rust.SafetensorError: Error while deserializing header: MetadataIncompleteBuffer", "F901"),
        (
            "RuntimeError: size mismatch for model.layers.3.mlp.up_proj.weight: copying a param with shape "
            "torch.Size([11008, 4096])",
            "F902",
        ),
        (
            "The input size is not aligned with the quantized\nweight shape. This can be caused by too large\n"
            "tensor parallel size.",
            "G902",
        ),
        (
            "input size is not aligned with the quantized weight shape, caused by too large tensor parallel size",
            "G902",
        ),
    ],
)
def test_a_pasted_message_finds_its_rule_first(text, code):
    assert codes(text)[0] == code


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   \n ",
        "hello world",
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "ValueError: invalid literal for int() with base 10",
        "ModuleNotFoundError: No module named 'torch'",
        "{}",
        "{key}",
        "assert",
        "the of is not",
    ],
)
def test_an_unrelated_message_finds_nothing(text):
    assert codes(text) == []


@pytest.mark.parametrize(
    "text",
    [
        "ModuleNotFoundError: No module named 'flash_attn'",
        "ConnectionError: HTTPSConnectionPool(host='example.org', port=443)",
        "KeyboardInterrupt",
        "Permission denied: '/srv/x'",
        "Segmentation fault (core dumped)",
    ],
)
def test_unrelated_messages_find_none_of_the_real_rules(text):
    assert codes(text, RULES) == []


def test_numbers_names_and_paths_make_no_difference():
    assert explain.normal("k = 4096, n = 11008 in '/a/b/c.py'") == explain.normal("K = 512, N = 3 in  /x/y/z.py")


def test_the_last_of_two_errors_comes_first():
    log = "ValueError: Hessian is not invertible\nretrying\nmust be divisible by tensor parallel size 8\n"
    assert codes(log) == ["G901", "W901"]


def test_among_equals_the_cheapest_to_check_comes_first():
    rules = [
        made("A901", "the very same message", cost="calibration"),
        made("B901", "the very same message", cost="values"),
        made("C901", "the very same message", cost="header"),
    ]
    assert codes("error: the very same message", rules) == ["C901", "B901", "A901"]


def test_a_long_log_is_searched_in_a_moment_and_from_its_end():
    import time

    log = (
        "\n".join(f"step {i} loss {i / 7} some words of a progress line" for i in range(50_000))
        + "\nValueError: Hessian is not invertible\n"
    )
    start = time.perf_counter()
    assert codes(log) == ["W901"]
    assert time.perf_counter() - start < 5


def test_code_and_name_are_found_in_any_case():
    for word in ("w201", "W201", " nonfinite-weight ", "NONFINITE-WEIGHT"):
        assert explain.find(word, RULES).code == "W201"
    assert explain.find("W999", RULES) is None


def test_nearest_shares_words_with_the_text():
    assert explain.nearest("my hessian cannot be inverted", LIBRARY)[0].code == "W901"
    assert len(explain.nearest("x", LIBRARY)) == 3


def test_the_deciding_command_depends_on_what_the_rule_reads():
    assert explain.decider(made("F902", cost="header")) == "doctor check CKPT --select F902 --stage header"
    assert explain.decider(made("W901")) == "doctor check CKPT --select W901"
    assert "--calibration" in explain.decider(made("Q901", cost="calibration"))
    assert explain.decider(made("O901", cost="output")).startswith("doctor verify")


@pytest.mark.parametrize("entry", RULES, ids=lambda r: r.code)
def test_a_page_loses_no_word_of_its_file(entry):
    page = rule_pages.markdown(entry)
    for key, _ in explain.SECTIONS:
        assert entry.section(key) in page
    for key, _ in explain.SECTIONS:
        assert (
            re.sub(r"\s+", " ", " ".join(explain.paragraphs(entry.section(key)))).split() == entry.section(key).split()
        )


@pytest.mark.parametrize(
    "text, code",
    [
        ("KeyError: 'layers.5.mlp.down_proj.weight'", "O656"),
        ("There is no module or parameter named 'layers.0.mlp.down_proj.weight' in LlamaModel", "O656"),
        ("KeyError: 'layers.32.self_attn.qkv_proj.k_scale'", "K502"),
        ("ValueError: Missing parameters: lm_head.biases lm_head.scales.", "O625"),
        ("error loading model vocabulary: unknown pre-tokenizer type: 'deepseek-r1-qwen'", "F076"),
        ("NotImplementedError: BPE pre-tokenizer was not recognized - update get_vocab_base_pre()", "C174"),
    ],
)
def test_the_names_in_an_engines_message_are_read(text, code):
    found = read(text)
    assert found is not None and found.rules[0] == code


def test_what_a_server_said_is_judged_for_that_server():
    said = "ValueError: Unsupported activation: gelu. Only silu is supported for now."
    shown = CliRunner().invoke(cli, ["explain", said]).output
    assert "start with   doctor check CKPT --select C175 --runtime vllm --stage header" in shown
