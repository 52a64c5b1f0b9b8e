"""Measures the costs of aggregation on this machine, once, and remembers them in a file.

Owns the measurement and the file. ``lifl.planner`` owns the meaning of the costs for a round. The file is only a
convenience: if it cannot be read, is damaged, or was written by another version or on another machine, it counts as
missing; if it cannot be written, nothing is lost but the time of the next measurement.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import socket
import statistics
import tempfile
import threading
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any

import attrs

from lifl.errors import LiflError, PeerGoneError
from lifl.node.microbench import measure_memory
from lifl.planner.costs import Costs
from lifl.shm import messages
from lifl.shm.arena import OWNER, Arena, require
from lifl.shm.machine import cores
from lifl.shm.messages import Kind
from lifl.shm.ring import Bell, Inbox, Outbox
from lifl.workers.spawner import Spawner

STARTS = 3
QUESTIONS = 20
WIRE_BYTES = 64 * 2**20
ANSWER_TIMEOUT_S = 20.0


def default_costs() -> Costs:
    """The costs assumed for a machine that was not measured: those of a slow one, so that predictions are modest.

    Rates are about half of those of a server of 2020. The bus carries one core and a quarter of each other core.
    """
    count = cores()
    return Costs(
        cores=count,
        land_bytes_s=3e9,
        land_array_s=10e-6,
        fold_bytes_s=5e9,
        sum_bytes_s=5e9,
        mean_bytes_s=4e9,
        parallel=1 + (count - 1) / 4,
        dispatch_s=100e-6,
        cold_start_s=0.02,
        first_read_bytes_s=10e9,
        first_write_bytes_s=1.5e9,
        wire_bytes_s=1e9,
        wire_cpu_bytes_s=1.5e9,
    )


def costs(measure: bool = False) -> Costs:
    """The costs of this machine: from the file; else measured if `measure` is true; else the default, at once."""
    if (remembered := known()) is not None:
        return remembered
    return calibrate() if measure else default_costs()


def calibrate() -> Costs:
    """Measures this machine's costs and writes them to the file. Takes one to two seconds and 270 MB for that time.

    Only undisturbed runs of the kernels count: differences of disturbed runs mean nothing. Costs that cannot be
    measured, because no process or socket may be made, are those of :func:`default_costs`.

    Raises :class:`~lifl.errors.ShmError` where lifl cannot run.
    """
    require()
    measured = attrs.evolve(default_costs(), **measure_memory(cores()))
    for part in (_starts, _wire):
        with contextlib.suppress(LiflError, OSError):
            measured = attrs.evolve(measured, **part())
    _write(measured)
    return measured


# ---------------------------------------------------------------- workers


class _Workers:
    """A spawner and its workers, asked for signs of life."""

    def __init__(self) -> None:
        self._pidfds: list[int] = []
        with contextlib.ExitStack() as stack:
            arena, bell = Arena.create(1, 1 + 1 + STARTS), Bell()
            stack.callback(arena.close)
            stack.callback(bell.close)
            self._inbox, self._outbox = Inbox(arena, OWNER), Outbox.of_rings(arena, OWNER)
            self._spawner = Spawner(arena.fd, bell.fd, 0.0)
            stack.callback(self._spawner.close)
            self._end = stack.pop_all()

    def start(self) -> float:
        """Starts one more worker; returns the seconds until it waits for work."""
        begin = time.perf_counter()
        self._pidfds.append(self._spawner.start_worker(len(self._pidfds) + 1)[1])
        self._ask(len(self._pidfds))
        return time.perf_counter() - begin

    def ask(self) -> float:
        """Asks the first worker, which sleeps; returns the seconds until its answer is here."""
        begin = time.perf_counter()
        self._ask(1)
        return time.perf_counter() - begin

    def _ask(self, worker: int) -> None:
        # A worker answers ABORT with ABORTED for every round, also for an unknown one.
        self._outbox.push(worker, messages.abort(1))
        deadline = time.monotonic() + ANSWER_TIMEOUT_S
        while (item := self._inbox.try_pop()) is None or item[1].kind != Kind.ABORTED:  # HELLO comes first
            if time.monotonic() > deadline:
                raise PeerGoneError(f"worker {worker} did not answer in {ANSWER_TIMEOUT_S:g} s")
            if item is None:
                self._inbox.wait(0.0)

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for worker in range(1, 1 + len(self._pidfds)):
            self._outbox.push(worker, messages.STOP)
        self._end.close()
        for pidfd in self._pidfds:
            os.close(pidfd)


def _starts() -> dict[str, Any]:
    """The time to start a worker beside a first one, and that of a message: half of a question and its answer."""
    with _Workers() as workers:
        workers.start()
        starts = [workers.start() for _ in range(STARTS)]
        answers = [workers.ask() for _ in range(QUESTIONS)]
    return {"cold_start_s": statistics.median(starts), "dispatch_s": statistics.median(answers) / 2}


# ---------------------------------------------------------------- the wire


def _wire() -> dict[str, Any]:
    """A connection over loopback: bytes a second, and bytes per second of CPU, the mean of both sides."""
    source, target = bytearray(2**20), bytearray(2**20)
    spent: list[float] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(ANSWER_TIMEOUT_S)

        def send() -> None:
            with contextlib.suppress(OSError), socket.create_connection(server.getsockname()) as connection:
                begin = time.thread_time()
                for _ in range(WIRE_BYTES // len(source)):
                    connection.sendall(source)
                spent.append(time.thread_time() - begin)

        # Joined below; a daemon, because nobody joins it if the connection fails and this function raises.
        sender = threading.Thread(target=send, daemon=True)
        sender.start()
        connection, _ = server.accept()
        with connection:
            connection.settimeout(ANSWER_TIMEOUT_S)
            begin, begin_cpu, received = time.perf_counter(), time.thread_time(), 0
            while n := connection.recv_into(target):
                received += n
            seconds = time.perf_counter() - begin
            spent.append(time.thread_time() - begin_cpu)
        sender.join()
    if received < WIRE_BYTES:
        raise OSError(f"{received} of {WIRE_BYTES} bytes came through the loopback connection")
    return {"wire_bytes_s": received / seconds, "wire_cpu_bytes_s": received / statistics.mean(spent)}


# ---------------------------------------------------------------- the file


def cache_folder() -> Path:
    """``$LIFL_CACHE``, else the user's cache folder: ``lifl`` in ``$XDG_CACHE_HOME``, else in ``~/.cache``.

    Raises ``RuntimeError`` if there is no home.
    """
    if folder := os.environ.get("LIFL_CACHE"):
        return Path(folder)
    from platformdirs import user_cache_path  # here: a Node whose costs are given needs no folder

    # Not every version of it notices that there is no home.
    return user_cache_path("lifl", appauthor=False).expanduser()


def machine() -> dict[str, str | int]:
    """The key of the costs: the processor's model, the cores that lifl may use, and lifl's version."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        model = next(line for line in lines if line.startswith("model name")).partition(":")[2].strip()
    try:
        ours = version("lifl")
    except PackageNotFoundError:  # run from a checkout that is not installed
        ours = "unknown"
    return {"cpu": model, "cores": cores(), "lifl": ours}


def path() -> Path:
    """The file of this machine's costs; raises ``RuntimeError`` if there is no home."""
    key = json.dumps(machine(), sort_keys=True)
    return cache_folder() / f"costs-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def known() -> Costs | None:
    """The costs that were measured on this machine before; None if there are none, or they cannot be read."""
    # RuntimeError: no home, or JSON that is too deep. The others: no file, no JSON, other names, no numbers.
    with contextlib.suppress(OSError, RuntimeError, ValueError, TypeError, KeyError, OverflowError):
        found = json.loads(path().read_bytes())
        if found["machine"] == machine():
            return Costs.from_dict(found["costs"])
    return None


def _write(measured: Costs) -> None:
    """Writes the file as a whole or not at all: another process may read it, or write its own."""
    with contextlib.suppress(OSError, RuntimeError):
        target = path()
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=target.parent, delete=False) as file:
            try:
                json.dump({"machine": machine(), "costs": measured.to_dict()}, file, indent=1)
                file.close()
                os.replace(file.name, target)
            except BaseException:
                os.unlink(file.name)
                raise
