"""Which tensors of a checkpoint are linears, by the templates of its family or, without a table, by name and shape."""

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from doctor.checkpoint.safetensors import TensorInfo
from doctor.model.templates import Template

# Parts of a multimodal checkpoint whose linears no text calibration reaches.
NOT_TEXT = re.compile(  # by whole parts from the start: half the time of a search from every letter
    r"^(?:[^.]*\.)*?(?:visual|vision\w*|vit|audio\w*|image\w*|multi_modal_projector|mm_projector|patch_embed"
    r"|talker|token2wav|code2wav)(?:\.|$)"
)


# What readers compute anew, and older saves hold all the same: rotary frequencies, causal masks, positions.
BUFFERS = re.compile(r"rotary_emb|inv_freq|rope|masked_bias|attn\.bias|attention\.bias|position_ids")


QUANTIZABLE = frozenset(
    {
        "q",
        "k",
        "v",
        "o",
        "gate",
        "up",
        "down",
        "qkv",
        "gate_up",
        "q_a",
        "q_b",
        "kv_a",
        "kv_b",
        "linear_attn_in",
        "linear_attn_out",
    }
)


# Row-parallel linears are cut along in_features by tensor parallelism; the others along out_features.
ROW_PARALLEL = frozenset({"o", "down", "linear_attn_out"})


def shown_role(role: str, name: str) -> str:
    """A role as a message says it: of layers with a state (Mamba, linear attention) the linear's own name, as in_proj;
    families call them by no common word.
    """
    return name.rpartition(".")[2] if role.startswith("linear_attn") else role


class Linear(NamedTuple):
    """A module with a 2-D weight that can be quantized. block: its decoder layer, None outside. transposed: stored [in,
    out], as Conv1D does. expert: its number in a mixture of experts.
    """

    name: str
    tensor: str
    role: str
    block: int | None
    in_features: int
    out_features: int
    transposed: bool = False
    expert: int | None = None


_BLOCK = re.compile(r"\.(?P<i>\d+)\.")


# Layers of multi-token prediction with a prefix of their own: their numbers begin at 0 again, so their linears have no
# decoder layer (block None).
_EXTRA_LAYERS = re.compile(r"(?:^|\.)(?:mtp|mtp_layers|nextn)\.")


def find_linears(
    infos: Iterable[TensorInfo], templates: tuple[Template, ...], experts: tuple[Template, ...]
) -> Iterator[Linear]:
    """Linears among the tensors: those that the family's templates name, and those that look like one where no template
    says what a tensor of the same layers is.
    """
    if templates:
        unknown: list[TensorInfo] = []
        stems = set()
        for linear in _by_template(infos, [t for t in (*templates, *experts) if "{i}" in t.tensor], unknown):
            stems.add(_stem(linear.tensor))
            yield linear
        yield from (linear for linear in _by_shape(unknown) if _stem(linear.tensor) in stems)
    else:
        for linear in _by_shape(infos):
            found = _template_and_match(linear.tensor, experts)
            yield linear._replace(role=found[0].role or "other", expert=int(found[1]["e"])) if found else linear


def _stem(name: str) -> str:
    """What stands before the number of a layer."""
    block = _BLOCK.search(name)
    return name[: block.start()] if block else name


def in_extra_layer(name: str) -> bool:
    """Whether a tensor or module belongs to a layer of multi-token prediction with its own prefix (`mtp.`)."""
    return _EXTRA_LAYERS.search(name) is not None


