"""The header of a safetensors file that is written."""

import json
import struct
from collections.abc import Iterable, Mapping, Sequence

from doctor.checkpoint.json_text import escaped
from doctor.core.errors import DoctorError
from doctor.core.messages import _


def header_bytes(
    tensors: Iterable[tuple[str, str, Sequence[int], int]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Length and JSON header, padded to 8 bytes, of (name, dtype, shape, bytes) of tensors that lie one behind the
    other.

    metadata: what `__metadata__` holds beside the format, which transformers 4 wants named. Raises DoctorError where
    two tensors have one name.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    at = 0
    for name, dtype, shape, nbytes in tensors:
        if name in header:
            raise DoctorError(
                _("{name}: two tensors of the output have this name; every tensor needs its own.", name=name)
            )
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    raw = escaped(json.dumps(header, separators=(",", ":"), ensure_ascii=False)).encode("utf-8")
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw
