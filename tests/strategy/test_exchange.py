"""Replies are pulled soon after they are there, few at a time, and nothing is waited for that cannot come."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.app.error import Error
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripted import (
    MODEL,
    Clock,
    Late,
    ScriptedGrid,
    after,
    content,
    nudge,
    plain,
    record,
    reply,
    run,
    silent,
)

import lifl
from lifl.strategy import FedAvg, exchange
from lifl.strategy.exchange import EventGrid, as_it_is


def instruction(node_id: int) -> Message:
    """A message to train."""
    config = ConfigRecord({"server-round": 1})
    return Message(RecordDict({"arrays": record(MODEL), "config": config}), node_id, "train")


def ask(grid: ScriptedGrid, timeout: float | None = None, reply_bytes: int = 1) -> tuple[list[Message], list[int]]:
    """Asks every client of a grid once: the replies, and the nodes that are missing."""
    missing: list[int] = []
    messages = [instruction(node) for node in grid.get_node_ids()]
    return exchange.exchange(grid, messages, timeout, reply_bytes, as_it_is, missing.append), missing


def test_the_first_look_is_at_once_and_the_next_milliseconds_later(clock: Clock) -> None:
    """Replies that are there are taken at once; the pauses begin with 5 ms and grow with the time waited."""
    ask(ScriptedGrid({1: nudge(1), 2: nudge(2)}, clock))
    assert not clock.sleeps
    ask(ScriptedGrid({1: nudge(1), 2: after(30.0, nudge(2))}, clock))
    assert clock.sleeps[:10] == [0.005] * 10
    assert clock.sleeps == sorted(clock.sleeps)
    assert clock.sleeps[-1] == exchange.MAX_PAUSE_S
    # 0.005 s up to 0.05 s, then a tenth more each time up to 10 s, then one a second.
    assert len(clock.sleeps) < 10 + np.log(10 / 0.05) / np.log(1.1) + 20 + 2


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(delays=st.lists(st.floats(0, 100), min_size=1, max_size=8))
def test_a_reply_waits_a_tenth_of_the_round_at_most(clock: Clock, delays: list[float]) -> None:
    """However they are spread, each reply is taken within 5 ms, a tenth of the wait for it, or one second."""
    grid = ScriptedGrid({i: after(seconds, nudge(i + 1)) for i, seconds in enumerate(delays)}, clock)
    began = clock.now
    taken: dict[int, float] = {}

    def take(message: Message, node_id: int) -> Message:
        taken[node_id] = clock.now - began
        return message

    messages = [instruction(node) for node in grid.get_node_ids()]
    exchange.exchange(grid, messages, None, 1, take, lambda _: pytest.fail("one is missing"))
    for i, seconds in enumerate(delays):
        assert seconds <= taken[i] + 1e-9
        assert taken[i] - seconds <= min(1.0, max(0.005, seconds / 10)) + 1e-9


def test_replies_are_in_the_order_in_which_they_came(clock: Clock) -> None:
    """The list that is returned is in order of arrival, not of the messages."""
    clients = {1: after(3, nudge(1)), 2: after(1, nudge(2)), 3: after(2, nudge(3))}
    replies, _ = ask(ScriptedGrid(clients, clock))
    assert [r.metadata.src_node_id for r in replies] == [2, 3, 1]


@pytest.mark.parametrize(("pull_bytes", "at_once"), [(1, 4), (6000, 6), (10**9, 40)])
def test_a_pull_is_bounded_by_bytes(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, pull_bytes: int, at_once: int
) -> None:
    """A pull asks for as many replies as are meant to fit, at least four; a sweep asks for each reply once."""
    monkeypatch.setattr(exchange, "PULL_BYTES", pull_bytes)
    grid = ScriptedGrid({i: nudge(i) for i in range(1, 41)}, clock)
    replies, _ = ask(grid, reply_bytes=1000)
    assert len(replies) == 40
    assert [len(pull) for pull in grid.pulls] == [at_once] * (40 // at_once) + [40 % at_once] * (40 % at_once > 0)
    assert sorted(i for pull in grid.pulls for i in pull) == sorted(grid.asked)


def test_a_train_round_pulls_by_the_models_size(node: lifl.Node, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replies to training are taken to be as large as the model; those to evaluation are small."""
    monkeypatch.setattr(exchange, "PULL_BYTES", 5 * sum(a.nbytes for a in MODEL.values()))
    clients = {i: nudge(i) for i in range(1, 13)}
    result, grid = run(FedAvg(node=node, order="flower"), clients, 1, clock)
    assert [len(pull) for pull in grid.pulls] == [5, 5, 2, 12]
    expected, _ = run(FlowerFedAvg(), clients, 1)
    assert result.arrays.object_id == expected.arrays.object_id


