"""The field reports this project began with, from the symptom to the cure, through the doors that users take.

Each story plants the true cause in a small checkpoint, starts from what its victims saw, and ends with a checkpoint
that works.
"""

import json
import random
import re

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from test_groups import QWEN2_72B, QWEN15_14B, headers_only

from doctor import api
from doctor.checkpoint.codecs import from_codes
from doctor.checkpoint.directory import Checkpoint
from doctor.cli import main as cli
from doctor.core.recipe import Recipe
from doctor.lint.testing import encode, shard_bytes, tiny
from doctor.quant.dequantize import as_float

RECIPE = Recipe(group_size=32)
ENDOFTEXT, IM_START, IM_END = 151643, 151644, 151645


def doctor(*arguments):
    """(exit code, output) of the command line."""
    result = CliRunner().invoke(cli.cli, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def explained(message):
    """What `doctor explain` makes of a message, as one line."""
    code, text = doctor("explain", message)
    assert code == 0, text
    return text


def found(report, code):
    return [f for f in report.findings if f.code == code]


def codes(report):
    return {f.code for f in report.findings}


def rows_file(folder, rows=32, length=64, seed=0):
    """A calibration file of ready token ids."""
    draw = random.Random(seed)
    path = folder / f"rows-{rows}-{length}.jsonl"
    path.write_text(
        "\n".join(
            json.dumps({"input_ids": [1] + [draw.randrange(3, 96) for _ in range(length - 1)]}) for _ in range(rows)
        )
    )
    return path


def quantize(source, output, recipe=RECIPE, *, rows=32, length=64, **options):
    text = rows_file(output.parent, rows, length)
    return api.quantize(source, output, recipe, calibration=text, rows=rows, max_seq_length=length, **options)


def logits(folder, dtype=torch.float32):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    ids = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model(ids).logits


# "Could not infer dtype of NoneType"


def qwen_without_bos(folder, key, generation):
    """A Qwen2 with its own ids and tokenizer_config, as its vendor ships them, whose config.json has bos_token_id null
    or not at all.
    """
    case = tiny("qwen2")
    config, tokenizer = case.config, case.json["tokenizer.json"]
    config |= {"vocab_size": 151936, "eos_token_id": IM_END, "pad_token_id": ENDOFTEXT, "bos_token_id": None}
    if key == "absent":
        del config["bos_token_id"]
    embedding = case.tensors["model.embed_tokens.weight"]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in case.tensors:
            case.tensors[name] = np.resize(embedding, (151936, embedding.shape[1]))
    marks = {"<|endoftext|>": ENDOFTEXT, "<|im_start|>": IM_START, "<|im_end|>": IM_END}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer["added_tokens"] = [{"id": i, "content": t, "special": True, **flags} for t, i in marks.items()]
    tokenizer["model"]["vocab"] = {chr(0x21 + i): i for i in range(90)}
    tokenizer["model"]["unk_token"] = "!"
    case.json["tokenizer_config.json"] = {
        "tokenizer_class": "Qwen2Tokenizer",
        "model_max_length": 32768,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
    }
    case.json["generation_config.json"] = {"eos_token_id": [IM_END, ENDOFTEXT], "pad_token_id": ENDOFTEXT}
    if generation:
        case.json["generation_config.json"]["bos_token_id"] = ENDOFTEXT
    return case.write(folder)


def test_could_not_infer_dtype_of_nonetype_leads_to_the_missing_bos():
    assert "start with   doctor check CKPT --select C101\n" in explained(
        "RuntimeError: Could not infer dtype of NoneType"
    )
    page = explained("C101")
    assert "151643" in page and "151644, is <|im_start|>" in page.replace("\n", " ").replace("151644 is", "151644, is")


@pytest.mark.parametrize("key, generation", [("null", True), ("null", False), ("absent", True)])
def test_a_qwen_without_bos_gets_endoftext_and_never_the_chat_token(tmp_path, key, generation):
    source = qwen_without_bos(tmp_path / "m", key, generation)
    code, text = doctor("check", source, "--group-size", 32)
    assert "C101" in text and str(ENDOFTEXT) in text and str(IM_START) not in text
    (finding,) = found(api.check(source, RECIPE), "C101")
    by = "generation_config.json" if generation else "the qwen2 table"
    assert finding.message == f"bos_token_id is {key} in config.json; {by} has <|endoftext|> = {ENDOFTEXT}"
    assert code == (1 if finding.severity == "error" else 0)
    code, text = doctor("fix", source, "-o", tmp_path / "cured", "--group-size", 32)
    assert code == 0, text
    assert json.loads((tmp_path / "cured" / "config.json").read_text())["bos_token_id"] == ENDOFTEXT
    assert not api.check(tmp_path / "cured", RECIPE).findings
    assert (tmp_path / "cured" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


def test_the_work_around_of_the_forums_is_itself_a_finding(tmp_path):
    source = qwen_without_bos(tmp_path / "m", "null", True)
    config = json.loads((source / "config.json").read_text()) | {"bos_token_id": IM_START}
    (source / "config.json").write_text(json.dumps(config))
    (finding,) = found(api.check(source, RECIPE), "C102")
    assert str(IM_START) in finding.message
    assert [e.value for e in finding.fix.edits] == [ENDOFTEXT]


# "Hessian is not invertible"


def test_hessian_is_not_invertible_leads_to_what_is_not_finite_and_never_to_memory():
    text = explained("ValueError: Hessian is not invertible")
    assert "W201" in text and "Q401" in text
    assert "VRAM" not in text


@pytest.mark.parametrize("value, words", [(0x7FC0, "1 NaN"), (0x7F80, "1 Inf")])
def test_one_bad_weight_is_named_to_the_element_before_any_hour_is_spent(tmp_path, value, words):
    case = tiny("llama")
    want = case.down(1).copy()
    base = case.write(tmp_path / "base")
    case.down(1)[3, 5] = value
    source = case.write(tmp_path / "m")
    result = quantize(source, tmp_path / "q")
    assert result.output is None and result.linears == []
    (finding,) = found(result.report, "W201")
    assert finding.message == f"{words} among 8,192 values of {case.name('down', 1)}"
    assert (finding.where.tensor, finding.where.index) == (case.name("down", 1), (3, 5))
    cured = api.fix(source, tmp_path / "cured", RECIPE, donor=base)
    assert cured.report.ok and (Checkpoint.open(tmp_path / "cured").load(case.name("down", 1)) == want).all()
    assert quantize(tmp_path / "cured", tmp_path / "q").output == tmp_path / "q"


def test_nan_that_calibration_makes_stops_the_run_at_its_linear_without_one_try_of_damping(tmp_path):
    """Every stored value is finite; but queries times keys are not, so attention is Inf - Inf: what Qwen2 does in
    float16.
    """
    case = tiny("qwen2")
    for role in "qk":
        case.tensors[case.name(role, 1).replace(".weight", ".bias")][:] = encode(np.full(1, 1e20), "BF16")
    source = case.write(tmp_path / "m")
    assert not [f for f in api.check(source, RECIPE).findings if f.severity == "error"]
    result = quantize(source, tmp_path / "q")
    assert result.output is None and not (tmp_path / "q").exists()
    linear = case.name("o", 1).removesuffix(".weight")
    (finding,) = found(result.report, "Q401")
    assert (
        f"NaN or Inf among the inputs of {linear}, the first at token " in finding.message
        and ", channel " in finding.message
    )
    assert "damping cannot help" in finding.advice
    (record,) = [r for r in result.linears if r["outcome"] == "failed"]
    assert record["name"] == linear and record["solve"]["attempts"] == ()
    assert {r["block"] for r in result.linears} == {0, 1}


# 13696: "the input size is not aligned with the quantized weight shape"


def test_the_message_of_the_servers_leads_to_the_group_count():
    text = explained(
        "ValueError: The input size is not aligned with the quantized weight shape. "
        "This can be caused by too large tensor parallel size."
    )
    assert "group-count-indivisible-by-tp" in text and "--stage header" in text


@pytest.mark.parametrize(
    "config, tp, size",
    [
        (QWEN15_14B, 2, 13824),
        (QWEN15_14B, 4, 13824),
        (QWEN15_14B, 8, 14336),
        (QWEN2_72B, 2, 29696),
        (QWEN2_72B, 4, 29696),
        (QWEN2_72B, 8, 29696),
    ],
)
def test_the_widths_of_qwen_are_refused_and_the_published_sizes_proposed(tmp_path, config, tp, size):
    source = headers_only(tmp_path, config)
    report = api.check(source, Recipe(tp=tp), stage="header")
    (finding,) = found(report, "G302")
    assert f"intermediate_size {config['intermediate_size']} = " in finding.message
    assert finding.fix.edits[-1].value == size
    assert not found(
        api.check(headers_only(source, config | {"intermediate_size": size}), Recipe(tp=tp), stage="header"), "G302"
    )


def test_14436_is_no_size_that_any_plan_of_128_can_have(tmp_path):
    """The figure of one report; its author meant 13696. 14436 is not even a multiple of 8."""
    source = headers_only(tmp_path, QWEN15_14B | {"intermediate_size": 14436})
    report = api.check(source, Recipe(), stage="header", select=["G"])
    assert not report.ok and any("14436" in f.message for f in found(report, "G301"))
    for f in report.findings:
        assert not f.fix or all(getattr(e, "size", 128) % 128 == 0 for e in f.fix.edits)


def with_heads(case, heads, kv_heads):
    """A case with other numbers of heads of 16, their weights drawn anew."""
    case.config.update(num_attention_heads=heads, num_key_value_heads=kv_heads)
    draw = np.random.default_rng(5)
    for block in (0, 1):
        for role, count in (("q", heads), ("k", kv_heads), ("v", kv_heads), ("o", heads)):
            name = case.name(role, block)
            shape = (64, 16 * count) if role == "o" else (16 * count, 64)
            case.tensors[name] = encode(draw.normal(0, 0.08, shape), "BF16")
            bias = name.replace(".weight", ".bias")
            if bias in case.tensors:
                case.tensors[bias] = encode(draw.normal(0, 0.1, 16 * count), "BF16")
    return case


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_107_groups_are_padded_for_8_gpus_and_the_model_says_the_same(tmp_path, family):
    case = with_heads(tiny(family, mlp=107 * 32), 16, 8)
    recipe = Recipe(group_size=32, tp=8)
    source = case.write(tmp_path / "m")
    (finding,) = api.check(source, recipe).findings
    assert finding.message == "intermediate_size 3424 = 107 × 32: 107 groups cannot be split across 8 GPUs"
    code, text = doctor("fix", source, "-o", tmp_path / "cured", "--group-size", 32, "--tp", 8, "--unsafe-fixes=G302")
    assert code == 0, text
    assert json.loads((tmp_path / "cured" / "config.json").read_text())["intermediate_size"] == 3584
    assert not api.check(tmp_path / "cured", recipe).findings
    # A longer sum is cut into other parts, so the last bits may differ; nothing else may.
    for dtype, least in ((torch.float64, 1e-13), (torch.float32, 1e-5)):
        before, cured = logits(source, dtype), logits(tmp_path / "cured", dtype)
        assert not (cured - before).abs().max() > least * before.abs().max()


# AutoAWQ: "assert torch.isnan(w).sum() == 0" on a model without NaN


def test_the_bare_assert_of_awq_leads_to_empty_groups():
    text = explained("    assert torch.isnan(w).sum() == 0\nAssertionError")
    assert "W203" in text and "W206" in text


def test_weights_too_small_for_float16_are_found_and_get_finite_scales(tmp_path):
    case = tiny("qwen2")
    gate = case.tensors[case.name("gate")]
    gate[7, 32:64] = encode(np.full(32, 1e-8), "BF16")
    source = case.write(tmp_path / "m")
    (finding,) = api.check(source, RECIPE).findings
    assert (finding.code, finding.severity) == ("W206", "warning")
    assert case.name("gate") in finding.message
    # The cast that other programs begin with, and their division by the group's largest weight.
    group = torch.from_numpy(from_codes(gate, "BF16")).half().reshape(-1, 2, 32)[7, 1]
    assert torch.isnan(group / group.abs().amax()).all()
    assert finite_scales(quantize(source, tmp_path / "q"))


def test_zeros_appended_at_the_end_leave_empty_groups_and_spread_ones_do_not(tmp_path):
    case = tiny("qwen2", mlp=96)
    whole = case.write(tmp_path / "whole")
    for block in (0, 1):
        for role, axis in (("gate", 0), ("up", 0), ("down", 1)):
            name = case.name(role, block)
            pad = [(0, 0), (0, 0)]
            pad[axis] = (0, 32)
            case.tensors[name] = np.pad(case.tensors[name], pad)
    case.config["intermediate_size"] = 128
    appended = case.write(tmp_path / "appended")
    assert {f.subject for f in found(api.check(appended, RECIPE), "W203")} == {
        f"linear:{case.name('down', b).removesuffix('.weight')}" for b in (0, 1)
    }
    assert finite_scales(quantize(appended, tmp_path / "q"))
    result = api.fix(whole, tmp_path / "spread", Recipe(group_size=32, tp=2), unsafe_fixes=["G302"])
    assert result.report.ok and not codes(result.report) & {"W203", "W206"}
    assert torch.equal(logits(whole), logits(tmp_path / "spread"))


def finite_scales(result):
    """Whether a run was written whole, with no scale that is 0 or not finite, and weights that a reader decodes to
    finite values.
    """
    assert result.output is not None, result.report.findings
    out = Checkpoint.open(result.output)
    scales = [out.load(n).view(np.float16) for n in out.tensors if n.endswith(".scales")]
    weights = as_float(out)
    assert all(
        np.isfinite(np.asarray(weights.load(n), np.float32)).all() for n in weights.tensors if n.endswith("proj.weight")
    )
    return len(scales) == 14 and all(np.isfinite(s).all() and (s != 0).all() for s in scales)


# AutoGPTQ: "the leading minor of order k is not positive-definite"


@pytest.mark.parametrize("order, likely", [(1, "W201"), (1025, "Q411"), (14960, "Q411")])
def test_a_leading_minor_leads_to_every_cause_it_has_the_one_of_its_order_first_and_the_cheapest_check_to_start_with(
    order, likely
):
    text = explained(
        "linalg.cholesky: The factorization could not be completed because the input is not positive-definite "
        f"(the leading minor of order {order} is not positive-definite)"
    )
    listed = [
        line.split()[0]
        for line in text.splitlines()
        if line.startswith("  ") and line.split()[0] in ("W201", "W209", "Q401", "Q404", "Q411", "Q402")
    ]
    assert sorted(listed) == ["Q401", "Q402", "Q404", "Q411", "W201", "W209"] and listed[0] == likely
    assert "start with   doctor check CKPT --select W201,W209\n" in text


def test_fewer_tokens_than_columns_without_damping_end_in_a_good_result_that_says_what_was_done(tmp_path):
    source = tiny("llama").write(tmp_path / "m")
    bare = Recipe(group_size=32, damp=0.0)
    result = quantize(source, tmp_path / "q", bare, rows=3, length=16)
    assert result.output is not None
    downs = [r for r in result.linears if r["role"] == "down"]
    for record in downs:
        tried = record["solve"]["attempts"]
        assert tried[0][:2] == (0.0, "float32") and tried[0][2] == "not-positive"
        assert tried[-1][2] == "ok" and [a[2] for a in tried].count("ok") == 1
        assert record["solve"]["damp_used"] == tried[-1][0] > 0
        assert record["solve"]["loss"] < record["solve"]["rtn_loss"]
    linear = downs[0]["name"]
    assert next(f.message for f in found(result.report, "Q404")).endswith("in_features")
    assert any(
        f"{linear} saw 48 calibration tokens for 128 in_features" == f.message for f in found(result.report, "Q404")
    )
    assert any(
        f"from 0 to {downs[0]['solve']['damp_used']:g} for {linear}" in f.message for f in found(result.report, "Q402")
    )
    assert any(linear in f.message for f in found(result.report, "Q411"))
    assert finite_scales(result)


def test_group_size_has_no_part_in_it(tmp_path):
    """H is made of inputs alone. The first stage sees the same inputs under any group size; so do the tries there."""
    source = tiny("llama").write(tmp_path / "m")
    tries = []
    for group in (32, 64):
        result = quantize(source, tmp_path / f"q{group}", Recipe(group_size=group, damp=0.0), rows=2, length=16)
        tries.append(
            {
                r["role"]: (r["solve"]["attempts"], r["hessian"])
                for r in result.linears
                if r["block"] == 0 and r["role"] in "qkv"
            }
        )
    assert len(tries[0]) == 3 and tries[0] == tries[1]
    assert tries[0]["q"][0][0][2] == "not-positive"


# "!!!!!!!!"


def spoiled(result, folder, change):
    """A copy of a quantized checkpoint with its tensors changed by change(name, codes) where that is not None."""
    source = Checkpoint.open(result.output)
    tensors, dtypes = {}, {}
    for name, info in source.tensors.items():
        codes_ = source.load(name).copy()
        new = change(name, codes_)
        tensors[name], dtypes[name] = codes_ if new is None else new, info.dtype.name
    folder.mkdir()
    for path in result.output.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    (folder / "model.safetensors").write_bytes(shard_bytes(tensors, dtypes))
    return folder


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """(original, result of quantizing it, text that the original finds likely, being its own)."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("sound")
    source = tiny("qwen2").write(folder / "m")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    said = model.generate(
        torch.arange(3, 7)[:, None], do_sample=True, temperature=0.7, min_new_tokens=48, max_new_tokens=48
    )
    text = folder / "own.jsonl"
    text.write_text("\n".join(json.dumps({"input_ids": row}) for row in said.tolist()))
    return source, quantize(source, folder / "q"), text


def test_exclamation_marks_lead_to_scales_zero_points_and_logits():
    text = explained("!!!!!!!!!!!!!!!!!!!!!!!!")
    assert all(code in text for code in ("O602", "O603", "O607", "O608"))


def test_scales_that_are_nan_are_named_and_so_is_what_the_model_then_says(tmp_path, sound):
    original, result, text = sound
    name = "model.layers.1.mlp.down_proj.scales"
    broken = spoiled(
        result,
        tmp_path / "broken",
        lambda n, c: np.where(np.arange(c.size).reshape(c.shape) == 5, np.uint16(0x7E00), c) if n == name else None,
    )
    code, printed = doctor("check", broken, "--group-size", 32)
    assert code == 1 and "W201" in printed and name in printed
    report = api.verify(original, broken, text=text)
    assert not report.ok and {"W201", "O602"} <= codes(report)
    assert "layer 1 is the first whose output is not finite" in found(report, "O602")[0].message
    assert report.extra["comparison"]["token0_share"] == 1.0 and found(report, "O603")[0].consequence_of
    assert api.verify(original, result.output, text=text).ok


def test_scales_that_are_zero_are_named(tmp_path, sound):
    name = "model.layers.1.mlp.down_proj.scales"
    broken = spoiled(sound[1], tmp_path / "broken", lambda n, c: c * 0 if n == name else None)
    report = api.check(broken, RECIPE)
    assert [f.message for f in found(report, "O607")] == [f"256 of 256 scales in {name} are 0"]


def test_zero_points_of_version_2_under_the_name_of_version_1_are_found_and_renamed(tmp_path, sound):
    original, result, text = sound
    mixed = spoiled(
        result, tmp_path / "mixed", lambda n, c: c + np.int32(0x11111111) if n.endswith(".qzeros") else None
    )
    code, printed = doctor("check", mixed, "--group-size", 32)
    assert code == 1 and "O608" in printed and "0x88888888" in printed
    wrong = api.verify(original, mixed, text=text)
    right = api.verify(original, result.output, text=text)
    assert not wrong.ok and "O608" in codes(wrong)
    assert wrong.extra["comparison"]["kl_mean"] > 10 * right.extra["comparison"]["kl_mean"]
    code, printed = doctor("fix", mixed, "-o", tmp_path / "cured", "--group-size", 32)
    assert code == 0, printed
    cured = api.verify(original, tmp_path / "cured", text=text)
    assert cured.ok and cured.extra["comparison"]["kl_mean"] == right.extra["comparison"]["kl_mean"]


# A KV cache of 4 bits that garbles text, on one model of a family and not on another


def test_a_large_key_bias_is_found_before_the_cache_garbles_text(tmp_path):
    case = tiny("qwen2")
    name = case.name("k", 1).replace(".weight", ".bias")
    case.tensors[name][5] = encode([200.0], "BF16")[0]
    source = case.write(tmp_path / "m")
    report = api.check(source, RECIPE)
    (finding,) = report.findings
    assert (finding.code, finding.severity) == ("K501", "warning") and report.ok
    assert finding.message == f"{name} reaches 200: a 4-bit KV cache may garble text"
    assert not api.check(tiny("qwen2").write(tmp_path / "plain"), RECIPE).findings
    code, text = doctor("kvcache", source)
    assert code == 0
    assert re.search(r"\n +1 +200 +8\+ bits .* Q6\n", text), text
