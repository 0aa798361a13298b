"""A crowd of tensors over next to no data: a header that no model has, made to keep its readers busy.

More tensors than CROWD in one file, of fewer bytes each on average than CROWD_BYTES, are no model's: the largest
mixture has 200,000, of kilobytes and more. Such a header is named and not read, so no small file takes seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from doctor.core.messages import Message, _

CROWD, CROWD_BYTES = 65_536, 64


def is_crowd(header: Mapping[str, Any], room: int) -> bool:
    """Whether a header's entries are a crowd over `room` bytes of data. Of a file that is cut short the data are those
    that the header promises.
    """
    count = len(header)
    if count <= CROWD or room >= CROWD_BYTES * count:
        return False
    ends = (e["data_offsets"] for e in header.values() if type(e) is dict and "data_offsets" in e)
    last = max((o[1] for o in ends if type(o) is list and len(o) == 2 and type(o[1]) is int), default=0)
    return last < CROWD_BYTES * count


def crowd_of(count: int, room: int) -> Message:
    """What is wrong with it."""
    return _(
        "the header lists {count:,} tensors over {room:,} bytes of data; no model is stored so, and they are not read",
        count=count,
        room=room,
    )
