"""lifl-superlink with a database, killed at each moment of a round and started again: the run goes on, nothing is lost.

It holds docs/howto-superlink.md, moment by moment. The ServerApp is started by a SuperExec of its own, so that it
outlives the server; with the server's own it ends with it, see test_lifl_superlink.py.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fedavg_runs
import numpy as np
import pytest
from fedavg_runs import Runs
from servers import Servers

ARGUMENTS = ("--database", "{database}", "--isolation", "process", "--lifl-memory", "256MiB", "--lifl-workers", "1")
WAIT_S = 150.0
DEADLINE_S = 100
"""The deadline of a round. A model of both nodes is made before it: after it the model would be the mean of one."""

pytestmark = [
    pytest.mark.ladder,
    pytest.mark.leaves("Flower's programs reap the processes of their tasks late"),
    pytest.mark.timeout(400),
]

MOMENTS = {
    "the messages are announced, the model is not there": "after app's push_messages 1",
    "half of the model is there": "after app's push_object 3",
    "the model is there, nobody has pulled": "after app's last push_object 1",
    "a SuperNode is given its message": "after pull 1",
    "the model is being pulled": "after large 1",
    "the ClientApps begin to train": "after node's confirm_message_received 2",
    "the first reply is announced": "after node's push_messages 1",
    "half of a reply is there": "before node's push_object 4",
    "half of a reply is there, the last object unanswered": "after node's push_object 4",
    "one reply is whole": signal.SIGKILL,
    "one reply is whole, and the server is asked to end": signal.SIGTERM,
    "all replies are in": "before finish 1",
    "the mean is made": "after finish 1",
    "the mean is taken": "before close 1",
}
"""In the order of the rounds in which they come; a signal is sent when one reply is whole."""
ROUNDS = {moment: number for number, moment in enumerate(MOMENTS, 1)}


def wait_until(is_so: Callable[[], Any], what: Callable[[], str]) -> None:
    """Returns when it is so; fails after WAIT_S."""
    end = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < end, what()
        time.sleep(0.05)


class Deployed:
    """A server that kills itself when it is told to, two SuperNodes, and a run of which each round is set off."""

    def __init__(self, servers: Servers, folder: Path) -> None:
        self.servers, self.folder, self.number = servers, folder, 0

    @property
    def told(self) -> Path:
        """The file that the server reads; see killed_superlink.py."""
        return self.folder / "moment"

    def submit(self, strategy: str, rounds: int) -> None:
        """Begins a run."""
        self.out, self.number, self.rounds = self.folder / strategy, 0, rounds
        self.out.mkdir()
        config = {"out": str(self.out), "strategy": strategy, "rounds": rounds, "steps": True}
        self.servers.submit(fedavg_runs.APP, config | {"quorum": 1, "deadline": DEADLINE_S})

    def begin(self) -> None:
        """Sets off the next round."""
        self.number += 1
        (self.out / f"on-{self.number}").touch()

    def end(self) -> None:
        """Waits until the round has ended."""
        wait_until(lambda: self._saved(self.number).exists(), lambda: f"round {self.number} did not end: {self.log()}")

    def play_before(self, number: int) -> None:
        """Plays the rounds before this one that have not been played, undisturbed."""
        while self.number < number - 1:
            self.begin()
            self.end()

    def kill_at(self, moment: str) -> None:
        """A round in which the server kills itself and is started again."""
        self.told.write_text(moment)
        self.begin()
        server = self.servers.server
        program = self.servers._programs[server]
        wait_until(lambda: program.poll() is not None, lambda: f"{moment!r} did not come: {self.log()}")
        assert self.servers.end(server, signal.SIGKILL) == -signal.SIGKILL
        self.servers.start_server()

    def end_when_one_has_replied(self, how: signal.Signals) -> None:
        """A round in which the server is ended when SuperNode 0 has replied and 1 has not, and started again."""
        servers, other = self.servers, self.servers.pid(self.servers.node(1))
        sent = servers.log(servers.node(0)).count("Sent successfully")
        os.kill(other, signal.SIGSTOP)
        try:
            self.begin()
            wait_until(lambda: servers.log(servers.node(0)).count("Sent successfully") > sent, lambda: "no reply")
            servers.end(servers.server, how)
            servers.start_server()
        finally:
            os.kill(other, signal.SIGCONT)

    def nodes(self) -> list[int] | None:
        """The nodes whose mean the model of the round is; None if it is no mean of the nodes' updates."""
        runs = Runs(self.out, 2)
        before, model = (runs.model("single", number) for number in (self.number - 1, self.number))
        for nodes in ([0, 1], [0], [1]):
            expected = runs.mean(self.number, nodes, before)
            if np.allclose(model["bias"], expected["bias"], rtol=1e-9):
                np.testing.assert_allclose(model["weight"], expected["weight"], rtol=1e-5, atol=1e-6)
                return nodes
        return None

    def log(self) -> str:
        """The state of the run, and the last lines of every process."""
        (run, *_) = self.servers._runs()
        said = self.servers._flwr("log", run["run-id"], "--show")
        others = (self.servers.node(0), self.servers.node(1), self.servers.server)
        tails = "\n".join(self.servers.tail(name) for name in others)
        return f"{run['status']}: {run['status-details']}\n{said[-4000:]}\n{tails}"

    def _saved(self, number: int) -> Path:
        return self.out / f"single-{number}.npz"


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    """Shared by all, with lifl's server."""
    folder = tmp_path_factory.mktemp("killed")
    command = ("killed-superlink", "lifl")
    with Servers(command, ARGUMENTS, env={"LIFL_KILL": str(folder / "moment")}) as servers:
        servers.start_superexec()
        servers.start_node(0)
        servers.start_node(1)
        yield Deployed(servers, folder)


