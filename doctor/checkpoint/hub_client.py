"""HTTP requests to the Hugging Face Hub: byte ranges of files and pages of listings, with bounded retries.

Endpoint, token, offline mode and proxy are huggingface_hub's (HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE).
"""

import json
import re
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from datetime import UTC, datetime
from urllib.parse import quote

from doctor.core.errors import BadCheckpoint, DoctorError, MachineError
from doctor.core.messages import _

MAX_LISTING_BYTES = 16 << 20  # of one page
RETRIES = 4
MAX_WAIT_S = 60.0  # a longer Retry-After ends the request with an error
TIMEOUT_S = 30.0  # without a byte
GRACE_S = 30.0  # of a request, before the floor holds
FLOOR_BYTES_S = 4096  # a server that sends less on average, or nothing but header lines, is given up


def network_errors() -> tuple[type[Exception], ...]:
    """Base classes of the errors of the HTTP library that huggingface_hub uses."""
    from huggingface_hub.utils import get_session

    library = sys.modules[type(get_session()).__module__.partition(".")[0]]
    return library.HTTPError, library.StreamError, library.InvalidURL


class HubClient:
    """GET requests for one repository. A broken connection is resumed at the byte where it broke; a busy server is
    asked again after the time that it states, up to MAX_WAIT_S. Safe to use from several threads.
    """

    def __init__(self, repo: str) -> None:
        from huggingface_hub import constants
        from huggingface_hub.utils import build_hf_headers, get_session

        self.repo, self.endpoint = repo, constants.ENDPOINT.rstrip("/")
        self._session, self._errors = get_session(), network_errors()
        self._headers = {**build_hf_headers(library_name="checkpoint-doctor"), "Accept-Encoding": "identity"}

    def url(self, commit: str, name: str) -> str:
        return f"{self.endpoint}/{self.repo}/resolve/{quote(commit, safe='')}/{quote(name)}"

    def read(self, url: str, what: str, begin: int, count: int) -> tuple[bytes, int | None, Mapping[str, str]]:
        """(bytes [begin, begin + count) of the resource, fewer where it ends; its size if the server states it; the
        response headers). `what` names the resource in errors.

        Raises MachineError with the byte at which the connection broke, BadCheckpoint for what the Hub does not have.
        """
        got = bytearray()
        tries = 0
        while True:
            at = begin + len(got)
            try:
                wait, answer = self._watched(url, at, count - len(got), got, what)
                why: str = _("the Hub is busy")
            except self._errors as error:
                wait, answer, why = 0.5 * 2**tries, None, f"{type(error).__name__}: {error}"[:160]
            if answer is not None:
                return bytes(got), *answer
            tries += 1
            if tries > 1 and why.startswith("ConnectError"):  # a mistyped path must not take long to say so
                raise MachineError(
                    _(
                        "{repo}: no such directory here, and {endpoint} cannot be reached: {why}.",
                        repo=self.repo,
                        endpoint=self.endpoint,
                        why=why,
                    ),
                    _("Check the path; for a repository check the network and HF_ENDPOINT."),
                )
            if tries > RETRIES:
                raise MachineError(
                    _(
                        "{repo}: {what}: incomplete after {tries} tries; the last one ended at byte {byte:,}: {why}.",
                        repo=self.repo,
                        what=what,
                        tries=tries,
                        byte=begin + len(got),
                        why=why,
                    ),
                    _("Run it again later."),
                )
            if wait > MAX_WAIT_S:
                raise MachineError(
                    _(
                        "{repo}: {what}: the Hub asks to wait {wait:,.0f} s; doctor waits at most {most:.0f} s.",
                        repo=self.repo,
                        what=what,
                        wait=wait,
                        most=MAX_WAIT_S,
                    ),
                    _("Run it again after that time; with HF_TOKEN set the limits are higher."),
                )
            time.sleep(wait)

    def _watched(
        self, url: str, at: int, count: int, got: bytearray, what: str
    ) -> tuple[float, tuple[int | None, Mapping[str, str]] | None]:
        """`_once`, given up where the server drips: the library's time limit is for each byte, not for all of them."""
        received, box = [0], Future[tuple[float, tuple[int | None, Mapping[str, str]] | None]]()
        mine = bytearray()  # what a request that was given up still receives must not get into the next one

        def work() -> None:
            try:
                box.set_result(self._once(url, at, count, mine, what, received))
            except BaseException as error:
                box.set_exception(error)

        threading.Thread(target=work, daemon=True).start()
        began = time.monotonic()
        while not wait_for([box], timeout=0.25).done:
            seconds = time.monotonic() - began
            if received[0] < FLOOR_BYTES_S * (seconds - GRACE_S):
                raise MachineError(
                    _(
                        "{repo}: {what}: {n:,} bytes in {seconds:.0f} s; a server must send {floor:,} bytes a second.",
                        repo=self.repo,
                        what=what,
                        n=received[0],
                        seconds=seconds,
                        floor=FLOOR_BYTES_S,
                    ),
                    _("Check HF_ENDPOINT and the network, or download the files by another way."),
                )
        try:
            return box.result()
        finally:
            got += mine

    def _once(
        self, url: str, at: int, count: int, got: bytearray, what: str, received: list[int]
    ) -> tuple[float, tuple[int | None, Mapping[str, str]] | None]:
        """One request; appends to `got` and counts all bytes in `received`. (seconds to wait, None) if it must be asked
        again, else (0, (size, headers)).
        """
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
                    _(
                        "{repo}: {what}: asked for byte {byte:,}, the server sent the range {range!r}.",
                        repo=self.repo,
                        what=what,
                        byte=at,
                        range=response.headers.get("content-range", ""),
                    )
                )
            skip = at if status == 200 else 0  # a server that knows no ranges sends everything from the start
            for part in response.iter_raw():
                received[0] += len(part)
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
                _("{repo}: {what}: the Hub refuses access ({status}).", repo=self.repo, what=what, status=status),
                _("Accept the terms on {page}, and set HF_TOKEN or run `hf auth login`.", page=page),
            )
        if code == "RevisionNotFound":
            return BadCheckpoint(
                _("{repo}: {what}: the repository has no such revision (404).", repo=self.repo, what=what),
                _("See {page}.", page=f"{page}/commits/main"),
            )
        if code == "EntryNotFound":
            return BadCheckpoint(
                _("{repo}: {what}: the file is not in the repository (404).", repo=self.repo, what=what)
            )
        if status in (401, 404):
            return BadCheckpoint(
                _(
                    "{repo}: {what}: no such directory here, and no such repository on {endpoint}, or it is private "
                    "({status}).",
                    repo=self.repo,
                    what=what,
                    endpoint=self.endpoint,
                    status=status,
                ),
                _("Check the name; for a private repository set HF_TOKEN or run `hf auth login`."),
            )
        return MachineError(
            _("{repo}: {what}: the Hub answered {status}.", repo=self.repo, what=what, status=status),
            _("Run it again later."),
        )

    def document(self, url: str, what: str) -> tuple[object, str | None]:
        """(parsed JSON, address of the next page or None) of an API call."""
        raw, _size, headers = self.read(url, what, 0, MAX_LISTING_BYTES)
        try:
            return json.loads(raw), next_page(headers.get("link", ""), self.endpoint)
        except (ValueError, RecursionError):
            raise MachineError(
                _(
                    "{repo}: {what}: the Hub's answer is not JSON, or longer than {limit:,} bytes.",
                    repo=self.repo,
                    what=what,
                    limit=MAX_LISTING_BYTES,
                ),
                _("Check HF_ENDPOINT."),
            ) from None


def next_page(link: str, endpoint: str) -> str | None:
    """The next page that a Link header names, None where there is none or another host is named."""
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
