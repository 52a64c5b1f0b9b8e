"""The figures of a Node as values: its state at a moment, and counters since its start. Collected and drawn elsewhere.

Times are seconds, sizes bytes. A counter only ever rises: the difference of two snapshots is a rate.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import attrs


@attrs.frozen
class MemoryStats:
    """The arena: its room for blocks, and the part of it that is not free."""

    total_bytes: int
    used_bytes: int


@attrs.frozen
class RoundStats:
    """A round that has not been closed.

    ``phase`` is "open" (takes updates), "folding" (all updates are in), "done" or "failed". ``accepted`` of
    ``expected`` updates are in, together ``accepted_bytes``; ``refused`` counts refused updates by rule.
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
    """Counters since the Node's start, open rounds included.

    ``rounds_failed`` includes rounds that were closed before their result. ``accepted`` counts updates when they are
    admitted: an update that workers died of later is also in ``refused``, under "poison".
    """

    rounds_done: int
    rounds_failed: int
    accepted: int
    accepted_bytes: int
    refused: Mapping[str, int]


@attrs.frozen
class WorkerStats:
    """A worker, or the calling process if the Node has none.

    Attributes
    ----------
    id : int
        The worker's number, from 1, as in a round's report.
    pid : int or None
        None: no process runs as this worker now.
    roles : tuple of str
        The roles of now: "leaf", "top" and "shard" (several if the worker takes part in several rounds), or "idle",
        or "off" (no process).
    rounds : tuple of int
        The open rounds in which the worker has a role.
    arrivals : int
        Descriptors that were ever sent to the worker.
    queued : int
        Arrivals that the worker has not taken yet.
    folded : int
        Updates that the worker has folded into a sum of its own, as a leaf. Updates folded in shards do not count.
    busy_s : float
        Execution time, as far as the worker has reported it.
    deaths : int
        Deaths of the worker's process without an order to stop.
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
    """Figures of a ``lifl-superlink`` beside those of its Node.

    Attributes
    ----------
    received_bytes, sent_bytes : int
        Bytes through the gateway.
    copied_bytes : int
        Received bytes that were copied once more in the server.
    uploads : int
        Objects that are arriving now.
    objects : int or None
        Objects in the store; None if they are in a database, which is not asked.
    held_requests : int
        Requests of SuperNodes for work that are held open now.
    messages, replies : int
        Messages stored for SuperNodes, and replies announced by them; a reply that is announced again counts again.
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
    """A snapshot of a Node.

    Attributes
    ----------
    pid, number : int
        The Node's process, and the Node's number in it, from 1.
    transport : str
        "rings" or "ebpf".
    loader : str or None
        With "ebpf": the loader of the program.
    uptime_s : float
        Time since the Node was made.
    memory : MemoryStats
    rounds : tuple of RoundStats
        Rounds that have not been closed, the oldest first.
    open_rounds : int
        The number of these rounds; ``rounds`` has fewer if the snapshot was cut short for another process.
    totals : Totals
    workers : tuple of WorkerStats
        All workers that the Node may have, by id.
    superlink : SuperlinkStats or None
        None if the Node is not a ``lifl-superlink``'s.
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
        """The snapshot as plain dicts, lists, strings and numbers, for JSON."""
        return attrs.asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> NodeStats:
        """The reverse of :meth:`to_dict`. Fields of a newer version that this one does not know are left out.

        Raises ``ValueError`` if `values` is no snapshot.
        """
        try:
            fields = {
                **values,
                "memory": _made(MemoryStats, values["memory"]),
                "rounds": tuple(_made(RoundStats, one) for one in values["rounds"]),
                "totals": _made(Totals, values["totals"]),
                "workers": tuple(_worker(one) for one in values["workers"]),
                "superlink": None if values["superlink"] is None else _made(SuperlinkStats, values["superlink"]),
            }
            return _made(cls, fields)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"no snapshot of a Node: {error!r}") from None


Kind = TypeVar("Kind")


def _made(kind: type[Kind], values: Mapping[str, Any]) -> Kind:
    known = {field.name for field in attrs.fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in values.items() if name in known})


def _worker(values: Mapping[str, Any]) -> WorkerStats:
    return _made(WorkerStats, {**values, "roles": tuple(values["roles"]), "rounds": tuple(values["rounds"])})
