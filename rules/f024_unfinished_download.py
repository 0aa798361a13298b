"""F024 unfinished-download: a downloader's working file still lies in the directory.

Why: these files are renamed or deleted when the download ends. While one is there, some file is not whole, even if its
size is right: aria2 reserves the full size first.

Do: start the download again; it goes on where it stopped. If it did end, delete the working file.

False alarms: leftovers of a download that was later done by other means.

Fix safety: unsafe, and only by name: the copy does not get the working file; a download that is not done stays so.

Sources: aria2 manual, "Control file"; huggingface/huggingface_hub src/huggingface_hub/file_download.py (`.incomplete`).
"""

from doctor.lint.rule import DropFile, Fix, Place, finding, rule
from doctor.lint.testing import tiny

ENDINGS = (".incomplete", ".aria2", ".part", ".partial", ".crdownload", ".download", ".!qB", ".st")


@rule("F024", "warning", certainty="likely")
def unfinished_download(checkpoint, files):
    for name in sorted(files):
        if name.endswith(ENDINGS):
            yield finding(
                f"{name} ({files[name].size:,} bytes) is what a download leaves before it is done",
                at=Place(name),
                evidence={"bytes": files[name].size},
                fix=Fix(f"leave {name} out", (DropFile(name),), "unsafe", by_name=True),
                advice="finish the download, or delete the working file",
            )


def bad():
    case = tiny()
    case.files["model.safetensors.aria2"] = bytes(64)
    return case, "model.safetensors.aria2 (64 bytes) is what a download leaves before it is done"


def good():
    return tiny()
