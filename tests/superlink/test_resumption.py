"""A server over the database of one that was killed, and a strategy whose server is lost: nothing is lost with it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flower_objects import update
from flwr.app import Message, RecordDict
from flwr.common.serde import message_from_proto
from flwr.proto import fleet_pb2, message_pb2
from flwr.superlink.servicer.runtime import runtime_handlers
from rig import Node, Rig
from scripted_clients import Client, flowers, mean_of, play, says, wait_until

from lifl.strategy import FedAvg, fedavg
from lifl.superlink import app_socket, resumption
from lifl.superlink.rounds.rounds import ASSEMBLERS

MODEL = {"w": np.zeros((30, 40), np.float32), "b": np.zeros(3)}
HONEST = [({"w": np.full((30, 40), n, np.float32), "b": np.full(3, float(n))}, float(n)) for n in (1, 3)]
BOTH: dict[str, Any] = {"fraction_evaluate": 0.0, "min_available_nodes": 2, "min_train_nodes": 2}

pytestmark = [pytest.mark.ladder, pytest.mark.leaves("SQLAlchemy's pool opens connections when it needs them")]


@pytest.fixture
def database(tmp_path: Path) -> str:
    """A file that outlives servers."""
    return str(tmp_path / "state.db")


# ---------------------------------------------------------------- the server


def poll(node: Node) -> list[Message]:
    """The messages that a SuperNode gets when it asks for work once."""
    _, body = node.say("pull-messages", fleet_pb2.PullMessagesRequest(node=node.proto))
    return [message_from_proto(proto) for proto in fleet_pb2.PullMessagesResponse.FromString(body).messages_list]


class Asked:
    """A node that has been given a message by a server that is gone, which has a database."""

    def __init__(self, database: str) -> None:
        self.database = database
        with Rig(database=database) as rig:
            self.port, self.node = rig.port, rig.node()
            self.run_id, token = rig.start_run()
            with rig.grid(self.run_id, token) as grid:
                content = RecordDict({"arrays": flowers(MODEL)})
                grid.push_messages([Message(content, self.node.id, "train")])
            (self.message,) = poll(self.node)
            assert poll(self.node) == []

    def get(self) -> list[str]:
        """The messages that a new server gives to the node, which asks twice."""
        with Rig(database=self.database, port=self.port):
            found = [*poll(self.node), *poll(self.node)]
        return [message.metadata.message_id for message in found]


@pytest.fixture
def asked(database: str) -> Iterator[Asked]:
    """The node is closed afterwards."""
    made = Asked(database)
    yield made
    made.node.close()


def test_a_message_that_was_given_out_and_not_received_is_given_again(asked: Asked) -> None:
    """Flower takes it for delivered; the SuperNode that asks anew has not got it. It comes once from each server."""
    assert asked.get() == [asked.message.metadata.message_id]
    assert asked.get() == [asked.message.metadata.message_id]


def test_a_message_that_was_received_is_not_given_again(asked: Asked) -> None:
    """The SuperNode has confirmed it to the new server, before it asks for more."""
    with Rig(database=asked.database, port=asked.port):
        request = message_pb2.ConfirmMessageReceivedRequest(
            node=asked.node.proto, run_id=asked.run_id, message_object_id=asked.message.metadata.message_id
        )
        assert asked.node.say("confirm-message-received", request)[0] == 200
        assert poll(asked.node) == []
    assert asked.get() == []


def test_a_database_of_another_form_is_served_all_the_same(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    """A message is not given again if Flower's tables have changed; the log says so, and the server works."""
    warnings: list[str] = []
    monkeypatch.setattr(resumption, "FIND", "SELECT message_id FROM no_such_table")
    monkeypatch.setattr(resumption._server, "log", lambda _, text, *rest: warnings.append(text % rest))
    assert asked.get() == []
    assert len(warnings) == 1
    assert "not delivered again" in warnings[0]


