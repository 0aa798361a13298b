"""F024 unfinished-download: temporary file of an unfinished download.

Why: download tools rename or delete these files at the end. While one exists, some file is incomplete even if its size
is right: aria2 reserves the full size first.

Do: start the download again; it resumes where it stopped. If it did finish, delete the temporary file.

False alarms: leftovers of a download that was later completed by other means.

Fix safety: unsafe, and only by name: the output does not get the temporary file; an unfinished download stays
unfinished.

Sources: aria2 manual, "Control file"; huggingface/huggingface_hub src/huggingface_hub/file_download.py (`.incomplete`).
"""

from doctor.lint.rule import DropFile, Fix, Place, _, finding, rule
from doctor.lint.testing import tiny

ENDINGS = (".incomplete", ".aria2", ".part", ".partial", ".crdownload", ".download", ".!qB", ".st")


@rule("F024", "warning", certainty="likely")
def unfinished_download(checkpoint, files):
    for name in sorted(files):
        if name.endswith(ENDINGS):
            yield finding(
                _(
                    "{file} ({size:,} bytes) is the temporary file of an unfinished download",
                    file=name,
                    size=files[name].size,
                ),
                at=Place(name),
                evidence={"bytes": files[name].size},
                fix=Fix(_("leave {file} out", file=name), (DropFile(name),), "unsafe", by_name=True),
                advice=_("finish the download, or delete the temporary file"),
            )


def bad():
    case = tiny()
    case.files["model.safetensors.aria2"] = bytes(64)
    return case, "model.safetensors.aria2 (64 bytes) is the temporary file of an unfinished download"


def good():
    return tiny()
