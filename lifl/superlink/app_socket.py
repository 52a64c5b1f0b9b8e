"""The socket for ServerApps on this machine: they announce rounds, and get replies and means back.

Owns the socket, the thread that accepts, and two threads for each connection: one reads and one writes, so that a
ServerApp which does not read holds nobody else up. Only the same user may connect. The arena is given as a file
descriptor that cannot be written through, and nothing is opened by a path that a client names.
"""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import struct
import threading
from logging import WARNING
from pathlib import Path
from typing import Any

from lifl import ipc
from lifl.errors import LiflError, RoundError
from lifl.round.admission import Limits
from lifl.round.round import core_of
from lifl.strategy.server_client import RESULT_TIMEOUT_S
from lifl.superlink import flower
from lifl.superlink.rounds.incoming_reply import Settled
from lifl.superlink.rounds.rounds import Rounds
from lifl.superlink.rounds.served_round import Announced, ServedRound
from lifl.tensor import Tensor, TensorSpec

_names, _server = flower.part("rounds"), flower.part("server")

SEND_TIMEOUT_S = 30
"""A ServerApp that has read nothing for so long is disconnected."""

FLUSH_TIMEOUT_S = 1.0
"""Time for the last frames of a connection that is closed."""


class AppSocket:
    """The socket of one server.

    Parameters
    ----------
    rounds : Rounds
    arena_fd : int
        Stays the caller's; the socket opens a read-only one of its own.
    """

    def __init__(self, rounds: Rounds, arena_fd: int) -> None:
        self._rounds = rounds
        # A new description of the same memory, so that no ServerApp writes there by mistake. It is no wall: processes
        # of one user can look into each other anyway, and a ServerApp could open the memory anew through /proc.
        self._fd = os.open(f"/proc/self/fd/{arena_fd}", os.O_RDONLY | os.O_CLOEXEC)
        self._listening: socket.socket | None = None
        self._path: Path | None = None
        # Added by the thread that accepts, removed by each connection's own, copied by `close`: each is one step for
        # Python.
        self._connections: set[Connection] = set()

    def listen(self, path: Path) -> None:
        """Makes the socket at `path`; raises ``OSError`` if another server has it.

        Starts the thread that accepts, which ends when :meth:`close` shuts the socket down.
        """
        with contextlib.suppress(FileNotFoundError), socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(str(path)) == 0:
                raise OSError(f"{path}: another lifl-superlink listens there")
            path.unlink()
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        # The umask, because the file must not be open to others between `bind` and a chmod.
        before = os.umask(0o177)
        try:
            listening.bind(str(path))
        finally:
            os.umask(before)
        listening.listen(16)
        # Before the thread starts, which reads it.
        self._listening, self._path = listening, path
        threading.Thread(target=self._accept, name="lifl-app-socket", daemon=True).start()

    def close(self) -> None:
        """Ends the socket and all connections; harmless when closed."""
        # None before the shutdown, so that the thread that accepts ends whatever `accept` does.
        listening, self._listening = self._listening, None
        if listening is not None:
            with contextlib.suppress(OSError):
                listening.shutdown(socket.SHUT_RDWR)
            listening.close()
            if self._path is not None:
                self._path.unlink(missing_ok=True)
        for connection in list(self._connections):
            # Messages in a database outlive the server: the ServerApp pulls its replies when there is one again.
            connection.close(deletes=not self._rounds.store.is_durable)
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _accept(self) -> None:
        listening = self._listening
        while listening is not None and self._listening is not None:
            try:
                peer, _ = listening.accept()
            except OSError:
                return
            if ipc.uid_of_peer(peer) != os.getuid():
                _server.log(WARNING, "A process of user %s is not let in at lifl's socket", ipc.uid_of_peer(peer))
                peer.close()
                continue
            connection = Connection(peer, self._rounds, self._fd)
            self._connections.add(connection)
            # Ends when the ServerApp is gone, or when `close` closes the connection.
            threading.Thread(target=self._serve, args=(connection,), name="lifl-serverapp", daemon=True).start()

    def _serve(self, connection: Connection) -> None:
        try:
            connection.serve()
        finally:
            self._connections.discard(connection)
            connection.close()


