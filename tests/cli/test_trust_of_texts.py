"""What a checkpoint's JSON files say reaches neither the terminal's interpreter nor an encoder that cannot hold it."""

import json

import pytest

from doctor.cli import main as cli
from doctor.lint.testing import tiny

# Sets a window's title, rings, colours what follows, turns the direction of text, and has no UTF-8.
TOKEN = "\x1b]0;owned\x07\x1b[31m\u202e\ud800"
SHOWN = r"\x1b]0;owned\x07\x1b[31m\u202e\ud800"


@pytest.fixture
def hostile(tmp_path):
    """A checkpoint whose tokenizer.json has a token beyond the vocabulary, whose content is TOKEN and which
    tokenizer_config.json makes the first of a text; the end token is missing from generation_config.json, which also
    holds a lone surrogate.
    """
    folder = tiny().write(tmp_path / "m")

    def edit(name, change):
        document = json.loads((folder / name).read_text())
        change(document)
        (folder / name).write_text(json.dumps(document))

    token = {"id": 5000, "content": TOKEN, "special": True, "normalized": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False}
    edit("tokenizer.json", lambda d: d["added_tokens"].append({**token, **flags}))
    edit("tokenizer_config.json", lambda d: d.update(bos_token=TOKEN))
    edit("generation_config.json", lambda d: d.update(eos_token_id=0, note="\udfff", **{"\ud800key": TOKEN}))
    return folder


def run(capsys, *arguments):
    with pytest.raises(SystemExit):
        cli.main([str(a) for a in arguments])
        raise SystemExit(0)
    out = capsys.readouterr()
    return out.out, out.err


@pytest.mark.parametrize("form", ["full", "concise", "markdown", "github", "gitlab", "json", "sarif", "junit", "html"])
def test_escapes_of_a_token_are_shown_and_not_sent(hostile, capsys, plain_environment, form):
    out, err = run(capsys, "check", hostile, "--group-size", "32", "--format", form)
    assert "owned" in out
    assert not set(out + err) & {"\x1b", "\x07", "\u202e"} and not any("\ud800" <= c <= "\udfff" for c in out + err)
    if form == "full":
        assert SHOWN in out


def test_fix_keeps_a_lone_surrogate_as_the_escape_it_was(hostile, tmp_path, capsys, plain_environment):
    shown = "".join(run(capsys, "fix", hostile, "--group-size", "32", "-o", tmp_path / "out"))
    assert not set(shown) & {"\x1b", "\x07", "\u202e"}
    raw = (tmp_path / "out" / "generation_config.json").read_bytes()
    before, after = json.loads((hostile / "generation_config.json").read_bytes()), json.loads(raw)
    assert after["eos_token_id"] != 0 and {**after, "eos_token_id": 0} == before
    assert rb'"\udfff"' in raw and rb'"\ud800key"' in raw
    receipt = (tmp_path / "out" / "doctor.json").read_bytes()
    assert json.loads(receipt) and b"\x1b" not in receipt
