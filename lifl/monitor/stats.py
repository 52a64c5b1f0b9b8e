"""What a Node is doing at a moment, and what it has done since its start, as values. Collected and drawn elsewhere.

Times are seconds, sizes bytes. What counts since the start only ever rises: the difference of two snapshots is a rate.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import attrs


@attrs.frozen
class MemoryStats:
    """The arena: its room for blocks, and what is not free of it."""

    total_bytes: int
    used_bytes: int


@attrs.frozen
class RoundStats:
    """A round that has not been closed.

    ``phase`` is "open" (takes updates), "folding" (all are in), "done" or "failed"; ``accepted`` of ``expected``
    updates are in, together ``accepted_bytes``; ``refused`` are those that are not, by rule.
    """

    number: int
    phase: str
    timing: str
    expected: int
    accepted: int
    refused: Mapping[str, int]
    accepted_bytes: int
    age_s: float


@attrs.frozen
class Totals:
    """Since the Node's start, open rounds included.

    ``rounds_failed`` includes rounds that were closed before their result. ``accepted`` are updates as they came in at
    the door: one that workers died of later is in ``refused``, under "poison", too.
    """

    rounds_done: int
    rounds_failed: int
    accepted: int
    accepted_bytes: int
    refused: Mapping[str, int]


@attrs.frozen
class WorkerStats:
    """One participant of the arena that can fold.

    Attributes
    ----------
    id : int
        From 1; the same number is in a round's report.
    pid : int or None
        None: no process is there for it now.
    roles : tuple of str
        Now: "leaf", "top" and "shard" (several if it has a part in several rounds), or "idle", or "off" (no process).
    rounds : tuple of int
        The open rounds that it has a part in.
    arrivals : int
        Descriptors that were ever sent to it.
    queued : int
        Of these, what it has not taken.
    folded : int
        Updates that it has folded into a sum of its own, as a leaf. What is folded in shards is not in it.
    busy_s : float
        Execution time, as far as it has told of it.
    deaths : int
        How often its process died without having been told to stop.
    """

    id: int
    pid: int | None
    roles: tuple[str, ...]
    rounds: tuple[int, ...]
    arrivals: int
    queued: int
    folded: int
    busy_s: float
    deaths: int


@attrs.frozen
class SuperlinkStats:
    """What a ``lifl-superlink`` has to tell beside its Node.

    Attributes
    ----------
    received_bytes, sent_bytes : int
        Through the gateway.
    copied_bytes : int
        Of what was received: copied once more in the server.
    uploads : int
        Objects that are coming in now.
    objects : int or None
        In the store; None if they are in a database, which is not asked.
    held_requests : int
        SuperNodes' requests for work that are held open now.
    messages, replies : int
        Stored for SuperNodes, and announced by them; one that is announced again counts again.
    """

    received_bytes: int
    sent_bytes: int
    copied_bytes: int
    uploads: int
    objects: int | None
    held_requests: int
    messages: int
    replies: int


@attrs.frozen
class NodeStats:
    """One look at a Node.

    Attributes
    ----------
    pid, number : int
        Its process, and which of that process's Nodes it is, from 1.
    transport : str
        "rings" or "ebpf".
    loader : str or None
        With "ebpf": what has loaded the program.
    uptime_s : float
        Since the Node was made.
    memory : MemoryStats
    rounds : tuple of RoundStats
        Those that have not been closed, the oldest first.
    open_rounds : int
        How many these are; more than ``rounds`` has if a snapshot for another process was cut short.
    totals : Totals
    workers : tuple of WorkerStats
        All that there may be, by id.
    superlink : SuperlinkStats or None
        If the Node is a ``lifl-superlink``'s.
    """

    pid: int
    number: int
    transport: str
    loader: str | None
    uptime_s: float
    memory: MemoryStats
    rounds: tuple[RoundStats, ...]
    open_rounds: int
    totals: Totals
    workers: tuple[WorkerStats, ...]
    superlink: SuperlinkStats | None = None

    def to_dict(self) -> dict[str, Any]:
        """The same as plain dicts, lists, strings and numbers, for JSON."""
        return attrs.asdict(self)

    @classmethod
    def from_dict(cls, said: Any) -> NodeStats:
        """What :meth:`to_dict` was called on; of a newer version, without what this one does not know.

        Raises ``ValueError`` for what is no snapshot.
        """
        try:
            values = {
                **said,
                "memory": _made(MemoryStats, said["memory"]),
                "rounds": tuple(_made(RoundStats, one) for one in said["rounds"]),
                "totals": _made(Totals, said["totals"]),
                "workers": tuple(_worker(one) for one in said["workers"]),
                "superlink": None if said["superlink"] is None else _made(SuperlinkStats, said["superlink"]),
            }
            return _made(cls, values)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"no snapshot of a Node: {error!r}") from None


Kind = TypeVar("Kind")


def _made(kind: type[Kind], said: Mapping[str, Any]) -> Kind:
    known = {field.name for field in attrs.fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in said.items() if name in known})


def _worker(said: Mapping[str, Any]) -> WorkerStats:
    return _made(WorkerStats, {**said, "roles": tuple(said["roles"]), "rounds": tuple(said["rounds"])})
