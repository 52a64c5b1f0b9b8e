"""The figures of a Node for Prometheus, over HTTP: collected at each scrape, named by Prometheus' conventions.

Owns the server, its thread and the names of the metrics. The values are those of ``lifl.monitor.stats``. The default
registry of the program is not touched. Needs the extra ``metrics``.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from socketserver import TCPServer, ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

import attrs
from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric

from lifl.errors import LiflError
from lifl.ipc import keep_from_forks
from lifl.monitor.stats import NodeStats, SuperlinkStats, WorkerStats

log = logging.getLogger("lifl.monitor.prometheus")

REQUESTS = 8
"""Requests that are answered at once, each in a thread."""
REQUEST_S = 5.0
"""A request that takes longer, from the connection to the last byte of the answer, is cut."""
GRACE_S = 0.05
"""Time for a connection to bring its request while all places are taken; then it is cut for the next one."""
RETRY_S = 0.1

ADVICE = {
    errno.EADDRINUSE: "give another port, or 0 for any that is free",
    errno.EACCES: "give a port from 1024 on",
}

ROLES = ("leaf", "top", "shard", "idle", "off")


class Exporter:
    """Serves the figures that `stats` gives at the time of a scrape.

    Parameters
    ----------
    stats : callable
        Gives a :class:`~lifl.monitor.stats.NodeStats`; raises :class:`LiflError` when the Node is closed.
    port : int
        0: any free port.
    host : str
        An address of this machine.

    Attributes
    ----------
    address : str
        Host and port.

    Raises
    ------
    ValueError
        If `port` is no port number.
    OSError
        If the port cannot be had; the message names a remedy.
    """

    def __init__(self, stats: Callable[[], NodeStats], port: int, host: str) -> None:
        if not 0 <= port <= 65535:
            raise ValueError(f"metrics_port={port}: give 1 to 65535, or 0 for any that is free")
        registry = CollectorRegistry()
        registry.register(_Collector(stats))
        try:
            family, *_, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            self._server = _Server(family, (str(where[0]), int(where[1])))
        except OSError as error:
            advice = ADVICE.get(error.errno or 0, "give an address of this machine")
            why = f"metrics cannot be served at {host} port {port}: {error.strerror or error}; {advice}"
            raise OSError(error.errno, why) from error
        keep_from_forks(self._server.socket)
        self._server.set_app(make_wsgi_app(registry))
        self.address = self._server.address
        # Waits for connections; `close` ends it. A daemon, so that a program that forgets `close` can exit.
        self._thread = threading.Thread(target=self._server.serve, name="lifl-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread and gives the port back; harmless when closed."""
        self._server.end()
        self._thread.join()
        self._server.server_close()


class _Handler(WSGIRequestHandler):
    timeout = REQUEST_S
    server: _Server

    def parse_request(self) -> bool:
        """Parses as WSGI's handler does, and notes in the server that the whole head has arrived."""
        is_whole = super().parse_request()
        if is_whole:
            self.server.note_whole(self.connection)
        return is_whole

    def log_message(self, *_: Any) -> None:
        """Logs nothing: scrapes are frequent."""


@attrs.define(eq=False)
class _Scrape:
    """A connection that is being answered."""

    connection: socket.socket
    began_s: float
    is_whole: bool = False  # the whole request has arrived
    is_cut: bool = False

    def cut(self) -> None:
        """Shuts the connection down: the thread that answers it then finds its end."""
        self.is_cut = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)


