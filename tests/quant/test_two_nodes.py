"""Two nodes that share no disk: the files are those of one process on one machine, byte by byte."""

import json
import os
import random
import socket
import subprocess
import sys

from doctor import api
from doctor.core.recipe import Recipe
from doctor.lint.testing import tiny


def scratch(folder):
    """A node's own disk: the checkpoint, the rows, and what torch writes."""
    tiny("llama").write(folder / "m")
    rng = random.Random(0)
    rows = [[1] + [rng.randrange(3, 96) for _ in range(63)] for _ in range(16)]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps({"input_ids": row}) for row in rows))
    return folder


def node(folder, number, port):
    """torchrun of one of two nodes, started."""
    torchrun = ("-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(number), "--nproc-per-node", "1")
    place = ("--master-addr", "127.0.0.1", "--master-port", str(port))
    ours = ("-m", "doctor", "quantize", "m", "-o", "out", "--group-size", "32", "--calibration", "rows.jsonl")
    return subprocess.Popen(
        [sys.executable, *torchrun, *place, *ours, "--max-seq-length", "64", "--tune", "off", "--verify", "0"],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DOCTOR_LANG": "en", "TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_two_nodes_without_a_common_disk_write_what_one_process_writes(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = [scratch(tmp_path / name) for name in ("first", "second")]
    nodes = [node(place, number, port) for number, place in enumerate(places)]
    alone = scratch(tmp_path / "alone")
    recipe, rows = Recipe(group_size=32), alone / "rows.jsonl"
    api.quantize(alone / "m", alone / "out", recipe, calibration=rows, max_seq_length=64, tune="off")
    said = [one.communicate(timeout=240)[0] for one in nodes]
    assert [one.returncode for one in nodes] == [0, 0], "\n".join(said)[-3000:]
    assert not (places[1] / "out").exists()  # the first node writes
    written = sorted(path.name for path in (alone / "out").iterdir())
    assert written == sorted(path.name for path in (places[0] / "out").iterdir())
    for name in (name for name in written if name != "doctor.json"):  # which tells seconds
        assert (places[0] / "out" / name).read_bytes() == (alone / "out" / name).read_bytes(), name
