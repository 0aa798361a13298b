"""Patterns of a file: as `re` reads them, and given up where they do not end."""

import re
import time

import numpy as np
import pytest

from doctor.api import check
from doctor.core.errors import BadCheckpoint
from doctor.core.patterns import SECONDS, Pattern, pattern_of
from doctor.lint.testing import tiny

ENDLESS = "(a|aa)+$"
NAME = "a" * 60 + "!"


@pytest.mark.parametrize("text", (r"model\.layers\.[01]\..*_proj$", "(?:q|k)_proj", ".*mlp.*", "^lm_head$", r"\w+\.\d"))
@pytest.mark.parametrize("name", ("model.layers.1.mlp.down_proj", "q_proj", "lm_head", "", "x.7", "model.layers.2.x"))
def test_a_pattern_matches_as_in_the_standard_library(text, name):
    assert Pattern(text).match(name) == (re.match(text, name) is not None)


@pytest.mark.parametrize("text", ("(", "a{99999999999999}", "(" * 100_000, "*"))
def test_what_is_no_pattern_is_told_as_such(text):
    assert pattern_of(text) is None


def test_a_pattern_that_does_not_end_is_given_up():
    started = time.process_time()
    with pytest.raises(BadCheckpoint, match="takes more than"):
        Pattern(ENDLESS).match(NAME)
    assert time.process_time() - started < 4 * SECONDS


def test_a_check_of_such_a_pattern_ends_and_is_never_ready(tmp_path):
    case = tiny()
    words = f"model.layers.0.mlp.{NAME}.weight_packed"
    case.tensors[words], case.dtypes[words] = np.zeros((4, 4), np.int32), "I32"
    case.config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 32}}},
        "ignore": ["re:.*?" + ENDLESS],
    }
    report = check(case.write(tmp_path / "m"), case.recipe, stage="header")
    assert not report.ok or report.crashed
    assert any("takes more than" in str(run.crashed) for run in report.crashed)
