"""A ServerApp beside a lifl-superlink: its rounds are folded by the server, replies come as events, means as views.

Owns the connection to the server. The server is found by an environment variable that it sets for the programs that
it starts, or by its well-known socket if the grid's address is of this machine. Without one nothing changes.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from logging import WARNING
from pathlib import Path
from typing import Any

import attrs
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.app.message import make_message
from flwr.common.serde import message_from_proto
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.serverapp import Grid
from flwr.supercore import log
from flwr.supercore.inflatable.inflatable_object import get_object_head_values_from_object_content
from flwr.supercore.inflatable.inflatable_utils import inflatable_class_registry
from flwr.superlink.grid.http_grid import HttpGrid

from lifl import ipc
from lifl.errors import LiflError, PeerGoneError, RoundError
from lifl.report.entries import Rejection
from lifl.report.report import RoundReport
from lifl.report.result import RoundResult
from lifl.round.admission import Limits
from lifl.round.settings import Order, Timing
from lifl.shm.arena import Arena, Block
from lifl.strategy.exchange import push
from lifl.strategy.heap import give_back
from lifl.tensor import TensorSpec

CONNECT_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 120.0
LOCAL = ("127.0.0.1", "localhost", "[::1]", "::1", "0.0.0.0")


@attrs.frozen
class Reply:
    """What the server says of one reply: as it came, its arrays without data; and why it does not count, if so."""

    message: Message
    refusal: Rejection | None


class Server:
    """A connection to a server on this machine. One round at a time; not thread-safe.

    Attributes
    ----------
    waiting_since_s : float or None
        When the messages of the round had been pushed (``time.monotonic``); None before.
    """

    def __init__(self, path: Path) -> None:
        self._peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self.waiting_since_s: float | None = None
        try:
            self._peer.settimeout(CONNECT_TIMEOUT_S)
            self._peer.connect(str(path))
            if ipc.uid_of_peer(self._peer) != os.getuid():
                raise PermissionError(f"{path} is of user {ipc.uid_of_peer(self._peer)}")
            self._reader, self._frames = ipc.Reader(), list[ipc.Frame]()
            data, fds, _, _ = socket.recv_fds(self._peer, 2**16, 1)
            self._frames += self._reader.feed(data)
            try:
                self._arena = Arena.attach(fds[0])
            finally:
                for fd in fds:
                    os.close(fd)
            self._next(CONNECT_TIMEOUT_S)  # its welcome
        except BaseException:
            self._peer.close()
            raise

    @classmethod
    def find(cls, grid: Grid) -> Server | None:
        """The server that `grid` is connected to, if it is a lifl-superlink of this user on this machine."""
        for path in _paths(grid):
            with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                try:
                    return cls(path)
                except (OSError, LiflError, IndexError, ValueError) as error:
                    if isinstance(error, (FileNotFoundError, ConnectionRefusedError)):
                        raise
                    log(WARNING, "lifl-superlink at %s is not used: %s", path, error)
        return None

    def open_round(
        self,
        run_id: int,
        messages: list[Message],
        spec: TensorSpec,
        weight_key: str,
        timing: Timing,
        order: Order,
        limits: Limits,
    ) -> ServedRound:
        """Announces a round of `messages`, which are about to be sent; raises :class:`RoundError` if it is refused."""
        self.waiting_since_s = None
        first = messages[0].metadata
        self._ask(
            {
                "do": "open",
                "run_id": run_id,
                "message_type": first.message_type,
                "group_id": first.group_id,
                "nodes": [m.metadata.dst_node_id for m in messages],
                "weight_key": weight_key,
                "spec": [[t.name, t.dtype, list(t.shape)] for t in spec.tensors],
                "timing": timing,
                "order": order,
                "limits": attrs.asdict(limits),
            },
            "opened",
        )
        return ServedRound(self, spec, timing)

    def count_bound(self, message_ids: list[str]) -> int:
        """How many of the messages the server has seen and will receive replies to."""
        return int(self._ask({"do": "bound", "messages": message_ids}, "bound")["count"])

    def replies(self, timeout: float | None) -> Iterator[Reply]:
        """Replies as they are settled; ends when none came for the rest of `timeout` seconds."""
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            left = 1.0 if end is None else end - time.monotonic()
            if left <= 0 and not self._early:
                return
            frame = self._early.pop(0) if self._early else self._next(max(min(left, 1.0), 0.001))
            if frame is not None:
                yield _reply(*frame)

    def is_gone(self) -> bool:
        """True if the server has closed the connection, or ended."""
        self._peer.settimeout(0)
        try:
            return not self._peer.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def close(self) -> None:
        """Lets go of the server, which closes the round if one is open."""
        self._peer.close()

    @property
    def _early(self) -> list[ipc.Frame]:
        """Replies that came while something else was waited for."""
        return self._frames

    def ask(self, said: dict[str, Any], answer: str) -> dict[str, Any]:
        """Asks and waits for the answer; raises the server's error."""
        return self._ask(said, answer)

    def view(self, spec: TensorSpec, block: Block) -> dict[str, Any]:
        """A mean in the server's arena as NumPy views that cannot be written."""
        return spec.views(memoryview(self._arena.buffer(block)).toreadonly())

    def _ask(self, said: dict[str, Any], answer: str) -> dict[str, Any]:
        try:
            self._peer.settimeout(ANSWER_TIMEOUT_S)
            self._peer.sendall(ipc.encode(said))
        except OSError as error:
            raise PeerGoneError(f"the lifl-superlink is gone: {error}") from None
        end, kept = time.monotonic() + ANSWER_TIMEOUT_S, self._frames
        self._frames = []
        while True:
            frame = self._next(max(end - time.monotonic(), 0.001))
            if frame is None:
                raise PeerGoneError(f"the lifl-superlink gave no answer in {ANSWER_TIMEOUT_S:g} s")
            if frame[0]["event"] == "reply":
                kept.append(frame)
                continue
            self._frames = kept + self._frames
            if frame[0]["event"] == "failed":
                raise RoundError(frame[0]["reason"])
            if frame[0]["event"] != answer:
                raise PeerGoneError(f"the lifl-superlink said {frame[0]['event']!r}, {answer!r} was expected")
            return frame[0]

    def _next(self, timeout: float) -> ipc.Frame | None:
        """The next frame, or None at the time-out."""
        end = time.monotonic() + timeout
        while not self._frames:
            try:
                self._peer.settimeout(max(end - time.monotonic(), 0.001))
                data = self._peer.recv(2**18)
            except TimeoutError:
                return None
            except OSError as error:
                raise PeerGoneError(f"the lifl-superlink is gone: {error}") from None
            if not data:
                raise PeerGoneError("the lifl-superlink has closed the connection")
            self._frames += self._reader.feed(data)
        return self._frames.pop(0)


