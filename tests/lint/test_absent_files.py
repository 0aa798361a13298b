"""A checkpoint without one of the files that readers do without: still judged by every rule."""

import pytest

from doctor.api import check
from doctor.lint.testing import tiny

TEMPLATE = "{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"


@pytest.mark.parametrize(
    "file", ["generation_config.json", "tokenizer_config.json", "tokenizer.json", "config.json", "model.safetensors"]
)
@pytest.mark.parametrize("damage", ["absent", "empty", "broken", "list"])
def test_no_rule_crashes_where_a_file_is_not_there_or_not_what_it_must_be(file, damage, tmp_path):
    case = tiny("llama")
    case.json["tokenizer_config.json"]["chat_template"] = TEMPLATE
    folder = case.write(tmp_path)
    path = folder / file
    if damage == "absent":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "broken": b"{", "list": b"[]"}[damage])
    report = check(folder, case.recipe)
    assert not report.crashed, [r.crashed for r in report.crashed]
    if not (damage == "absent" and file in ("generation_config.json", "tokenizer_config.json")):
        assert report.findings