def test_an_object_that_is_pushed_again_has_been_stored(database: str) -> None:
    """A client whose answer was lost is told so, instead of that it must not push; what never came is not stored."""
    stored: list[list[bool]] = []

    def push(client: Client, asked: Message) -> None:
        announced = client.announce(asked, update(*HONEST[0]))
        first, second, *_ = announced.missing
        stored.append(client.push(asked, announced, first, first, first))
        content = announced.objects[second].content
        stored.append([client.node.push(asked.metadata.run_id, "no session", second, content)])
        stored.append(client.push(asked, announced, *announced.missing))

    with Rig(database=database) as rig:
        run_id, token = rig.start_run()
        client = Client(rig, push)
        with rig.grid(run_id, token) as grid:
            grid.push_messages([Message(RecordDict({"arrays": flowers(MODEL)}), client.node.id, "train")])
        wait_until(lambda: len(stored) == 3 or client.error is not None)
        client.close()
        assert client.error is None
    again, never, rest = stored
    assert again == [True] * 3
    assert never == [False]
    assert all(rest)


def test_an_object_that_is_pushed_again_while_its_reply_is_read_has_been_stored(database: str) -> None:
    """A client whose last answer was lost is told so: its reply is whole, and waits for a thread that reads it."""
    free = threading.Event()
    again: list[bool] = []

    def push(client: Client, asked: Message) -> None:
        announced = client.announce(asked, update(*HONEST[0]))
        assert all(client.push(asked, announced))
        again.extend(client.push(asked, announced, announced.missing[-1]))
        free.set()

    with Rig(database=database) as rig:
        for _ in range(ASSEMBLERS):
            rig.plane.rounds._assemblers.submit(free.wait, 20)
        round_, _ = play(rig, MODEL, [], push, is_alone=False)
    assert again == [True]
    assert len(round_.report.accepted) == 1


