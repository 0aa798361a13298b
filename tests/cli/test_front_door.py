"""Whatever of an error stands in a terminal, `doctor explain` leads to the rule that tells its cause, and unrelated
errors to none.
"""

import re
import tomllib
from pathlib import Path

import pytest

from doctor.core.tables import table
from doctor.lint import explain
from doctor.lint.engine import load_rules
from doctor.lint.readings import read

RULES = load_rules()
DATA = tomllib.loads((Path(__file__).parents[2] / "fixtures" / "errors.toml").read_text(encoding="utf-8"))
ERRORS = [(e["text"], e["rules"]) for e in DATA["error"]]


def first(text):
    return [m.rule.code for m in explain.search(text, RULES)][:1]


def other_numbers(text):
    """The same message of another model: layers, sizes and orders differ; a count that is part of the wording stays."""
    fixed = re.compile(r"= 128|= 64|by 256|10%|\(2\)|\(3\)|1\.0 for|token-0|== 0|< 0|F16|e4m3|order 1\b")
    kept = [m.span() for m in fixed.finditer(text)]
    return re.sub(
        r"(?<![\w.-])\d+(?!\w)|(?<=layers\.)\d+",
        lambda m: m[0] if any(a <= m.start() < b for a, b in kept) else str(int(m[0]) + 7),
        text,
    )


def in_a_log(text):
    return "\n".join(
        [
            "INFO 11-23 19:00:01 [loader.py:42] Loading weights took 3.21 seconds",
            "Traceback (most recent call last):",
            '  File "/opt/venv/lib/python3.12/site-packages/engine/worker.py", line 1021, in load_model',
            "    self.model = build(config)",
            f"(Worker pid=4711) ERROR 11-23 19:00:02 [worker.py:7] {text}",
            "",
        ]
    )


@pytest.mark.parametrize("text, rules", ERRORS, ids=[t[:40] for t, _ in ERRORS])
def test_the_right_rule_comes_first(text, rules):
    assert set(first(text)) & set(rules), first(text)


@pytest.mark.parametrize("text, rules", ERRORS, ids=[t[:40] for t, _ in ERRORS])
def test_numbers_of_another_model_and_a_log_around_it_change_nothing(text, rules):
    log = in_a_log(other_numbers(text))
    assert set(first(log)) & set(rules), first(log)


@pytest.mark.parametrize("text, rules", ERRORS, ids=[t[:40] for t, _ in ERRORS])
def test_the_last_line_with_its_exception_is_enough(text, rules):
    line = text if re.match(r"^\w*Error: |^!", text) else f"RuntimeError: {text}"
    assert set(first(f"/data/models/my-model-7b: {line}")) & set(rules), first(line)


@pytest.mark.parametrize("text", [u["text"] for u in DATA["unrelated"]], ids=lambda t: t[:40])
def test_an_error_of_something_else_leads_to_no_rule(text):
    assert first(text) == [] and read(text) is None
    assert first(in_a_log(text)) == [] and read(in_a_log(text)) is None


@pytest.mark.parametrize("case", DATA["reading"], ids=lambda c: c["text"][:40])
def test_names_and_numbers_of_a_message_say_more_than_its_words(case):
    typed = len(case["text"]) <= 60 and not re.search(r"Error|not |\(", case["text"])
    for pasted in (case["text"],) if typed else (case["text"], in_a_log(case["text"])):
        found = read(pasted)
        assert found is not None and found.name == case["name"]
        codes = [m.rule.code for m in explain.search(pasted, RULES)]
        assert codes[: len(case["rules"])] == case["rules"] and not {*case["unlike"]} & {*codes}
        assert "{" not in found.says + found.do
        chinese = read(pasted, "zh")
        assert re.search("[一-鿿]", chinese.says) and re.search("[一-鿿]", chinese.do)


def test_a_symptom_in_a_log_is_chance_and_not_read():
    log = in_a_log("RuntimeError: boom") + "\nthe server never stops\nfiltered 12 garbage rows\n"
    assert read(log) is None and read("the server never stops").name == "never-stops"


def test_every_reading_has_a_message_that_shows_it():
    assert {e["name"] for e in table("readings")["reading"]} == {c["name"] for c in DATA["reading"]}


def test_every_rule_that_the_data_names_exists():
    codes = {r.code for r in RULES}
    assert {c for _, rules in ERRORS for c in rules} <= codes
    assert {c for e in table("readings")["reading"] for c in (*e["rules"], *e.get("unlike", ()))} <= codes


def test_every_way_to_fail_has_rules_that_exist_or_a_reason():
    modes = tomllib.loads((Path(__file__).parents[2] / "fixtures" / "modes.toml").read_text(encoding="utf-8"))["mode"]
    codes = {r.code for r in RULES}
    for mode in modes:
        assert set(mode["rules"]) <= codes, mode
        assert bool(mode["rules"]) != bool(mode.get("why_none")), mode