class _Server(ThreadingMixIn, WSGIServer):
    """A few threads, one for each scrape. A client that sends slowly or does not read delays no other."""

    daemon_threads = True
    request_queue_size = 64  # a client that finds the queue full tries again after a second

    def __init__(self, family: int, where: tuple[str, int]) -> None:
        self.address_family, self._is_ended = family, False
        self._scrapes: dict[socket.socket, _Scrape] = {}
        self._changed = threading.Condition()  # guards _scrapes; notified when a place is free
        super().__init__(where, _Handler)

    @property
    def timeout(self) -> float | None:  # type: ignore[override]
        """Seconds to wait for a connection: until the next request has taken too long."""
        with self._changed:
            ends_s = [one.began_s + REQUEST_S for one in self._scrapes.values() if not one.is_cut]
        return max(0.0, min(ends_s) - time.monotonic()) if ends_s else None

    def handle_timeout(self) -> None:
        """Cuts requests that have taken too long."""
        now_s = time.monotonic()
        with self._changed:
            for one in self._scrapes.values():
                if not one.is_cut and now_s - one.began_s >= REQUEST_S:
                    one.cut()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answers a request in a thread of its own, when there is a place for it."""
        self.handle_timeout()
        self._make_place()
        with self._changed:
            self._scrapes[request] = _Scrape(request, time.monotonic())
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._forget(request)
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answers a request, and frees its place."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._forget(request)

    def _forget(self, request: Any) -> None:
        with self._changed:
            self._scrapes.pop(request, None)
            self._changed.notify_all()

    def _make_place(self) -> None:
        """Waits for a free place. Cuts the oldest connection without a whole request, or one that takes too long."""
        with self._changed:
            while len(self._scrapes) >= REQUESTS and not self._is_ended:
                now_s = time.monotonic()
                going = sorted(
                    (one for one in self._scrapes.values() if not one.is_cut),
                    key=lambda one: (one.is_whole, one.began_s),
                )
                if going and now_s - going[0].began_s >= (REQUEST_S if going[0].is_whole else GRACE_S):
                    going[0].cut()
                self._changed.wait(GRACE_S)

    def note_whole(self, request: Any) -> None:
        """Notes that the whole head of a request has arrived."""
        with self._changed:
            if (scrape := self._scrapes.get(request)) is not None:
                scrape.is_whole = True

    def server_bind(self) -> None:
        """Binds as WSGIServer does, but asks no name server for this machine's name."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()

    @property
    def address(self) -> str:
        name = f"[{self.server_name}]" if ":" in self.server_name else self.server_name
        return f"{name}:{self.server_port}"

    def serve(self) -> None:
        # serve_forever would wake up twice a second.
        while not self._is_ended:
            self.handle_request()

    def end(self) -> None:
        if not self._is_ended:
            self._is_ended = True
            with self._changed:
                for scrape in self._scrapes.values():
                    scrape.cut()
            self.socket.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits for a connection

    def get_request(self) -> Any:
        try:
            return super().get_request()
        except OSError:
            if not self._is_ended:  # no descriptor is left: clients wait, and this thread must not spin
                time.sleep(RETRY_S)
            raise

    def handle_error(self, *_: Any) -> None:
        """Logs that a client has gone, or that no thread is left."""
        log.debug("a scrape was not answered", exc_info=True)


