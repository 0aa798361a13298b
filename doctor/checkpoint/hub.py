"""A repository on the Hugging Face Hub, looked at without downloading it: the listing, the JSON files, and each shard's
header.

The interface is Checkpoint's, so rules cannot tell the difference, except that tensor bytes are not there. Everything
the server says is distrusted as a local file would be: JSON is read up to a limit, headers go through
shard.parse_header, a length is believed only if the listing and the response agree on it. A shard costs one request,
two where its header is longer than HEAD_BYTES. All requests go to one commit, so a push in between cannot mix two
states.

Endpoint, token, offline mode and proxy are huggingface_hub's (HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE). Its own
get_safetensors_metadata is not used: it raises at the first fault and gives no place.
"""

import hashlib
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from urllib.parse import quote

from doctor.checkpoint.directory import MAX_JSON_BYTES, Checkpoint, Entry, JsonFile
from doctor.checkpoint.safetensors import Defect, Shard, ShardFile, parse_header
from doctor.core.errors import BadCheckpoint, DoctorError, MachineError

NOT_DOWNLOADED = "not downloaded; --download fetches it"
HEAD_BYTES = 64 << 10  # most headers of a shard end before that
MAX_ALL_JSON_BYTES = 256 << 20
MAX_FILES = 10_000
MAX_LISTING_BYTES = 16 << 20  # of one page
RETRIES = 4
MAX_WAIT_S = 60.0  # a Retry-After above is not waited for
TIMEOUT_S = 30.0
WORKERS = 8
FETCH_BYTES = 16 << 20  # of one request of a tensor or file: what a torn connection loses at most
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

    notice gets a line for the user where there was a choice. Raises BadCheckpoint, MachineError.
    """
    text = os.fspath(text)
    match = _REPO.fullmatch(text)
    forced = text.startswith("hf://")
    if not forced and (match is None or os.path.exists(text)):
        if revision or download:
            raise BadCheckpoint(
                f"{text}: {'a local path' if os.path.exists(text) else 'no repository name'}; --revision and --download are for "
                "the Hub.",
                "Write hf://org/name for a repository.",
            )
        if match is not None and _is_cached(match["repo"]):
            notice(
                f"{text}: the local directory is checked, not the Hub's repository of this name; hf://{text} is that one."
            )
        return Checkpoint.open(text)
    if match is None:
        raise BadCheckpoint(f"{text}: not a repository name.", "Write hf://org/name or hf://org/name@revision.")
    if match["revision"] and revision and match["revision"] != revision:
        raise BadCheckpoint(
            f"{text}: names revision {match['revision']}, --revision names {revision}.", "Give one of them."
        )
    repo, revision = match["repo"], revision or match["revision"]
    if _offline():
        return _from_cache(repo, revision, notice)
    remote = HubCheckpoint.at(repo, revision)
    if download and any(n.endswith(".safetensors") for n in remote.entries):
        return Checkpoint.open(_download(repo, remote.commit))
    if download:
        notice(f"{repo}: holds no safetensors file, so nothing was downloaded.")
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
            f"{repo}: HF_HUB_OFFLINE is set, and the cache has no snapshot of it.",
            "Unset HF_HUB_OFFLINE, or give a local directory.",
        ) from None
    notice(f"{repo}: HF_HUB_OFFLINE is set; what the cache holds is checked, which may be less than the repository.")
    return Checkpoint.open(folder)


def _download(repo: str, commit: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, revision=commit, ignore_patterns=_NOT_WANTED))
    except (OSError, *_network_errors()) as error:
        raise MachineError(
            f"{repo}: the download ended early: {str(error).splitlines()[0][:200]}",
            "Run it again: it goes on where it stopped.",
        ) from None


def _network_errors() -> tuple[type[Exception], ...]:
    """Base errors of the HTTP library that huggingface_hub brings, whichever it is."""
    from huggingface_hub.utils import get_session

    library = sys.modules[type(get_session()).__module__.partition(".")[0]]
    return library.HTTPError, library.StreamError, library.InvalidURL


class Hub:
    """GET requests about one repository, with bounded patience: a torn connection goes on where it stopped, a busy
    server is waited for as long as it asks, within limits. Safe to use from several threads.
    """

    def __init__(self, repo: str):
        from huggingface_hub import constants
        from huggingface_hub.utils import build_hf_headers, get_session

        self.repo, self.endpoint = repo, constants.ENDPOINT.rstrip("/")
        self._session, self._errors = get_session(), _network_errors()
        self._headers = {**build_hf_headers(library_name="checkpoint-doctor"), "Accept-Encoding": "identity"}

    def url(self, commit: str, name: str) -> str:
        return f"{self.endpoint}/{self.repo}/resolve/{quote(commit, safe='')}/{quote(name)}"

    def read(self, url: str, what: str, begin: int, count: int) -> tuple[bytes, int | None, object]:
        """(bytes [begin, begin + count) of the resource, fewer where it ends; its size where the server says; the
        headers).

        Raises MachineError with the byte at which the connection broke, BadCheckpoint for what the Hub does not have.
        """
        got = bytearray()
        tries = 0
        while True:
            at = begin + len(got)
            try:
                wait, answer = self._once(url, at, count - len(got), got, what)
                why = "the Hub is busy"
            except self._errors as error:
                wait, answer, why = 0.5 * 2**tries, None, f"{type(error).__name__}: {error}"[:160]
            if answer is not None:
                return bytes(got), *answer
            tries += 1
            if tries > 1 and why.startswith(
                "ConnectError"
            ):  # nobody there: a mistyped path must not take long to say so
                raise MachineError(
                    f"{self.repo}: no such directory here, and {self.endpoint} cannot be reached: {why}.",
                    "Check the path; for a repository check the network and HF_ENDPOINT.",
                )
            if tries > RETRIES:
                raise MachineError(
                    f"{self.repo}: {what}: not whole after {tries} tries; the last ended at byte {begin + len(got):,}: {why}.",
                    "Run it again later.",
                )
            if wait > MAX_WAIT_S:
                raise MachineError(
                    f"{self.repo}: {what}: the Hub asks to wait {wait:,.0f} s; at most {MAX_WAIT_S:.0f} s are waited.",
                    "Run it again after that; with HF_TOKEN set the limits are wider.",
                )
            time.sleep(wait)

    def _once(
        self, url: str, at: int, count: int, got: bytearray, what: str
    ) -> tuple[float, tuple[int | None, object] | None]:
        """One request; appends to `got`. (seconds to wait, None) where it must be asked again."""
        headers = {**self._headers, "Range": f"bytes={at}-{at + count - 1}"}
        with self._session.stream("GET", url, headers=headers, timeout=TIMEOUT_S, follow_redirects=True) as response:
            status = response.status_code
            if status == 429 or status >= 500:
                return _retry_after(response.headers.get("retry-after")), None
            total = _total(response.headers, status)
            if status == 416:
                return 0.0, (total, response.headers)
            if status not in (200, 206):
                raise self._refusal(status, response.headers.get("x-error-code", ""), what)
            first = re.match(r"bytes (\d+)-", response.headers.get("content-range", ""))
            if status == 206 and (first is None or int(first[1]) != at):
                raise MachineError(
                    f"{self.repo}: {what}: asked for byte {at:,}, the server sent {response.headers.get('content-range', 'no range')!r}."
                )
            skip = at if status == 200 else 0  # a server that knows no ranges sends everything from the start
            for part in response.iter_raw():
                cut = min(skip, len(part))
                part, skip = part[cut:], skip - cut
                got += part[:count]
                count -= min(len(part), count)
                if count == 0:
                    break
        return 0.0, (total, response.headers)

    def _refusal(self, status: int, code: str, what: str) -> DoctorError:
        page = f"{self.endpoint}/{self.repo}"
        if code == "GatedRepo" or status == 403:
            return MachineError(
                f"{self.repo}: {what}: the Hub refuses access ({status}).",
                f"Accept the terms on {page}, and set HF_TOKEN or run `hf auth login`.",
            )
        if code == "RevisionNotFound":
            return BadCheckpoint(
                f"{self.repo}: {what}: the repository has no such revision (404).", f"See {page}/commits/main."
            )
        if code == "EntryNotFound":
            return BadCheckpoint(f"{self.repo}: {what}: the file is not in the repository (404).")
        if status in (401, 404):
            return BadCheckpoint(
                f"{self.repo}: {what}: no such directory here, and no such repository on {self.endpoint}, or it is private ({status}).",
                "Check the name; for a private repository set HF_TOKEN or run `hf auth login`.",
            )
        return MachineError(f"{self.repo}: {what}: the Hub answered {status}.", "Run it again later.")

    def document(self, url: str, what: str) -> tuple[object, str | None]:
        """(parsed JSON, address of the next page or None) of an API call."""
        raw, _, headers = self.read(url, what, 0, MAX_LISTING_BYTES)
        try:
            return json.loads(raw), _next_page(headers.get("link", ""), self.endpoint)
        except (ValueError, RecursionError):
            raise MachineError(
                f"{self.repo}: {what}: the Hub's answer is not JSON, or longer than {MAX_LISTING_BYTES:,} bytes.",
                "Check HF_ENDPOINT.",
            ) from None


def _next_page(link: str, endpoint: str) -> str | None:
    found = re.search(r'<([^<>]+)>\s*;\s*rel="next"', link)
    return found[1] if found and found[1].startswith(endpoint + "/") else None  # never with our token to another host


def _total(headers, status: int) -> int | None:
    """Size of the whole resource, as the server states it."""
    match = re.search(r"/(\d+)\s*$", headers.get("content-range", ""))
    if match:
        return int(match[1])
    length = headers.get("content-length", "")
    return int(length) if status == 200 and length.isdigit() else None


def _retry_after(text: str | None) -> float:
    """Seconds to wait; the header holds seconds or a date. Without one, a second."""
    if not text:
        return 1.0
    if re.fullmatch(r"\s*\d{1,9}\s*", text):
        return float(text)
    from email.utils import parsedate_to_datetime

    try:
        return max((parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds(), 0.0)
    except (TypeError, ValueError):
        return 1.0


class HubCheckpoint(Checkpoint):
    """One commit of a Hub repository. `root` is its name, for messages; no file of it is on this machine."""

    unread = NOT_DOWNLOADED

    def __init__(self, repo: str, revision: str | None):
        super().__init__(PurePosixPath(repo + (f"@{revision}" if revision else "")))
        self.revision, self.commit = revision, ""
        self.lfs_sha256: dict[str, str] = {}
        self.requests = Hub(repo)

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
        info, _ = hub.document(
            f"{base}/revision/{quote(self.revision, safe='')}" if self.revision else base, "its description"
        )
        commit = info.get("sha") if isinstance(info, dict) else None
        if not isinstance(commit, str) or not re.fullmatch(r"[0-9a-f]{40,64}", commit):
            raise MachineError(f"{hub.repo}: its description names no commit.", "Check HF_ENDPOINT.")
        self.commit = commit
        page: str | None = f"{base}/tree/{commit}"
        while page is not None:
            rows, page = hub.document(page, "its listing")
            for row in rows if isinstance(rows, list) else []:
                self._add(row)
            if len(self.entries) > MAX_FILES:
                raise BadCheckpoint(
                    f"{hub.repo}: more than {MAX_FILES:,} files.",
                    "Download the files that belong together and check them.",
                )

    def _add(self, row: object) -> None:
        """One row of the listing; folders and what has no usable name or size are left out or said."""
        name, size = (row.get("path"), row.get("size")) if isinstance(row, dict) else (None, None)
        if not isinstance(name, str) or row.get("type") != "file" or "/" in name or name in ("", ".", ".."):
            return
        lfs = row.get("lfs")
        if isinstance(lfs, dict):
            size = lfs.get("size", size)
            if isinstance(lfs.get("oid"), str):
                self.lfs_sha256[name] = lfs["oid"].removeprefix("sha256:")
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            self.problems.append(Defect("unreadable", f"the Hub lists it with {str(size)[:40]!r} bytes", name))
            return
        self.entries[name] = Entry(name, size)

    def _load_json(self) -> None:
        room, wanted = MAX_ALL_JSON_BYTES, []
        for entry in sorted(self.entries.values(), key=lambda e: e.size):
            if entry.name.endswith(".json"):
                room -= entry.size
                if room < 0:
                    self.problems.append(
                        Defect(
                            "unreadable",
                            f"{entry.size:,} bytes; at most {MAX_ALL_JSON_BYTES:,} of JSON are fetched",
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

    def _in_parallel(self, work: Callable, names: Iterable[str]) -> list:
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
        """Bytes of one listed file, fetched. Raises BadCheckpoint when it is larger than `limit` or not what the
        listing says.
        """
        size = self.entries[name].size
        if size > limit:
            raise BadCheckpoint(f"{name}: {size:,} bytes; at most {limit:,} are read.")
        raw, total, _ = self.requests.read(self._url(name), name, 0, size + 1)
        if len(raw) != size or total not in (None, size):
            raise BadCheckpoint(
                f"{name}: the Hub lists {size:,} bytes and serves {total if total is not None else len(raw):,}."
            )
        return raw

    def _url(self, name: str) -> str:
        return self.requests.url(self.commit, name)

    def _open_all(self, names: list[str]) -> list[Shard]:
        return self._in_parallel(self._open_shard, names)

    def _open_shard(self, name: str) -> Shard:
        size = self.entries[name].size
        try:
            head, total, _ = self.requests.read(self._url(name), name, 0, HEAD_BYTES)
        except BadCheckpoint as error:
            self.problems.append(Defect("unreadable", error.message, name))
            return Shard(name, size, defects=[Defect("unreadable", error.message)])
        real = total if total is not None else len(head) if len(head) < min(HEAD_BYTES, size) else size
        if real != size:
            self.problems.append(Defect("unreadable", f"the Hub lists {size:,} bytes and serves {real:,}", name))

        def read(offset: int, n: int) -> bytes:
            part = head[offset : offset + n]
            more = min(n, real - offset) - len(part)
            if more > 0:
                part += self.requests.read(self._url(name), name, offset + len(part), more)[0]
            return part

        return parse_header(name, real, read)

    def donor(self) -> "HubDonor":
        """The same commit, to take tensors and files from."""
        result = HubDonor(self.requests.repo, self.revision)
        for name in ("commit", "lfs_sha256", "entries", "problems", "json", "shards", "missing_shards"):
            setattr(result, name, getattr(self, name))
        return result

    def sha256(self, name: str) -> str:
        """SHA-256 as the Hub states it for a large file, worked out for a JSON file. Raises BadCheckpoint for
        others.
        """
        if name in self.lfs_sha256:
            return self.lfs_sha256[name]
        if name in self.json:
            return hashlib.sha256(self.json[name].raw).hexdigest()
        return hashlib.sha256(self.read_file(name)).hexdigest()

    def path(self, name: str) -> Path:
        raise BadCheckpoint(f"{self.name}: {name} is {NOT_DOWNLOADED}.", f"doctor check {self.name} --download")

    def open_file(self, shard: str) -> ShardFile:
        raise BadCheckpoint(f"{self.name}: {shard} is {NOT_DOWNLOADED}.", f"doctor check {self.name} --download")


class HubDonor(HubCheckpoint):
    """A repository to take from: a tensor is one range of its shard, a file is checked by the hash that the Hub keeps
    of it.

    What is asked for is fetched into `folder` once, sparse files of the shards' own sizes, and read from there; the
    folder is the caller's to remove. A range cannot be checked by a hash of the whole file: there the digest of what
    came is in the receipt.
    """

    unread = ""

    def __init__(self, repo: str, revision: str | None):
        super().__init__(repo, revision)
        self.folder: Path | None = None
        self.progress: Callable[[int], None] = lambda n: None
        self._fetched: dict[str, set[tuple[int, int]]] = {}
        self._whole: set[str] = set()
        self._lock = threading.Lock()

    @property
    def label(self) -> str:
        """Name of exactly this state of the repository, as edits and receipts name it."""
        return f"hf://{self.requests.repo}@{self.commit}"

    def path(self, name: str) -> Path:
        """The whole file, fetched and checked. Raises BadCheckpoint where its hash is not the Hub's, MachineError for
        the network.
        """
        if name not in self.entries:
            raise BadCheckpoint(f"{name}: not a file of {self.name}.")
        self.fetch(name, 0, self.entries[name].size)
        with self._lock:
            if name not in self._whole:
                self._check(name)
                self._whole.add(name)
        return self.folder / name

    def _check(self, name: str) -> None:
        with open(self.folder / name, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        stated = self.sha256(name)
        if found != stated:
            raise BadCheckpoint(
                f"{self.name}: {name} came with sha256 {found}; the Hub states {stated}.",
                "Run it again; nothing was kept.",
            )

    def open_file(self, shard: str) -> ShardFile:
        self._place(shard)
        return _Fetched(self, shard)

    def fetch(self, name: str, begin: int, end: int) -> None:
        """Bytes [begin, end) of a file, in its place in the folder. Raises MachineError, BadCheckpoint."""
        with self._lock:
            done = self._fetched.setdefault(name, set())
            if any(a <= begin and end <= b for a, b in done):
                return
            self._place(name)
            fd = os.open(self.folder / name, os.O_WRONLY | os.O_CLOEXEC)
            try:
                for at in range(begin, end, FETCH_BYTES):
                    count = min(FETCH_BYTES, end - at)
                    data = self.requests.read(self._url(name), name, at, count)[0]
                    if len(data) != count:
                        raise BadCheckpoint(
                            f"{self.name}: {name} ends at byte {at + len(data):,}; the Hub lists {self.entries[name].size:,}."
                        )
                    os.pwrite(fd, data, at)
                    self.progress(count)
            finally:
                os.close(fd)
            done.add((begin, end))

    def _place(self, name: str) -> None:
        """A sparse file of the right size, where there is none yet."""
        with open(self.folder / name, "ab") as file:
            file.truncate(self.entries[name].size)


class _Fetched(ShardFile):
    """A shard of which the tensors that are read are fetched first, each with one range from its first byte to its
    last.
    """

    def __init__(self, donor: HubDonor, name: str):
        super().__init__(donor.folder / name, name)
        self._donor = donor
        self._tensors = donor.shards[name].tensors

    def _fetch(self, begin: int, end: int) -> None:
        for info in self._tensors:
            if info.begin < end and begin < info.end:
                self._donor.fetch(self.name, info.begin, info.end)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self._fetch(offset, offset + len(buffer))
        super().read_into(offset, buffer)

    def read(self, offset: int, n: int) -> bytes:
        self._fetch(offset, offset + n)
        return super().read(offset, n)
