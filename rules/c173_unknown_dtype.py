"""C173 unknown-dtype: dtype in config.json is a name that PyTorch does not have.

Why: transformers takes the word for an attribute of torch, and stops there, before it builds the model or its tokenizer.

Do: write the dtype that the weights are stored in, in PyTorch's spelling.

False alarms: none known.

Fix safety: safe: with the stored dtype stated, loading changes no value.

Sources: transformers 5.24 src/transformers/configuration_utils.py (`getattr(torch, dtype)`); vllm-project/vllm
vllm/config/model.py, STR_DTYPE_TO_TORCH_DTYPE.
"""

from doctor.lint.rule import CONFIG_NAMES, DTYPES, Fix, Place, RemoveJson, SetJson, _, finding, rule, stored_float
from doctor.lint.testing import tiny

KNOWN_NAMES = frozenset((*CONFIG_NAMES, *(d.torch for d in DTYPES.values() if d.torch), "double", "auto"))


@rule("C173", "error")
def unknown_dtype(checkpoint, spec, tensors, config):
    for key in ("dtype", "torch_dtype"):
        inner = {spec.at(key): spec.section(config)} if spec.text_key else {}
        for pointer, block in {f"/{key}": config, **inner}.items():
            stated = block.get(key)
            if not isinstance(stated, str) or stated.removeprefix("torch.") in KNOWN_NAMES:
                continue
            stored = _mostly_stored(tensors)
            yield finding(
                _("{key} is {stated!r} in config.json, which is no dtype of PyTorch", key=key, stated=stated[:40]),
                at=Place("config.json", pointer=pointer),
                evidence={"said": stated[:40]},
                fix=Fix(_('set "{key}": "{value}"', key=key, value=stored), (SetJson("config.json", pointer, stored, stated),))
                if stored
                else Fix(_("remove {key}", key=key), (RemoveJson("config.json", pointer, stated),)),
            )  # fmt: skip


def _mostly_stored(tensors):
    """The float type of most bytes. Asked for where there is a finding: a header may hold 100,000 names."""
    amounts: dict[str, int] = {}
    for info in tensors.values():
        amounts[info.dtype.name] = amounts.get(info.dtype.name, 0) + info.nbytes
    return stored_float(max(amounts, key=amounts.__getitem__, default=""))


def bad():
    case = tiny()
    case.config["torch_dtype"] = "bf16"
    return case, "torch_dtype is 'bf16' in config.json, which is no dtype of PyTorch"


def good():
    return tiny()
