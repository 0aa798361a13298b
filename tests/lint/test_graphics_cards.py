"""--gpu: what a runtime computes with depends on the card, by the tables that were read from its releases."""

from dataclasses import replace

import pytest

from doctor.api import check
from doctor.core.errors import DoctorError
from doctor.core.recipe import Recipe
from doctor.formats.schemes import fields_of
from doctor.lint.testing import tiny


def said(scheme, gpu, folder, runtime="vllm"):
    case = tiny("llama")
    recipe = Recipe(**fields_of(scheme, {}), runtime=runtime, gpu=gpu, goal="quantize")
    return [(f.severity, f.message) for f in check(case.write(folder), recipe).findings if f.code == "G334"]


@pytest.mark.parametrize(
    "scheme, gpu, message",
    [
        ("W4AFP8", "rtx4090", "vllm computes with this format on compute capability 9.0; rtx4090 has 8.9"),
        ("W4AFP8", "b200", "vllm computes with this format on compute capability 9.0 alone; b200 has 10.0"),
        ("W4AFP8", "h100", None),
        ("MXFP4A16", "t4", "vllm computes with this format on compute capability 8.0; t4 has 7.5"),
        ("W4A16", "t4", None),
    ],
)
def test_a_scheme_is_judged_by_the_card(scheme, gpu, message, tmp_path):
    assert [m for severity, m in said(scheme, gpu, tmp_path) if severity == "error"] == ([message] if message else [])


def test_without_a_runtime_a_card_says_nothing(tmp_path):
    assert said("W4AFP8", "rtx4090", tmp_path, runtime="") == []


def test_a_card_that_is_not_in_the_table_is_refused():
    with pytest.raises(DoctorError, match="one of t4"):
        Recipe(gpu="rtx409")


def test_a_card_changes_nothing_of_what_is_written():
    assert replace(Recipe(), gpu="h100").scheme == Recipe().scheme
