"""The process that starts workers is killed while the server folds: no node sees it, and every mean is exact."""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import rig as rigs
from flower_objects import update
from flwr.app import Message
from rig import Rig
from scripted_clients import Client, check_mean, play, wait_until

MODEL = {"w": np.zeros((100, 500), np.float32), "b": np.zeros(3)}
HONEST = [({"w": np.full((100, 500), 2.0**i, np.float32), "b": np.full(3, 2.0**i)}, 1.0 + i) for i in range(3)]
"""Powers of two: a mean tells exactly who is in it."""
MOMENTS = ["before the first reply", "between replies", "within a reply", "after the last reply"]


@pytest.fixture
def statuses(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """The number of answers with each status."""
    found: Counter[int] = Counter()
    real, lock = rigs.Node.say, threading.Lock()

    def say(self: rigs.Node, route: str, message: Any) -> tuple[int, bytes]:
        status, body = real(self, route, message)
        with lock:
            found[status] += 1
        return status, body

    monkeypatch.setattr(rigs.Node, "say", say)
    return found


@pytest.fixture(params=[1, 2], ids="{}-workers".format)
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    """A server."""
    with Rig(workers=request.param) as rig:
        yield rig


class Turns:
    """Clients that answer one after another in each round, and what is done at a moment of a round."""

    def __init__(self, rig: Rig, moment: str, sent: int = signal.SIGKILL, of_rounds: tuple[int, ...] = (1,)) -> None:
        self._rig, self._moment, self._sent, self._of_rounds = rig, moment, sent, of_rounds
        self._turn = threading.Condition()
        self._answered = 0
        self.hurt: list[int] = []
        """The pids of those that were hurt."""

    def _hurt(self, moment: str, number: int) -> None:
        if moment == self._moment and number in self._of_rounds:
            self.hurt.append(spawner_of(self._rig))
            os.kill(self.hurt[-1], self._sent)

    def act(self, i: int) -> Any:
        """The reply of client `i` to a message."""
        arrays, examples = HONEST[i]

        def act(client: Client, asked: Message) -> None:
            with self._turn:
                mine = (len(client.asked) - 1) * len(HONEST) + i
                assert self._turn.wait_for(lambda: self._answered == mine, 30)
                number, is_last = len(client.asked), i == len(HONEST) - 1
                if i == 0:
                    self._hurt(MOMENTS[0], number)
                if i == 1:
                    self._hurt(MOMENTS[1], number)
                announced = client.announce(asked, update(arrays, examples))
                first, *others = announced.missing
                assert all(client.push(asked, announced, first))
                if i == 1:
                    self._hurt(MOMENTS[2], number)
                assert all(client.push(asked, announced, *others))
                if is_last:
                    self._hurt(MOMENTS[3], number)
                self._answered += 1
                self._turn.notify_all()

        return act


def spawner_of(rig: Rig) -> int:
    """Its pid."""
    supervisor = rig.plane.node._supervisor
    assert supervisor is not None
    return supervisor.spawner.pid


def play_all(rig: Rig, turns: Turns, num_rounds: int = 2) -> None:
    """Rounds whose mean is exactly that of all clients, one after another."""
    acts = [turns.act(i) for i in range(len(HONEST))]
    round_, clients = play(rig, MODEL, [], *acts, num_rounds=num_rounds)
    assert {one.client_id for one in round_.report.accepted} == {client.name for client in clients}
    assert not round_.report.rejected
    check_mean(round_, HONEST)
    assert rig.plane.node.is_open


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_in_a_served_round(rig: Rig, statuses: Counter[int], moment: str) -> None:
    """Whenever it is killed, nodes are answered as ever, the round has the exact mean, and the next is served."""
    turns = Turns(rig, moment, of_rounds=(1, 2))
    play_all(rig, turns, num_rounds=3)
    assert len(set(turns.hurt)) == 2
    assert set(statuses) == {200}


def test_killed_while_all_workers_rest(rig: Rig, statuses: Counter[int]) -> None:
    """Between rounds too, when no worker is there: the next round starts what it needs."""
    agent = rig.plane.node._agent
    assert agent is not None
    agent._idle_timeout = 0.02
    play_all(rig, Turns(rig, "never"), num_rounds=1)
    for _ in range(2):
        wait_until(lambda: not rig.plane.node.pids())
        os.kill(spawner_of(rig), signal.SIGKILL)
        play_all(rig, Turns(rig, "never"), num_rounds=1)
    assert set(statuses) == {200}


def test_stopped_in_a_served_round(rig: Rig, statuses: Counter[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A spawner that is stopped when a worker has to be started is given some time, and then replaced."""
    monkeypatch.setattr("lifl.workers.spawner.FORK_TIMEOUT_S", 0.3)
    turns = Turns(rig, MOMENTS[1], signal.SIGSTOP)
    play_all(rig, turns, num_rounds=1)
    os.kill(rig.plane.node.pids()[0], signal.SIGKILL)
    play_all(rig, Turns(rig, "never"), num_rounds=1)
    wait_until(lambda: spawner_of(rig) != turns.hurt[0])
    assert set(statuses) == {200}
