"""A server on the loopback speaks the parts of the Hub's API that are used, and misbehaves on demand. Nothing leaves
this machine.
"""

import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest

from doctor.api import check
from doctor.checkpoint import hub, hub_client
from doctor.checkpoint.directory import INDEX_NAME, Checkpoint
from doctor.checkpoint.hub import HubCheckpoint, open_checkpoint
from doctor.core.errors import BadCheckpoint, MachineError
from doctor.core.recipe import Recipe
from doctor.lint.testing import tiny
from doctor.report import render

COMMIT = "c0ffee" * 6 + "beef"
PLAN = Recipe(group_size=32)


class FakeHub:
    """The repository `org/name` of a server, and what it does wrong. `log` holds (path, Range header, Authorization
    header).
    """

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.listed: dict[str, int] = {}  # name -> the size that the listing states, where it lies
        self.failures: dict[
            str, list
        ] = {}  # part of a path -> handlers for the next requests with it; each is used once
        self.always: dict[str, object] = {}
        self.log: list[tuple] = []
        self.page = 1000
        self.ranges = True
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                outer.answer(self)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def put(self, folder: Path) -> "FakeHub":
        self.files = {p.name: p.read_bytes() for p in sorted(folder.iterdir())}
        return self

    def answer(self, request) -> None:
        path = unquote(request.path)
        self.log.append((path, request.headers.get("Range"), request.headers.get("Authorization")))
        for part, handlers in self.failures.items():
            if part in path and handlers:
                return handlers.pop(0)(request)
        for part, handler in self.always.items():
            if part in path:
                return handler(request)
        bare = path.partition("?")[0]
        if bare in ("/api/models/org/name", "/api/models/org/name/revision/v1"):
            return send(request, 200, json.dumps({"id": "org/name", "sha": COMMIT}).encode())
        if bare == f"/api/models/org/name/tree/{COMMIT}":
            return self.tree(request, path)
        if bare.startswith(f"/org/name/resolve/{COMMIT}/"):
            name = bare.rpartition("/")[2]
            if name not in self.files:
                return send(request, 404, b"", {"X-Error-Code": "EntryNotFound"})
            if name.endswith(".safetensors"):
                return send(request, 302, b"", {"Location": f"{self.url}/cdn/{name}"})
            return self.serve(request, self.files[name])
        if bare.startswith("/cdn/"):
            return self.serve(request, self.files[bare[5:]])
        return send(request, 404, b'{"error":"Repository not found"}', {"X-Error-Code": "RepoNotFound"})

    def tree(self, request, path) -> None:
        names = list(dict.fromkeys([*self.files, *self.listed]))
        start = int(path.partition("cursor=")[2] or 0)
        rows = [{"type": "directory", "path": "onnx", "oid": "0" * 40, "size": 0}]
        for name in names[start : start + self.page]:
            data = self.files.get(name, b"")
            size = self.listed.get(name, len(data))
            row = {"type": "file", "path": name, "size": size, "oid": "0" * 40}
            if name.endswith(".safetensors"):
                row["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": size, "pointerSize": 134}
            rows.append(row)
        more = (
            {"Link": f'<{self.url}/api/models/org/name/tree/{COMMIT}?cursor={start + self.page}>; rel="next"'}
            if start + self.page < len(names)
            else {}
        )
        send(request, 200, json.dumps(rows).encode(), more)

    def serve(self, request, data: bytes) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("Range") or "")
        if not asked or not self.ranges:
            return send(request, 200, data)
        first, last = int(asked[1]), min(int(asked[2]), len(data) - 1)
        if first >= len(data):
            return send(request, 416, b"", {"Content-Range": f"bytes */{len(data)}"})
        send(request, 206, data[first : last + 1], {"Content-Range": f"bytes {first}-{last}/{len(data)}"})

    def requests_for(self, part: str) -> list:
        return [entry for entry in self.log if part in entry[0]]


def send(request, status, body, headers=None, promise=None) -> None:
    """An answer; with `promise` it claims more bytes than it sends and hangs up."""
    request.send_response(status)
    for key, value in {
        "Content-Type": "application/json",
        "Content-Length": str(len(body) if promise is None else promise),
        **(headers or {}),
    }.items():
        request.send_header(key, value)
    request.end_headers()
    with contextlib.suppress(OSError):
        request.wfile.write(body)
    if promise is not None:
        request.close_connection = True


def refuse(status, **headers):
    return lambda request: send(request, status, b"{}", {k.replace("_", "-"): v for k, v in headers.items()})


