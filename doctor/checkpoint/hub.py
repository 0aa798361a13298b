"""A repository on the Hugging Face Hub, checked without downloading it: the listing, the JSON files, the shards'
headers.

The interface is Checkpoint's, so rules cannot tell the difference, except that tensor bytes are not there. The server
is trusted as little as a local file: JSON is read up to a limit, headers go through safetensors.parse_header, a length
is believed only if the listing and the response agree on it. A shard takes one request, or two if its header is longer
than HEAD_BYTES. All requests go to one commit, so a push in between cannot mix two states.

huggingface_hub's own get_safetensors_metadata is not used: it raises at the first fault and gives no place.
"""

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from doctor.checkpoint.directory import MAX_JSON_BYTES, Checkpoint, Entry, JsonFile
from doctor.checkpoint.hub_client import HubClient, network_errors
from doctor.checkpoint.safetensors import Defect, Shard, ShardFile, parse_header
from doctor.core.errors import BadCheckpoint, MachineError
from doctor.core.messages import _

NOT_DOWNLOADED: str = _("not downloaded; --download fetches it")
HEAD_BYTES = 64 << 10  # most headers end before that
MAX_ALL_JSON_BYTES = 256 << 20
MAX_FILES = 10_000
MAX_PAGES, MAX_ROWS, MAX_LISTING_S = 200, 200_000, 300.0  # of one listing, whatever its rows are
WORKERS = 8
_REPO = re.compile(r"(?:hf://)?(?P<repo>\w[\w.-]*/\w[\w.-]*(?<!\.safetensors)(?<!\.json))(?:@(?P<revision>[^@\s]+))?")
# Not needed for any check, and large.
_NOT_WANTED = ["*/*", "*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx", "*.h5", "*.msgpack", "*.ot", "*.tflite"]


def open_checkpoint(
    text: str | os.PathLike,
    revision: str | None = None,
    download: bool = False,
    notice: Callable[[str], None] = lambda line: None,
) -> Checkpoint:
    """A local directory or file, else the Hub repository `org/name[@revision]`; hf://org/name is always the Hub's.

    notice gets a line for the user if the name was ambiguous. Raises BadCheckpoint, MachineError.
    """
    text = os.fspath(text)
    match = _REPO.fullmatch(text)
    forced = text.startswith("hf://")
    if not forced and (match is None or os.path.exists(text)):
        if revision or download:
            raise BadCheckpoint(
                _("{path}: a local path; --revision and --download are for the Hub.", path=text)
                if os.path.exists(text)
                else _("{path}: not a repository name; --revision and --download are for the Hub.", path=text),
                _("Write hf://org/name for a repository."),
            )
        if match is not None and _is_cached(match["repo"]):
            notice(
                _(
                    "{path}: the local directory is checked, not the Hub repository of this name; that one is "
                    "hf://{path}.",
                    path=text,
                )
            )
        return Checkpoint.open(text)
    if match is None:
        raise BadCheckpoint(
            _("{path}: not a repository name.", path=text), _("Write hf://org/name or hf://org/name@revision.")
        )
    if match["revision"] and revision and match["revision"] != revision:
        raise BadCheckpoint(
            _(
                "{path}: names revision {first}, --revision names {second}.",
                path=text,
                first=match["revision"],
                second=revision,
            ),
            _("Give one of them."),
        )
    repo, revision = match["repo"], revision or match["revision"]
    if _offline():
        return _from_cache(repo, revision, notice)
    remote = HubCheckpoint.at(repo, revision)
    if download and any(n.endswith(".safetensors") for n in remote.entries):
        return Checkpoint.open(_download(repo, remote.commit))
    if download:
        notice(_("{repo}: has no safetensors file, so nothing was downloaded.", repo=repo))
    return remote


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _is_cached(repo: str) -> bool:
    from huggingface_hub import constants

    return os.path.isdir(os.path.join(constants.HF_HUB_CACHE, "models--" + repo.replace("/", "--")))


