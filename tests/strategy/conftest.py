"""Fixtures of the strategies' tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from flwr.serverapp.strategy import strategy_utils
from flwr.supercore.task_identity import TaskIdentity
from scripted import Clock

import lifl
from lifl.strategy import exchange


@pytest.fixture(autouse=True, scope="module")
def identity() -> Iterator[None]:
    """The identity of a ServerApp, without which Flower makes no Message."""
    names = ("_run_id", "_node_id", "_task_id")
    before = [getattr(TaskIdentity, name) for name in names]
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    yield
    for name, value in zip(names, before, strict=True):
        setattr(TaskIdentity, name, value)


class FirstNodes:
    """Stands in for the module `random` where Flower samples nodes: takes the first."""

    @staticmethod
    def sample(population: list[int], k: int) -> list[int]:
        """The first `k`."""
        return population[:k]


@pytest.fixture(autouse=True)
def same_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes are asked in the script's order, so that replies at once come in that order too."""
    monkeypatch.setattr(strategy_utils, "random", FirstNodes)


@pytest.fixture(scope="module")
def node() -> Iterator[lifl.Node]:
    """A Node with two workers for a module."""
    with lifl.Node("64MiB", workers=2, debug=True) as node:
        yield node


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock of the test's own for the exchange of messages."""
    clock = Clock()
    monkeypatch.setattr(exchange, "time", clock)
    return clock
