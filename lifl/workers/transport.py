"""The transport of descriptors: the interface that a Node uses, and the rings behind it.

Rings are the default. ``lifl.ebpf`` has sockets behind the same interface; it is imported only when it is asked for.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, Protocol

from lifl.errors import EbpfUnavailableError
from lifl.shm.arena import OWNER, Arena
from lifl.shm.ring import Inbox, Outbox, Receiver

if TYPE_CHECKING:
    from lifl.ebpf.record import Metrics

log = logging.getLogger("lifl.workers.transport")

Name = Literal["rings", "ebpf", "auto"]
NAMES = ("rings", "ebpf", "auto")
VARIABLE = "LIFL_TRANSPORT"


class Transport(Protocol):
    """The transport of one Node, in the owner's process. The owner reports each worker that starts or dies."""

    name: str

    @property
    def loader(self) -> str | None:
        """The loader of the kernel's program, "prebuilt" or "bcc"; None if there is no program."""

    def inbox(self, participant: int = OWNER) -> Receiver:
        """The inbox of a participant of this process."""

    def outbox(self, participant: int = OWNER, on_backlog: Callable[[], None] | None = None) -> Outbox:
        """The outbox of a participant of this process."""

    def admit(self, worker: int) -> int | None:
        """Prepares the start of a worker; returns a file descriptor for it, which the caller closes, or None."""

    def remove(self, worker: int) -> None:
        """Drops what a worker, which is proven dead, had not read."""

    def route_top(self, number: int, worker: int | None) -> None:
        """Sets the worker that adds up the sums of a round; None: the round is over."""

    def metrics(self) -> dict[int, Metrics]:
        """The kernel's counters of each participant; empty if the kernel counts nothing."""

    def close(self) -> None:
        """Closes everything; harmless when closed."""


class Rings:
    """The rings in the arena, each with one producer; futexes and an eventfd wake the consumers."""

    name = "rings"
    loader = None

    def __init__(self, arena: Arena) -> None:
        self._arena = arena

    def inbox(self, participant: int = OWNER) -> Inbox:
        """The inbox over all rings that end at a participant."""
        return Inbox(self._arena, participant)

    def outbox(self, participant: int = OWNER, on_backlog: Callable[[], None] | None = None) -> Outbox:
        """The outbox over all rings that begin at a participant."""
        return Outbox.of_rings(self._arena, participant, on_backlog)

    def admit(self, worker: int) -> None:
        """Does nothing: the rings are there already."""

    def remove(self, worker: int) -> None:
        """Does nothing: messages of workers stay for the successor, the owner resets its own ring itself."""

    def route_top(self, number: int, worker: int | None) -> None:
        """Does nothing: a leaf gets the number of the top with its FLUSH."""

    def metrics(self) -> dict[int, Metrics]:
        """Empty: the kernel does not see rings."""
        return {}

    def close(self) -> None:
        """Does nothing: the rings belong to the arena."""


def open_transport(name: Name | None, arena: Arena) -> Transport:
    """The transport with a name; "auto" is eBPF where it is available, else rings, and logs that once.

    None: the name in the environment variable ``LIFL_TRANSPORT``, else rings.

    Raises :class:`EbpfUnavailableError` for "ebpf" where it is not available, with the reason and the remedy.
    """
    name = name or os.environ.get(VARIABLE) or "rings"  # type: ignore[assignment]
    if name not in NAMES:
        raise ValueError(f"transport={name!r}: give one of {', '.join(map(repr, NAMES))}")
    if name != "rings":
        from lifl.ebpf.sidecar import Sidecar  # late: rings do not need it

        try:
            sidecar = Sidecar(arena)
            if name == "auto":
                _log_once(f"transport auto: eBPF is used, {sidecar.loader}")
            return sidecar
        except EbpfUnavailableError as error:
            if name == "ebpf":
                raise
            _log_once(f"transport auto: rings are used; {error}")
    return Rings(arena)


_logged: set[str] = set()


def _log_once(message: str) -> None:
    if message not in _logged:
        _logged.add(message)
        log.info(message)
