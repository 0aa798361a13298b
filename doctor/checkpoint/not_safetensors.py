"""What a file is that has a shard's name and is no shard: a pointer, a web page, a pickle, a file of zeros."""

from doctor.core.messages import _

_STARTS = {
    b"version https://git-lfs": ("lfs-pointer", _("a Git LFS pointer, not the data")),
    b"<!doctype": ("web-page", _("an HTML page, not a shard")),
    b"<html": ("web-page", _("an HTML page, not a shard")),
    b"pk\x03\x04": ("pickle", _("a zip archive (a torch pickle?), not a shard")),
    b"\x80\x02": ("pickle", _("a Python pickle, not a shard")),
    b"gguf": ("gguf", _("a GGUF file, not a shard")),
}


def other_kind(start: bytes, size: int, longest: int) -> tuple[str, str] | None:
    """(kind of defect, its text) of a file of `size` bytes that begins with these and is something else; else None.

    A header length that fits the file is believed: the bytes of the length 640 are also those of a pickle. longest: the
    longest header that the format allows, in bytes.
    """
    length = int.from_bytes(start[:8], "little")
    if 0 < length <= longest and (start[8:9] == b"{" or length + 8 <= size):
        return None
    found = next((what for magic, what in _STARTS.items() if start.lower().startswith(magic)), None)
    if found is None and start == bytes(len(start)):
        text = _("the first {count} bytes are zero: a preallocated file that was never filled", count=len(start))
        return "zero-filled", text
    return found
