"""lifl's FedAvg in Flower's simulation, where the ServerApp runs in a thread and Ray runs the clients."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import fedavg_runs
import pytest
from fedavg_runs import Runs

pytestmark = pytest.mark.ladder

pytest.importorskip("ray", reason="Flower's simulation needs flwr[simulation]")

NODES = 4
PATIENCE_S = 5.0


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """All the runs, in a program of their own: it ends as a user's does, and Ray's processes with it."""
    out = tmp_path_factory.mktemp("simulation")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(fedavg_runs.APP), os.environ.get("PYTHONPATH")])),
        "FLWR_HOME": str(out / "flwr"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    program = Path(__file__).parent / "simulated.py"
    done = subprocess.run(
        [sys.executable, str(program), str(out), str(NODES), str(PATIENCE_S)],
        env=environment,
        cwd=out,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout
    assert (out / "results.json").exists(), done.stdout
    return Runs(out, NODES)


def test_the_node_is_made_in_a_thread(runs: Runs) -> None:
    """The simulation runs the ServerApp in a thread, and the embedded Node serves it there."""
    assert runs.said["main thread"] is False
    assert len(runs.said["workers"]) >= 1


def test_flowers_bits(runs: Runs) -> None:
    """With order="flower" each round is Flower's mean of the same four replies, bit by bit."""
    fedavg_runs.check_bits(runs)


def test_the_mean(runs: Runs) -> None:
    """In the default order the model is the mean; evaluation works too."""
    fedavg_runs.check_mean(runs)


def test_a_bad_update(runs: Runs) -> None:
    """A node's NaN is refused and named; the round goes on with the other three."""
    fedavg_runs.check_refusal(runs)


def test_failure_deadline_and_quorum(runs: Runs) -> None:
    """A failing client and a late one leave too few; the model stays as it was, and the run goes on."""
    fedavg_runs.check_strictness(runs)


def test_nothing_is_left(runs: Runs) -> None:
    """The workers ended with the program; the rest is the module's check."""
    fedavg_runs.check_workers_are_gone(runs)
