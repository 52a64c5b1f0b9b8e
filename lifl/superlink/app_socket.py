"""The socket at which ServerApps on this machine find the server: rounds are announced, replies and means go back.

Owns the socket and two threads for each connection, one that listens and one that speaks, so that a ServerApp which
does not read holds nobody else up. Only the same user may connect; what is in the arena is given as a file descriptor
that cannot be written through; nothing is opened by a path that a client names.
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
from lifl.superlink import flower
from lifl.superlink.rounds.incoming_reply import Settled
from lifl.superlink.rounds.rounds import Rounds
from lifl.superlink.rounds.served_round import Announced, ServedRound
from lifl.tensor import Tensor, TensorSpec

_names, _server = flower.part("rounds"), flower.part("server")

SEND_TIMEOUT_S = 30
"""A ServerApp that has taken nothing for so long is let go of."""

RESULT_TIMEOUT_S = 600.0
LAST_WORDS_S = 1.0


class Agency:
    """One server's socket."""

    def __init__(self, rounds: Rounds, arena_fd: int) -> None:
        self._rounds = rounds
        # A new description of the same memory, so that no ServerApp writes there by mistake. It is no wall: processes
        # of one user can look into each other anyway, and this one could open it anew through /proc.
        self._fd = os.open(f"/proc/self/fd/{arena_fd}", os.O_RDONLY | os.O_CLOEXEC)
        self._listening: socket.socket | None = None
        self._path: Path | None = None
        self._connections: set[Connection] = set()

    def listen(self, path: Path) -> None:
        """Makes the socket; raises ``OSError`` if another server has it."""
        with contextlib.suppress(FileNotFoundError), socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(str(path)) == 0:
                raise OSError(f"{path}: another lifl-superlink listens there")
            path.unlink()
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        before = os.umask(0o177)
        try:
            listening.bind(str(path))
        finally:
            os.umask(before)
        listening.listen(16)
        self._listening, self._path = listening, path
        threading.Thread(target=self._accept, name="lifl-agency", daemon=True).start()

    def close(self) -> None:
        """Ends all connections; harmless when closed."""
        listening, self._listening = self._listening, None
        if listening is not None:
            with contextlib.suppress(OSError):
                listening.shutdown(socket.SHUT_RDWR)
            listening.close()
            if self._path is not None:
                self._path.unlink(missing_ok=True)
        for connection in list(self._connections):
            # What is in a database outlives the server: the ServerApp pulls it when there is one again.
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
            threading.Thread(target=self._serve, args=(connection,), name="lifl-serverapp", daemon=True).start()

    def _serve(self, connection: Connection) -> None:
        try:
            connection.serve()
        finally:
            self._connections.discard(connection)
            connection.close()


