"""A run whose process is SIGKILLed at any of a dozen moments, resumed, ends bit-equal to the undisturbed one.

In Flower's order, in which the same replies give the same bits each time (see docs/numbers.md).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import fedavg_runs
import numpy as np
import pytest
from resumable import MOMENTS
from safetensors import safe_open
from scalar_files import scalars, untimed

from lifl.deploy.deployment import Deployment
from tests.forkserver import ForkServer

pytestmark = pytest.mark.ladder

Part = Callable[..., int]


@pytest.fixture(scope="module")
def part(fork_server: ForkServer) -> Part:
    """Starts a process that begins or resumes the run; its exit status."""
    environment = fork_server.environment(dict(os.environ))

    def run(checkpoint: Path, out: Path, moment: str = "") -> int:
        command = ["resumable", str(checkpoint), str(out), moment, str(checkpoint.with_name("board"))]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        return done.returncode

    return run


def end_of(out: Path) -> tuple[dict[str, tuple[str, bytes]], dict[str, str]]:
    """The final model's bytes, and what was measured."""
    with safe_open(str(out), "numpy") as file:
        names = sorted(file.keys())
        return {n: (str(file.get_tensor(n).dtype), file.get_tensor(n).tobytes()) for n in names}, file.metadata()


@pytest.fixture(scope="module")
def whole(part: Part, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed run."""
    folder = tmp_path_factory.mktemp("whole")
    assert part(folder / "run", folder / "out") == 0
    return folder / "out"


@pytest.mark.parametrize("moment", MOMENTS.values(), ids=MOMENTS)
def test_killed_and_resumed(moment: str, part: Part, whole: Path, tmp_path: Path) -> None:
    """Killed once: the same model, the same nodes in each round, the same random numbers."""
    path, out = tmp_path / "run", tmp_path / "out"
    assert part(path, out, moment) == -signal.SIGKILL
    assert not out.exists()
    assert part(path, out) == 0
    assert end_of(out) == end_of(whole)


@pytest.mark.timeout(300)
def test_killed_at_every_moment_of_one_run(part: Part, whole: Path, tmp_path: Path) -> None:
    """Killed a dozen times, each time a little further on: the same end, and the same scalars for TensorBoard."""
    path, out = tmp_path / "run", tmp_path / "out"
    assert [part(path, out, moment) for moment in MOMENTS.values()] == [-signal.SIGKILL] * len(MOMENTS)
    assert part(path, out) == 0
    assert end_of(out) == end_of(whole)
    drawn = untimed(scalars(tmp_path / "board" / "run-1"))
    assert drawn == untimed(scalars(whole.with_name("board") / "run-1"))
    assert drawn["round/accepted"].keys() == {1, 2, 3, 4, 5}
    assert [folder.name for folder in (tmp_path / "board").iterdir()] == ["run-1"]


def test_server_app_of_a_superlink_is_killed(tmp_path: Path) -> None:
    """On a real SuperLink: the ServerApp is SIGKILLed in round 2, and `flwr run` again ends as if it had not been."""

    def config(name: str) -> dict[str, str | int | float | bool]:
        (tmp_path / name).mkdir(exist_ok=True)
        return {"out": str(tmp_path / name), "checkpoint": str(tmp_path / name / "run")}

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    with Deployment(supernodes=2) as deployment:
        deployment.run(fedavg_runs.APP, config("whole"), timeout=120)
        # Not deployment.run, which waits until the SuperLink misses the ServerApp: that takes it a minute.
        pairs = [f"{key} = {json.dumps(value)}\n" for key, value in (config("killed") | {"end": 2}).items()]
        (tmp_path / "config.toml").write_text("".join(pairs))
        deployment._flwr("run", str(fedavg_runs.APP), "--run-config", str(tmp_path / "config.toml"))
        end = time.monotonic() + 60
        while not (killed / "end").exists():  # the last thing that it does
            assert time.monotonic() < end, "the ServerApp did not come to round 2 within 60 s"
            time.sleep(0.05)
        assert not (killed / "results.json").exists()
        deployment.run(fedavg_runs.APP, config("killed"), timeout=120)
    for number in (1, 2, 3):
        with np.load(whole / f"resumable-{number}.npz") as a, np.load(killed / f"resumable-{number}.npz") as b:
            assert {name: array.tobytes() for name, array in a.items()} == {
                n: array.tobytes() for n, array in b.items()
            }
    assert list(json.loads((killed / "results.json").read_text())) == ["1", "2", "3"]
