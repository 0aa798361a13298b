"""Whose configuration files are believed: what changes a verdict or runs Python never comes from who made the files.

Believed are a file that the user names, one that `doctor trust` allowed, one in the user's own configuration directory,
and one of the user's own project: a git repository, owned by the user, that is no copy of a model repository. Python
rule files of a project are loaded only after `doctor trust`, since a project may be a stranger's clone. `doctor trust`
keeps a hash of the file and of the Python that it names, so a change of either takes the permission back.

Source for what marks a copy of a model repository: huggingface_hub src/huggingface_hub/_local_folder.py
(`.cache/huggingface`) and file_download.py (`snapshots/REV`); Hub repositories keep weights in Git LFS, as their
.gitattributes says.
"""

import contextlib
import hashlib
import json
import os
import re
from pathlib import Path

from doctor.checkpoint.directory import INDEX_NAME
from doctor.checkpoint.regular import read_regular
from doctor.core.errors import DoctorError, MachineError
from doctor.core.messages import Message, _

FILE = "doctor.toml"
ALLOWED = "trusted.json"
MAX_BYTES = 1 << 20
MAX_RULE_FILES, MAX_RULE_BYTES = 1000, 16 << 20  # of the Python that one configuration names
_MODEL_HOSTS = re.compile(r"^\s*url\s*=.*\b(huggingface\.co|hf\.co|hf-mirror\.com|modelscope\.(cn|com))\b", re.M)
_LFS_WEIGHTS = re.compile(r"^\s*\S*\.(safetensors|bin|gguf|ckpt)\s.*filter=lfs", re.M)


def user_folder() -> Path:
    """The user's own configuration directory: $XDG_CONFIG_HOME/doctor, else ~/.config/doctor."""
    base = os.environ.get("XDG_CONFIG_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".config") / "doctor"


def holds_checkpoint(folder: Path) -> bool:
    """Whether weights or their config.json lie directly in a directory."""
    return (folder / "config.json").exists() or (folder / INDEX_NAME).exists() or any(folder.glob("*.safetensors"))


def doubt(path: Path) -> Message | None:
    """Why a file that was found on the way up is not believed; None where it is. Python that it names is asked for by
    `is_allowed`.
    """
    if is_allowed(path):
        return None
    folder = path.parent
    for place in (folder, *folder.parents):
        if holds_checkpoint(place):
            return _("it is in a directory with a checkpoint, and came with it")
        if (place / ".git").exists():
            return _doubt_project(place, path)
        if place.parent.name == "snapshots" and place.parent.parent.name.startswith("models--"):
            return _("it is in a snapshot of the Hub")
    return _("it is in no project of yours: no directory above it has a .git")


def _doubt_project(root: Path, path: Path) -> Message | None:
    git = root / ".git"
    owners = {os.stat(p).st_uid for p in (git, path)}
    mine = {os.getuid(), int(os.environ.get("SUDO_UID", os.getuid()))}
    if not owners <= mine:
        return _("{root} belongs to another user", root=root)
    if not (git.is_file() or (git / "HEAD").is_file()):
        return _("{git} is no git directory", git=git)
    if (root / ".cache" / "huggingface").exists():
        return _("{root} was downloaded from the Hub", root=root)
    if _MODEL_HOSTS.search(_text(git / "config")) or _LFS_WEIGHTS.search(_text(root / ".gitattributes")):
        return _("{root} is a clone of a model repository", root=root)
    return None


def _text(path: Path) -> str:
    with contextlib.suppress(OSError, DoctorError):
        return read_regular(path, MAX_BYTES).decode("utf-8", "replace")
    return ""


def fingerprint(path: Path) -> str:
    """SHA-256 over a configuration file and every Python file below the directories that its `rules` names. Raises
    OSError, DoctorError.
    """
    raw = read_regular(path, MAX_BYTES)
    digest = hashlib.sha256(raw)
    for folder in _rules_of(path, raw):
        files = sorted(folder.rglob("*.py"))
        if len(files) > MAX_RULE_FILES:
            raise DoctorError(
                _("{path}: {n} Python files; at most {most} can be trusted at once.",
                  path=folder, n=len(files), most=MAX_RULE_FILES)
            )  # fmt: skip
        for file in files:
            data = read_regular(file, MAX_RULE_BYTES)
            digest.update(f"\0{file.relative_to(folder)}\0{len(data)}\0".encode("utf-8", "surrogateescape") + data)
    return digest.hexdigest()


def _rules_of(path: Path, raw: bytes) -> list[Path]:
    import tomllib

    try:
        table = tomllib.loads(raw.decode("utf-8"))
        table = table.get("tool", {}).get("doctor", {}) if path.name == "pyproject.toml" else table
        names = table.get("rules", ())
        return [(path.parent / n).resolve() for n in names if isinstance(n, str)] if isinstance(names, list) else []
    except (ValueError, RecursionError, AttributeError):
        return []


def is_allowed(path: Path) -> bool:
    """Whether `doctor trust` allowed this file, and neither it nor the Python that it names changed since."""
    known = _allowed().get(str(path.resolve()))
    if known is None:
        return False
    try:
        return fingerprint(path) == known
    except (OSError, DoctorError):
        return False


def allow(path: Path) -> str:
    """Allow a file as it is now; returns its fingerprint. Raises DoctorError where the file cannot be read,
    MachineError where the permission cannot be kept.
    """
    try:
        found = fingerprint(path)
    except OSError as error:
        raise DoctorError(
            _("{path}: {error}.", path=path, error=error.strerror), _("Give a doctor.toml or pyproject.toml.")
        ) from None
    _keep({**_allowed(), str(path.resolve()): found})
    return found


def forbid(path: Path) -> bool:
    """Take a permission back; whether there was one. Raises MachineError."""
    known = _allowed()
    if known.pop(str(path.resolve()), None) is None:
        return False
    _keep(known)
    return True


def _allowed() -> dict[str, str]:
    """Path -> fingerprint of what `doctor trust` allowed; a list that cannot be read allows nothing."""
    try:
        known = json.loads(read_regular(user_folder() / ALLOWED, MAX_BYTES))
    except (OSError, ValueError, RecursionError, DoctorError):
        return {}
    return {k: v for k, v in known.items() if isinstance(v, str)} if isinstance(known, dict) else {}


def _keep(known: dict[str, str]) -> None:
    place = user_folder() / ALLOWED
    beside = place.with_name(f"{ALLOWED}.{os.getpid()}")
    try:
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        beside.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(beside, place)
    except OSError as error:
        raise MachineError(
            _("{path}: {error}.", path=place, error=error.strerror),
            _("The list of trusted files must be writable; XDG_CONFIG_HOME moves it."),
        ) from None