def _from_cache(repo: str, revision: str | None, notice: Callable[[str], None]) -> Checkpoint:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = snapshot_download(repo, revision=revision, local_files_only=True)
    except (LocalEntryNotFoundError, OSError):
        raise MachineError(
            _("{repo}: HF_HUB_OFFLINE is set, and the cache has no snapshot of it.", repo=repo),
            _("Unset HF_HUB_OFFLINE, or give a local directory."),
        ) from None
    notice(
        _(
            "{repo}: HF_HUB_OFFLINE is set: the cached files are checked, which may be fewer than the repository's.",
            repo=repo,
        )
    )
    return Checkpoint.open(folder)


def _download(repo: str, commit: str) -> Path:
    from huggingface_hub import snapshot_download

    broken: tuple[type[Exception], ...] = (OSError, *network_errors())
    try:
        return Path(snapshot_download(repo, revision=commit, ignore_patterns=_NOT_WANTED))
    except broken as error:
        raise MachineError(
            _("{repo}: the download was interrupted: {error}", repo=repo, error=str(error).splitlines()[0][:200]),
            _("Run it again: it resumes where it stopped."),
        ) from None


class HubCheckpoint(Checkpoint):
    """One commit of a Hub repository. `root` is its name, for messages; none of its files is on this machine."""

    unread = NOT_DOWNLOADED

    def __init__(self, repo: str, revision: str | None) -> None:
        super().__init__(Path(repo + (f"@{revision}" if revision else "")))
        self.revision, self.commit = revision, ""
        self.lfs_sha256: dict[str, str] = {}
        self.requests = HubClient(repo)

    @classmethod
    def at(cls, repo: str, revision: str | None = None) -> "HubCheckpoint":
        """List the repository and read what a header check needs. Raises BadCheckpoint, MachineError."""
        self = cls(repo, revision)
        self._list()
        self._load_json()
        self._open_shards()
        return self

    @property
    def name(self) -> str:
        return str(self.root)

    def _list(self) -> None:
        hub = self.requests
        base = f"{hub.endpoint}/api/models/{hub.repo}"
        info, _next = hub.document(
            f"{base}/revision/{quote(self.revision, safe='')}" if self.revision else base, _("model info")
        )
        commit = info.get("sha") if isinstance(info, dict) else None
        if not isinstance(commit, str) or not re.fullmatch(r"[0-9a-f]{40,64}", commit):
            raise MachineError(_("{repo}: its model info names no commit.", repo=hub.repo), _("Check HF_ENDPOINT."))
        self.commit = commit
        page: str | None = f"{base}/tree/{commit}"
        pages, count, began = 0, 0, time.monotonic()
        while page is not None:
            rows, page = hub.document(page, _("file listing"))
            pages, count = pages + 1, count + (len(rows) if isinstance(rows, list) else 0)
            for row in rows if isinstance(rows, list) else []:
                self._add(row)
            seconds = time.monotonic() - began
            if pages > MAX_PAGES or seconds > MAX_LISTING_S:
                raise MachineError(
                    _(
                        "{repo}: file listing: {pages:,} pages with {rows:,} rows in {seconds:.0f} s and no end; at "
                        "most {most} pages and {limit:.0f} s are read.",
                        repo=hub.repo,
                        pages=pages,
                        rows=count,
                        seconds=seconds,
                        most=MAX_PAGES,
                        limit=MAX_LISTING_S,
                    ),
                    _("Check HF_ENDPOINT, or download one checkpoint of it and check that directory."),
                )
            if count > MAX_ROWS or len(self.entries) > MAX_FILES:
                raise BadCheckpoint(
                    _("{repo}: more than {limit:,} files.", repo=hub.repo, limit=MAX_FILES),
                    _("Download one checkpoint of it, and check that directory."),
                )

    def _add(self, row: object) -> None:
        """One row of the listing. Folders are left out; a file without a usable size is a problem."""
        if not isinstance(row, dict):
            return
        name, size = row.get("path"), row.get("size")
        if not isinstance(name, str) or row.get("type") != "file" or "/" in name or name in ("", ".", ".."):
            return
        lfs = row.get("lfs")
        if isinstance(lfs, dict):
            size = lfs.get("size", size)
            if isinstance(lfs.get("oid"), str):
                self.lfs_sha256[name] = lfs["oid"].removeprefix("sha256:")
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            self.problems.append(
                Defect("unreadable", _("the Hub lists it with {size!r} bytes", size=str(size)[:40]), name)
            )
            return
        self.entries[name] = Entry(name, size)

    def _load_json(self) -> None:
        left, wanted = MAX_ALL_JSON_BYTES, []
        for entry in sorted(self.entries.values(), key=lambda e: e.size):
            if entry.name.endswith(".json"):
                left -= entry.size
                if left < 0:
                    self.problems.append(
                        Defect(
                            "unreadable",
                            _(
                                "{size:,} bytes; at most {limit:,} bytes of JSON are fetched",
                                size=entry.size,
                                limit=MAX_ALL_JSON_BYTES,
                            ),
                            entry.name,
                        )
                    )
                else:
                    wanted.append(entry.name)
        for name, raw in zip(wanted, self._in_parallel(self._try_read, wanted), strict=True):
            if isinstance(raw, BadCheckpoint):
                self.problems.append(Defect("unreadable", raw.message, name))
            else:
                self.json[name] = JsonFile(name, raw)

    def _try_read(self, name: str) -> bytes | BadCheckpoint:
        try:
            return self.read_file(name)
        except BadCheckpoint as error:
            return error

    def _in_parallel(self, work: Callable[[str], Any], names: Iterable[str]) -> list[Any]:
        from concurrent.futures import ThreadPoolExecutor

        names = list(names)
        with ThreadPoolExecutor(min(WORKERS, max(len(names), 1))) as pool:
            jobs = [pool.submit(work, name) for name in names]
            try:
                return [job.result() for job in jobs]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def read_file(self, name: str, limit: int = MAX_JSON_BYTES) -> bytes:
        """Bytes of one listed file, fetched. Raises BadCheckpoint if it is larger than `limit` or not of the listed
        size.
        """
        size = self.entries[name].size
        if size > limit:
            raise BadCheckpoint(
                _("{file}: {size:,} bytes; at most {limit:,} are read.", file=name, size=size, limit=limit)
            )
        raw, total, _headers = self.requests.read(self._url(name), name, 0, size + 1)
        if len(raw) != size or total not in (None, size):
            raise BadCheckpoint(
                _(
                    "{file}: the Hub lists {size:,} bytes and serves {served:,}.",
                    file=name,
                    size=size,
                    served=total if total is not None else len(raw),
                )
            )
        return raw

    def _url(self, name: str) -> str:
        return self.requests.url(self.commit, name)

    def _open_all(self, names: list[str]) -> list[Shard]:
        return self._in_parallel(self._open_shard, names)

    def _open_shard(self, name: str) -> Shard:
        size = self.entries[name].size
        try:
            head, total, _headers = self.requests.read(self._url(name), name, 0, HEAD_BYTES)
        except BadCheckpoint as error:
            self.problems.append(Defect("unreadable", error.message, name))
            return Shard(name, size, defects=[Defect("unreadable", error.message)])
        real = total if total is not None else len(head) if len(head) < min(HEAD_BYTES, size) else size
        if real != size:
            self.problems.append(
                Defect(
                    "unreadable", _("the Hub lists {size:,} bytes and serves {served:,}", size=size, served=real), name
                )
            )

        def read(offset: int, n: int) -> bytes:
            part = head[offset : offset + n]
            more = min(n, real - offset) - len(part)
            if more > 0:
                part += self.requests.read(self._url(name), name, offset + len(part), more)[0]
            return part

        return parse_header(name, real, read)

    def sha256(self, name: str) -> str:
        """SHA-256 in hexadecimal: as the Hub states it for an LFS file, computed for any other. Raises
        BadCheckpoint.
        """
        if name in self.lfs_sha256:
            return self.lfs_sha256[name]
        if name in self.json:
            return hashlib.sha256(self.json[name].raw).hexdigest()
        return hashlib.sha256(self.read_file(name)).hexdigest()

    def path(self, name: str) -> Path:
        raise self._not_downloaded(name)

    def open_file(self, shard: str) -> ShardFile:
        raise self._not_downloaded(shard)

    def _not_downloaded(self, file: str) -> BadCheckpoint:
        return BadCheckpoint(
            _("{checkpoint}: {file} is {why}.", checkpoint=self.name, file=file, why=NOT_DOWNLOADED),
            f"doctor check {self.name} --download",
        )
