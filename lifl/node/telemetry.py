"""The figures of a Node while it works, and the beacon and the exporter that give them to others.

Takes the Node's lock for as long as it reads counters, and waits for no worker. Changes nothing.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from lifl.errors import LeaseError
from lifl.monitor.beacon import Beacon
from lifl.monitor.stats import MemoryStats, NodeStats, RoundStats, SuperlinkStats, Totals, WorkerStats
from lifl.round.record import Tally
from lifl.shm.arena import Arena
from lifl.shm.ring import counts_of, queued

if TYPE_CHECKING:
    from lifl.monitor.prometheus import Exporter
    from lifl.round.core import RoundCore
    from lifl.workers.team import Team

log = logging.getLogger("lifl.node.telemetry")

MAX_ROUNDS_SHOWN = 64
"""Open rounds in a snapshot for another process, so that it fits into a socket's buffer."""

_numbers = itertools.count(1)


class Watched(Protocol):
    """The part of a Node that telemetry uses."""

    arena: Arena
    changed: threading.Condition
    tally: Tally

    @property
    def is_foreign(self) -> bool:
        """True in a fork of the Node's process."""

    @property
    def is_closed(self) -> bool:
        """True when the Node is closed."""

    @property
    def used_bytes(self) -> int:
        """Bytes of the arena that are in use."""

    def close(self) -> None:
        """Ends the Node."""


class Watch:
    """The telemetry of one Node.

    Attributes
    ----------
    number : int
        The number of the Node in its process, from 1.
    superlink : callable or None
        Gives the figures of a ``lifl-superlink``; called by any thread, without the Node's lock.
    """

    def __init__(self, node: Watched, rounds: Mapping[int, RoundCore], team: Team) -> None:
        self._node, self._rounds, self._team = node, rounds, team
        self.number = next(_numbers)
        self._since_s = time.monotonic()
        self.superlink: Callable[[], SuperlinkStats] | None = None
        self._beacon: Beacon | None = None
        self._exporter: Exporter | None = None
        if team.supervisor is not None:
            try:
                self._beacon = beacon = Beacon(self.number, self._snapshot)
                team.supervisor.listen(beacon.fd, beacon.serve)
            except OSError as error:
                log.debug("`lifl top` will not find this Node: %s", error)

    # ------------------------------------------------------------ beacon and exporter

    def export(self, port: int, host: str) -> None:
        """Serves the figures to Prometheus, by an ``Exporter``. Closes the Node if the exporter cannot be made."""
        try:
            from lifl.monitor.prometheus import Exporter  # imported late: it needs an extra

            self._exporter = Exporter(self.stats, port, host)
        except ModuleNotFoundError as error:
            self._node.close()
            why = f"metrics_port={port} needs {error.name}, which is not installed: pip install 'lifl[metrics]'"
            raise ModuleNotFoundError(why, name=error.name) from error
        except BaseException:
            self._node.close()
            raise

    @property
    def metrics_address(self) -> str | None:
        """The address for Prometheus, as "127.0.0.1:9400"; None if the figures are not served."""
        return None if self._exporter is None else self._exporter.address

    def _snapshot(self) -> dict[str, Any]:
        stats = self.stats().to_dict()
        return {**stats, "rounds": stats["rounds"][:MAX_ROUNDS_SHOWN]}

    def close(self) -> None:
        """Closes the beacon and the exporter; harmless when closed."""
        if self._beacon is not None:
            self._beacon.close()
        if self._exporter is not None:
            self._exporter.close()

    # ------------------------------------------------------------ the figures

    def stats(self) -> NodeStats:
        """See :meth:`lifl.Node.stats`."""
        node, transport = self._node, self._team.transport
        if node.is_foreign:
            raise LeaseError(f"this Node belongs to another process, not to its fork {os.getpid()}: ask it there")
        with node.changed:
            if node.is_closed:
                raise LeaseError("the Node is closed: it has no figures any more")
            memory = MemoryStats(node.arena.block_bytes, node.used_bytes)
            rounds = tuple(_round_stats(round_) for round_ in self._rounds.values())
            workers = self._workers()
            tally = node.tally
            totals = Totals(tally.done, tally.failed, tally.accepted, tally.accepted_bytes, dict(tally.refused))
        return NodeStats(
            pid=os.getpid(),
            number=self.number,
            transport=transport.name,
            loader=transport.loader,
            uptime_s=time.monotonic() - self._since_s,
            memory=memory,
            rounds=rounds,
            open_rounds=len(rounds),
            totals=totals,
            workers=workers,
            superlink=None if self.superlink is None else self.superlink(),
        )

    def _workers(self) -> tuple[WorkerStats, ...]:
        node, supervisor, tally = self._node, self._team.supervisor, self._node.tally
        ids = range(1, node.arena.participants)
        pids = dict.fromkeys(ids, os.getpid()) if supervisor is None else supervisor.by_number()
        parts = [(number, round_.lifecycle.roles()) for number, round_ in self._rounds.items()]
        kernel = self._team.transport.metrics()
        found = []
        for worker in ids:
            # For sockets the kernel counts, and a worker cannot report wrong numbers.
            counted = kernel.get(worker)
            busy_ns, folded = tally.busy_ns[worker], tally.folded[worker]
            if counted is not None:
                busy_ns, folded = counted.busy_ns, counted.folded
            roles = sorted({roles_in[worker] for _, roles_in in parts if worker in roles_in})
            found.append(
                WorkerStats(
                    id=worker,
                    pid=pids.get(worker),
                    roles=tuple(roles or ["idle" if worker in pids else "off"]),
                    rounds=tuple(number for number, roles_in in parts if worker in roles_in),
                    arrivals=counts_of(node.arena, worker)[0] if counted is None else counted.records,
                    queued=queued(node.arena, worker),
                    folded=folded,
                    busy_s=busy_ns / 1e9,
                    deaths=tally.deaths[worker],
                )
            )
        return tuple(found)


def _round_stats(round_: RoundCore) -> RoundStats:
    lifecycle = round_.lifecycle
    books = lifecycle.books
    return RoundStats(
        number=round_.number,
        phase=lifecycle.phase.shown,
        timing=round_.terms.timing,
        expected=round_.terms.expected,
        accepted=len(books.updates),
        refused=dict(books.refused),
        accepted_bytes=len(books.updates) * books.update_bytes,
        age_s=books.now_s(),
    )
