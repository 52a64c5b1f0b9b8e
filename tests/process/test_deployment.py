"""A real deployment starts, works and goes, however it is ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lifl.deploy.deployment import Deployment

pytestmark = pytest.mark.usefixtures("own_programs")

APP = Path(__file__).parents[2] / "examples" / "quickstart-digits"

OWNER = """
import sys, time
from lifl.deploy.deployment import Deployment
deployment = Deployment(supernodes=2)
print(deployment.folder, flush=True)
try:
    with deployment:
        print("ready", flush=True)
        time.sleep(60)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


def processes_of(folder: Path | str) -> list[str]:
    """The living processes with `folder` in their environment or on their command line."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
            text = command + (process / "environ").read_bytes()
        except OSError:
            continue
        if os.fsencode(folder) in text:
            found.append(command.replace(b"\0", b" ").decode(errors="replace"))
    return found


def wait_until_gone(folder: Path, seconds: float) -> None:
    """Return when neither processes nor the folder are left; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while (left := processes_of(folder)) or folder.exists():
        assert time.monotonic() < deadline, f"left behind: {left}, {folder} exists: {folder.exists()}"
        time.sleep(0.1)


def test_deployment_runs_an_app_and_leaves_nothing() -> None:
    """Two SuperNodes train one round with stock Flower; afterwards there is no trace of them."""
    lines: list[str] = []
    with Deployment(supernodes=2) as deployment:
        config: dict[str, str | int | float | bool] = {
            "strategy": "flower",
            "num-server-rounds": 1,
            "num-nodes": 2,
        }
        deployment.run(APP, config, lines.append, timeout=120)
        assert len(processes_of(deployment.folder)) >= 3
    assert any("Round 1 of 1: accuracy 0.9" in line for line in lines)
    assert not processes_of(deployment.folder)
    assert not deployment.folder.exists()


def test_a_program_that_ends_at_start_up_is_told_with_its_log(tmp_path: Path) -> None:
    """A server that cannot start is an error at once, with what it said, and nothing stays."""
    server = tmp_path / "server"
    server.write_text("#!/bin/sh\necho no such port >&2\nexit 3\n")
    server.chmod(0o755)
    deployment = Deployment(supernodes=1, server_command=[str(server)])
    with pytest.raises(RuntimeError, match=r"superlink ended with status 3[^$]*no such port"), deployment:
        pass
    assert not processes_of(deployment.folder)
    assert not deployment.folder.exists()


@pytest.mark.parametrize(
    ("kind", "program"),
    [
        (signal.SIGINT, "flower-superlink"),
        (signal.SIGINT, "flower-supernode"),
        (signal.SIGKILL, "flower-supernode"),
    ],
)
def test_ending_the_owner_during_start_up_leaves_nothing(kind: signal.Signals, program: str) -> None:
    """Ctrl-C, and even SIGKILL, as soon as `program` is started ends everything within seconds."""
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    folder = Path(owner.stdout.readline().strip())
    while not any(program in command for command in processes_of(folder)):
        assert owner.poll() is None
        time.sleep(0.02)
    owner.send_signal(kind)
    output, _ = owner.communicate(timeout=15)
    # After SIGKILL it is up to the janitor alone, which needs a moment more.
    wait_until_gone(folder, seconds=15 if kind == signal.SIGKILL else 0.5)
    assert ("interrupted" in output) == (kind == signal.SIGINT)
    assert "ready" not in output
