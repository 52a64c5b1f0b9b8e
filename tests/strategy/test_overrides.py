"""Every override point of Flower's Strategy and Grid: the user's code is called, or a class is refused, or one warning.

docs/howto-flower.md has the table.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import flwr.serverapp.strategy as flowers
import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result
from scripted import Clock, ScriptedGrid, after, content, nudge, plain, record, run

import lifl.strategy
from lifl.strategy import FedAvg

MODEL = {"w": np.zeros(3, np.float32)}
OTHERS = ["Krum", "MultiKrum", "Bulyan", "FedMedian", "FedTrimmedAvg", "QFedAvg", "FedXgbBagging", "FedXgbCyclic"]


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The warnings so far, but for those of Flower's arguments."""
    return [
        r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and "fraction_" not in r.getMessage()
    ]


# ---------------------------------------------------------------- classes whose method nobody would call


@pytest.mark.parametrize("name", [*OTHERS, "FedAvgM", "FedAdagrad", "FedAdam", "FedYogi"])
def test_a_rule_behind_lifls_mean_is_refused(name: str) -> None:
    """Also with a class of the user's before it; derived the other way round it is Flower's rule, and is called."""
    other = getattr(flowers, name)
    mixin = type("Mixin", (FedAvg,), {})
    for base in (FedAvg, mixin, lifl.strategy.FedProx):
        cls = type("Robust", (base, other), {})
        with pytest.raises(
            TypeError, match=r"Robust has lifl's Fed\w+ before .*, whose aggregate_train would never be"
        ):
            cls()


def test_a_loop_behind_lifls_is_refused() -> None:
    """A start() of the user's that stands behind lifl's."""

    class Looping(flowers.FedAvg):
        def start(self, *args: Any, **kwargs: Any) -> Any:
            raise AssertionError("is not called")

    with pytest.raises(TypeError, match=r"before .*Looping, whose start would never be called: derive from"):
        type("Both", (FedAvg, Looping), {})()
    type("Right", (Looping, FedAvg), {})()  # there it is the first


def test_a_method_behind_lifls_that_is_called() -> None:
    """FedProx adds to the configuration; nothing of it is passed over."""
    strategy = type("Prox", (FedAvg, flowers.FedProx), {})(proximal_mu=0.5)
    seen = []

    def client(message: Message) -> Any:
        seen.append(message.content["config"]["proximal-mu"])
        return nudge(1)(message)

    run(strategy, {1: client, 2: client}, 1, initial_arrays=record(MODEL))
    assert seen[:2] == [0.5, 0.5]


# ---------------------------------------------------------------- a loop of the user's


class Own(FedAvg):
    """Runs its rounds itself."""

    def start(self, grid: Grid, initial_arrays: ArrayRecord, num_rounds: int = 3, *_: Any, **__: Any) -> Any:
        """The shortest loop that there is."""
        arrays, result = initial_arrays, Result()
        for number in range(1, num_rounds + 1):
            replies = grid.send_and_receive(self.configure_train(number, arrays, ConfigRecord(), grid))
            arrays = self.aggregate_train(number, replies)[0] or arrays
        result.arrays = arrays
        return result


@pytest.mark.usefixtures("clock")
def test_what_has_no_effect_in_a_loop_of_the_users_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By name and value; without such arguments nothing is said, and a loop that calls lifl's start() has them."""
    run(Own(deadline=5.0, checkpoint=tmp_path / "run"), {1: nudge(1), 2: nudge(2)}, 2, initial_arrays=record(MODEL))
    (said,) = (text for text in warnings_of(caplog) if "Own" in text)
    assert f"Own: deadline=5.0 and checkpoint={tmp_path / 'run'!r} without effect" in said
    caplog.clear()
    run(Own(quorum=1), {1: nudge(1), 2: nudge(2)}, 1, initial_arrays=record(MODEL))

    class Calls(FedAvg):
        def start(self, *args: Any, **kwargs: Any) -> Any:
            return super().start(*args, **kwargs)

    _, grid = run(Calls(deadline=5.0), {1: nudge(1), 2: after(60.0, nudge(2))}, 1, initial_arrays=record(MODEL))
    assert grid.clock.now - 1000 < 11  # a round of training and one of evaluation
    assert not [text for text in warnings_of(caplog) if "without effect" in text]


# ---------------------------------------------------------------- a grid of the user's


class Dropouts(ScriptedGrid):
    """Loses what node 3 says."""

    calls = 0

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """All but node 3's."""
        self.calls += 1
        return [m for m in super().send_and_receive(messages, timeout=timeout) if m.metadata.src_node_id != 3]


def adding(message: Message) -> Any:
    """Adds the node's number to the model."""
    return content({"w": plain(message.content["arrays"])["w"] + np.float32(message.metadata.dst_node_id)}, 1, loss=0.1)


