"""Stored formats, judged as engines read them: what is named, and what stays silent."""

import numpy as np

from doctor.api import check
from doctor.lint.testing import use_family


def codes_of(report):
    return {f.code for f in report.findings if not f.consequence_of}


def test_fused_packed_experts_are_one_error_and_missing_experts_follow_from_it(tmp_path):
    from doctor.rules import o619_fused_experts_packed as rule_file

    with use_family("qwen3_moe"):
        case, _message = rule_file.bad()
    report = check(case.write(tmp_path), case.recipe)
    assert codes_of(report) == {"O619"}
    [found] = [f for f in report.findings if f.code == "O619"]
    assert found.evidence == {
        "tensors": 4,
        "experts": 4,
        "names": sorted(n for n in case.tensors if n.endswith("_packed")),
    }
    assert ("engines look for", "model.layers.0.mlp.experts.0.down_proj.weight_packed") in found.facts_table


def test_fused_experts_in_eight_bits_under_their_own_names_are_not_called_unreadable(tmp_path):
    from doctor.rules import o619_fused_experts_packed as rule_file

    with use_family("qwen3_moe"):
        case, _message = rule_file.bad()
    for name in [n for n in case.tensors if n.endswith("_packed")]:
        codes, plain = case.tensors.pop(name), name.removesuffix("_packed")
        case.tensors[plain], case.dtypes[plain] = codes.view(np.uint8), "U8"
        del case.dtypes[name]
    assert "O619" not in {f.code for f in check(case.write(tmp_path), case.recipe).findings}
