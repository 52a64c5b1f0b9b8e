"""The owner's side of the sockets: the program with its maps, the sockets of all participants, and the routes.

Owns all of these. Only this process needs capabilities; a worker gets its socket and nothing else. The kernel frees
everything when this process ends.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable

from lifl.ebpf import probe
from lifl.ebpf.links import Receiver, outbox_of, sent_on, top_of
from lifl.ebpf.pairs import pair
from lifl.ebpf.record import LAUNCHER, Metrics, Record
from lifl.errors import EbpfUnavailableError, PeerGoneError
from lifl.shm import messages
from lifl.shm.arena import OWNER, Arena, check, lib
from lifl.shm.ring import Outbox


class Sidecar:
    """The transport "ebpf" of one Node.

    Raises :class:`EbpfUnavailableError` where it is not available, with the reason and the remedy.

    Attributes
    ----------
    loader : str
        "prebuilt" or "bcc".
    """

    name = "ebpf"

    def __init__(self, arena: Arena, loader: str | None = None) -> None:
        self._arena = arena
        self._program = probe.load(loader)
        self.loader = self._program.loader
        self._anchors: dict[int, socket.socket] = {}
        self._sockets: dict[int, socket.socket] = {}  # of participants in this process, and of workers that will start
        self._is_closed = False
        self._outbox: Outbox | None = None
        self._routes: set[int] = set()
        try:
            self._sockets[OWNER] = self.enter(OWNER, *pair())
        except OSError as error:
            self.close()
            raise EbpfUnavailableError(*probe.explained(error)) from error

    # ------------------------------------------------------------ participants

    def enter(self, participant: int, own: socket.socket, anchor: socket.socket) -> socket.socket:
        """Puts a participant's socket into the map, and keeps its anchor: the socket works while the anchor is open.

        Both may have been made in another network namespace, see :func:`lifl.ebpf.pairs.pair`; nothing passes between
        the two. The caller keeps the socket: the map needs only a copy, and the participant has the other.
        """
        old, self._anchors[participant] = self._anchors.get(participant), anchor
        if old is not None and old is not anchor:
            old.close()
        if (unused := self._sockets.pop(participant, None)) is not None:  # the socket of a worker that did not start
            unused.close()
        key = LAUNCHER if participant == OWNER else participant
        with contextlib.suppress(FileNotFoundError):
            self._program.socks.delete(key)  # the kernel refuses a socket that is in the map already
        self._program.socks.update(key, own.fileno())
        self.route(participant, participant)
        return own

    def admit(self, worker: int) -> int:
        """A socket for a worker, in the map; the caller closes its file descriptor.

        Raises :class:`PeerGoneError` if no socket can be made.
        """
        return (self._sockets.pop(worker, None) or self._enter_new(worker)).detach()

    def remove(self, worker: int) -> None:
        """Drops the socket of a worker, which is proven dead, with all that the worker had not read.

        The socket of its successor takes its place at once, and keeps what is sent until the successor starts.
        """
        check(lib.lifl_credit_reset(self._arena.handle, worker), f"credits of participant {worker}")
        self._sockets[worker] = self._enter_new(worker)

    def _enter_new(self, participant: int) -> socket.socket:
        try:
            return self.enter(participant, *pair())
        except OSError as error:
            raise PeerGoneError(f"no socket for worker {participant}: {error}") from error

    # ------------------------------------------------------------ routes

    def route(self, aggregator: int, participant: int | None) -> None:
        """Routes an aggregator's records to a participant from now on. None: removes the route, the owner gets them.

        An aggregator is a role, such as the top of a round, or a participant, whose own number leads to itself. The
        change is a single update of a map: a record takes the old way or the new one.
        """
        if participant is not None:
            self._program.routes.update(aggregator, LAUNCHER if participant == OWNER else participant)
            self._routes.add(aggregator)
        elif aggregator in self._routes:
            self._routes.discard(aggregator)
            self._program.routes.delete(aggregator)

    def route_top(self, number: int, worker: int | None) -> None:
        """Sets the worker that adds up the sums of a round; None: the round is over."""
        self.route(top_of(number), worker)

    # ------------------------------------------------------------ participants of this process

    def inbox(self, participant: int = OWNER) -> Receiver:
        """The inbox of a participant of this process."""
        own = self._own(participant)
        return Receiver(self._arena, own, participant, self._stray if participant == OWNER else sent_on(own))

    def outbox(self, participant: int = OWNER, on_backlog: Callable[[], None] | None = None) -> Outbox:
        """The outbox of a participant of this process."""
        outbox = outbox_of(self._arena, self._own(participant), participant, on_backlog)
        if participant == OWNER:
            self._outbox = outbox
        return outbox

    def _own(self, participant: int) -> socket.socket:
        if participant not in self._sockets:
            self._sockets[participant] = self._enter_new(participant)
        return self._sockets[participant]

    def _stray(self, record: Record) -> None:
        """Handles a record that came to the owner because its receiver had no socket.

        The owner's own messages are sent anew when a successor is there. The record of a worker is sent once more to
        the aggregator that it names: its successor has a socket by now, or the record comes back here.
        """
        if record.src != OWNER and self._outbox is not None:
            self._outbox.push(record.line, messages.read(record))

    # ------------------------------------------------------------ what passed

    def metrics(self) -> dict[int, Metrics]:
        """The kernel's counters of each participant; empty when closed."""
        if self._is_closed:
            return {}
        found: dict[int, bytes] = {}
        for key in self._program.metrics:
            # The owner has two keys: records to it count at the launcher's key, its own reports at its number.
            participant = OWNER if key == LAUNCHER else key
            found[participant] = found.get(participant, b"") + (self._program.metrics.lookup(key) or b"")
        return {participant: Metrics.merged(counted) for participant, counted in found.items()}

    def close(self) -> None:
        """Closes everything; harmless when closed."""
        sockets = [*self._sockets.values(), *self._anchors.values()]
        self._sockets, self._anchors, self._outbox = {}, {}, None
        for one in sockets:
            one.close()
        if not self._is_closed:
            self._is_closed = True
            self._program.close()
