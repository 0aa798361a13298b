"""F019 link-leads-out: a file is a symbolic link to a place outside the checkpoint.

Why: what it shows depends on the machine, and a checkpoint from elsewhere could so point at private files. It is not followed here,
and the file counts as absent.

Do: replace the link by a copy or a hard link of what it points to.

False alarms: layouts of your own that link shards from another disk. A Hub cache's links into its blobs are followed.

Fix safety: manual; doctor does not follow paths out of the checkpoint.

Sources: huggingface/huggingface_hub docs, "Manage your cache": snapshots hold links into ../../blobs.
"""

import os

from doctor.rule import Fix, Place, finding, rule
from doctor.testing import tiny

READ = (".safetensors", ".json", ".jinja", ".model")


@rule("F019", "error")
def link_leads_out(checkpoint, listing_problems):
    for defect in listing_problems:
        if defect.kind == "link-leads-out" and defect.tensor.endswith(READ):
            yield finding(f"{defect.tensor} is {defect.detail}, outside the checkpoint", at=Place(defect.tensor),
                          fix=Fix("put a copy or a hard link of the file in its place", (), "manual"))


def bad():
    case = tiny()

    def link(folder):
        os.symlink("/dev/null", folder / "notes.json")

    case.damage.append(link)
    return case, "notes.json is a symbolic link to /dev/null, outside the checkpoint"


def good():
    return tiny()