@pytest.mark.parametrize("text, says", [(e["text"], e["says"]) for e in DATA["elsewhere"]], ids=lambda t: t[:40])
def test_a_message_that_no_checkpoint_causes_gets_its_cause_and_no_rule(text, says):
    for pasted in (text, in_a_log(text)):
        found = explain.elsewhere(pasted)
        assert says in found.cause + found.do and first(pasted) == []
    chinese = explain.elsewhere(text, "zh")
    assert re.search("[一-鿿]", chinese.cause) and re.search("[一-鿿]", chinese.do)


@pytest.mark.parametrize(
    "text",
    [t for t, _ in ERRORS]
    + [u["text"] for u in DATA["unrelated"] if "attention_mask" not in u["text"] and "Catcher" not in u["text"]],
    ids=lambda t: t[:40],
)
def test_a_message_with_a_rule_or_of_something_else_is_not_said_to_come_from_elsewhere(text):
    assert explain.elsewhere(in_a_log(text)) is None


# What a terminal holds after each tool: colours, bars, boxes and stamps around the message.
LOGS = [
    (
        "\x1b[32mQuantizing\x1b[0m:  12%|█▎        | 3/24 [01:10<08:12, 23.5s/it]\rQuantizing:  17%|█▋        | "
        "4/24 [01:34<07:52, 23.6s/it]\n"
        "Traceback (most recent call last):\n"
        '  File "/home/u/q.py", line 31, in <module>\n    model.quantize(tokenizer, quant_config=quant_config)\n'
        '  File "/home/u/venv/lib/python3.11/site-packages/awq/quantize/quantizer.py", line 80, in '
        "pseudo_quantize_tensor\n"
        "    assert torch.isnan(w).sum() == 0\n           ^^^^^^^^^^^^^^^^^^^^^^^^^^\nAssertionError\n",
        "W201",
    ),
    (
        " -- Layer: model.layers.11 (Attention)\n !! Warning: Applied additional damping\n !! Warning: Applied "
        "additional damping\n"
        'Traceback (most recent call last):\n  File "/srv/exllamav2/conversion/adaptivegptq.py", line 333, in prepare\n'
        '    raise ValueError("Hessian is not invertible")\nValueError: Hessian is not invertible\n',
        "W201",
    ),
    (
        "INFO - Start quantizing layer 17/80\nINFO - Quantizing mlp.down_proj in layer 17/80...\n"
        '  File "/opt/auto_gptq/quantization/gptq.py", line 116, in fasterquant\n    H = torch.linalg.cholesky(H)\n'
        "torch._C._LinAlgError: linalg.cholesky: The factorization could not be completed because the input is not "
        "positive-definite "
        "(the leading minor of order 18163 is not positive-definite).\n",
        "Q411",
    ),
    (
        "(EngineCore_DP0 pid=4711) ERROR 11-23 19:00:02 [core.py:842] EngineCore failed to start.\n"
        "(EngineCore_DP0 pid=4711) ERROR 11-23 19:00:02 [core.py:842] ValueError: The input size is not aligned "
        "with the quantized weight shape. "
        "This can be caused by too large tensor parallel size.\n"
        "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}\n",
        "G302",
    ),
    (
        "╭──────────────── Traceback (most recent call last) ────────────────╮\n│ /opt/v/tokenizer.py:415 in encode "
        "                                │\n"
        "│ ❱ 415 │   │   ids = torch.tensor(list_ids)                          │\n"
        "╰───────────────────────────────────────────────────────────────────╯\n"
        "\x1b[1;31mRuntimeError: \x1b[0mCould not infer dtype of NoneType\n",
        "C101",
    ),
    (
        "\x1b]8;;https://example.org/x\x1b\\link\x1b]8;;\x1b\\ 2026-11-23T19:00:02.123Z stderr F "
        "safetensors_rust.SafetensorError: Error while deserializing header: "
        "MetadataIncompleteBuffer\n",
        "F001",
    ),
    (
        "llm-compressor | WARNING - Hessian inversion failed for 12/280 modules (4.3%). These modules were "
        "quantized with round-to-nearest instead of GPTQ\n",
        "Q406",
    ),
    (
        "Loading checkpoint shards:  33%|███▎      | 1/3 [00:02<00:05,  2.61s/it]\nTraceback (most recent call last):\n"
        '  File "x.py", line 2, in <module>\nFileNotFoundError: No such file or directory: '
        '"model-00002-of-00003.safetensors"\n',
        "F010",
    ),
]


@pytest.mark.parametrize("log, code", LOGS, ids=[c for _, c in LOGS])
def test_a_whole_log_as_a_terminal_shows_it_leads_to_the_right_rule_first(log, code):
    assert first(log) == [code]


def test_the_order_of_the_minor_is_read_and_tells_an_early_failure_from_a_late_one():
    late = "linalg.cholesky: (the leading minor of order 18163 is not positive-definite)"
    early = late.replace("18163", "1")
    assert (explain.minor(late), explain.minor(early), explain.minor("no factorization here")) == (18163, 1, None)
    assert (
        explain.minor("\x1b[31m" + early + "\n" + late) == 18163
        and explain.minor("14314-th leading minor of the array") == 14314
    )
    assert first(late) == ["Q411"] and first(early) == ["W201"]
