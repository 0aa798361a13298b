"""What formats ask of a quantization_config and of the tensors of one linear, with the sentence where it is not so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from doctor.core.errors import BadCheckpoint
from doctor.core.facts import Unavailable
from doctor.core.messages import _
from doctor.formats.arrays import Array


def whole(raw: Mapping[str, Any], *names: str) -> int:
    """The first of these keys that is a positive whole number or -1. Raises Unavailable where none is."""
    for name in names:
        value = raw.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and (value > 0 or value == -1):
            return value
    raise Unavailable(_("quantization_config has no usable {key}", key=names[0]))


def require_known(key: str, value: str, known: Sequence[str]) -> None:
    """Unavailable where a version is none of these."""
    if value not in known:
        raise Unavailable(
            _(
                "{key} {value!r}: its packing is not read, only {known}",
                key=key,
                value=value,
                known=" and ".join(known),
            )
        )


def require_shape(name: str, array: Array, shape: tuple[int, ...]) -> None:
    """BadCheckpoint where a part has another shape than the others ask for."""
    if tuple(array.shape) != shape:
        raise BadCheckpoint(
            _(
                "{name} is {found}: the other tensors of this linear ask for {wanted}.",
                name=name,
                found=list(array.shape),
                wanted=list(shape),
            )
        )


def require_groups(g_idx: Array, k: int, groups: int) -> None:
    """BadCheckpoint where the group of a column is none of the groups of scales."""
    require_shape("g_idx", g_idx, (k,))
    if int(g_idx.min()) < 0 or int(g_idx.max()) >= groups:
        raise BadCheckpoint(
            _(
                "g_idx spans {least}..{most}: there are {groups} groups of scales.",
                least=int(g_idx.min()),
                most=int(g_idx.max()),
                groups=groups,
            )
        )


def require_dividing(k: int, groups: int) -> None:
    """BadCheckpoint where groups of neighbours do not divide in_features."""
    if groups < 1 or k % groups:
        raise BadCheckpoint(
            _(
                "{groups} groups of scales for {size} in_features: groups must divide in_features.",
                groups=groups,
                size=k,
            )
        )


def stored_shape(shape: tuple[int, ...], padded: tuple[int, int]) -> tuple[int, ...]:
    """[n, k] of a weight as it is stored, rounded up to multiples of `padded`."""
    return (*(-(-size // unit) * unit for size, unit in zip(shape, padded, strict=False)), *shape[2:])
