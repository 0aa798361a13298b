"""C172 experts-per-token: the router is asked for more experts than there are, or for none.

Why: a router takes the largest k of its scores. With k above the number of experts the first forward pass stops; with 0 no
expert runs, and each token keeps what attention gave it. Groups of experts have the same limits.

Seen as:
- PyTorch: `RuntimeError: selected index k out of range`
- vLLM: `topk must be smaller than`

Do: write the number that the base model's config.json has.

False alarms: none known. A model without experts is not judged.

Fix safety: unsafe, and only with `--from`: the donor's number. Else manual: how many experts a token was trained with is
not in the weights.

Sources: transformers src/transformers/models/qwen3_moe/modeling_qwen3_moe.py and deepseek_v3/modeling_deepseek_v3.py
(torch.topk).
"""

from doctor.lint.rule import Place, _, finding, rule, value_from_base
from doctor.lint.testing import only_in, tiny

PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@rule("C172", "error", implied_by=("F051",))
def experts_per_token(checkpoint, spec, base):
    config = spec.config
    experts = spec.lookup("num_experts")
    experts = experts if _whole(experts) else next((config[k] for k in EXPERTS if _whole(config.get(k))), None)
    if not experts or experts < 1:
        return
    groups = config.get("n_group")
    if _whole(groups) and groups > 0 and experts % groups and groups <= experts:
        yield finding(
            _(
                "n_group is {groups} in config.json; it must divide the {experts} experts",
                groups=groups,
                experts=experts,
            ),
            at=Place("config.json", pointer=spec.at("n_group")),
            evidence={"value": groups, "experts": experts},
            fix=value_from_base(
                base,
                "config.json",
                spec.at("n_group"),
                groups,
                _("write the number that the base model's config.json has"),
            ),
        )
    for key, most, what in (
        *((key, experts, _("experts")) for key in PER_TOKEN),
        ("n_group", experts, _("experts")),
        ("topk_group", config.get("n_group"), _("groups of experts")),
    ):
        value = config.get(key)
        if not _whole(value) or not _whole(most) or 1 <= value <= most or (key not in PER_TOKEN and value < 1):
            continue
        manual = _("write the number that the base model's config.json has")
        yield finding(
            _(
                "{key} is {value} in config.json; it must be from 1 to {most}, the number of {what}",
                key=key,
                value=value,
                most=most,
                what=what,
            ),
            at=Place("config.json", pointer=spec.at(key)),
            evidence={"value": value, "most": most},
            fix=value_from_base(base, "config.json", spec.at(key), value, manual),
        )


def _whole(value):
    return isinstance(value, int) and not isinstance(value, bool)


def bad():
    case = tiny(
        only_in("qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "gpt_oss", why="it takes a mixture of experts")
    )
    experts = case.spec.lookup("num_experts")
    case.config["num_experts_per_tok"] = experts + 1
    return case, (
        f"num_experts_per_tok is {experts + 1} in config.json; it must be from 1 to {experts}, the number of experts"
    )


def good():
    return tiny(
        only_in("qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "gpt_oss", why="it takes a mixture of experts")
    )