def _by_template(
    infos: Iterable[TensorInfo], templates: Iterable[Template], unknown: list[TensorInfo]
) -> Iterator[Linear]:
    """Linears by templates with a role that can be quantized. unknown: gets matrices that no template names."""
    # By the name without its layer's number: a large mixture of experts has 50,000 tensors.
    known: dict[str, tuple[Template, str | None, int | None] | None] = {}
    by_tail: dict[str, list[Template]] = {}
    for template in templates:
        by_tail.setdefault(_tail(template.tensor), []).append(template)
    for info in infos:
        if len(info.shape) != 2:
            continue
        block = _BLOCK.search(info.name)
        alike = info.name if block is None else info.name[: block.start() + 1] + info.name[block.end() - 1 :]
        if alike not in known:
            found = _template_and_match(info.name, by_tail.get(_tail(info.name), ()))
            if found is not None and (block is None or found[1].start("i") != block.start("i")):
                alike = info.name  # the layer's number is another one of the name
            known[alike] = None
            if found is not None:
                expert = found[1].groupdict().get("e")
                known[alike] = (
                    found[0],
                    found[1]["i"] if alike == info.name or block is None else None,
                    int(expert) if expert is not None else None,
                )
        entry = known[alike]
        if entry is None:
            unknown.append(info)
        elif entry[0].role in QUANTIZABLE:
            template, number, expert_number = entry
            out, inn = info.shape[::-1] if template.transposed else info.shape
            layer = None if in_extra_layer(info.name) else int(number or (block["i"] if block else 0))
            yield Linear(
                info.name.removesuffix(".weight"),
                info.name,
                template.role or "other",
                layer,
                inn,
                out,
                template.transposed,
                expert_number,
            )


def _template_and_match(name: str, templates: Iterable[Template]) -> tuple[Template, re.Match[str]] | None:
    found = next(((t, match) for t in templates if (match := t.pattern.match(name))), None)
    return None if found is None or NOT_TEXT.search(name) else found


def _tail(name: str) -> str:
    """The last part of a name, which no template leaves open: only templates of the same tail can match."""
    return name[name.rfind(".", 0, name.rfind(".")) + 1 :]


ROLE_OF_TAIL = {
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "o",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
    "qkv_proj": "qkv",
    "gate_up_proj": "gate_up",
    "w1": "gate",
    "w3": "up",
    "w2": "down",
}


# Kept in 16 bits: norms (some are matrices), routers, embeddings, and the step projections of state-space models:
# x_proj and dt_proj are a few per cent of a Mamba layer, as narrow as the rank of its step, and feed a recurrence that
# adds up their errors.
_LEFT_OUT = re.compile(r"norm[^.]*(?:\.[^.]*)?$|embed[^.]*$|router[^.]*(?:\.[^.]*)?$|\.(?:gate|x_proj|dt_proj)$")


_ROUTER = re.compile(r"\.\d+\.(?:[^.]+\.)*(?:gate|router|router\.(?:proj|layer|gate|linear)|shared_expert_gate|wg)$")


def is_router(module: str) -> bool:
    """Whether a module of a layer, by its name, gives each expert of a mixture its share."""
    return _ROUTER.search(module) is not None


_EXPERT = re.compile(r"experts\.(\d+)\.")  # of a mixture whose experts are stored one by one

NARROWEST = 32  # a narrower matrix fills neither a group of weights nor a packed word


def _by_shape(infos: Iterable[TensorInfo]) -> Iterator[Linear]:
    """Linears of a family without a table: 2-D float weights of numbered layers, wide enough to be worth packing."""
    for info in infos:
        if len(info.shape) != 2 or min(info.shape) < NARROWEST:
            continue
        block = _BLOCK.search(info.name)
        module = info.name.removesuffix(".weight")
        if (
            block is None
            or module == info.name
            or not info.dtype.is_float
            or _LEFT_OUT.search(module, block.end() - 1)
            or NOT_TEXT.search(info.name)
        ):
            continue
        tail, expert = module.rpartition(".")[2], _EXPERT.search(module, block.end() - 1)
        yield Linear(
            module,
            info.name,
            ROLE_OF_TAIL.get(tail, "other"),
            None if in_extra_layer(info.name) else int(block["i"]),
            info.shape[1],
            info.shape[0],
            expert=int(expert[1]) if expert else None,
        )
