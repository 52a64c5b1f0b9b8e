"""A Grid whose clients follow a script, on a clock that only sleeping moves; and builders of what they say."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.app.error import Error
from flwr.app.message import make_message
from flwr.app.metadata import Metadata
from flwr.serverapp import Grid

Arrays = Mapping[str, Any]


def record(arrays: Arrays) -> ArrayRecord:
    """An ArrayRecord of NumPy arrays."""
    return ArrayRecord({name: Array(np.asarray(array)) for name, array in arrays.items()})


def plain(arrays: ArrayRecord | None) -> dict[str, np.ndarray[Any, Any]]:
    """The NumPy arrays of an ArrayRecord."""
    assert arrays is not None
    return {name: array.numpy() for name, array in arrays.items()}


def content(arrays: Arrays | ArrayRecord, weight: Any = 1, **metrics: Any) -> RecordDict:
    """The reply of a client after training; a weight of None leaves the weight out."""
    if not isinstance(arrays, ArrayRecord):
        arrays = record(arrays)
    weights = {} if weight is None else {"num-examples": weight}
    return RecordDict({"arrays": arrays, "metrics": MetricRecord({**weights, **metrics})})


_ids = count(1)


def reply(said: RecordDict | Error, node_id: int = 7, to: Message | None = None) -> Message:
    """A reply as a Grid hands it over."""
    metadata = Metadata(
        run_id=1,
        message_id=f"reply-{next(_ids)}",
        src_node_id=node_id,
        dst_node_id=1,
        reply_to_message_id="" if to is None else to.metadata.message_id,
        group_id="",
        created_at=1.0,
        ttl=3600.0,
        message_type="train" if to is None else to.metadata.message_type,
    )
    if isinstance(said, Error):
        return make_message(metadata, error=said)
    return make_message(metadata, said)


def replies_of(updates: Iterable[Arrays], weights: Iterable[Any], **metrics: Any) -> list[Message]:
    """Replies of nodes 1, 2, 3 ... to training."""
    pairs = enumerate(zip(updates, weights, strict=True), 1)
    return [reply(content(arrays, weight, **metrics), node) for node, (arrays, weight) in pairs]


class Clock:
    """Stands in for the module `time`: only sleeping makes it later."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.sleeps: list[float] = []

    def monotonic(self) -> float:
        """Seconds."""
        return self.now

    time = monotonic

    def sleep(self, seconds: float) -> None:
        """Makes it so much later, at once."""
        self.sleeps.append(seconds)
        self.now += seconds


@dataclass
class Late:
    """A client's reply, and the seconds until it comes; None: never."""

    said: RecordDict | Error | None
    seconds: float | None


Client = Callable[[Message], "RecordDict | Error | Late | None"]


@dataclass
class Asked:
    """A message that was pushed, and the reply that is on its way."""

    message: Message
    ready_at: float
    reply: Message | None