class Connection:
    """The connection of one ServerApp. It has one round at a time, which is closed with the connection.

    Its reading thread is the caller of :meth:`serve`; its writing thread is started there and ended by :meth:`close`.
    Other threads only put frames into the outbox, with replies that are settled.
    """

    def __init__(self, peer: socket.socket, rounds: Rounds, fd: int) -> None:
        self._peer = peer
        self._rounds = rounds
        self._fd = fd
        peer.settimeout(None)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", SEND_TIMEOUT_S, 0))
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write, name="lifl-to-serverapp", daemon=True)
        # Both are the reading thread's, and at the end also that of `AppSocket.close`.
        self._served: ServedRound | None = None
        self._offered: set[str] = set()  # ids of objects of the last mean

    def serve(self) -> None:
        """Answers requests until the ServerApp is gone."""
        reader = ipc.Reader()
        try:
            socket.send_fds(self._peer, [ipc.encode({"event": "welcome", "pid": os.getpid()})], [self._fd])
            self._writer.start()
            while data := self._peer.recv(2**16):
                for request, _ in reader.feed(data):
                    self._handle(request)
        except Exception as error:  # whatever a ServerApp sends, only its own connection ends
            _server.log(WARNING, "A ServerApp at lifl's socket is disconnected: %r", error)

    def close(self, *, deletes: bool = True) -> None:
        """Ends the round, deleting its messages if it `deletes`, and the connection."""
        self._end_round(deletes=deletes)
        self._withdraw()
        self._outbox.put(None)
        if self._writer.is_alive():
            self._writer.join(FLUSH_TIMEOUT_S)
        with contextlib.suppress(OSError):
            self._peer.shutdown(socket.SHUT_RDWR)
        self._peer.close()

    def _send(self, event: dict[str, Any], blobs: list[bytes] | None = None) -> None:
        self._outbox.put(ipc.encode(event, blobs or []))

    def _write(self) -> None:
        try:
            while (frame := self._outbox.get()) is not None:
                self._peer.sendall(frame)
        except OSError as error:
            if isinstance(error, BlockingIOError):
                _server.log(WARNING, "A ServerApp at lifl's socket has read nothing for %d s", SEND_TIMEOUT_S)
            with contextlib.suppress(OSError):
                self._peer.shutdown(socket.SHUT_RDWR)  # the reading thread sees it, and ends the connection

    def _handle(self, request: dict[str, Any]) -> None:
        try:
            getattr(self, f"_on_{request['do']}")(request)
        except LiflError as error:
            self._send({"event": "failed", "kind": type(error).__name__, "reason": str(error)})

    def _on_open(self, request: dict[str, Any]) -> None:
        self._end_round()
        announced = Announced(
            *(int(request["run_id"]), request["message_type"], request["group_id"]),
            *([int(node) for node in request["nodes"]], request["weight_key"]),
        )
        if not self._rounds.is_running(announced.run_id):
            self._send({"event": "failed", "kind": "RoundError", "reason": f"no run {announced.run_id} here"})
            return
        spec = TensorSpec(tuple(Tensor(str(name), dtype, tuple(shape)) for name, dtype, shape in request["spec"]))
        if len({*spec}) < len(spec) or any(n < 0 for tensor in spec.tensors for n in tensor.shape):
            raise ValueError("a spec with a tensor twice, or with one of less than nothing")
        limits = Limits(**request["limits"])
        self._served = self._rounds.open(announced, spec, request["timing"], request["order"], limits, self._settled)
        self._send({"event": "opened", "round": self._served.round.number})

    def _settled(self, settled: Settled) -> None:
        """Sends a reply that is settled. Any thread."""
        records: list[list[Any]] = []
        blobs = [_names.message_to_proto(settled.message).SerializeToString()]
        for name, record in settled.records.items():
            if isinstance(record, bytes):  # a record as the client sent it
                records.append([name, None])
                blobs.append(record)
            else:  # an ArrayRecord, whose arrays have no data
                arrays = {key: [a.dtype, list(a.shape), a.stype] for key, a in record.items()}
                records.append([name, arrays])
        refusal = settled.refusal
        why = None if refusal is None else [refusal.client_id, refusal.rule, refusal.reason]
        self._send({"event": "reply", "client": settled.client, "records": records, "refusal": why}, blobs)

    def _on_bound(self, request: dict[str, Any]) -> None:
        """Answers with the number of the sent messages that belong to the round."""
        served = self._served
        # The messages refer to those objects of the model before that they still need, so the offers can go.
        self._withdraw()
        count = 0 if served is None else sum(message_id in served.asked for message_id in request["messages"])
        self._send({"event": "bound", "count": count})

    def _on_report(self, _: dict[str, Any]) -> None:
        if self._served is None:
            raise RoundError("no round is open")
        self._send({"event": "report", "report": self._served.round.report().to_dict()})

    def _on_finish(self, _: dict[str, Any]) -> None:
        if self._served is None:
            raise RoundError("no round is open")
        round_ = self._served.round
        round_.close_early()
        result = round_.result(RESULT_TIMEOUT_S)
        core = core_of(round_)
        block = core.mean
        self._send(
            {
                "event": "result",
                "block": [block.index, block.generation, block.nbytes],
                "weight": result.weight,
                "num_updates": result.num_updates,
                "report": result.report.to_dict(),
            }
        )
        # While the ServerApp reads the mean: the objects of a model with it, which it will most probably send next.
        self._offered |= self._rounds.offer_model(self._served, core.mean_buffer)

    def _on_close(self, _: dict[str, Any]) -> None:
        self._end_round()
        self._send({"event": "closed"})

    def _on_leave(self, _: dict[str, Any]) -> None:
        """Gives the round up; its messages stay, for the ServerApp to deal with."""
        self._end_round(deletes=False)
        self._send({"event": "closed"})

    def _withdraw(self) -> None:
        offered, self._offered = self._offered, set()
        self._rounds.store.withdraw(offered)

    def _end_round(self, *, deletes: bool = True) -> None:
        served, self._served = self._served, None
        if served is not None:
            self._rounds.end(served, deletes=deletes)
