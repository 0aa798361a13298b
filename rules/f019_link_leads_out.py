"""F019 link-leads-out: symbolic link points outside the checkpoint.

Why: what it points to depends on the machine, and a downloaded checkpoint could use it to reach private files. doctor
does not follow it, and treats the file as missing.

Do: replace the link by a copy or a hard link of its target.

False alarms: your own layout that links shards from another disk. Links of a Hub cache into its blobs are followed.

Fix safety: with `--from` the donor's file of this name is used: unsafe unless another shard shows that the donor is the
same model. Else manual: doctor does not follow paths out of the checkpoint.

Sources: huggingface/huggingface_hub docs, "Manage your cache": snapshots hold links into ../../blobs.
"""

import os

from doctor.lint.rule import Place, _, finding, from_base, rule
from doctor.lint.testing import tiny

READ = (".safetensors", ".json", ".jinja", ".model")


@rule("F019", "error")
def link_leads_out(checkpoint, listing_problems, base):
    for defect in listing_problems:
        if defect.kind == "link-leads-out" and defect.tensor.endswith(READ):
            yield finding(
                _("{file} is {detail}, outside the checkpoint", file=defect.tensor, detail=defect.detail),
                at=Place(defect.tensor),
                fix=from_base(base, defect.tensor, _("replace it by a copy or a hard link of the file")),
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
    """The checkpoint of --from that has the file."""
    case = tiny()
    case.files["notes.json"] = b"{}"
    return case