def torn(data, after):
    """Answers a range in full by its headers and breaks off after some bytes."""

    def handler(request):
        first, last = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers["Range"]).groups())
        last = min(last, len(data) - 1)
        send(
            request,
            206,
            data[first : min(first + after, last + 1)],
            {"Content-Range": f"bytes {first}-{last}/{len(data)}"},
            promise=last + 1 - first,
        )

    return handler


@pytest.fixture
def fake(monkeypatch, tmp_path):
    from huggingface_hub import constants

    made = FakeHub()
    for name in (
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "ALL_PROXY",
        "http_proxy",
        "https_proxy",
        "all_proxy",
        "HF_TOKEN",
        "HF_HUB_OFFLINE",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", made.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    waits = []
    monkeypatch.setattr(hub_client.time, "sleep", waits.append)
    made.waits = waits
    monkeypatch.chdir(tmp_path)
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def local(tmp_path):
    """tiny() in three shards, written to disk."""
    case = tiny()
    case.shards = 3
    return case.write(tmp_path / "local")


def lines(report):
    return [f"{f.code} {f.message}" for f in report.findings]


# a healthy repository


def test_headers_and_json_are_read_and_the_report_is_that_of_the_same_files_here(fake, local):
    fake.put(local)
    far, near = check("org/name", PLAN), check(local, PLAN, stage="header")
    assert lines(far) == lines(near) == []
    assert {k: v for k, v in far.summary.items() if k not in ("path", "unread")} == {
        k: v for k, v in near.summary.items() if k != "path"
    }
    assert far.checkpoint == "org/name" and far.bytes_read == 0
    status = {r.rule.code: r for r in far.runs}
    assert status["W201"].status == "skipped" and list(status["W201"].reasons) == [
        "not downloaded; --download fetches it"
    ]
    assert status["C101"].status == "run" and status["F051"].status == "run"


def test_findings_of_headers_are_found_from_afar(fake, tmp_path):
    case = tiny()
    case.config["bos_token_id"] = None
    case.tensors["model.norm.weight"] = case.tensors["model.norm.weight"][:60]
    fake.put(case.write(tmp_path / "local"))
    far, near = check("org/name", PLAN), check(tmp_path / "local", PLAN, stage="tokenizer")
    assert lines(far) == lines(near) and {"C101", "F051"} <= {f.code for f in far.findings}
    assert far.findings[0].where.line == near.findings[0].where.line


def test_what_to_do_next_is_the_download_and_no_fix_of_files_that_are_not_here(fake, tmp_path):
    case = tiny()
    case.config["bos_token_id"] = None
    fake.put(case.write(tmp_path / "local"))
    screen = render("full", [check("org/name", PLAN)])
    assert "doctor check org/name --group-size 32 --download" in screen and "doctor fix" not in screen


def test_a_small_shard_costs_one_request_and_no_tensor_byte_is_asked_for_twice(fake, local):
    fake.put(local)
    HubCheckpoint.at("org/name")
    assert len(fake.requests_for("/cdn/")) == 3 and len(fake.requests_for("/resolve/")) == 3 + len(
        [n for n in fake.files if n.endswith(".json")]
    )


def test_a_long_header_costs_two_requests_and_nothing_behind_it_is_asked_for(fake, local, monkeypatch):
    monkeypatch.setattr(hub, "HEAD_BYTES", 600)
    fake.put(local)
    checkpoint = HubCheckpoint.at("org/name")
    assert checkpoint.tensors.keys() == Checkpoint.open(local).tensors.keys()
    for name, shard in checkpoint.shards.items():
        asked = [r for _, r, _ in fake.requests_for(f"/cdn/{name}")]
        assert asked == ["bytes=0-599", f"bytes=600-{shard.data_begin - 1}"]


def test_all_requests_go_to_one_commit(fake, local):
    fake.put(local)
    checkpoint = open_checkpoint("org/name@v1")
    assert checkpoint.commit == COMMIT and checkpoint.name == "org/name@v1"
    assert fake.log[0][0] == "/api/models/org/name/revision/v1"
    assert all(COMMIT in path or "/cdn/" in path for path, _, _ in fake.log[1:])


def test_a_listing_of_several_pages_is_read_to_its_end(fake, local):
    fake.put(local).page = 2
    assert sorted(HubCheckpoint.at("org/name").entries) == sorted(fake.files)


def test_a_next_page_on_another_host_is_not_followed(fake, local):
    assert hub_client.next_page('<http://evil.example/x>; rel="next"', fake.url) is None
    assert hub_client.next_page(f'<{fake.url}/x>; rel="next"', fake.url) == f"{fake.url}/x"


def test_the_token_is_sent_and_hashes_come_from_the_listing(fake, local, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    fake.put(local)
    checkpoint = HubCheckpoint.at("org/name")
    assert {a for _, _, a in fake.log} == {"Bearer hf_secret"}
    for name in ("model-00001-of-00003.safetensors", "config.json"):
        assert checkpoint.sha256(name) == Checkpoint.open(local).sha256(name)


def test_tensor_bytes_are_refused_with_the_option_that_fetches_them(fake, local):
    fake.put(local)
    with pytest.raises(BadCheckpoint, match=r"is not downloaded.*--download"):
        HubCheckpoint.at("org/name").load("model.norm.weight")


def test_a_server_without_ranges_is_read_no_further_than_needed(fake, local, monkeypatch):
    monkeypatch.setattr(hub, "HEAD_BYTES", 256)
    fake.put(local).ranges = False
    assert HubCheckpoint.at("org/name").tensors.keys() == Checkpoint.open(local).tensors.keys()


# a damaged one


def test_a_missing_shard_is_the_same_finding_as_here(fake, local):
    (local / "model-00002-of-00003.safetensors").unlink()
    fake.put(local)
    far, near = check("org/name", PLAN), check(local, PLAN, stage="header")
    assert lines(far) == lines(near) and "F010" in [f.code for f in far.findings]


def test_a_shard_that_is_listed_and_not_served_is_a_finding(fake, local):
    fake.put(local)
    name = "model-00002-of-00003.safetensors"
    fake.listed[name] = len(fake.files.pop(name))
    found = check("org/name", PLAN).findings
    assert any(f.code == "F020" and name in f.message and "404" in f.message for f in found)


@pytest.mark.parametrize("by", (-40, 40))
def test_a_shard_whose_listed_size_lies_is_a_finding_and_judged_by_what_is_served(fake, local, by):
    fake.put(local)
    name = "model-00002-of-00003.safetensors"
    size = len(fake.files[name])
    fake.listed[name] = size + by
    report = check("org/name", PLAN)
    assert [f.message for f in report.findings if f.code == "F020"] == [
        f"{name}: the Hub lists {size + by:,} bytes and serves {size:,}"
    ]
    assert len(report.findings) == 1, lines(report)


def test_json_whose_listed_size_lies_is_a_finding(fake, local):
    fake.put(local)
    fake.listed["generation_config.json"] = 10
    assert any(
        "generation_config.json" in f.message and "the Hub lists 10 bytes" in f.message
        for f in check("org/name", PLAN).findings
    )


def test_a_truncated_shard_is_the_same_finding_as_here(fake, local):
    path = local / "model-00003-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    far, near = check(fake.put(local) and "org/name", PLAN), check(local, PLAN, stage="header")
    assert lines(far) == lines(near) and "F001" in [f.code for f in far.findings]


@pytest.mark.parametrize(
    "data",
    (
        b"",
        b"\x08",
        b"\xff" * 64,
        b"version https://git-lfs.github.com/spec/v1\noid x\n",
        bytes(100),
        b"<!DOCTYPE html><html>",
    ),
)
def test_any_bytes_in_place_of_a_shard_give_what_they_give_here(fake, tmp_path, data):
    folder = tiny().write(tmp_path / "local")
    (folder / "model.safetensors").write_bytes(data)
    far, near = check(fake.put(folder) and "org/name", PLAN), check(folder, PLAN, stage="header")
    assert lines(far) == lines(near) and far.findings


def test_json_over_the_limit_is_not_fetched(fake, local):
    fake.put(local)
    fake.listed["trainer_state.json"] = 65 << 20
    report = check("org/name", PLAN)
    assert any("trainer_state.json" in f.message for f in report.findings) and not fake.requests_for(
        "trainer_state.json"
    )


@pytest.mark.parametrize(
    "row",
    (
        {"path": "../up.json", "size": 1},
        {"path": "a/b.json", "size": 1},
        {"path": 7, "size": 1},
        "text",
        {"path": "x.json"},
        {"path": "x.json", "size": -1},
        {"path": "..", "size": 1},
    ),
)
def test_odd_rows_of_a_listing_name_no_file(fake, row):
    checkpoint = HubCheckpoint("org/name", None)
    checkpoint._add({"type": "file", **row} if isinstance(row, dict) else row)
    assert not checkpoint.entries


# a bad connection


def test_a_torn_connection_goes_on_where_it_stopped(fake, local):
    fake.put(local)
    name = "model-00001-of-00003.safetensors"
    fake.failures[f"/cdn/{name}"] = [torn(fake.files[name], 100), torn(fake.files[name], 50)]
    assert check("org/name", PLAN).ok
    assert [r for _, r, _ in fake.requests_for(f"/cdn/{name}")] == [
        "bytes=0-65535",
        "bytes=100-65535",
        "bytes=150-65535",
    ]


def test_a_connection_that_always_tears_ends_with_file_and_byte(fake, local):
    fake.put(local)
    name = "model-00001-of-00003.safetensors"
    fake.always[f"/cdn/{name}"] = torn(fake.files[name], 10)
    with pytest.raises(
        MachineError, match=rf"org/name: {name}: incomplete after 5 tries; the last one ended at byte 50: "
    ):
        check("org/name", PLAN)
    assert len(fake.requests_for(f"/cdn/{name}")) == 5 and sorted(fake.waits) == [0.5, 1, 2, 4]


@pytest.mark.parametrize("where", ["headers", "body"])
def test_a_server_that_drips_is_given_up(fake, local, monkeypatch, where):
    """Each byte comes in time; all of them together would take days."""
    fake.put(local)
    monkeypatch.setattr(hub_client, "GRACE_S", 0.5)

    def drip(request):
        with contextlib.suppress(OSError):
            request.wfile.write(b"HTTP/1.1 200 OK\r\n")
            if where == "body":
                request.wfile.write(b"Content-Length: 100000\r\n\r\n")
            for n in range(40):
                request.wfile.write(b"x" if where == "body" else f"X-{n}: 1\r\n".encode())
                request.wfile.flush()
                threading.Event().wait(0.1)

    fake.always["config.json"] = drip
    began = time.monotonic()
    with pytest.raises(MachineError, match=r"config.json: \d+ bytes in 1 s; a server must send 4,096 bytes a second"):
        open_checkpoint("org/name")
    assert time.monotonic() - began < 10


def test_a_listing_without_an_end_is_given_up(fake, local, monkeypatch):
    fake.put(local)
    fake.always["/tree/"] = lambda request: send(
        request, 200, b"[]", {"Link": f'<{fake.url}/api/models/org/name/tree/{COMMIT}?again>; rel="next"'}
    )
    monkeypatch.setattr(hub, "MAX_PAGES", 5)
    with pytest.raises(MachineError, match=r"file listing: 6 pages with 0 rows .* at most 5 pages"):
        open_checkpoint("org/name")
    monkeypatch.setattr(hub, "MAX_LISTING_S", -1.0)
    with pytest.raises(MachineError, match=r"file listing: 1 pages with 0 rows"):
        open_checkpoint("org/name")


def test_a_busy_hub_is_waited_for_as_long_as_it_asks(fake, local):
    fake.put(local)
    fake.failures["/tree/"] = [refuse(429, Retry_After="7"), refuse(503)]
    fake.failures["config.json"] = [refuse(429, Retry_After=formatdate(time.time() + 30, usegmt=True))]
    assert check("org/name", PLAN).ok
    assert fake.waits[:2] == [7.0, 1.0] and 25 < fake.waits[2] <= 30


def test_a_busy_hub_is_not_waited_for_without_end(fake, local):
    fake.put(local)
    fake.always["/tree/"] = refuse(429, Retry_After="2")
    with pytest.raises(MachineError, match=r"file listing: incomplete after 5 tries.*the Hub is busy"):
        open_checkpoint("org/name")
    assert fake.waits == [2.0] * 4
    fake.always["/tree/"] = refuse(429, Retry_After="3600")
    with pytest.raises(MachineError, match="asks to wait 3,600 s; doctor waits at most 60 s"):
        open_checkpoint("org/name")


@pytest.mark.parametrize(
    "part, answer, error, says",
    [
        (
            "/api/",
            refuse(401, X_Error_Code="RepoNotFound"),
            BadCheckpoint,
            r"no such repository on http.*or it is private \(401\).*HF_TOKEN",
        ),
        ("/api/", refuse(404, X_Error_Code="RevisionNotFound"), BadCheckpoint, "no such revision"),
        (
            "/resolve/",
            refuse(403, X_Error_Code="GatedRepo"),
            MachineError,
            r"refuses access \(403\).*Accept the terms on http.*/org/name",
        ),
        ("/api/", refuse(418), MachineError, "the Hub answered 418"),
        ("/tree/", lambda r: send(r, 200, b"<html>"), MachineError, "answer is not JSON.*HF_ENDPOINT"),
        ("/api/", lambda r: send(r, 200, b'{"sha": "../../x"}'), MachineError, "names no commit"),
        (
            "/cdn/",
            lambda r: send(r, 206, b"x" * 9, {"Content-Range": "bytes 5-13/900"}),
            MachineError,
            "asked for byte 0, the server sent the range 'bytes 5-13/900'",
        ),
    ],
)
def test_refusals_say_what_to_do(fake, local, part, answer, error, says):
    fake.put(local).always[part] = answer
    with pytest.raises(error, match=says):
        check("org/name", PLAN)


def test_a_hub_that_is_not_there_is_said_after_one_more_try(fake, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        MachineError, match=r"org/name: no such directory here, and http://127.0.0.1:9 cannot be reached"
    ):
        open_checkpoint("org/name")
    assert fake.waits == [0.5]


# which one is meant


def test_a_local_path_wins_and_says_so_where_the_cache_knows_the_repository(fake, local, tmp_path):
    fake.put(local)
    tiny().write(tmp_path / "org" / "name")
    said = []
    assert not isinstance(open_checkpoint("org/name", notice=said.append), HubCheckpoint) and not said and not fake.log
    (tmp_path / "cache" / "models--org--name").mkdir(parents=True)
    open_checkpoint("org/name", notice=said.append)
    assert said == [
        "org/name: the local directory is checked, not the Hub repository of this name; that one is hf://org/name."
    ]
    assert isinstance(open_checkpoint("hf://org/name"), HubCheckpoint)
    with pytest.raises(BadCheckpoint, match="a local path; --revision and --download"):
        open_checkpoint("org/name", revision="v1")


@pytest.mark.parametrize(
    "path",
    ("./missing", "../missing", "/tmp/missing/x", "missing", "a/b/c", "dir/model.safetensors", "dir/config.json"),
)
def test_what_looks_like_a_path_asks_nobody(fake, path):
    with pytest.raises(BadCheckpoint):
        open_checkpoint(path)
    assert not fake.log


def test_two_different_revisions_are_refused(fake):
    with pytest.raises(BadCheckpoint, match="names revision v1, --revision names v2"):
        open_checkpoint("org/name@v1", "v2")


def test_offline_asks_nobody_and_takes_the_cache(fake, local, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(MachineError, match="HF_HUB_OFFLINE is set, and the cache has no snapshot"):
        open_checkpoint("org/name")
    snapshot = tmp_path / "cache" / "models--org--name" / "snapshots" / COMMIT
    tiny().write(snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text(COMMIT)
    said = []
    assert check(open_checkpoint("org/name", notice=said.append), PLAN).bytes_read > 0
    assert "the cached files are checked" in said[0] and not fake.log


def test_download_fetches_the_commit_that_was_listed_and_checks_it_here(fake, local, monkeypatch):
    import huggingface_hub

    asked = []

    def snapshot(repo, revision, ignore_patterns):
        asked.append((repo, revision))
        return str(local)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    fake.put(local)
    assert check(open_checkpoint("org/name", download=True), PLAN).bytes_read > 0 and asked == [("org/name", COMMIT)]
    fake.files = {n: d for n, d in fake.files.items() if n == "config.json"}
    said = []
    assert (
        isinstance(open_checkpoint("org/name", download=True, notice=said.append), HubCheckpoint)
        and "nothing was downloaded" in said[0]
    )


def test_the_command_line_obeys_the_endpoint_and_imports_no_torch(fake, local, tmp_path):
    fake.put(local)
    code = (
        "import sys\nfrom doctor.cli.main import main\ntry:\n    main(['check', 'org/name', '--group-size', '32', "
        "'--config', 'none'])\n"
        "except SystemExit as error:\n    assert 'torch' not in sys.modules\n    sys.exit(error.code)\n"
    )
    environment = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()} | {
        "HF_ENDPOINT": fake.url,
        "HF_HOME": str(tmp_path / "home"),
    }
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment)
    assert run.returncode == 0 and "ready for gptq 4-bit g32 (headers only)   org/name" in run.stdout, (
        run.stdout + run.stderr
    )
    assert "weights not read" in run.stdout and any(INDEX_NAME in path for path, _, _ in fake.log)


# advice


def test_advice_on_a_repository_is_that_on_the_same_files_and_reads_headers_alone(fake, local):
    from doctor.evaluate.advise.advise import advise

    fake.put(local)
    far, near = advise("org/name", memory=24 << 30), advise(local, memory=24 << 30)
    assert [(o.scheme, o.gpus, o.cache, o.total_bytes, o.blocked) for o in far.options] == [
        (o.scheme, o.gpus, o.cache, o.total_bytes, o.blocked) for o in near.options
    ]
    # what computes with weights needs them here: the command names a directory that `hf download` makes
    assert far.checkpoint == "org/name" and "vllm serve org/name" in far.fitting[0].serve
    first = next(o for o in far.fitting if o.quantize)
    assert first.quantize.startswith("hf download org/name --local-dir name && doctor quantize name -o name-")