@pytest.mark.parametrize("withheld_s", [resumption.WITHHELD_S, 0.0], ids=["while it may come", "for long enough"])
def test_a_reply_is_given_to_the_serverapp_when_it_is_whole(
    withheld_s: float, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until then its SuperNode can announce it again; after a while it is left to Flower, which reports an error."""
    half, whole = threading.Event(), threading.Event()
    rest: list[bool] = []

    def reply(client: Client, asked: Message) -> None:
        announced = client.announce(asked, update(*HONEST[0]))
        assert client.push(asked, announced, announced.missing[0]) == [True]
        half.set()
        assert whole.wait(20)
        again = client.announce_again(announced)
        rest.extend(client.push(asked, again))

    monkeypatch.setattr(resumption, "WITHHELD_S", withheld_s)
    with Rig(database=database) as rig:
        run_id, token = rig.start_run()
        client = Client(rig, reply)
        with rig.grid(run_id, token) as grid:
            ids = set(grid.push_messages([Message(RecordDict({"arrays": flowers(MODEL)}), client.node.id, "train")]))
            assert half.wait(20)
            given = rig.state.get_message_res(message_ids=ids, run_id=run_id)
            whole.set()
            if withheld_s:
                replies: list[Message] = []
                wait_until(lambda: replies.extend(grid.pull_messages(ids)) or replies)
                assert not replies[0].has_error()
                assert all(rest)
        client.close()
        assert client.error is None
    assert len(given) == (not withheld_s)


# ---------------------------------------------------------------- the strategy


class Lost:
    """Two clients that answer when they may, and a strategy whose server can be lost."""

    def __init__(self, rig: Rig) -> None:
        self.rig, self.may_answer = rig, threading.Event()
        self.may_answer.set()
        self.clients = [Client(rig, self._late(update(*said))) for said in HONEST]

    def _late(self, said: Any) -> Any:
        answer = says(said)

        def act(client: Client, asked: Message) -> None:
            assert self.may_answer.wait(20)
            answer(client, asked)

        return act

    def run(self, num_rounds: int = 1, **options: Any) -> fedavg.Result:
        """A run of FedAvg."""
        run_id, token = self.rig.start_run()
        with self.rig.grid(run_id, token) as grid:
            return FedAvg(**{**BOTH, **options}).start(grid, flowers(MODEL), num_rounds=num_rounds, timeout=20)

    def close(self) -> None:
        """Ends the clients."""
        for client in self.clients:
            client.close()
            assert client.error is None


@pytest.fixture
def lost(database: str) -> Iterator[Lost]:
    """With a database."""
    with Rig(database=database) as rig:
        made = Lost(rig)
        yield made
        made.close()


def check_both(result: fedavg.Result, number: int) -> None:
    """The round has both clients and their exact mean."""
    report = result.reports[number]
    assert (len(report.accepted), report.rejected, report.late, report.error) == (2, (), (), None)
    for name, expected in mean_of(HONEST).items():
        np.testing.assert_allclose(result.arrays[name].numpy(), expected, rtol=1e-6)


def test_a_server_that_is_lost_while_it_makes_the_mean(lost: Lost, monkeypatch: pytest.MonkeyPatch) -> None:
    """The replies are in its database, and are pulled and folded; the next round is folded by the server again."""
    finish, finished = app_socket.Connection._on_finish, list[int]()

    def killed(connection: app_socket.Connection, said: dict[str, Any]) -> None:
        finished.append(1)
        if len(finished) > 1:
            return finish(connection, said)
        connection._end_round(deletes=False)  # as by SIGKILL
        raise OSError("killed")

    monkeypatch.setattr(app_socket.Connection, "_on_finish", killed)
    result = lost.run(2)
    check_both(result, 1)
    check_both(result, 2)
    assert len(finished) == 2
    assert lost.rig.plane.rounds.served == 2


def test_a_server_that_is_lost_between_rounds(lost: Lost, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next round is folded by the one that is there by then."""
    close = app_socket.Connection._on_close

    def killed(connection: app_socket.Connection, said: dict[str, Any]) -> None:
        if lost.rig.plane.rounds.served == 1:
            connection._end_round()
            raise OSError("killed")
        close(connection, said)

    monkeypatch.setattr(app_socket.Connection, "_on_close", killed)
    result = lost.run(2)
    check_both(result, 1)
    check_both(result, 2)
    assert lost.rig.plane.rounds.served == 2


def test_a_server_that_is_asked_to_end_leaves_the_round_in_its_database(lost: Lost) -> None:
    """The messages of an open round are not deleted: the ServerApp pulls the replies when there is a server again."""
    lost.may_answer.clear()
    results: list[fedavg.Result] = []
    thread = threading.Thread(target=lambda: results.append(lost.run()))
    thread.start()
    wait_until(lambda: all(client.asked for client in lost.clients))
    lost.rig.plane.app_socket.close()
    lost.may_answer.set()
    thread.join(30)
    (result,) = results
    check_both(result, 1)


@pytest.mark.parametrize("is_served", [True, False], ids=["by the server", "by the ServerApp"])
def test_a_model_of_which_an_object_is_refused_is_pushed_again(
    is_served: bool, lost: Lost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server had the object and its answer was lost: both nodes get one message, and the round is a round."""
    real, refused = runtime_handlers.push_object, list[str]()

    def push_object(request: Any, state: Any, task: Any) -> Any:
        answer = real(request, state, task)
        if not refused:
            refused.append(request.object_id)
            answer.stored = False
        return answer

    monkeypatch.setattr(runtime_handlers, "push_object", push_object)
    check_both(lost.run(order="any" if is_served else "flower"), 1)
    assert len(refused) == 1
    assert [len(client.asked) for client in lost.clients] == [1, 1]
    assert lost.rig.plane.rounds.served == is_served


def test_what_is_left_of_the_deadline_is_waited_for(lost: Lost, monkeypatch: pytest.MonkeyPatch) -> None:
    """A round whose server is lost does not begin to wait anew."""
    given: list[float] = []
    real = fedavg.exchange

    def exchange(*args: Any, **kwargs: Any) -> Any:
        given.append(args[2])
        return real(*args, **kwargs)

    def killed(connection: app_socket.Connection, _: dict[str, Any]) -> None:
        connection._end_round(deletes=False)
        raise OSError("killed")

    monkeypatch.setattr(fedavg, "exchange", exchange)
    monkeypatch.setattr(app_socket.Connection, "_on_finish", killed)
    check_both(lost.run(deadline=15), 1)
    assert len(given) == 1
    assert 0 < given[0] < 15


def test_a_mean_that_the_server_cannot_make_is_reported(lost: Lost, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal of the server's is no loss of the server: its reason is in the report, and nothing is folded anew."""
    monkeypatch.setattr("lifl.round.round.Round.result", refuse)
    report = lost.run().reports[1]
    assert report.error == "no mean today"
    assert lost.rig.plane.rounds.served == 1


def refuse(*_: Any, **__: Any) -> Any:
    """Stands for a sum that has left the range of float64."""
    from lifl.errors import RoundError

    raise RoundError("no mean today")
