"""Another user of the machine can read, attach to and fill nothing of a Node's; the owner's root can."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import lifl

SPEC = lifl.TensorSpec.from_arrays({"w": np.zeros(1000)})
NOBODY = 65534
REFUSED = {"EPERM", "EACCES"}

pytestmark = pytest.mark.usefixtures("root")


def probe(tmp_path: Path, uid: int, pids: list[int]) -> dict[str, list[str]]:
    """The successes of the other user, way by way, for each of the processes."""
    folder = tmp_path / "public"
    folder.mkdir(exist_ok=True)
    shutil.copy(Path(__file__).with_name("prober.py"), folder)
    # Standard input, because not every folder above a test's is open to everybody.
    command = [sys.executable, "-I", "-", str(uid), ",".join(map(str, pids))]
    program = (folder / "prober.py").read_text()
    done = subprocess.run(command, input=program, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    said: dict[str, list[str]] = json.loads(done.stdout)
    return said


def test_second_user_gets_at_nothing(tmp_path: Path) -> None:
    """Agent, spawner and workers, while a round is open: every way is refused, and the round is exact afterwards."""
    with lifl.Node("8MiB", workers=2) as node, node.open_round(SPEC, 2, "lazy") as round_:
        round_.submit({"w": np.full(1000, 3.0)}, client_id="a")
        assert node._supervisor is not None
        pids = [os.getpid(), node._supervisor.spawner.pid, *node.pids()]
        had = probe(tmp_path, NOBODY, pids)
        # There is nothing, or it is the socket of another test's server, at which nobody else is let in.
        assert set(had.pop("find something by name")) <= {"ENOENT", "EACCES"}
        assert had.pop("ask what it is doing") == ["EACCES", *["ENOENT"] * (len(pids) - 1)]
        for way, said in had.items():
            assert set(said) <= REFUSED, f"{way}: {said}"
            assert len(said) == len(pids)
        round_.submit({"w": np.full(1000, 5.0)}, client_id="b")
        assert (round_.result(30).arrays["w"] == 4).all()


def test_probe_can_succeed(tmp_path: Path) -> None:
    """The same probe as root gets at all of it: what is refused to the other user is really there."""
    with lifl.Node("8MiB", workers=1) as node:
        with node.open_round(SPEC, 1) as round_:  # then the worker has begun, and has all its memory
            round_.submit({"w": np.full(1000, 3.0)}, client_id="a")
            round_.result(30)
        had = probe(tmp_path, 0, list(node.pids()))
    had.pop("find something by name")
    had.pop("ask what it is doing")  # a worker has no Node; that the same user is answered is `lifl top`'s
    for way, said in had.items():
        assert all(one.startswith("ok: ") for one in said), f"{way}: {said}"
    assert "LIFLSHM1" in had["open the arena to read"][0]