class Connection:
    """One ServerApp. It has one round at a time; when it is gone its round is closed."""

    def __init__(self, peer: socket.socket, rounds: Rounds, fd: int) -> None:
        self._peer, self._rounds, self._fd = peer, rounds, fd
        peer.settimeout(None)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", SEND_TIMEOUT_S, 0))
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._speaker = threading.Thread(target=self._speak, name="lifl-to-serverapp", daemon=True)
        self._served: ServedRound | None = None
        self._result: Any = None
        self._offered: set[str] = set()  # objects of the last mean

    def serve(self) -> None:
        """Answers until the other end is gone."""
        reader = ipc.Reader()
        try:
            socket.send_fds(self._peer, [ipc.encode({"event": "welcome", "pid": os.getpid()})], [self._fd])
            self._speaker.start()
            while data := self._peer.recv(2**16):
                for said, _ in reader.feed(data):
                    self._handle(said)
        except Exception as error:  # whatever it says, it is this ServerApp that is let go of
            _server.log(WARNING, "A ServerApp at lifl's socket is let go of: %r", error)

    def close(self, *, deletes: bool = True) -> None:
        """Lets go of its round, with its messages if it `deletes`, and of the connection."""
        self._end_round(deletes=deletes)
        self._withdraw()
        self._outbox.put(None)
        if self._speaker.is_alive():
            self._speaker.join(LAST_WORDS_S)
        with contextlib.suppress(OSError):
            self._peer.shutdown(socket.SHUT_RDWR)
        self._peer.close()

    def _say(self, said: dict[str, Any], blobs: list[bytes] | None = None) -> None:
        self._outbox.put(ipc.encode(said, blobs or []))

    def _speak(self) -> None:
        try:
            while (frame := self._outbox.get()) is not None:
                self._peer.sendall(frame)
        except OSError as error:
            if isinstance(error, BlockingIOError):
                _server.log(WARNING, "A ServerApp at lifl's socket has read nothing for %d s", SEND_TIMEOUT_S)
            with contextlib.suppress(OSError):
                self._peer.shutdown(socket.SHUT_RDWR)  # who listens sees it, and lets go

    def _handle(self, said: dict[str, Any]) -> None:
        try:
            getattr(self, f"_on_{said['do']}")(said)
        except LiflError as error:
            self._say({"event": "failed", "kind": type(error).__name__, "reason": str(error)})

    def _on_open(self, said: dict[str, Any]) -> None:
        self._end_round()
        announced = Announced(
            *(int(said["run_id"]), said["message_type"], said["group_id"]),
            *([int(node) for node in said["nodes"]], said["weight_key"]),
        )
        if not self._rounds.is_running(announced.run_id):
            self._say({"event": "failed", "kind": "RoundError", "reason": f"no run {announced.run_id} here"})
            return
        spec = TensorSpec(tuple(Tensor(str(name), dtype, tuple(shape)) for name, dtype, shape in said["spec"]))
        if len({*spec}) < len(spec) or any(n < 0 for tensor in spec.tensors for n in tensor.shape):
            raise ValueError("a spec with a tensor twice, or with one of less than nothing")
        limits = Limits(**said["limits"])
        self._served = self._rounds.open(announced, spec, said["timing"], said["order"], limits, self._settled)
        self._say({"event": "opened", "round": self._served.round.number})

    def _settled(self, settled: Settled) -> None:
        records: list[list[Any]] = []
        blobs = [_names.message_to_proto(settled.message).SerializeToString()]
        for name, record in settled.records.items():
            if isinstance(record, bytes):  # what the client sent
                records.append([name, None])
                blobs.append(record)
            else:  # an ArrayRecord; its arrays have no data
                arrays = {key: [a.dtype, list(a.shape), a.stype] for key, a in record.items()}
                records.append([name, arrays])
        refusal = settled.refusal
        why = None if refusal is None else [refusal.client_id, refusal.rule, refusal.reason]
        self._say({"event": "reply", "records": records, "refusal": why}, blobs)

    def _on_bound(self, said: dict[str, Any]) -> None:
        """How many of the messages that were sent belong to the round."""
        served = self._served
        # The messages refer to what of the model before they still need.
        self._withdraw()
        count = 0 if served is None else sum(message_id in served.asked for message_id in said["messages"])
        self._say({"event": "bound", "count": count})

    def _on_report(self, _: dict[str, Any]) -> None:
        if self._served is None:
            raise RoundError("no round is open")
        self._say({"event": "report", "report": self._served.round.report().to_dict()})

    def _on_finish(self, _: dict[str, Any]) -> None:
        if self._served is None:
            raise RoundError("no round is open")
        round_ = self._served.round
        round_.close_early()
        self._result = result = round_.result(RESULT_TIMEOUT_S)
        core = core_of(round_)
        block = core.mean
        self._say(
            {
                "event": "result",
                "block": [block.index, block.generation, block.nbytes],
                "weight": result.weight,
                "num_updates": result.num_updates,
                "report": result.report.to_dict(),
            }
        )
        # While the ServerApp looks at it: what it will most probably send next is made ready.
        self._offered |= self._rounds.offer_model(self._served, core.mean_buffer)

    def _on_close(self, _: dict[str, Any]) -> None:
        self._end_round()
        self._say({"event": "closed"})

    def _on_leave(self, _: dict[str, Any]) -> None:
        """The round is given up, its messages are the ServerApp's own affair."""
        self._end_round(deletes=False)
        self._say({"event": "closed"})

    def _withdraw(self) -> None:
        offered, self._offered = self._offered, set()
        self._rounds.store.withdraw(offered)

    def _end_round(self, *, deletes: bool = True) -> None:
        self._result = None
        served, self._served = self._served, None
        if served is not None:
            self._rounds.end(served, deletes=deletes)
