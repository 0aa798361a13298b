"""Four-bit floats: a sign, two bits of exponent and one of mantissa, two codes a byte, the even column in the low half.

Source: the OCP microscaling formats specification 1.0, section 5.3.3.
"""

from __future__ import annotations

from doctor.core.errors import BadCheckpoint, NotQuantizable
from doctor.core.messages import _
from doctor.formats.arrays import Array, cast, interleaved, numbers, repeated, taken

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
VALUES = (*_MAGNITUDES, *(-value for value in _MAGNITUDES))


def values_of(packed: Array) -> Array:
    """f32[n, 2m]: the values of two codes a byte, u8[n, m]."""
    codes = cast(interleaved(packed & 15, packed >> 4), "I32")
    n, k = codes.shape
    return taken(numbers(VALUES, packed), codes.reshape(-1), 0).reshape(n, k)


def scaled(packed: Array, scale: Array, group: int) -> Array:
    """f32[n, k] of codes u8[n, k/2] and scales f32[n, k/group]. Raises BadCheckpoint where they do not fit."""
    n, k = packed.shape[0], packed.shape[1] * 2
    wanted = (n, -(-k // group))
    if tuple(scale.shape) != wanted or k % group:
        raise BadCheckpoint(
            _(
                "weight_scale is {found}; groups of {group} of {shape} need {wanted}.",
                found=list(scale.shape),
                group=group,
                shape=[n, k],
                wanted=list(wanted),
            )
        )
    return values_of(packed) * repeated(scale, group, 1)


# A code 0..24 of halves (grid.E2M1) -> the four bits that are stored. Values between the levels have none: 0xFF.
_OF_HALVES = tuple(
    next((code for code, value in enumerate(VALUES) if value == half / 2), 0xFF) for half in range(-12, 13)
)


def packed_halves(codes: Array) -> Array:
    """u8[n, k/2] of codes u8[n, k] in halves with zero point 12 (grid.E2M1). Raises NotQuantizable for one that is no
    level.
    """
    stored = cast(taken(numbers(_OF_HALVES, codes), cast(codes, "I32").reshape(-1), 0), "U8").reshape(codes.shape)
    if (stored == 0xFF).any():
        raise NotQuantizable(_("a code is no value of a 4-bit float: its grid was fitted for another format."))
    return stored[:, 0::2] | (stored[:, 1::2] << 4)
