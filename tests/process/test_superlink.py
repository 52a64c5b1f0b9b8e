"""lifl's FedAvg on a real SuperLink with two real SuperNodes, beside Flower's on the same ones."""

from __future__ import annotations

from pathlib import Path

import fedavg_runs
import pytest
from fedavg_runs import Runs

from lifl.deploy.deployment import Deployment

pytestmark = pytest.mark.ladder


@pytest.fixture(scope="module")
def lines() -> list[str]:
    """The lines that the ServerApp logs."""
    return []


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, lines: list[str]) -> Runs:
    """All the runs, one after another, on one deployment."""
    out = tmp_path_factory.mktemp("superlink")
    with Deployment(supernodes=2) as deployment:
        deployment.run(fedavg_runs.APP, {"out": str(out), "num-nodes": 2}, lines.append, timeout=200)
        folder = Path(deployment.folder)
    assert not folder.exists()
    print({k: v["seconds"] for k, v in Runs(out, 2).said.items() if isinstance(v, dict)})
    return Runs(out, 2)


def test_flowers_bits(runs: Runs) -> None:
    """With order="flower" each round is Flower's mean of the same replies, and so is the whole run."""
    fedavg_runs.check_bits(runs)
    # Two products and one sum do not depend on who came first, so that the two runs agree as well.
    assert runs.said["both"]["id"] == runs.said["flower"]["id"]
    assert runs.said["both"]["metrics"] == runs.said["flower"]["metrics"]


def test_the_mean(runs: Runs) -> None:
    """In the default order the model is the mean, as near to Flower's as one rounding; evaluation works too."""
    fedavg_runs.check_mean(runs)


def test_a_bad_update(runs: Runs) -> None:
    """A node's NaN is refused and named; the round goes on."""
    fedavg_runs.check_refusal(runs)


def test_failure_deadline_and_quorum(runs: Runs, lines: list[str]) -> None:
    """Too few updates are a clear error in the log; the model stays as it was, and the run goes on."""
    fedavg_runs.check_strictness(runs)
    errors = [line for line in lines if line.startswith("ERROR")]
    assert len(errors) == 2
    assert "round 1 has no new model, the model stays as it was: 1 of 2 updates" in errors[0]
    assert "told to fail" in errors[0]
    assert "round 2 has no new model" in errors[1]
    assert "; late: " in errors[1]


def test_one_line_per_round(runs: Runs, lines: list[str]) -> None:
    """Each round of lifl's that has a model is one line in the stream that `flwr run` shows."""
    assert sum("lifl: " in line for line in lines) == sum(
        report["error"] is None
        for run in runs.said.values()
        if isinstance(run, dict)
        for report in run["reports"].values()
    )


def test_nothing_is_left(runs: Runs) -> None:
    """The workers ended with the ServerApp's process; the rest is the module's check."""
    fedavg_runs.check_workers_are_gone(runs)
