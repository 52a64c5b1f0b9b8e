"""Rounds that the server folds: real HTTP, virtual SuperNodes, Flower's own grid, lifl's strategies."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
from rig import Rig

from lifl.bench.fleet.canned_reply import Prebuilt
from lifl.bench.fleet.fleet import Fleet
from lifl.strategy import FedAvg

Arrays = dict[str, Any]


def model(seed: int) -> Arrays:
    """Odd shapes: of several chunks, of a unit or so, tiny, 0-d, empty, whole numbers, half precision."""
    random = np.random.default_rng(seed)
    return {
        "big": random.random((1400, 1024), np.float32),  # 5.7 MB: two chunks
        "conv": random.random((64, 32, 3, 3), np.float32),
        "bias": random.random(7, np.float32),
        "bn1.count": np.array(seed + 5, np.int64),
        "half": random.random((33, 3)).astype(np.float16),
        "bn2.count": np.array(seed + 5, np.int64),
        "empty": np.zeros((0, 4), np.float32),
        "double": random.random((5, 5)),
    }


def record(arrays: Arrays) -> ArrayRecord:
    """As Flower holds a model."""
    return ArrayRecord({name: Array(array) for name, array in arrays.items()})


def replies(count: int) -> list[Prebuilt]:
    """The replies of so many nodes, which weigh 1, 2, 3 and so on."""
    return [Prebuilt(model(i), i + 1) for i in range(count)]


def check_mean(arrays: ArrayRecord, count: int, roundings: int = 1) -> None:
    """It is the weighted mean of all of them, to so many roundings to the dtype."""
    updates, weights = [model(i) for i in range(count)], [float(i + 1) for i in range(count)]
    for name, array in arrays.items():
        got = array.numpy()
        exact = sum(w * np.asarray(u[name], np.float64) for w, u in zip(weights, updates, strict=True)) / sum(weights)
        assert got.dtype == updates[0][name].dtype
        if got.dtype.kind == "i":
            assert got == np.rint(exact)
        else:  # one rounding to the dtype, and what the reference's own sums lose
            np.testing.assert_allclose(
                got.astype(np.float64), exact, rtol=roundings * np.finfo(got.dtype).eps, atol=1e-12
            )


@pytest.mark.parametrize("timing", ["eager", "lazy", "jit"])
def test_a_lifl_strategy_has_its_rounds_folded_by_the_server(timing: str) -> None:
    """Three rounds: the mean each time, and nothing stays in the arena, in the store or in the LinkState."""
    with Rig() as rig:
        run_id, token = rig.start_run()
        with Fleet(rig.address, replies(3), is_checking=True), rig.grid(run_id, token) as grid:
            strategy = FedAvg(timing=timing, fraction_evaluate=0.0, min_available_nodes=3, min_train_nodes=3)
            result = strategy.start(grid, record(model(99)), num_rounds=3)
        check_mean(result.arrays, 3)
        for report in result.reports.values():
            assert len(report.accepted) == 3
            assert not report.rejected
        assert rig.plane.rounds.served == 3
        rig.settle()
        assert rig.state.num_message_ins() == rig.state.num_message_res() == 0
        assert len(rig.store) == 0


def test_flowers_own_strategy_works_as_on_flowers_server() -> None:
    """Nothing is folded by the server; the model is Flower's."""
    with Rig() as rig:
        run_id, token = rig.start_run()
        with Fleet(rig.address, replies(2), is_checking=True), rig.grid(run_id, token) as grid:
            strategy = FlowerFedAvg(fraction_evaluate=0.0)
            result = strategy.start(grid, record(model(99)), num_rounds=1)
        check_mean(ArrayRecord({k: a for k, a in result.arrays.items() if "count" not in k}), 2, roundings=4)
        assert rig.plane.rounds.served == 0


def test_messages_that_take_long_to_store_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search for nodes that are gone does not ask for these messages: Flower would say that they never existed."""
    monkeypatch.setattr("lifl.superlink.rounds.watcher.WATCH_S", 0.05)
    with Rig() as rig:
        assert rig.plane.rounds is not None
        outgoing = rig.plane.rounds._outgoing
        registering = outgoing.registering

        @contextlib.contextmanager
        def slowly() -> Iterator[None]:
            with registering():
                time.sleep(0.5)  # noted as the round's, and not stored yet
                yield

        monkeypatch.setattr(outgoing, "registering", slowly)
        run_id, token = rig.start_run()
        with Fleet(rig.address, replies(2), is_checking=True), rig.grid(run_id, token) as grid:
            strategy = FedAvg(fraction_evaluate=0.0, min_available_nodes=2, min_train_nodes=2)
            result = strategy.start(grid, record(model(99)), num_rounds=1)
        assert len(result.reports[1].accepted) == 2
        check_mean(result.arrays, 2)
