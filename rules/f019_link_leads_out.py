"""F019 link-leads-out: a file is a symbolic link to a place outside the checkpoint.

Why: what it shows depends on the machine, and a checkpoint from elsewhere could so point at private files. It is not
followed here, and the file counts as absent.

Do: replace the link by a copy or a hard link of what it points to.

False alarms: layouts of your own that link shards from another disk. A Hub cache's links into its blobs are followed.

Fix safety: with `--from` the base's file of this name is taken, unsafe unless another shard shows that it is the same
model. Else manual; doctor does not follow paths out of the checkpoint.

Sources: huggingface/huggingface_hub docs, "Manage your cache": snapshots hold links into ../../blobs.
"""

import os

from doctor.lint.rule import Place, finding, from_base, rule
from doctor.lint.testing import tiny

READ = (".safetensors", ".json", ".jinja", ".model")


@rule("F019", "error")
def link_leads_out(checkpoint, listing_problems, base):
    for defect in listing_problems:
        if defect.kind == "link-leads-out" and defect.tensor.endswith(READ):
            yield finding(
                f"{defect.tensor} is {defect.detail}, outside the checkpoint",
                at=Place(defect.tensor),
                fix=from_base(base, defect.tensor, "put a copy or a hard link of the file in its place"),
            )


def bad():
    case = tiny()

    def link(folder):
        os.symlink("/dev/null", folder / "notes.json")

    case.damage.append(link)
    return case, "notes.json is a symbolic link to /dev/null, outside the checkpoint"


def good():
    return tiny()


def donor():
    """What the missing is taken from."""
    case = tiny()
    case.files["notes.json"] = b"{}"
    return case
