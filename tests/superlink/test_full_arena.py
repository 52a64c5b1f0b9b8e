"""An arena that is too small for what comes: nothing hangs, what has no room is kept as Flower's server keeps it."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
from rig import Rig

from lifl.bench.fleet.canned_reply import Prebuilt
from lifl.bench.fleet.fleet import Fleet
from lifl.strategy import FedAvg
from lifl.superlink.http import gateway

NODES = 4
SHAPE = 3, 1000, 1000
"""12 MB: three of Flower's chunks."""


@pytest.mark.parametrize("strategy", [FlowerFedAvg, FedAvg])
@pytest.mark.parametrize("memory", ["4MiB", "16MiB"])
def test_replies_that_have_no_room(strategy: type[FlowerFedAvg], memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even a chunk fits, or parts of all replies fill the arena so that none can be completed: the round ends."""
    monkeypatch.setattr(gateway, "FULL_S", 0.2)
    told: list[tuple[int, str]] = []
    monkeypatch.setattr(gateway._server, "log", lambda level, text: told.append((level, text)))
    updates = [Prebuilt({"w": np.full(SHAPE, i, np.float32)}, i + 1) for i in range(NODES)]
    with Rig(memory=memory) as rig:
        run_id, token = rig.start_run()
        with Fleet(rig.address, updates), rig.grid(run_id, token) as grid:
            made = strategy(fraction_evaluate=0.0, min_available_nodes=NODES, min_train_nodes=NODES)
            first = ArrayRecord({"w": Array(np.zeros(SHAPE, np.float32))})
            result = made.start(grid, first, num_rounds=1, timeout=60)
        expected = sum(i * (i + 1) for i in range(NODES)) / sum(i + 1 for i in range(NODES))
        np.testing.assert_allclose(result.arrays["w"].numpy(), np.full(SHAPE, expected), rtol=1e-6)
        rig.settle()
        assert rig.state.num_message_ins() == rig.state.num_message_res() == 0
    ((level, text),) = told
    assert level == logging.WARNING
    assert "lifl's arena is full" in text


def test_a_round_that_can_never_fit_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server does not wait for memory that it does not have; the ServerApp folds."""
    monkeypatch.setattr("lifl.superlink.rounds.rounds.OPEN_TIMEOUT_S", 1e9)
    updates = [Prebuilt({"w": np.full((1000, 1000), i, np.float32)}, 1) for i in range(2)]
    with Rig(memory="8MiB") as rig:
        run_id, token = rig.start_run()
        with Fleet(rig.address, updates), rig.grid(run_id, token) as grid:
            made = FedAvg(fraction_evaluate=0.0, min_available_nodes=2, min_train_nodes=2)
            first = ArrayRecord({"w": Array(np.zeros((1000, 1000), np.float32))})
            result = made.start(grid, first, num_rounds=1, timeout=60)
        assert len(result.reports[1].accepted) == 2
        assert rig.plane.rounds is not None
        assert rig.plane.rounds.served == 0