class _Collector:
    def __init__(self, stats: Callable[[], NodeStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        try:
            stats = self._stats()
        except LiflError:  # the Node has been closed meanwhile
            return
        yield from metrics_of(stats)


# ---------------------------------------------------------------- the names


def metrics_of(stats: NodeStats) -> Iterator[Metric]:
    """A snapshot as metric families."""
    node = {"transport": stats.transport, "loader": stats.loader or "none", "number": str(stats.number)}
    yield InfoMetricFamily("lifl_node", "The Node: its number in the process, how descriptors travel.", value=node)
    yield _gauge("lifl_node_uptime_seconds", "Time since the Node was made.", stats.uptime_s)
    yield _gauge("lifl_arena_bytes", "Room in shared memory for updates, sums and models.", stats.memory.total_bytes)
    yield _gauge("lifl_arena_used_bytes", "Part of it that is not free.", stats.memory.used_bytes)
    yield from _of_rounds(stats)
    yield from _of_workers(stats.workers)
    if stats.superlink is not None:
        yield from _of_superlink(stats.superlink)


def _of_rounds(stats: NodeStats) -> Iterator[Metric]:
    totals, rounds = stats.totals, stats.rounds
    yield _gauge("lifl_rounds_open", "Rounds that have not been closed.", stats.open_rounds)
    yield _gauge("lifl_rounds_open_expected", "Updates that the open rounds wait for in all.", _sum(rounds, "expected"))
    yield _gauge("lifl_rounds_open_accepted", "Updates that the open rounds have.", _sum(rounds, "accepted"))
    oldest = max((one.age_s for one in rounds), default=0.0)
    yield _gauge("lifl_rounds_open_oldest_age_seconds", "Age of the oldest open round; 0 without one.", oldest)
    outcomes = {"done": totals.rounds_done, "failed": totals.rounds_failed}
    yield _counters("lifl_rounds", "Rounds that have a result, and that have none.", "outcome", outcomes)
    yield _counter("lifl_updates_accepted", "Updates that were accepted.", totals.accepted)
    yield _counter("lifl_updates_accepted_bytes", "Bytes of the updates that were accepted.", totals.accepted_bytes)
    yield _counters(
        "lifl_updates_refused", "Updates that were refused, by the rule they broke.", "rule", totals.refused
    )


def _of_workers(workers: tuple[WorkerStats, ...]) -> Iterator[Metric]:
    now = Counter(role for worker in workers for role in worker.roles)
    gauge = GaugeMetricFamily("lifl_workers", "Workers in each role now; one may be in several.", labels=["role"])
    for role in ROLES:
        gauge.add_metric([role], now[role])
    yield gauge
    arrivals = CounterMetricFamily(
        "lifl_worker_arrivals", "Descriptors that were sent to the worker.", labels=["worker"]
    )
    queue = GaugeMetricFamily("lifl_worker_queue", "Descriptors that the worker has not taken.", labels=["worker"])
    folded = CounterMetricFamily(
        "lifl_worker_updates_folded", "Updates that the worker folded as a leaf.", labels=["worker"]
    )
    busy = CounterMetricFamily("lifl_worker_busy_seconds", "Execution time of the worker.", labels=["worker"])
    deaths = CounterMetricFamily(
        "lifl_worker_deaths", "Deaths of the worker without an order to stop.", labels=["worker"]
    )
    for one in workers:
        name = [str(one.id)]
        arrivals.add_metric(name, one.arrivals)
        queue.add_metric(name, one.queued)
        folded.add_metric(name, one.folded)
        busy.add_metric(name, one.busy_s)
        deaths.add_metric(name, one.deaths)
    yield from (arrivals, queue, folded, busy, deaths)


def _of_superlink(stats: SuperlinkStats) -> Iterator[Metric]:
    yield _counter("lifl_superlink_received_bytes", "Bytes through the gateway, from SuperNodes.", stats.received_bytes)
    yield _counter("lifl_superlink_sent_bytes", "Bytes through the gateway, to SuperNodes.", stats.sent_bytes)
    yield _counter("lifl_superlink_copied_bytes", "Received bytes that were copied once more.", stats.copied_bytes)
    yield _gauge("lifl_superlink_uploads", "Objects that are arriving now.", stats.uploads)
    if stats.objects is not None:
        yield _gauge("lifl_superlink_objects", "Objects in the store.", stats.objects)
    yield _gauge("lifl_superlink_held_requests", "Requests for work that are held open.", stats.held_requests)
    yield _counter("lifl_superlink_messages", "Messages that were stored for SuperNodes.", stats.messages)
    yield _counter("lifl_superlink_replies", "Replies that came from SuperNodes.", stats.replies)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(name, text, value=value)


def _counters(name: str, text: str, label: str, values: Any) -> Metric:
    family = CounterMetricFamily(name, text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family


def _sum(rounds: Any, name: str) -> int:
    return sum(getattr(one, name) for one in rounds)
