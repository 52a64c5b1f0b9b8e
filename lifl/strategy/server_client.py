"""A ServerApp beside a lifl-superlink: the server folds its rounds; replies come as events, means as views.

Owns the connection to the server. The server is found by an environment variable that it sets for the programs that
it starts, or by its well-known socket if the grid's address is on this machine. Without a server the ServerApp folds.
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

RESULT_TIMEOUT_S = 600.0
"""Longest time that the server takes for a mean; its client waits longer, since it gives the round up then."""

LOCAL = ("127.0.0.1", "localhost", "[::1]", "::1", "0.0.0.0")


@attrs.frozen
class Reply:
    """A reply that the server has received: the message as it came, its arrays without data; and its refusal if any.

    ``client`` is the client's name in the server's report: a node that was sent two messages has two.
    """

    client: str
    message: Message
    refusal: Rejection | None


class Server:
    """A connection to a server on this machine, for one round at a time; not thread-safe.

    Attributes
    ----------
    waiting_since_s : float or None
        Time (``time.monotonic``) at which the messages of the round had been pushed; None before.
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
            self._next(CONNECT_TIMEOUT_S)  # the server's welcome
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
        """Announces a round before its `messages` are sent; raises :class:`RoundError` if the server refuses it."""
        self.waiting_since_s = None
        first = messages[0].metadata
        self.ask(
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
        """Number of the messages that the server has seen and will receive replies to."""
        return int(self.ask({"do": "bound", "messages": message_ids}, "bound")["count"])

    def replies(self, timeout: float | None) -> Iterator[Reply]:
        """Replies as the server settles them; ends after `timeout` seconds, or never for None.

        A reply that came in time is given also if the caller was busy with another one until later.
        """
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            left = 1.0 if end is None else end - time.monotonic()
            frame = self._next(max(min(left, 1.0), 0.001))
            if frame is not None:
                yield _reply(*frame)
            elif left <= 0:
                return

    def is_gone(self) -> bool:
        """True if the server has closed the connection, or has ended."""
        self._peer.settimeout(0)
        try:
            return not self._peer.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def close(self) -> None:
        """Closes the connection; the server closes the round if one is open."""
        self._peer.close()

    def view(self, spec: TensorSpec, block: Block) -> dict[str, Any]:
        """A mean in the server's arena, as read-only NumPy views."""
        return spec.views(memoryview(self._arena.buffer(block)).toreadonly())

    def ask(self, request: dict[str, Any], answer: str, timeout: float | None = None) -> dict[str, Any]:
        """Sends a request and waits `timeout` or ``ANSWER_TIMEOUT_S`` seconds for the event `answer`.

        Raises :class:`RoundError` if the request failed, and :class:`PeerGoneError` if the server does not answer.
        """
        timeout = ANSWER_TIMEOUT_S if timeout is None else timeout
        try:
            self._peer.settimeout(ANSWER_TIMEOUT_S)
            self._peer.sendall(ipc.encode(request))
        except OSError as error:
            raise PeerGoneError(f"the lifl-superlink is gone: {error}") from None
        end = time.monotonic() + timeout
        # Replies may come before the answer. They are kept, in their order, for replies().
        kept = self._frames
        self._frames = []
        while True:
            frame = self._next(max(end - time.monotonic(), 0.001))
            if frame is None:
                raise PeerGoneError(f"the lifl-superlink gave no answer in {timeout:g} s")
            if frame[0]["event"] == "reply":
                kept.append(frame)
                continue
            self._frames = kept + self._frames
            if frame[0]["event"] == "failed":
                raise RoundError(frame[0]["reason"])
            if frame[0]["event"] != answer:
                raise PeerGoneError(f"the lifl-superlink sent {frame[0]['event']!r}, {answer!r} was expected")
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
    """A round on the server, with those methods of :class:`lifl.round.Round` that a Landing calls."""

    def __init__(self, server: Server, spec: TensorSpec, timing: Timing) -> None:
        self._server = server
        self.spec = spec
        self._timing = timing
        self._report: RoundReport | None = None
        self._result: RoundResult | None = None
        self._failure: str | None = None

    def report(self) -> RoundReport:
        """The report of the round so far; empty if the server, which has it, is gone."""
        if self._report is not None:
            return self._report
        try:
            return RoundReport.from_dict(self._server.ask({"do": "report"}, "report")["report"])
        except PeerGoneError:
            return RoundReport(0, 0, self._timing, "any")

    def close_early(self) -> None:
        """Does nothing, because the request for the result ends the round."""

    def result(self, timeout: float | None = None) -> RoundResult:
        """The mean of the accepted updates, as views of the server's memory; raises :class:`RoundError` if none.

        The server is asked once; later calls return the same result, or raise the same error.
        """
        if self._failure is not None:
            raise RoundError(self._failure)
        if self._result is None:
            try:
                answer = self._server.ask({"do": "finish"}, "result", RESULT_TIMEOUT_S + ANSWER_TIMEOUT_S)
            except RoundError as error:
                self._failure = str(error)  # only the text: the traceback of the error would keep the model
                raise
            self._report = report = RoundReport.from_dict(answer["report"])
            self._result = RoundResult(
                spec=self.spec,
                arrays=self._server.view(self.spec, Block(*answer["block"])),
                weight=answer["weight"],
                num_updates=answer["num_updates"],
                rejected=report.rejected,
                report=report,
            )
        return self._result

    def submit(self, arrays: Any, weight: Any, client_id: str) -> None:
        """Raises :class:`RoundError`, because the server receives the replies itself."""
        raise RoundError("replies to this round are received by the lifl-superlink")

    def close(self) -> None:
        """Ends the round; the server frees its memory, so views of the mean must not be used any more."""
        self._result = None
        with contextlib.suppress(LiflError):
            self._server.ask({"do": "close"}, "closed")


def exchange_served(
    grid: Grid,
    server: Server,
    messages: list[Message],
    timeout: float | None,
    note: Callable[[Reply], Message],
    missing: Callable[[int], None],
) -> list[Message] | None:
    """Pushes `messages` and collects the replies that the server settles; see :func:`lifl.strategy.exchange.exchange`.

    Returns None if the server has not seen all of the messages. Then, and if the server is lost meanwhile, the messages
    have been pushed, and `messages` holds copies with their metadata and without contents.
    """
    ids = [i for i in push(grid, messages) if i]
    server.waiting_since_s = time.monotonic()
    asked = {m.metadata.message_id: m.metadata.dst_node_id for m in messages if m.metadata.message_id in set(ids)}
    unasked = [m.metadata.dst_node_id for m in messages if m.metadata.message_id not in asked]
    if server.count_bound(list(asked)) < len(asked):
        server.ask({"do": "leave"}, "closed")
        return None
    # The messages hold the model, which the grid has by now.
    messages[:] = [make_message(metadata=m.metadata, content=RecordDict()) for m in messages]
    give_back()
    replies: list[Message] = []
    waiting = dict(asked)
    if waiting:
        for reply in server.replies(timeout):
            if waiting.pop(reply.message.metadata.reply_to_message_id, None) is not None:
                replies.append(note(reply))
            if not waiting:
                break
    for node_id in (*waiting.values(), *unasked):
        missing(node_id)
    return replies


def _paths(grid: Grid) -> Iterator[Path]:
    if not isinstance(grid, HttpGrid):
        return
    if path := os.environ.get(ipc.VARIABLE):
        yield Path(path)
        return
    # `_addr` is private in flwr (1.42); without it no server is found, and the ServerApp folds.
    host, _, port = str(getattr(grid, "_addr", "")).rpartition(":")
    if host in LOCAL and port.isdigit():
        with contextlib.suppress(OSError):
            yield ipc.path_for(int(port))


def _reply(event: dict[str, Any], blobs: list[bytes]) -> Reply:
    message = message_from_proto(MessageProto.FromString(blobs[0]))
    refusal = None if event["refusal"] is None else Rejection(*event["refusal"])
    if message.has_error():
        return Reply(event["client"], message, refusal)
    content, rest = RecordDict(), iter(blobs[1:])
    for name, arrays in event["records"]:
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
    return Reply(event["client"], make_message(metadata=message.metadata, content=content), refusal)