def test_many_clients(node: lifl.Node, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five hundred clients that answer whenever they like all count, in subsets of four."""
    monkeypatch.setattr(exchange, "PULL_BYTES", 1)
    clients = {i: after((i * 37 % 500) / 100, nudge(i)) for i in range(1, 501)}
    result, grid = run(FedAvg(node=node, fraction_evaluate=0.0), clients, 1, clock)
    assert len(result.reports[1].accepted) == 500
    assert max(len(pull) for pull in grid.pulls) == 4
    expected, _ = run(FlowerFedAvg(fraction_evaluate=0.0), clients, 1)
    np.testing.assert_allclose(plain(result.arrays)["weight"], plain(expected.arrays)["weight"], atol=1e-4)


@pytest.mark.parametrize("timeout", [0.5, 10.0, 1000.0])
def test_the_last_look_is_at_the_time_out(clock: Clock, timeout: float) -> None:
    """A reply that is there just before the time-out is taken, and the wait is over just then."""
    grid = ScriptedGrid({1: after(timeout - 1e-6, nudge(1)), 2: silent, 3: after(timeout + 1e-6, nudge(3))}, clock)
    began = clock.now
    replies, missing = ask(grid, timeout)
    assert [r.metadata.src_node_id for r in replies] == [1]
    assert missing == [2, 3]
    assert clock.now - began == pytest.approx(timeout)


def test_without_a_time_out_all_are_waited_for(clock: Clock) -> None:
    """No time-out means until the last one is there, as in Flower."""
    grid = ScriptedGrid({1: after(5000.0, nudge(1))}, clock)
    replies, missing = ask(grid)
    assert len(replies) == 1
    assert not missing


def test_what_could_not_be_pushed_is_missing_at_once(clock: Clock) -> None:
    """A message that the grid did not take is not waited for."""
    grid = ScriptedGrid({1: nudge(1), 2: nudge(2), 3: nudge(3)}, clock, unpushable={2})
    replies, missing = ask(grid, timeout=3600.0)
    assert [r.metadata.src_node_id for r in replies] == [1, 3]
    assert missing == [2]
    assert not clock.sleeps


def test_nothing_could_be_pushed(node: lifl.Node, clock: Clock) -> None:
    """If the grid took no message the round has no result, without waiting for the time-out."""
    strategy = FedAvg(node=node)
    grid = ScriptedGrid({1: nudge(1), 2: nudge(2)}, clock, unpushable={1, 2})
    result = strategy.start(grid, record(MODEL), 1)
    assert sorted(result.reports[1].late) == ["1", "2"]
    assert "0 of 2 updates" in str(result.reports[1].error)
    assert not clock.sleeps


def test_a_second_reply_to_a_message_is_left_out(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """A grid that hands over a reply twice does not make it count twice, and the log says so."""

    class Twice(ScriptedGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            return [*super().pull_messages(message_ids), *self.pulled]

    grid = Twice({1: nudge(1), 2: after(1.0, nudge(2))}, clock)
    with caplog.at_level(logging.WARNING, "flwr"):
        replies, missing = ask(grid)
    assert [r.metadata.src_node_id for r in replies] == [1, 2]
    assert not missing
    assert "second reply of node 1" in caplog.text


def test_the_superlinks_own_errors_name_the_node_that_was_asked(node: lifl.Node, clock: Clock) -> None:
    """An error reply that the SuperLink wrote for a node is reported under that node."""

    @dataclass
    class Unavailable(ScriptedGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            for message in super().pull_messages(message_ids):
                asked = self.asked[message.metadata.reply_to_message_id].message
                is_hers = message.metadata.src_node_id == 77
                yield reply(Error(3, "the objects are gone"), 1, asked) if is_hers else message

    class Changes(FedAvg):
        def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
            replies = list(replies)
            replies[0].content["metrics"]["num-examples"] = 5
            return super().aggregate_train(server_round, replies)

    for cls in (FedAvg, Changes):
        grid = Unavailable({76: nudge(1), 77: nudge(2)}, clock)
        result = cls(node=node, fraction_evaluate=0.0).start(grid, record(MODEL), 1)
        assert [(r.client_id, r.reason) for r in result.reports[1].rejected] == [("77", "the objects are gone")]


def test_the_models_that_were_sent_are_let_go(clock: Clock) -> None:
    """While replies are waited for, the exchange holds no message that was pushed."""
    messages = [instruction(1), instruction(2)]
    grid = ScriptedGrid({1: nudge(1), 2: nudge(2)}, clock)

    def take(message: Message, _: int) -> Message:
        assert not messages
        return message

    assert len(exchange.exchange(grid, messages, None, 1, take, pytest.fail)) == 2


def test_evaluation_is_event_driven_too(node: lifl.Node, clock: Clock) -> None:
    """A client that evaluates for two seconds costs two seconds and a tenth, not three."""

    def slow(message: Message) -> Late:
        return Late(nudge(2)(message), 2.0 if message.metadata.message_type == "evaluate" else 0.0)

    began = clock.now
    result, _ = run(FedAvg(node=node), {1: nudge(1), 2: slow}, 1, clock)
    assert 2.0 <= clock.now - began <= 2.21
    stock = Clock()
    expected, _ = run(FlowerFedAvg(), {1: nudge(1), 2: slow}, 1, stock)
    assert stock.now - 1000.0 == 3.0
    assert result.evaluate_metrics_clientapp == expected.evaluate_metrics_clientapp


class Talkative(FedAvg):
    """Its hooks use the grid for themselves."""

    seen: Any = None

    def configure_train(self, server_round: int, arrays: Any, config: Any, grid: Grid) -> Iterable[Message]:
        """Asks every node something first."""
        probes = [Message(RecordDict({"arrays": arrays}), node, "train.probe") for node in grid.get_node_ids()]
        self.seen = [plain(r.content["arrays"]) for r in grid.send_and_receive(probes, timeout=60)]
        return super().configure_train(server_round, arrays, config, grid)


def test_what_a_hook_asks_is_no_round(node: lifl.Node, clock: Clock) -> None:
    """Messages of the user's own, of whatever type, get their replies as they are: nothing is taken or refused."""

    def client(message: Message) -> RecordDict:
        if message.metadata.message_type == "train.probe":
            return RecordDict({"arrays": record({"of its own": np.array(["any dtype"])})})
        return nudge(3)(message)

    strategy = Talkative(node=node, fraction_evaluate=0.0)
    result, _ = run(strategy, {1: client, 2: client}, 1, clock)
    assert [s["of its own"].tolist() for s in strategy.seen] == [["any dtype"]] * 2
    assert len(result.reports[1].accepted) == 2
    assert not result.reports[1].rejected


def test_the_users_grid_shows_through(clock: Clock) -> None:
    """Hooks get a Grid on which everything but the exchange is the user's own."""
    grid = ScriptedGrid({1: nudge(1), 9: nudge(9)}, clock)
    event_grid = EventGrid(grid, lambda *_: pytest.fail("no round was asked for"))
    assert isinstance(event_grid, Grid)
    assert event_grid.run == "the run"
    assert event_grid.get_node_ids() == [1, 9]
    assert [n.node_id for n in event_grid.get_nodes()] == [1, 9]
    event_grid.set_run("another")
    with pytest.raises(NotImplementedError):
        event_grid.create_message(RecordDict(), "train", 1, "")
    assert grid.called == ["set_run", "create_message"]
    assert event_grid.pause_s == 3.0
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = event_grid.no_such_thing
    (message_id,) = event_grid.push_messages([instruction(9)])
    (came,) = event_grid.pull_messages([message_id])
    assert came.metadata.src_node_id == 9
    (came,) = event_grid.send_and_receive([instruction(1)])
    assert came.metadata.src_node_id == 1


def test_ctrl_c_while_waiting_ends_the_round(node: lifl.Node, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception in the middle of a round leaves nothing of it in the Node."""

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(clock, "sleep", interrupt)
    free = node.arena.free_bytes
    with pytest.raises(KeyboardInterrupt):
        run(FedAvg(node=node), {1: nudge(1), 2: silent}, 1, clock)
    assert not node.has_rounds
    assert node.arena.free_bytes == free


def test_content_is_what_the_tests_say_it_is() -> None:
    """The scripted grid answers as Flower's do: each reply once, an exception as an Error."""
    clock = Clock()
    grid = ScriptedGrid({1: lambda _: content({"x": np.zeros(1)}), 2: lambda _: 1 / 0}, clock)  # type: ignore[return-value]
    replies = list(grid.send_and_receive([instruction(1), instruction(2)]))
    assert [r.has_error() for r in replies] == [False, True]
    assert replies[1].error.reason == "ZeroDivisionError: division by zero"
    assert list(grid.pull_messages(list(grid.asked))) == []
