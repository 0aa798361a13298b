"""Tokenizers that cannot be used: `check` says so before a run meets them, and a bomb ends its own process alone."""

import json
import subprocess
import sys

import pytest

from doctor.api import check
from doctor.checkpoint.directory import Checkpoint
from doctor.core.errors import BadCheckpoint
from doctor.core.recipe import Recipe
from doctor.lint.testing import tiny
from doctor.quant.calibration.tokenizer import load_tokenizer
from doctor.quant.calibration.tokenizer_probe import use

BIG = 2**40


def model(**changes):
    return lambda document: document["model"].update(changes)


def top(**changes):
    return lambda document: document.update(changes)


def added(*entries):
    return lambda document: document.update(added_tokens=list(entries))


def removed(*path):
    def change(document):
        for key in path[:-1]:
            document = document[key]
        del document[path[-1]]

    return change


def split(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


DOCUMENTS = {
    "no model": removed("model"),
    "no vocabulary": removed("model", "vocab"),
    "a model of no type": model(type="Nothing"),
    "a model that is a list": top(model=[]),
    "a vocabulary that is a list of numbers": model(vocab=[1, 2, 3]),
    "an id that is a text": model(vocab={"a": "0"}),
    "an id that is negative": model(vocab={"a": -1}),
    "an id that is a fraction": model(vocab={"a": 0.5}),
    "an id beyond 32 bits": model(vocab={"a": BIG}),
    "an empty vocabulary": model(vocab={}),
    "an unknown token that is not there": model(unk_token="absent", vocab={"a": 0}),
    "merges of nothing": model(type="BPE", merges=["x y"], vocab={"a": 0}),
    "merges of three": model(type="BPE", merges=["a b c"], vocab={"a": 0, "b": 1, "ab": 2}),
    "merges that are numbers": model(type="BPE", merges=[1, 2]),
    "scores that are texts": model(type="Unigram", vocab=[["a", "high"]], unk_id=0),
    "an unknown id beyond the end": model(type="Unigram", vocab=[["a", 0.0]], unk_id=7),
    "an added token without content": added({"id": 1}),
    "an added token whose id is a text": added({"id": "1", "content": "x", "special": True}),
    "an added token that is a number": added(5),
    "added tokens that are a text": top(added_tokens="x"),
    "a normalizer of no type": top(normalizer={"type": "Nothing"}),
    "a normalizer without its pattern": top(normalizer={"type": "Replace"}),
    "a pattern that is no regular expression": top(pre_tokenizer=split("(")),
    "a pattern that backtracks without end": top(pre_tokenizer=split("(a+)+$")),
    "a pre-tokenizer that is a number": top(pre_tokenizer=7),
    "a post-processor of no type": top(post_processor={"type": "Nothing"}),
    "a post-processor whose tokens are not there": top(
        post_processor={
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "[X]", "type_id": 0}}],
            "pair": [],
            "special_tokens": {},
        }
    ),
    "a decoder of no type": top(decoder={"type": "Nothing"}),
    "a version of the future": top(version="99.0"),
    "truncation without a length": top(truncation={}),
    "padding that is a text": top(padding="yes"),
}
TEXTS = {
    "an empty file": b"",
    "an empty object": b"{}",
    "a list": b"[]",
    "a cut file": b'{"version": "1.0", "model": {"type": "BPE", "vocab": {"a"',
    "not UTF-8": b'{"version": "\xff\xfe"}',
    "nested too deeply": b"[" * 100_000,
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
}


@pytest.mark.parametrize("kind", [*DOCUMENTS, *TEXTS])
def test_a_tokenizer_that_cannot_be_used_is_found_before_a_run_meets_it(tmp_path, kind):
    """Either a rule finds it in the files, or the child does; what both let pass works."""
    pytest.importorskip("transformers")
    folder = tiny().write(tmp_path / "m")
    file = folder / "tokenizer.json"
    if kind in DOCUMENTS:
        document = json.loads(file.read_text())
        DOCUMENTS[kind](document)
        file.write_text(json.dumps(document))
    else:
        file.write_bytes(TEXTS[kind])
    report = check(folder, Recipe(group_size=32), select=["C", "F"], stage="tokenizer")
    assert not report.crashed
    if use(folder) or not report.ok:
        return
    tokenizer = load_tokenizer(Checkpoint.open(folder), "a text")
    assert tokenizer("a text")["input_ids"] is not None, kind


BOMBS = """
import json, sys
from doctor.quant import import_stubs
import_stubs.install()
import transformers.models.auto.tokenization_auto
from doctor.quant.calibration.tokenizer_probe import limited, use
healthy, *bombs = sys.argv[1:]
print(limited(lambda: use(healthy), 200 << 20, cpu=10, wall=60)())
for folder in bombs:
    print(limited(lambda: use(folder), 200 << 20, cpu=1, wall=60)())
"""


def test_bombs_end_in_their_own_process_with_the_limit_that_they_met(tmp_path):
    """A chat template that never ends, one that fills memory, and a normalizer that doubles a text forty times."""
    pytest.importorskip("transformers")
    folders = [tiny().write(tmp_path / name) for name in ("healthy", "loop", "text", "doubled")]
    for folder, body in zip(folders[1:3], ("{% if a < 0 %}x{% endif %}", "{{ 'a text that grows' }}"), strict=True):
        loops = "{% for a in range(99999) %}{% for b in range(99999) %}" + body + "{% endfor %}{% endfor %}"
        (folder / "chat_template.jinja").write_text(loops)
    document = json.loads((folders[3] / "tokenizer.json").read_text())
    double = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    document["normalizer"] = {"type": "Sequence", "normalizers": [double] * 40}
    (folders[3] / "tokenizer.json").write_text(json.dumps(document))
    done = subprocess.run([sys.executable, "-P", "-c", BOMBS, *folders], capture_output=True, text=True)
    time, memory = "it takes more than 1 s", "it takes more than 0 GiB of memory"
    healthy, loop, text, doubled = done.stdout.split("\n")[:4]
    assert (healthy, loop) == ("", time) and {text, doubled} <= {time, memory}, done.stderr


def test_a_run_and_a_comparison_refuse_a_bomb_with_its_reason(tmp_path, monkeypatch):
    from doctor.quant.calibration import tokenizer

    folder = tiny().write(tmp_path / "m")
    monkeypatch.setenv("DOCTOR_LOAD_PROOF", "1")
    monkeypatch.setattr(tokenizer, "why_unusable", lambda _folder: "it takes more than 60 s")
    with pytest.raises(BadCheckpoint, match=r"the tokenizer cannot be loaded for text.txt: it takes more than 60 s\."):
        load_tokenizer(Checkpoint.open(folder), "text.txt")