@pytest.fixture(scope="module")
def run(deployed: Deployed) -> Deployed:
    """A run of lifl's FedAvg."""
    deployed.submit("lifl", len(MOMENTS) + 1)
    return deployed


@pytest.mark.parametrize("moment", MOMENTS)
def test_both_count_in_the_round(moment: str, run: Deployed) -> None:
    """The round ends with the exact mean of both nodes, before its deadline."""
    run.play_before(ROUNDS[moment])
    how = MOMENTS[moment]
    if isinstance(how, signal.Signals):
        run.end_when_one_has_replied(how)
    else:
        run.kill_at(how)
    run.end()
    assert run.nodes() == [0, 1]


def test_the_run_ends_well(run: Deployed) -> None:
    """It completes, with both nodes in the books of every round; the last is folded by the server again."""
    run.play_before(len(MOMENTS) + 1)
    run.begin()
    run.servers.wait_for_run()
    reports = Runs(run.out, 2).said["single"]["reports"]
    assert len(reports) == run.rounds
    for number, report in reports.items():
        found = len(report["accepted"]), report["late"], report["rejected"], report["error"]
        assert found == (2, [], [], None), number
    assert "rounds are folded by the lifl-superlink" in run.log()


FLOWERS = {
    "a SuperNode is given its message": ("after pull 1", True),
    "the ServerApp asks for replies": ("before app's pull_messages 1", True),
    "the ServerApp is given replies": ("after app's pull_messages 1", False),
}
"""With Flower's FedAvg: a moment, and whether both nodes count. Flower forgets a reply when it has read it."""


@pytest.fixture(scope="module")
def flowers_run(deployed: Deployed) -> Deployed:
    """A run of Flower's FedAvg, on the same server."""
    deployed.submit("flower", len(FLOWERS) + 1)
    return deployed


@pytest.mark.parametrize("number", range(1, len(FLOWERS) + 1), ids=list(FLOWERS))
def test_flowers_strategy(number: int, flowers_run: Deployed) -> None:
    """Nothing is lost but replies that the ServerApp was about to get; that round ends without them, and soon."""
    moment, is_whole = list(FLOWERS.values())[number - 1]
    flowers_run.play_before(number)
    flowers_run.kill_at(moment)
    flowers_run.end()
    assert (flowers_run.nodes() == [0, 1]) == is_whole


def test_flowers_run_ends_well(flowers_run: Deployed) -> None:
    """It completes, the last round with both."""
    flowers_run.play_before(len(FLOWERS) + 1)
    flowers_run.begin()
    flowers_run.servers.wait_for_run()
    flowers_run.end()
    assert flowers_run.nodes() == [0, 1]