class ServedRound:
    """A round of the server's, with what a Landing needs of a :class:`lifl.round.Round`."""

    def __init__(self, server: Server, spec: TensorSpec, timing: Timing) -> None:
        self._server, self.spec, self._timing = server, spec, timing
        self._report: RoundReport | None = None
        self._result: RoundResult | None = None
        self._failure: str | None = None

    def report(self) -> RoundReport:
        """The books as they stand now; empty if the server, which has them, is gone."""
        if self._report is not None:
            return self._report
        try:
            return RoundReport.from_dict(self._server.ask({"do": "report"}, "report")["report"])
        except PeerGoneError:
            return RoundReport(0, 0, self._timing, "any")

    def close_early(self) -> None:
        """Nothing: asking for the result does."""

    def result(self, timeout: float | None = None) -> RoundResult:
        """The mean of what is in, as views of the server's memory, asked for once; raises :class:`RoundError`."""
        if self._failure is not None:
            raise RoundError(self._failure)
        if self._result is None:
            try:
                said = self._server.ask({"do": "finish"}, "result")
            except RoundError as error:
                self._failure = str(error)  # not the error: its traceback would keep the model
                raise
            self._report = report = RoundReport.from_dict(said["report"])
            arrays = self._server.view(self.spec, Block(*said["block"]))
            self._result = RoundResult(self.spec, arrays, said["weight"], said["num_updates"], report.rejected, report)
        return self._result

    def submit(self, arrays: Any, weight: Any, client_id: str) -> None:
        """Nobody submits here: replies are received by the server."""
        raise RoundError("replies to this round are received by the lifl-superlink")

    def close(self) -> None:
        """Ends it; views of its mean must be gone."""
        self._result = None
        with contextlib.suppress(LiflError):
            self._server.ask({"do": "close"}, "closed")


def exchange_served(
    grid: Grid,
    server: Server,
    messages: list[Message],
    timeout: float | None,
    note: Callable[[Reply, int], Message],
    missing: Callable[[int], None],
) -> list[Message] | None:
    """Pushes `messages` and gathers what the server tells of the replies; see :func:`exchange`.

    None if the server does not see all of the messages. Then, and if the server is lost on the way, they have been
    pushed, and their metadata are left in `messages`.
    """
    ids = [i for i in push(grid, messages) if i]
    server.waiting_since_s = time.monotonic()
    asked = {m.metadata.message_id: m.metadata.dst_node_id for m in messages if m.metadata.message_id in set(ids)}
    unasked = [m.metadata.dst_node_id for m in messages if m.metadata.message_id not in asked]
    if server.count_bound(list(asked)) < len(asked):
        server.ask({"do": "leave"}, "closed")
        return None
    # They hold the model, which the grid has by now.
    messages[:] = [make_message(metadata=m.metadata, content=RecordDict()) for m in messages]
    give_back()
    replies: list[Message] = []
    waiting = dict(asked)
    if waiting:
        for reply in server.replies(timeout):
            node_id = waiting.pop(reply.message.metadata.reply_to_message_id, None)
            if node_id is not None:
                replies.append(note(reply, node_id))
            if not waiting:
                break
    for node_id in (*waiting.values(), *unasked):
        missing(node_id)
    return replies


def _paths(grid: Grid) -> Iterator[Path]:
    if not isinstance(grid, HttpGrid):
        return
    if told := os.environ.get(ipc.VARIABLE):
        yield Path(told)
        return
    host, _, port = str(getattr(grid, "_addr", "")).rpartition(":")
    if host in LOCAL and port.isdigit():
        with contextlib.suppress(OSError):
            yield ipc.path_for(int(port))


def _reply(said: dict[str, Any], blobs: list[bytes]) -> Reply:
    message = message_from_proto(MessageProto.FromString(blobs[0]))
    refusal = None if said["refusal"] is None else Rejection(*said["refusal"])
    if message.has_error():
        return Reply(message, refusal)
    content, rest = RecordDict(), iter(blobs[1:])
    for name, arrays in said["records"]:
        if arrays is None:
            blob = next(rest)
            kind, _, _ = get_object_head_values_from_object_content(blob)
            content[name] = inflatable_class_registry[kind].inflate(blob)  # type: ignore[assignment]
        else:
            content[name] = ArrayRecord(
                {
                    key: Array(dtype=dtype, shape=tuple(shape), stype=stype, data=b"")
                    for key, (dtype, shape, stype) in arrays.items()
                }
            )
    return Reply(make_message(metadata=message.metadata, content=content), refusal)
