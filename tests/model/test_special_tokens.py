"""What each file says about special tokens, whatever its way of saying it."""

from doctor.checkpoint.directory import Checkpoint
from doctor.lint.testing import tiny
from doctor.model.special_tokens import SPECIAL, Statement, token_text
from doctor.scan.header import header_facts


def special_of(case, folder):
    return header_facts(Checkpoint.open(case.write(folder)), case.recipe).get(SPECIAL)


def test_null_and_absent_are_told_apart(tmp_path):
    case = tiny()
    case.config["bos_token_id"] = None
    del case.config["pad_token_id"]
    found = special_of(case, tmp_path)
    assert (found.of("config.json", "bos").stated, found.of("config.json", "pad").stated) == (True, False)


def test_ids_are_whole_numbers_only_and_zero_is_one():
    assert Statement("f", "/x", "eos", [2, 0, "7", True]).ids == (2, 0)
    assert Statement("f", "/x", "bos", None, True).ids == ()


def test_a_token_is_a_text_or_an_object_with_content():
    assert token_text({"content": "<s>", "lstrip": False}) == "<s>"
    assert token_text("</s>") == "</s>" and token_text(None) is None and token_text("") is None


def test_an_id_in_the_text_block_of_a_multimodal_config_is_found_there(tmp_path):
    case = tiny("llama")
    inner = dict(case.config)
    outer = {"architectures": inner.pop("architectures"), "model_type": "llava", "text_config": inner}
    case.json["config.json"] = outer
    assert special_of(case, tmp_path).of("config.json", "bos").pointer == "/text_config/bos_token_id"


def test_families_know_whether_vendors_state_a_bos(tmp_path):
    case = tiny("qwen2")
    assert special_of(case, tmp_path / "a").ships_bos is True
    case.config["model_type"] = "glm4"
    assert special_of(case, tmp_path / "b").ships_bos is False


def qwen(folder, **tokenizer_config):
    """Findings of C101 for a Qwen fine-tune whose config has lost its BOS."""
    from doctor.rules.c101_missing_bos import missing_bos

    from doctor.model.tokenizer import Tokenizer

    case = tiny("qwen2")
    case.config["bos_token_id"] = None
    del case.json["generation_config.json"]["bos_token_id"]
    case.json["tokenizer_config.json"] = tokenizer_config
    ids = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}
    return list(missing_bos(None, special_of(case, folder), Tokenizer(ids), 151936))


def test_a_qwen_without_bos_gets_the_vendors_value_from_its_own_tokenizer(tmp_path):
    (found,) = qwen(tmp_path, bos_token=None)
    assert found.message == "bos_token_id is null in config.json; the qwen2 table has <|endoftext|> = 151643"
    assert found.fix.edits[0].value == 151643


def test_a_chat_mark_is_never_offered_as_the_bos_of_a_qwen(tmp_path):
    (found,) = qwen(tmp_path, bos_token="<|im_start|>")
    assert found.fix.edits[0].value == 151643


def test_a_family_without_bos_is_left_alone(tmp_path):
    from doctor.rules.c101_missing_bos import missing_bos

    from doctor.model.tokenizer import Tokenizer

    case = tiny("llama")
    case.config.update(model_type="glm4", bos_token_id=None)
    assert list(missing_bos(None, special_of(case, tmp_path), Tokenizer({"<s>": 1}), 96)) == []