@pytest.mark.parametrize("is_instance", [False, True])
def test_a_grids_own_exchange_is_called(is_instance: bool, caplog: pytest.LogCaptureFixture) -> None:
    """An override of Grid.send_and_receive, in a class or on the grid: called as by Flower, and its replies count."""
    seen = {}
    for module in (flowers, lifl.strategy):
        grid: Any = Dropouts({1: adding, 2: adding, 3: adding}, Clock())
        if is_instance:
            grid = ScriptedGrid({1: adding, 2: adding, 3: adding}, Clock())
            inner = grid.send_and_receive
            grid.calls = 0

            def own(messages: Any, *, timeout: Any = None, grid: Any = grid, inner: Any = inner) -> Any:
                grid.calls += 1
                return [m for m in inner(messages, timeout=timeout) if m.metadata.src_node_id != 3]

            grid.send_and_receive = own
        strategy = module.FedAvg(min_train_nodes=3, fraction_evaluate=0.0)
        result = strategy.start(grid, record(MODEL), num_rounds=2)
        seen[module] = plain(result.arrays)["w"].tolist(), grid.calls
    assert seen[flowers] == seen[lifl.strategy] == ([3.0] * 3, 4)
    assert sorted(c.client_id for c in strategy.reports[2].accepted) == ["1", "2"]
    assert strategy.reports[2].late == ("3",)
    assert not [text for text in warnings_of(caplog) if "is not called" in text]


def test_a_grid_that_is_the_users_altogether(caplog: pytest.LogCaptureFixture) -> None:
    """Its messages are pushed and pulled one by one; that its own exchange is not called is said once a run."""
    FedAvg().start(ScriptedGrid({1: adding, 2: adding}, Clock()), record(MODEL), num_rounds=2)
    (said,) = (text for text in warnings_of(caplog) if "is not called" in text)
    assert said.startswith("ScriptedGrid.send_and_receive is not called: lifl pushes the messages and pulls each reply")


def test_a_grid_that_is_none_of_flowers() -> None:
    """An object with the methods, as tests of an app have it."""
    inner = ScriptedGrid({1: adding, 2: adding}, Clock())

    class Duck:
        __slots__ = ()

        def __getattr__(self, name: str) -> Any:
            return getattr(inner, name)

    duck: Any = Duck()
    result = FedAvg().start(duck, record(MODEL), num_rounds=1)
    assert plain(result.arrays)["w"].tolist() == [1.5] * 3


@pytest.mark.parametrize("method", ["push_messages", "pull_messages", "get_node_ids", "create_message", "set_run"])
def test_a_grids_other_methods_are_called(method: str) -> None:
    """Overridden in a class of the user's."""
    calls = []

    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(method)
        return getattr(ScriptedGrid, method)(self, *args, **kwargs)

    class Hooked(FedAvg):
        def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Any:
            if method == "set_run":
                grid.set_run("a run")
            if method == "create_message":
                with pytest.raises(NotImplementedError):
                    grid.create_message()
            return super().configure_train(server_round, arrays, config, grid)

    grid = type("Mine", (ScriptedGrid,), {method: called})({1: adding, 2: adding}, Clock())
    Hooked().start(grid, record(MODEL), num_rounds=1)
    assert calls


# ---------------------------------------------------------------- an aggregation of the user's


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "complex64"])
def test_a_model_that_only_the_users_rule_can_fold(dtype: str) -> None:
    """bfloat16's bits, complex numbers: lifl folds nothing of them, and stops the run only if it is asked to."""

    def make(base: Any) -> Any:
        class Sum(base):  # type: ignore[misc]
            def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
                arrays = [plain(r.content["arrays"])["w"] for r in replies]
                return record({"w": np.asarray(sum(arrays), dtype)}), MetricRecord({"n": len(arrays)})

        return Sum(fraction_evaluate=0.0)

    clients = {i: (lambda m: content(plain(m.content["arrays"]), 1)) for i in (1, 2)}
    model = record({"w": np.ones(3, dtype)})
    ours, theirs = (run(make(base), clients, 2, initial_arrays=model)[0] for base in (FedAvg, flowers.FedAvg))
    assert plain(ours.arrays)["w"].tobytes() == plain(theirs.arrays)["w"].tobytes()
    assert ours.train_metrics_clientapp == theirs.train_metrics_clientapp
    with pytest.raises((TypeError, ValueError), match=r"'w'"):
        run(FedAvg(fraction_evaluate=0.0), clients, 1, initial_arrays=model)


@pytest.mark.parametrize("is_empty", [True, False])
def test_an_empty_result_is_a_result(is_empty: bool, tmp_path: Path) -> None:
    """``ArrayRecord({})`` is the run's model, as with Flower; None in all rounds leaves the first model."""

    def make(base: Any, **more: Any) -> Any:
        class Empty(base):  # type: ignore[misc]
            def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
                return (ArrayRecord({}) if is_empty else None), None

        return Empty(fraction_evaluate=0.0, **more)

    clients = {1: adding, 2: adding}
    result, _ = run(make(FedAvg), clients, 1, initial_arrays=record(MODEL))
    assert plain(result.arrays).keys() == ({} if is_empty else MODEL).keys()
    for resume in (False, True):  # a run that is over has its model from the file
        strategy = make(FedAvg, checkpoint=tmp_path / "run", resume=resume)
        result, _ = run(strategy, clients, 1, initial_arrays=record(MODEL))
        assert plain(result.arrays).keys() == ({} if is_empty else MODEL).keys()