@dataclass
class ScriptedGrid(Grid):
    """Asks functions instead of nodes; its own send_and_receive is Flower's, with Flower's pause.

    Parameters
    ----------
    clients : dict
        Node id to client: a function of the message. It may return what it says, an Error, a :class:`Late`
        one, or None for nothing ever. An exception becomes an Error, as in Flower.
    """

    clients: dict[int, Client]
    clock: Clock = field(default_factory=Clock)
    pause_s: float = 3.0
    asked: dict[str, Asked] = field(default_factory=dict)
    pulls: list[list[str]] = field(default_factory=list)
    pull_times: list[float] = field(default_factory=list)
    pulled: list[Message] = field(default_factory=list)
    unpushable: set[int] = field(default_factory=set)
    called: list[str] = field(default_factory=list)

    def set_run(self, run: Any) -> None:
        """Nothing to set."""
        self.called.append("set_run")

    @property
    def run(self) -> Any:
        """A name for the run."""
        return "the run"

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """Notes the call."""
        self.called.append("create_message")
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        """All of them, in the script's order."""
        return list(self.clients)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Asks each client at once; its answer is there when its script says."""
        ids: list[Any] = []
        for message in messages:
            if message.metadata.dst_node_id in self.unpushable:
                ids.append(None)  # as HttpGrid says it
                continue
            message_id = f"message-{next(_ids)}"
            message.metadata.__dict__["_message_id"] = message_id
            said = self._ask(message)
            seconds: float | None = 0.0
            if isinstance(said, Late):
                said, seconds = said.said, said.seconds
            answer = None
            if said is not None and seconds is not None:
                answer = reply(said, message.metadata.dst_node_id, message)
            self.asked[message_id] = Asked(message, self.clock.now + (seconds or 0.0), answer)
            ids.append(message_id)
        return ids

    def _ask(self, message: Message) -> RecordDict | Error | Late | None:
        try:
            return self.clients[message.metadata.dst_node_id](message)
        except Exception as error:
            return Error(0, f"{type(error).__name__}: {error}")

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies that are there by now, each of them once."""
        self.pulls.append(list(message_ids))
        self.pull_times.append(self.clock.now)
        came = []
        for message_id in self.pulls[-1]:
            asked = self.asked[message_id]
            if asked.reply is not None and asked.ready_at <= self.clock.now:
                came.append(asked.reply)
                asked.reply = None
        self.pulled += came
        return came

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Polls for all of them until they are in or the time is over, as Flower's grids do."""
        waiting = [i for i in self.push_messages(messages) if i]
        end = self.clock.now + (timeout or 0.0)
        came: list[Message] = []
        while timeout is None or self.clock.now < end:
            came += self.pull_messages(waiting)
            answered = {message.metadata.reply_to_message_id for message in came}
            waiting = [i for i in waiting if i not in answered]
            if not waiting:
                break
            self.clock.sleep(self.pause_s)
        return came


def nudge(seed: int, dtype: Any = None, weight: Any = None, **metrics: Any) -> Client:
    """A client that adds something of its own to the model, and evaluates; deterministic."""

    def client(message: Message) -> RecordDict:
        said = message.content
        weight_ = seed if weight is None else weight
        if message.metadata.message_type.startswith("evaluate"):
            return RecordDict({"metrics": MetricRecord({"num-examples": weight_, "loss": seed / 3})})
        config = said["config"]
        assert isinstance(config, ConfigRecord)
        rng = np.random.default_rng([seed, config["server-round"]])
        new = {}
        for name, array in plain(said["arrays"]).items():
            kind = array.dtype if dtype is None or array.dtype.kind != "f" else np.dtype(dtype)
            if array.dtype.kind == "f":
                new[name] = np.asarray(array + rng.normal(size=array.shape), kind)
            else:
                new[name] = np.asarray(array + rng.integers(0, 5), array.dtype)
        return content(new, weight_, **{"loss": seed / 7, "parts": [seed / 3, 1.0], **metrics})

    return client


def failing(_: Message) -> RecordDict:
    """A client whose code raises."""
    raise RuntimeError("the client's disk is full")


def silent(_: Message) -> None:
    """A client that never answers."""


def after(seconds: float, client: Client) -> Client:
    """The same client, slower."""
    return lambda message: Late(client(message), seconds)  # type: ignore[arg-type]


def says(said: RecordDict | Error, otherwise: Client | None = None) -> Client:
    """A client that says the same to every training, and evaluates like an honest one."""
    honest = otherwise or nudge(1)
    return lambda message: said if message.metadata.message_type.startswith("train") else honest(message)


MODEL: dict[str, np.ndarray[Any, Any]] = {
    "weight": np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3),
    "bias": np.zeros(3, np.float64),
    "scale": np.array(1.5, np.float16),
    "num_batches_tracked": np.array(3, np.int64),
}


def run(
    strategy: Any, clients: Mapping[int, Client], rounds: int = 2, clock: Clock | None = None, **start: Any
) -> tuple[Any, ScriptedGrid]:
    """A whole run of a strategy over scripted clients."""
    grid = ScriptedGrid(dict(clients), clock or Clock())
    start.setdefault("initial_arrays", record(MODEL))
    return strategy.start(grid, num_rounds=rounds, **start), grid


def metrics_of(result: Any) -> list[dict[int, dict[str, Any]]]:
    """All metrics of a run, as plain dicts."""
    parts = (result.train_metrics_clientapp, result.evaluate_metrics_clientapp, result.evaluate_metrics_serverapp)
    return [{number: dict(metrics) for number, metrics in part.items()} for part in parts]
