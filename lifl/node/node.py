"""The wiring: a Node owns an arena, its workers, and the thread that listens to them.

It opens rounds, carries descriptors between rounds and workers, and ends everything it started. It does no arithmetic
and reads no update.
"""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections import Counter
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from lifl.errors import LeaseError, LiflError, PeerGoneError
from lifl.monitor.stats import NodeStats
from lifl.node.forecast import Forecast
from lifl.node.telemetry import Watch
from lifl.planner.shape import Shape
from lifl.round.admission import Limits
from lifl.round.core import RoundCore
from lifl.round.record import Tally
from lifl.round.round import Round
from lifl.round.settings import Order, Terms, Timing
from lifl.shm import arena as shm
from lifl.shm import messages
from lifl.shm.arena import Arena
from lifl.shm.messages import Kind
from lifl.shm.sizes import default_bytes, parse_bytes
from lifl.tensor import TensorSpec
from lifl.workers.listener import Listener
from lifl.workers.pool import Pool
from lifl.workers.team import Team, headcount
from lifl.workers.transport import Name as TransportName

DEFAULT_MEMORY = 2 * 2**30
STALL_TIMEOUT_S = 10.0
IDLE_TIMEOUT_S = 60.0


class Node:
    """A machine's share of the work: one arena and warm workers.

    Parameters
    ----------
    memory : str or int, optional
        The arena's size, taken from the machine at once: ``"2GiB"`` or bytes. Default: 2 GiB, or a
        quarter of what is available if that is less.
    workers : int, optional
        The most worker processes. Default: one per core. 0 folds in the calling process, through the same code.
    warm : int, optional
        Workers that are started at once; the others start when a round has work for them. Default: all, if `workers`
        was given, else one.
    idle_timeout : float or None
        Seconds after which a worker without work ends, the last one too; the next round starts what it needs. None:
        never.
    stall_timeout : float
        Seconds after which a worker that has work and gives no sign of life, because it is stopped or
        stuck, is killed and replaced; the time that folding the arena's content may take is added (a second per
        100 MB).
    transport : {"rings", "ebpf", "auto"}, optional
        The way of the descriptors: rings in shared memory, or sockets that an eBPF program in the kernel routes and
        counts (see docs/ebpf.md). "auto": eBPF if this machine allows it, else rings. Default: the environment
        variable LIFL_TRANSPORT, or "rings".
    metrics_port : int, optional
        Serve :meth:`stats` to Prometheus at this port of `metrics_host` (0: at any that is free, see
        ``metrics_address``). Needs ``pip install 'lifl[metrics]'``.
    debug : bool
        Overwrite freed blocks with 0xA5, so that a stale view shows itself.

    Raises
    ------
    ShmError
        If the memory cannot be had, or the machine is not Linux.
    PeerGoneError
        If the workers cannot be started.
    EbpfUnavailableError
        With ``transport="ebpf"`` on a machine that does not allow it: the reason, and what to do.
    OSError
        If the metrics' port cannot be had.

    Examples
    --------
    >>> spec = lifl.TensorSpec.from_arrays(model)
    >>> with lifl.Node(memory="1GiB") as node, node.open_round(spec, expected=2) as round_:
    ...     round_.submit(update_a, weight=10, client_id="a")
    ...     round_.submit(update_b, weight=30, client_id="b")
    ...     mean = round_.result(timeout=30).arrays
    """

    def __init__(
        self,
        memory: str | int | None = None,
        workers: int | None = None,
        *,
        warm: int | None = None,
        idle_timeout: float | None = IDLE_TIMEOUT_S,
        stall_timeout: float = STALL_TIMEOUT_S,
        transport: TransportName | None = None,
        metrics_port: int | None = None,
        metrics_host: str = "127.0.0.1",
        debug: bool = False,
    ) -> None:
        from lifl.node import calibration

        shm.require()
        workers, warm = headcount(workers, warm, idle_timeout, stall_timeout)
        if memory is None:
            memory = default_bytes(DEFAULT_MEMORY)
        self._pid = os.getpid()
        self.workers = workers
        # Guards the books of the Node, its rounds and its workers, and is notified of each change. Reentrant: rounds
        # call their host, and the host its rounds.
        self.changed = threading.Condition(threading.RLock())
        self._rounds: dict[int, RoundCore] = {}
        self._number = 0
        self._is_closed = False
        self._closing = threading.Lock()  # held by the one thread that closes the Node; taken before `changed`
        self._gone: PeerGoneError | None = None
        self._listener: Listener | None = None
        self.tally = Tally()
        self.arena = Arena.create(parse_bytes(memory), 1 + max(workers, 1), debug=debug)
        self._team = team = Team(self.arena, workers, warm, stall_timeout, transport)
        self._supervisor = team.supervisor
        self.transport, self.outbox, self.traffic = team.transport, team.outbox, team.traffic
        try:
            self.forecast = Forecast(calibration.costs(), max(workers, 1), self.traffic.take)
            self.pool = Pool(max(workers, 1), team.supervisor, self.engaged)
            self.watch = Watch(self, self._rounds, team)
            if team.supervisor is not None:
                self._listener = Listener(self, team.supervisor, team.inbox, team.bell, idle_timeout)
        except BaseException:  # the machine may have no thread left
            team.close()
            raise
        _nodes.add(self)
        if metrics_port is not None:
            self.watch.export(metrics_port, metrics_host)

    # ------------------------------------------------------------ workers

    def engaged(self) -> Counter[int]:
        """Worker -> the number of rounds that it has a part in now. The caller holds the lock."""
        return Counter(worker for round_ in self._rounds.values() for worker in round_.lifecycle.engaged)

    @property
    def waits_for_workers(self) -> bool:
        """True while a worker has work of a round, or has to let go of one. The caller holds the lock."""
        return any(round_.lifecycle.waits_for_workers for round_ in self._rounds.values())

    @property
    def used_bytes(self) -> int:
        """Bytes of the arena that are in use."""
        return self.arena.block_bytes - self.arena.free_bytes

    @property
    def is_closed(self) -> bool:
        """True after :meth:`close`."""
        return self._is_closed

    def drain(self) -> bool:
        """Handles the descriptors that workers have sent; false if there were none. The caller holds the lock."""
        worked = False
        while (item := self._team.inbox.try_pop()) is not None:
            worked = True
            sender, descriptor = item
            if self._supervisor is not None:
                self._supervisor.heard(sender, descriptor.kind != Kind.HELLO)
            if (round_ := self._rounds.get(descriptor.round)) is None:
                continue
            try:
                round_.lifecycle.handle(sender, descriptor)
            except LiflError as error:  # that round is lost; the thread that listens to workers must go on
                round_.lifecycle.fail(error)
        if worked:
            self.changed.notify_all()
        return worked

    def replace(self, pidfd: int) -> None:
        """Takes up what a worker that is proven dead left, and starts its successor unless it had to stop."""
        supervisor = self._supervisor
        assert supervisor is not None, "only a listener calls this, and there is none without workers"
        with self.changed:
            self.drain()  # the descriptors that it sent before it died count
            dead = supervisor.remove(pidfd)
            worker = dead.number
            self.tally.deaths[worker] += not dead.was_leaving
            if self._is_closed:
                return
            try:
                self.transport.remove(worker)
                self.outbox.reset(worker)
                told = [d for r in list(self._rounds.values()) for d in r.lifecycle.recover(worker, dead.died_of_work)]
                if told or not dead.was_leaving or self.engaged()[worker]:
                    supervisor.start(worker)
                else:
                    supervisor.leave_empty(worker)
            except LiflError as error:
                self.lose(PeerGoneError(f"worker {worker} (pid {dead.pid}) died and has no successor: {error}"))
                return
            for descriptor in told:
                self.outbox.push(worker, descriptor)
            self.changed.notify_all()

    def lose(self, error: PeerGoneError) -> None:
        """Ends every round with this error: the Node cannot go on. The caller holds the lock."""
        self._gone = error
        for round_ in self._rounds.values():
            round_.lifecycle.fail(error)
        self.changed.notify_all()

    def pids(self) -> tuple[int, ...]:
        """The workers' process ids."""
        with self.changed:
            return () if self._supervisor is None else self._supervisor.pids

    def stats(self) -> NodeStats:
        """The Node's figures, now and since its start; see :mod:`lifl.monitor.stats`.

        Works at any time and waits for no worker; with ``workers=0`` it waits for the fold that goes on. Raises
        :class:`LeaseError` if the Node is closed.
        """
        return self.watch.stats()

    @property
    def metrics_address(self) -> str | None:
        """Host and port of the metrics, as "127.0.0.1:9400"; None without ``metrics_port``."""
        return self.watch.metrics_address

    # ------------------------------------------------------------ for its rounds

    def pump(self) -> None:
        """Sets workers to work and lets the listener's thread watch them; without workers the calling thread works."""
        if self._listener is not None:
            self._listener.wake()
        if (inline := self._team.inline) is not None:
            with self.changed:
                while inline.step() or self.drain():
                    self.outbox.flush()

    @property
    def is_foreign(self) -> bool:
        """True in a fork of the process that made this Node."""
        return os.getpid() != self._pid

    def check_workers(self) -> None:
        """Raises :class:`PeerGoneError` if a worker died and has no successor.

        :class:`LeaseError` if the Node is closed, or this is a fork of its process.
        """
        if self.is_foreign:
            raise LeaseError(f"this Node belongs to process {self._pid}, not to its fork {os.getpid()}")
        if self._gone:
            raise self._gone
        if self._is_closed:
            raise LeaseError("the Node is closed")

    def relieve(self) -> bool:
        """Makes lazy rounds fold the updates that they hold; false if no block will come free without help."""
        for round_ in self._rounds.values():
            round_.lifecycle.press()
        self.pump()
        return any(round_.lifecycle.is_moving for round_ in self._rounds.values())

    def held_by(self, client_id: str) -> int:
        """Bytes of the arena that a client holds, in all open rounds. The caller holds the lock."""
        return sum(round_.quota.held_by(client_id) for round_ in self._rounds.values())

    @property
    def largest_update_bytes(self) -> int:
        """Bytes of the largest update of the open rounds; 0 if none is open. The caller holds the lock."""
        return max((round_.spec.layout.update_bytes for round_ in self._rounds.values()), default=0)

    def next_number(self) -> int:
        """The number of a round that is being opened. The caller holds the lock."""
        self._number += 1
        return self._number

    def forget(self, number: int) -> None:
        """Takes a closed round off the books."""
        self._rounds.pop(number, None)
        self.transport.route_top(number, None)

    # ------------------------------------------------------------ rounds

    def open_round(
        self,
        spec: TensorSpec,
        expected: int,
        timing: Timing = "eager",
        order: Order = "any",
        *,
        commit_every: int | None = None,
        limits: Limits | None = None,
        base: Mapping[str, Any] | None = None,
        shape: Shape | None = None,
    ) -> Round:
        """Opens a round for updates of one spec. Several may be open at once.

        Parameters
        ----------
        spec : TensorSpec
            The form of every update.
        expected : int
            The round is complete when so many updates have been accepted; at least 1.
        timing : {"eager", "lazy", "jit"}
            Fold each update when it is ready, or all when they are complete, or just in time: so late that the work
            ends when the last update is expected. Sooner if memory is short.
        order : {"any", "flower"}
            ``"flower"`` makes the mean in Flower's order (that of submission), arithmetic and dtypes, bit
            by bit; it keeps every update until the last is in.
        commit_every : int, optional
            A leaf folds at most so many updates (1 to 64, the default) before it commits and gives their
            memory back. Fewer keep less memory, and less is folded again if a worker dies; more are faster.
        limits : Limits, optional
            The server's bounds, in addition to the rules for every update; see :class:`Limits`.
        shape : Shape, optional
            The number of workers that fold ahead, and of ranges in which the mean is made; see :class:`lifl.Shape`.
            Default: the planner chooses by the measured costs of this machine, and again when updates come faster or
            slower.
        base : mapping of str to array, optional
            With ``limits.clipping_norm``, the model that updates are clipped against, of exactly the spec's
            form. Not copied: it must not change while the round is open.

        Raises
        ------
        ShmError
            ENOSPC if the arena has no room for the round's sums, its mean and one update.
        ValueError
            For an unknown timing or order, ``expected`` below 1, ``commit_every`` outside 1 to 64, bfloat16
            with ``order="flower"``, a base of another form or with NaN or Inf, or without ``clipping_norm``.
        TypeError
            For a spec, limits or a shape of another type.
        """
        terms = Terms.of(spec, expected, timing, order, commit_every, limits, base, shape)
        self.check_workers()  # before the lock too: in a fork no thread may exist that lets go of it
        with self.changed:
            self.check_workers()
            core = RoundCore(self, terms)  # waits for memory, and lets go of the lock meanwhile
            if not self._rounds:
                self.traffic.begin()
            self._rounds[core.number] = core
            try:
                core.engage_leaves()
            except BaseException:  # Ctrl-C too: nobody else could close the round
                core.close()
                raise
        return Round(core)

    # ------------------------------------------------------------ the end

    @property
    def is_open(self) -> bool:
        """False after :meth:`close`, or when a worker died and could not be replaced."""
        return not self._is_closed and self._gone is None

    @property
    def has_rounds(self) -> bool:
        """True while a round is open."""
        return bool(self._rounds)

    def close(self) -> None:
        """Closes every round, ends every process, gives the memory back. Results stay valid.

        Harmless when closed, and in a fork of the process that owns the Node.
        """
        if self.is_foreign:
            return
        with self._closing:  # a second thread waits until the first has closed it
            if not self._is_closed:
                self._close()

    def _close(self) -> None:
        for round_ in list(self._rounds.values()):
            round_.close()
        with self.changed:
            self._is_closed = True
            for worker in self.pool.present:
                self.outbox.push(worker, messages.STOP)
            self.changed.notify_all()
        self._team.bell.ring()
        if self._listener is not None:
            self._listener.join()
        self.watch.close()
        self._team.close()
        self.arena.close()

    def __enter__(self) -> Node:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._is_closed or self.is_foreign:
            return "<Node: closed>" if self._is_closed else f"<Node of process {self._pid}>"
        if self._gone:
            return f"<Node: {self._gone}>"
        free, total = self.arena.free_bytes, self.arena.block_bytes
        return f"<Node: {self.workers} workers, {len(self._rounds)} rounds, {free:,} of {total:,} bytes free>"


# ---------------------------------------------------------------- at exit

_nodes: weakref.WeakSet[Node] = weakref.WeakSet()


@atexit.register
def close_all() -> None:
    """Closes every Node of this process."""
    for node in list(_nodes):
        node.close()
