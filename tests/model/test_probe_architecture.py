"""The program that writes the tables of architectures gives what is committed, for three families with it in full."""

import pytest
from architecture_file import notes_of, render
from probe_architecture import FAMILIES, ProbeError, fit_size, probe

from doctor.core.tables import family, family_names, parse_family, tables_folder


@pytest.mark.parametrize("name", ["llama", "lfm2", "qwen3_next"])
def test_a_fresh_probe_is_what_is_committed(name):
    text = (tables_folder() / "architectures" / f"{name}.toml").read_text(encoding="utf-8")
    assert render(probe(name, parse_family(text)), notes_of(text)) == text


def test_every_family_that_was_executed_can_be_probed_again():
    executed = {name for name in family_names() if family(name)["verified"] == "executed"}
    assert executed == set(FAMILIES)


def test_a_file_reads_back_as_it_was_written():
    entry = family("qwen3_next") | {"config_keys": ["hidden_size"], "renamed_keys": {"norm_eps": "rms_norm_eps"}}
    again = parse_family(render(entry, "# a note\n#   of two lines"))
    assert again["tensor"] == entry["tensor"] and again["kinds"] == entry["kinds"]
    assert again["config_keys"] == {"hidden_size": "hidden_size", "norm_eps": "rms_norm_eps"}


class Sizes:
    def __init__(self, **config):
        self.config = config

    def size(self, key):
        return self.config.get(key)


def test_a_size_is_fitted_to_both_models_and_keeps_the_files_words():
    models = Sizes(hidden_size=96, a=6, b=5), Sizes(hidden_size=216, a=9, b=7)
    assert fit_size((96, 216), models, None) == "hidden_size"
    assert fit_size((30, 63), models, None) == "a * b" and fit_size((30, 63), models, "b * a") == "b * a"
    assert fit_size((30, 63), models, "hidden_size") == "a * b", "words that do not fit are not kept"
    with pytest.raises(ProbeError):
        fit_size((31, 1009), models, None)
