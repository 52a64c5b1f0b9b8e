"""The fork server of these tests: a shim stands for its process, whatever happens to either."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from lifl.deploy.programs import free_ports
from tests.forkserver import RUNNING, ForkServer

WAIT_S = 60.0
"""The time that anything may take: a bound on liveness, not a measurement."""

Started = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(fork_server: ForkServer, tmp_path: Path) -> Started:
    """Starts a program of Flower's with a shim."""
    environment = fork_server.environment(dict(os.environ))

    def run(*command: str, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, env=environment | dict(env or {}), cwd=tmp_path, stdout=pipe, stderr=pipe, text=True
        )

    return run


def forked() -> set[int]:
    """The processes that the fork server has now."""
    (server,) = RUNNING
    found = set()
    for task in Path(f"/proc/{server}/task").iterdir():
        found |= set(map(int, (task / "children").read_text().split()))
    return found


def superexec(start: Started) -> tuple[subprocess.Popen[str], int]:
    """A program that waits for a server which is not there: its shim, and its process."""
    address = f"127.0.0.1:{free_ports(1)[0]}"
    shim = start("flower-superexec", "--insecure", "--runtime-api-address", address)
    assert shim.stderr is not None
    assert "Starting Flower SuperExec" in shim.stderr.readline() + shim.stderr.readline()
    (process,) = forked()
    return shim, process


def wait_for_end(process: int) -> None:
    """Until the process has gone."""
    end = time.monotonic() + WAIT_S
    while process in forked():
        assert time.monotonic() < end, f"process {process} is left"
        time.sleep(0.01)


def test_output_and_status(start: Started) -> None:
    """As the program's own."""
    said, wrong = start("flwr", "--version").communicate(timeout=WAIT_S)
    assert (said.startswith("Flower version: "), wrong) == (True, "")
    process = start("flwr", "nonsense")
    assert "No such command 'nonsense'" in process.communicate(timeout=WAIT_S)[1]
    assert process.returncode == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on(start: Started, number: signal.Signals) -> None:
    """The program ends by its own handler."""
    shim, process = superexec(start)
    shim.send_signal(number)
    assert "terminated gracefully" in shim.communicate(timeout=WAIT_S)[1]
    assert shim.returncode == 0
    wait_for_end(process)


def test_both_are_killed(start: Started) -> None:
    """Whichever of the two is."""
    shim, process = superexec(start)
    shim.kill()
    shim.communicate(timeout=WAIT_S)
    wait_for_end(process)
    shim, process = superexec(start)
    os.kill(process, signal.SIGKILL)
    shim.communicate(timeout=WAIT_S)
    assert shim.returncode == -signal.SIGKILL


def test_other_rights_and_variables_are_not_passed_over(start: Started, fork_server: ForkServer) -> None:
    """Then the shim becomes the program itself."""
    path = f"{fork_server.environment({})['PATH']}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    alone = start("setpriv", "--no-new-privs", "flwr", "--version", env={"PATH": path})
    assert alone.communicate(timeout=WAIT_S)[0].startswith("Flower version: ")
    misled = start("flwr", "--version", env={"PATH": path, "PYTHONHOME": "/nowhere"})
    assert "/nowhere" in misled.communicate(timeout=WAIT_S)[1]
    assert misled.returncode != 0
