"""How descriptors travel: the seam between who sends them and what carries them, and the rings behind it.

Rings are the default. ``lifl.ebpf`` has sockets behind the same seam; it is imported when it is asked for.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, Protocol

from lifl.errors import EbpfUnavailableError
from lifl.shm.arena import AGENT, Arena
from lifl.shm.ring import Inbox, Outbox, Receiver

if TYPE_CHECKING:
    from lifl.ebpf.record import Metrics

log = logging.getLogger("lifl.workers.transport")

Name = Literal["rings", "ebpf", "auto"]
NAMES = ("rings", "ebpf", "auto")
VARIABLE = "LIFL_TRANSPORT"


class Transport(Protocol):
    """A Node's, as its agent has it. It is told who starts and who is dead."""

    name: str

    @property
    def loader(self) -> str | None:
        """What has loaded a program into the kernel, if there is one."""

    def inbox(self, me: int = AGENT) -> Receiver:
        """What a participant of this process receives."""

    def outbox(self, me: int = AGENT, on_backlog: Callable[[], None] | None = None) -> Outbox:
        """What a participant of this process sends."""

    def admit(self, me: int) -> int | None:
        """Worker `me` is about to start; the descriptor that it is given, which the caller closes, or None."""

    def bury(self, me: int) -> None:
        """Worker `me` is proven dead: what it had not read is gone."""

    def route_top(self, number: int, me: int | None) -> None:
        """Who adds up the sums of a round; None: it is over."""

    def metrics(self) -> dict[int, Metrics]:
        """What the kernel has counted so far, of each participant; nothing if it counts nothing."""

    def close(self) -> None:
        """Lets go of everything; harmless when closed."""


class Rings:
    """Single-producer rings in the arena, with futexes and an eventfd to wake up."""

    name = "rings"
    loader = None

    def __init__(self, arena: Arena) -> None:
        self._arena = arena

    def inbox(self, me: int = AGENT) -> Inbox:
        """All the rings that end at a participant."""
        return Inbox(self._arena, me)

    def outbox(self, me: int = AGENT, on_backlog: Callable[[], None] | None = None) -> Outbox:
        """All the rings that begin at a participant."""
        return Outbox.of_rings(self._arena, me, on_backlog)

    def admit(self, me: int) -> None:
        """Rings are there already."""

    def bury(self, me: int) -> None:
        """What others have sent stays for its successor; what the agent has sent it takes back itself."""

    def route_top(self, number: int, me: int | None) -> None:
        """A leaf is told with its last order."""

    def metrics(self) -> dict[int, Metrics]:
        """The kernel sees nothing of rings."""
        return {}

    def close(self) -> None:
        """The rings are the arena's."""


def open_transport(name: Name | None, arena: Arena) -> Transport:
    """The transport of a name; "auto" is eBPF where it can be had, else rings, which is logged once.

    None: what the environment variable ``LIFL_TRANSPORT`` says, else rings.

    Raises :class:`EbpfUnavailableError` for "ebpf" where it cannot be had, with the reason and what to do.
    """
    name = name or os.environ.get(VARIABLE) or "rings"  # type: ignore[assignment]
    if name not in NAMES:
        raise ValueError(f"transport={name!r}: give one of {', '.join(map(repr, NAMES))}")
    if name != "rings":
        from lifl.ebpf.sidecar import Sidecar  # late: who uses rings needs none of it

        try:
            sidecar = Sidecar(arena)
            if name == "auto":
                _say_once(f"transport auto: eBPF is used, {sidecar.loader}")
            return sidecar
        except EbpfUnavailableError as error:
            if name == "ebpf":
                raise
            _say_once(f"transport auto: rings are used; {error}")
    return Rings(arena)


_said: set[str] = set()


def _say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        log.info(message)
