"""Opens the donor that `--from` names: a directory, or a repository on the Hub of which only what is copied is
downloaded.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from doctor.checkpoint.directory import Checkpoint
from doctor.checkpoint.hub import HubCheckpoint, open_checkpoint
from doctor.checkpoint.hub_donor import HubDonor
from doctor.core.errors import BadCheckpoint
from doctor.core.facts import CHECKPOINT
from doctor.core.messages import _
from doctor.edits.donor import Donor
from doctor.edits.donor_registry import donate
from doctor.fixing.assess import Progress
from doctor.fixing.staging import open_fetch


@contextmanager
def donor_facts(
    donor: str | os.PathLike[str] | Checkpoint | None, source: Checkpoint, output: Path, progress: Progress
) -> Iterator[list[tuple[str, str, object]]]:
    """The fact `base` of a donor, [] without one, for as long as the donor may be read.

    What is downloaded from the Hub lies beside the output and is removed at the end. Raises BadCheckpoint for a donor
    without readable weights, or that is the source itself.
    """
    if donor is None:
        yield []
        return
    text = str(donor.root if isinstance(donor, Checkpoint) else donor)
    found = donor if isinstance(donor, Checkpoint) else open_checkpoint(text)
    if isinstance(found, HubCheckpoint) and "adapter_config.json" in source.entries and not source.value("config.json"):
        found = open_checkpoint(text, download=True)  # a merge needs the base model whole
    unread = "" if isinstance(found, HubCheckpoint) else found.unread  # what is copied from the Hub is downloaded
    if unread or not found.tensors:
        raise BadCheckpoint(
            _(
                "{donor}: {reason}; --from needs weights to copy from.",
                donor=text,
                reason=unread or _("no safetensors tensor can be read"),
            )
        )
    if os.path.realpath(found.root) == os.path.realpath(source.root):
        raise BadCheckpoint(
            _("{donor}: is the checkpoint itself.", donor=text), _("Give the base model, or another copy.")
        )
    if not isinstance(found, HubCheckpoint):
        yield [(CHECKPOINT, "base", Donor(found, source, text))]
        return
    with open_fetch(output) as folder:
        fetched = HubDonor(found, folder)
        fetched.progress = partial(progress, "fetch")
        with donate(fetched.label, fetched):
            yield [(CHECKPOINT, "base", Donor(fetched, source, text))]
