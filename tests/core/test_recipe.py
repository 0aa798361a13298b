import pytest

from doctor.core.errors import DoctorError
from doctor.core.recipe import Recipe, parse_runtime


@pytest.mark.parametrize(
    "bad, text",
    [
        ({"bits": 5}, "bits 5; must be 2, 3, 4 or 8"),
        ({"method": "exl9"}, "method 'exl9'"),
        ({"group_size": 0}, "group size 0"),
        ({"tp": 0}, "tensor parallel 0"),
        ({"damp": 0.5, "damp_max": 0.1}, "damp 0.5 to 0.1"),
        ({"damp": float("nan")}, "damp nan"),
        ({"method": "awq", "bits": 8}, "awq with 8 bits"),
        ({"runtime": "tgi"}, "runtime 'tgi'"),
    ],
)
def test_an_illegal_value_is_refused_with_what_it_must_be(bad, text):
    with pytest.raises(DoctorError, match=text):
        Recipe(**bad)


def test_a_recipe_moves_one_way():
    recipe = Recipe(damp=0.01)
    assert recipe.with_field("damp", 0.05).damp == 0.05
    assert recipe.with_field("method", "rtn").method == "rtn"
    with pytest.raises(DoctorError, match="raised, never lowered"):
        recipe.with_field("damp", 0.001)
    with pytest.raises(DoctorError, match="a simpler one"):
        Recipe(method="rtn").with_field("method", "gptq")
    with pytest.raises(DoctorError, match="a field of the recipe"):
        recipe.with_field("dampp", 1)


def test_labels_read_as_people_write_them():
    assert Recipe(tp=8).label() == "gptq 4-bit g128 tp8"
    assert Recipe(method="awq", group_size=-1).label() == "awq 4-bit per-channel"
    assert (
        Recipe(format="compressed-tensors", group_size=64).label() == "compressed-tensors 4-bit g64"
    )  # who rounded it, its files do not say
    assert parse_runtime("vLLM==0.6.0") == ("vllm", "0.6.0")
    assert parse_runtime("vllm") == ("vllm", "")


def test_few_calibration_rows_get_more_damping_up_to_the_most():
    recipe = Recipe()
    assert [round(recipe.damp_for(n), 4) for n in (0, 256, 1024, 2048, 4096, 16_384, 20_000, 65_536)] == [
        0.4,
        0.4,
        0.1953,
        0.0977,
        0.0488,
        0.0122,
        0.01,
        0.01,
    ]
    assert Recipe(damp=0.2, damp_max=0.5).damp_for(65_536) == 0.2  # what is asked for is the least
    assert Recipe(damp_max=0.03).damp_for(1024) == 0.03
    assert Recipe(damp=0.0).damp_for(1024) == 0
