"""Clients of a rig that do what a test tells them, honest ones beside them, and whole rounds of both."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import attrs
import numpy as np
from flwr.app import Array, ArrayRecord, Error, Message
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto import fleet_pb2, message_pb2
from plain import soon
from rig import Node, Rig
from things import Thing, update

from lifl.metrics import RoundReport
from lifl.strategy import FedAvg
from lifl.superlink.prebuilt import Placeholder

POLL_S = 0.005

Arrays = Mapping[str, Any]


@attrs.define
class Announced:
    """A reply that has been announced: its Message, all its objects by id, those that are missing, and the session."""

    said: Message
    message: Thing
    things: dict[str, Thing]
    missing: list[str]
    session_id: str


def prepare(asked: Message, said: Thing | Error) -> Announced:
    """A reply to a message, before it is announced."""
    content = said if isinstance(said, Error) else Placeholder(said.id)
    made = Message(content, reply_to=asked)
    head, _, body = made.deflate().partition(b"\0")
    message = Thing(head.split(b" ")[0].decode(), (said,) if isinstance(said, Thing) else (), body)
    assert message.content == made.deflate()
    made.metadata.__dict__["_message_id"] = message.id
    return Announced(made, message, {thing.id: thing for thing in message.all()}, [], "")


class Client:
    """A node and a thread in which it does `act` with each message that it gets."""

    def __init__(self, rig: Rig, act: Callable[[Client, Message], None]) -> None:
        self.rig, self._act = rig, act
        self.node: Node = rig.node()
        self.error: BaseException | None = None
        self.asked: list[Message] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"client-{self.node.id}", daemon=True)
        self._thread.start()

    @property
    def name(self) -> str:
        """As reports have it."""
        return str(self.node.id)

    def close(self) -> None:
        """Ends it; what ended it before is in `error`."""
        self._stop.set()
        self._thread.join(20)
        self.node.say("unregister-node", fleet_pb2.UnregisterNodeFleetRequest(node_id=self.node.id))
        self.node.close()

    def _run(self) -> None:
        try:
            while not self._stop.wait(POLL_S):
                _, body = self.node.say("pull-messages", fleet_pb2.PullMessagesRequest(node=self.node.proto))
                for proto in fleet_pb2.PullMessagesResponse.FromString(body).messages_list:
                    message = message_from_proto(proto)
                    self.asked.append(message)
                    self._act(self, message)
        except BaseException as error:
            self.error = error

    # ------------------------------------------------------------ what it can do

    def announce(self, asked: Message, said: Thing | Error) -> Announced:
        """Says that a reply will come."""
        return self.announce_again(prepare(asked, said))

    def announce_again(self, announced: Announced, tree: Any = None) -> Announced:
        """Says the same reply once more; with another tree, if so wanted."""
        proto = message_to_proto(remove_content_from_message(announced.said))
        request = fleet_pb2.PushMessagesRequest(
            node=self.node.proto, messages_list=[proto], message_object_trees=[tree or announced.message.tree]
        )
        status, answer = self.node.say("push-messages", request)
        assert status == 200, (status, answer)
        response = fleet_pb2.PushMessagesResponse.FromString(answer)
        missing = list(dict.fromkeys(response.objects_to_push))
        return attrs.evolve(announced, missing=missing, session_id=response.session_id)

    def request(self, asked: Message, announced: Announced, object_id: str, content: bytes | None = None) -> bytes:
        """A push-object request's body for one of a reply's objects."""
        return message_pb2.PushObjectRequest(
            node=self.node.proto,
            run_id=asked.metadata.run_id,
            object_id=object_id,
            object_content=announced.things[object_id].content if content is None else content,
            session_id=announced.session_id,
        ).SerializeToString(deterministic=True)

    def push(self, asked: Message, announced: Announced, *object_ids: str) -> list[bool]:
        """Pushes these objects, or all that are missing; which were stored."""
        session, things = announced.session_id, announced.things
        wanted = object_ids or announced.missing
        return [self.node.push(asked.metadata.run_id, session, i, things[i].content) for i in wanted]

    def answer(self, asked: Message, said: Thing | Error) -> None:
        """Announces a reply and pushes all of it, which must be stored."""
        assert all(self.push(asked, self.announce(asked, said)))


Act = Callable[[Client, Message], None]


def says(said: Thing | Error) -> Act:
    """Answers every message so."""
    return lambda client, asked: client.answer(asked, said)


def never(_client: Client, _asked: Message) -> None:
    """Does not answer."""


@attrs.define
class Round:
    """What became of a round with honest clients and bad ones."""

    arrays: dict[str, Any]
    report: RoundReport
    refused: dict[str, str]  # who -> by which rule
    reasons: dict[str, str]


def flowers(arrays: Arrays) -> ArrayRecord:
    """A model as Flower holds it."""
    return ArrayRecord({name: Array(np.asarray(one)) for name, one in arrays.items()})


def play(
    rig: Rig,
    model: Arrays,
    honest: list[tuple[Arrays, float]],
    *bad: Act,
    num_rounds: int = 1,
    beside: Callable[[list[Client]], None] | None = None,
    is_alone: bool = True,
    **options: Any,
) -> tuple[Round, list[Client]]:
    """Runs a strategy with honest clients and with such that `act`; checks that nothing is left, and who counted.

    `beside` runs in this thread after the strategy. The clients that are returned are closed, the bad ones first.
    Not `is_alone`: something else goes on at the server, which may stay.
    """
    clients = [Client(rig, act) for act in bad]
    good = [Client(rig, says(update(arrays, examples))) for arrays, examples in honest]
    run_id, token = rig.start_run()
    served = rig.plane.rounds.served
    try:
        with rig.grid(run_id, token) as grid:
            count = len(clients) + len(good)
            strategy = FedAvg(
                **{"fraction_evaluate": 0.0, "min_available_nodes": count, "min_train_nodes": count, **options}
            )
            result = strategy.start(grid, flowers(model), num_rounds=num_rounds, timeout=20)
        if beside is not None:
            beside(clients)
    finally:
        for client in (*clients, *good):
            client.close()
        for client in (*clients, *good):
            if client.error is not None:
                raise client.error
    assert rig.plane.rounds.served == served + num_rounds, "the server folded every round"
    if is_alone:
        settled(rig)  # before the run ends, with which Flower clears what is left of it
    rig.state.stop_run(run_id)
    report = result.reports[num_rounds]
    arrays = {name: one.numpy() for name, one in result.arrays.items()}
    refused = {one.client_id: one.rule for one in report.rejected}
    reasons = {one.client_id: one.reason for one in report.rejected}
    assert {one.client_id for one in report.accepted} & {client.name for client in good} == {
        client.name for client in good
    }, report
    return Round(arrays, report, refused, reasons), clients


def settled(rig: Rig) -> None:
    """Nothing is left of any round: no object, no message, no place that is waited for, and the arena is empty."""
    rounds, state = rig.plane.rounds, rig.state

    def left() -> list[Any]:
        books = [rounds._open, rounds._asked, rounds._wanted, rounds._sessions]
        return [*books, rig.plane.protocol.busy, rig.plane.gateway.uploads, state.num_message_ins(), len(rig.store)]

    assert soon(lambda: not any(left()), 10.0), f"left: {left()}"
    rig.settle()


def mean_of(honest: list[tuple[Arrays, float]]) -> dict[str, Any]:
    """Their exact mean, in the model's dtypes."""
    total = sum(examples for _, examples in honest)
    exact = {
        name: sum(examples * np.asarray(arrays[name], np.float64) for arrays, examples in honest) / total
        for name in honest[0][0]
    }
    dtypes = {name: np.asarray(one).dtype for name, one in honest[0][0].items()}
    return {n: (np.rint(e) if dtypes[n].kind in "iu" else e).astype(dtypes[n]) for n, e in exact.items()}


def check_mean(round_: Round, honest: list[tuple[Arrays, float]]) -> None:
    """The new model is the mean of the honest ones, and of nobody else."""
    for name, expected in mean_of(honest).items():
        got = round_.arrays[name]
        assert got.dtype == expected.dtype
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-12)


def wait_until(is_true: Callable[[], Any], timeout: float = 10.0) -> None:
    """Waits, and fails if it does not become true."""
    begin = time.monotonic()
    assert soon(is_true, timeout), f"not in {time.monotonic() - begin:.1f} s"
