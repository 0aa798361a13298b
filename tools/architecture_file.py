"""Writes a family's table as the TOML file that people read and edit: rules/tables/architectures/FAMILY.toml.

What is left out has a default (doctor/core/tables.py, parse_family). Comment lines at the head of a file are a person's
notes and survive a rewrite.
"""

import json
from collections.abc import Mapping

# Order of the keys of one tensor in the file.
TENSOR_KEYS = (
    "name",
    "shape",
    "role",
    "transposed",
    "bias",
    "norm_before",
    "norm",
    "layers",
    "only_with",
    "only_without",
)


def render(entry: Mapping, notes: str = "") -> str:
    """Text of the file. entry: the keys of the file, tensors under "tensor"; notes: comment lines for its head."""
    lines = [notes.rstrip() + "\n"] if notes.strip() else []
    for key in ("model_type", "architecture", "verified"):
        lines.append(f"{key} = {value(entry[key])}")
    for key, default in (
        ("tie_word_embeddings", False),
        ("embed_tokens", "model.embed_tokens"),
        ("lm_head", "lm_head"),
        ("norm", "weight * xhat"),
        ("linear_paths", []),
    ):
        if entry.get(key, default) != default:
            lines.append(f"{key} = {value(entry[key])}")
    lines.append(f"config_keys = {value(list(entry['config_keys']))}")
    for name in ("renamed_keys", "defaults", "kinds"):
        if entry.get(name):
            lines += ["", f"[{name}]", *(f"{key} = {value(v)}" for key, v in entry[name].items())]
    for tensor in entry["tensor"]:
        lines += [
            "",
            "[[tensor]]",
            *(f"{key} = {value(tensor[key])}" for key in TENSOR_KEYS if tensor.get(key) not in (None, False)),
        ]
    return "\n".join(lines) + "\n"


def notes_of(text: str) -> str:
    """Comment lines at the head of a file."""
    head = []
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            break
        head.append(line)
    return "\n".join(head).strip()


def value(v: object) -> str:
    """A value as TOML. Strings need no escapes that JSON does not share."""
    if isinstance(v, bool):
        return "true" if v else "false"
    if isinstance(v, (list, tuple)):
        return "[" + ", ".join(value(x) for x in v) + "]"
    return json.dumps(v, ensure_ascii=False) if isinstance(v, str) else repr(v)
