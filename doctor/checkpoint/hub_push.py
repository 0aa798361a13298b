"""A finished directory onto the Hub: `--push org/name`. Nothing else here sends a byte of a checkpoint anywhere."""

from __future__ import annotations

import re
from pathlib import Path

from doctor.checkpoint.hub_client import network_errors
from doctor.core.errors import DoctorError, MachineError
from doctor.core.messages import _

_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def require_pushable(name: str) -> None:
    """Before hours of work: that the name is one and that a token is there. Raises DoctorError, MachineError."""
    if not _REPOSITORY.fullmatch(name):
        raise DoctorError(_("--push {name}: not a repository's name; must be org/name.", name=name))
    from huggingface_hub import get_token

    if not get_token():
        raise MachineError(
            _("--push {name}: no token of the Hub is there.", name=name),
            _("Log in with `hf auth login`, or set HF_TOKEN."),
        )


def push(folder: Path, name: str) -> str:
    """Upload every file of a directory to a repository, which is made private where it is new; its address."""
    from huggingface_hub import HfApi

    api = HfApi()
    failures: tuple[type[Exception], ...] = (
        OSError,
        ValueError,
        *network_errors(),
    )  # bases of the Hub's own errors too
    try:
        url = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=name, folder_path=str(folder), commit_message="Upload a checkpoint that doctor quantized"
        )
    except failures as error:
        raise MachineError(
            _("--push {name}: {reason}.", name=name, reason=str(error).splitlines()[0].rstrip(".")),
            _("{folder} is whole; `hf upload {name} {folder}` tries again.", folder=str(folder), name=name),
        ) from None
    return str(url)
