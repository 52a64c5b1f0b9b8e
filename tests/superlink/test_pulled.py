"""Rounds that the ServerApp folds itself, on Flower's own SuperLink and on lifl's: bad replies over the real wire."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import attrs
import numpy as np
import pytest
import scripted_clients
import uvicorn
from flower_objects import FlowerObject, array, record, reply, update
from flwr.app import Message
from flwr.proto import message_pb2
from rig import HOST, Rig
from scripted_clients import Act, Client, flowers, prepare, says

import lifl
from lifl import ipc
from lifl.strategy import FedAvg
from lifl.superlink import flower

MODEL = {"w": np.zeros((40, 50), np.float32), "b": np.zeros(3)}
ONES = {"w": np.full((40, 50), 1, np.float32), "b": np.arange(3.0)}
FIVES = {"w": np.full((40, 50), 5, np.float32), "b": np.ones(3)}
NINES = {"w": np.full((40, 50), 9, np.float32), "b": np.full(3, 9.0)}
FOURS = {"w": np.full((40, 50), 4, np.float32), "b": (np.arange(3.0) + 3) / 4}


class Stock(Rig):
    """Flower's own SuperLink, as it is, where a rig has lifl's."""

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind((HOST, 0))
            port = probe.getsockname()[1]
        names = flower.part("server")
        line = ["flower-superlink", "--insecure", "--isolation", "process", "--host", HOST, "--port", str(port)]
        before, sys.argv = sys.argv, line
        try:
            config = names.parse_config()
        finally:
            sys.argv = before
        self.address, self.port, self.config = f"{HOST}:{port}", port, config
        app = names.create_app(config, names.Lifespan)
        self.plane = SimpleNamespace(app=app, close=lambda: None)  # type: ignore[assignment]
        settings = uvicorn.Config(app, host=HOST, port=port, log_level="warning", timeout_graceful_shutdown=2)
        self._server = uvicorn.Server(settings)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._server.serve()), name="stock")
        self._variable = os.environ.get(ipc.VARIABLE)


@pytest.fixture(params=["Flower's", "lifl's"])
def server(request: pytest.FixtureRequest) -> Iterator[Rig]:
    """A SuperLink."""
    with Stock() if request.param == "Flower's" else Rig() as rig:
        yield rig


@pytest.fixture(scope="module")
def node() -> Iterator[lifl.Node]:
    """A Node of the ServerApp's, with which no server folds its rounds."""
    with lifl.Node("16MiB", workers=0) as node:
        yield node


def slow(others_are_in: threading.Event) -> Act:
    """Announces its reply, and pushes the objects of it when all the others' have been taken."""

    def act(client: Client, asked: Message) -> None:
        announced = client.announce(asked, update(FOURS, 4))
        assert others_are_in.wait(60)
        assert all(client.push(asked, announced))

    return act


def lie(client: Client, asked: Message) -> None:
    """Announces an answer to its message; the Message object itself says that it answers another."""
    right = prepare(asked, update(NINES, 9))
    proto = message_pb2.Message.FromString(right.message.body)
    proto.metadata.reply_to_message_id = "d" * 64
    wrong = FlowerObject("Message", right.message.children, proto.SerializeToString(deterministic=True))
    right.said.metadata.__dict__["_message_id"] = wrong.id
    announced = attrs.evolve(right, message=wrong, objects={one.id: one for one in wrong.all()})
    client.push(asked, client.announce_again(announced))


CHUNK = FlowerObject("ArrayChunk", (), bytes(2**20))
BAD: dict[str, Act] = {
    "would take more than": says(update({**NINES, "w": array(np.zeros(1), chunks=[CHUNK], arraychunk_ids=[0] * 400)})),
    "is described by no JSON object": says(update({**NINES, "w": FlowerObject("Array", (), b"[]")})),
    "is no list of names": says(FlowerObject("RecordDict", (record(NINES),), b"no JSON")),
    "a record": says(reply(arrays=record(NINES), metrics=FlowerObject("MetricRecord", (), b"\xff" * 9))),
    "describes itself in": says(update({**NINES, "w": array(np.ones(2), dtype="f" * 2_000_000)})),
    "reply_to_message_id": lie,
}


def in_the_first_round(bad: Act, otherwise: Act) -> Act:
    """Bad in round 1, honest in the next."""
    return lambda client, asked: (bad if len(client.asked) == 1 else otherwise)(client, asked)


def test_bad_replies_cost_only_their_nodes_the_round(
    server: Rig, node: lifl.Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The honest mean is exact, each bad node is named with what was wrong, who is slow counts last, all go on."""
    monkeypatch.setattr(scripted_clients, "POLL_S", 0.1)
    honest = says(update(NINES, 4))
    clients = {name: Client(server, in_the_first_round(bad, honest)) for name, bad in BAD.items()}
    others_are_in, confirmed = threading.Event(), list[Any]()
    late = Client(server, in_the_first_round(slow(others_are_in), honest))
    good = [Client(server, says(update(arrays, examples))) for arrays, examples in ((ONES, 1), (FIVES, 3))]
    everybody = [*clients.values(), late, *good]
    run_id, token = server.start_run()
    models: list[Any] = []

    def confirm(request: Any) -> Any:
        confirmed.append(request.message_object_id)
        if len(confirmed) == len(everybody) - 1:
            others_are_in.set()
        return confirm_at_the_server(request)

    def keep(_: int, arrays: Any) -> None:
        models.append(arrays)

    try:
        with server.grid(run_id, token) as grid:
            count = len(everybody)
            confirm_at_the_server = grid._runtime_client.ConfirmMessageReceived
            monkeypatch.setattr(grid._runtime_client, "ConfirmMessageReceived", confirm)
            strategy = FedAvg(node=node, fraction_evaluate=0.0, min_available_nodes=count, min_train_nodes=count)
            result = strategy.start(grid, flowers(MODEL), 2, 100.0, evaluate_fn=keep)
    finally:
        for client in everybody:
            client.close()
    assert not [client.error for client in everybody if client.error is not None]
    first, second = result.reports[1], result.reports[2]
    accepted = sorted(first.accepted, key=lambda one: one.arrived_s)
    assert {one.client_id for one in accepted} == {client.name for client in (*good, late)}
    assert accepted[-1].client_id == late.name
    assert not first.late
    reasons = {one.client_id: one.reason for one in first.rejected}
    assert reasons.keys() == {clients[name].name for name in BAD}
    assert not {name: reasons[clients[name].name] for name in BAD if name not in reasons[clients[name].name]}
    for name, expected in FOURS.items():  # which is the mean of the honest two, too
        assert np.array_equal(models[1][name].numpy(), expected)
    assert len(second.accepted) == count
    assert not node.has_rounds
