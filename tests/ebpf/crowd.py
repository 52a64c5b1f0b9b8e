"""A crowd of workers that send to each other through the sidecar while its routes change: the program of test_crowd.py.

Run by itself, so that it forks from a process without threads: ``python crowd.py FOLDER``. It leaves in the folder what
each worker got, when each batch was sent, when which route changed, and what the kernel counted; it judges nothing.
"""

from __future__ import annotations

import json
import os
import random
import select
import socket
import sys
import time
from pathlib import Path

import numpy as np

from lifl.ebpf.links import top_of
from lifl.ebpf.record import RECORD_BYTES
from lifl.ebpf.sidecar import Sidecar
from lifl.shm.arena import AGENT, Arena

WORKERS = 64
IDS = 64
"""Logical aggregators: roles, whose routes change."""
BATCHES, BATCH = 125, 125
"""The sends of a worker: 125 of 125 records, 15,625 in all; a million by all workers."""
PAUSE_S = 0.02
"""Between two batches, so that all of it takes as long as some hundred changes of routes."""
CHANGES_PER_S, CHANGED = 100, 4
"""The rate of the changes, and the number of aggregators that each change moves to other workers."""
HANG_S = 60.0

RECORD = np.dtype(
    [
        *(("dst", "<u4"), ("src", "<u2"), ("line", "<u2"), ("seq", "<u4"), ("busy_us", "<u4"), ("block", "<u4")),
        *(("generation", "<u4"), ("round", "<u4"), ("kind", "<u2"), ("arg", "<u2")),
    ]
)


def work(me: int, own: socket.socket, control: socket.socket, folder: Path) -> None:
    """A worker: sends its batches and takes the records that arrive, until it is asked to stop."""
    records = np.zeros(BATCHES * BATCH, RECORD)
    records["src"], records["seq"] = me, np.arange(len(records))
    ids = np.random.default_rng(me).integers(0, IDS, len(records), np.uint32)
    records["dst"] = np.array([top_of(k) for k in range(IDS)], np.uint32)[ids]
    data, step = records.tobytes(), BATCH * RECORD_BYTES
    got, times = [], np.zeros((BATCHES, 2), np.int64)

    def take() -> None:
        while True:
            try:
                got.append(own.recv(2**16, socket.MSG_DONTWAIT))
            except BlockingIOError:
                return

    control.recv(1)
    for i in range(BATCHES):
        times[i, 0] = time.monotonic_ns()
        own.sendall(data[i * step : (i + 1) * step])
        times[i, 1] = time.monotonic_ns()
        take()
        time.sleep(PAUSE_S)
    control.send(b"s")
    poll = select.poll()
    poll.register(own, select.POLLIN)
    poll.register(control, select.POLLIN)
    while control.fileno() not in dict(poll.poll()):
        take()
    take()
    np.save(folder / f"got-{me}.npy", np.frombuffer(b"".join(got), RECORD))
    np.save(folder / f"times-{me}.npy", times)


def change_routes(sidecar: Sidecar, controls: list[socket.socket]) -> list[tuple[int, int, int, int]]:
    """Moves aggregators about until every worker has sent its all; each move: aggregator, worker, begin and end."""
    choose, moves, waiting = random.Random(7), [], list(controls)
    due, end = time.monotonic(), time.monotonic() + HANG_S
    while waiting:
        assert time.monotonic() < end, f"{len(waiting)} workers have not sent all"
        due += 1 / CHANGES_PER_S
        ready, _, _ = select.select(waiting, [], [], max(0.0, due - time.monotonic()))
        for control in ready:
            control.recv(1)
            waiting.remove(control)
        if time.monotonic() < due:
            continue
        for k in choose.sample(range(IDS), CHANGED):
            worker = choose.randint(1, WORKERS)
            begin = time.monotonic_ns()
            sidecar.route(top_of(k), worker)
            moves.append((k, worker, begin, time.monotonic_ns()))
    return moves


def main(folder: Path) -> None:
    """Starts everybody, changes routes, and writes down what happened."""
    arena = Arena.create(1, 1 + WORKERS)
    sidecar = Sidecar(arena)
    inbox = sidecar.inbox()
    moves = [(k, 1 + k % WORKERS, 0, 0) for k in range(IDS)]
    for k, worker, _, _ in moves:
        sidecar.route(top_of(k), worker)
    given = {me: socket.socket(fileno=sidecar.admit(me)) for me in range(1, 1 + WORKERS)}
    controls, pids = [], []
    for me, own in given.items():
        ours, theirs = socket.socketpair()
        if not (pid := os.fork()):
            status = 1
            try:
                for other in (*controls, ours, *(one for who, one in given.items() if who != me)):
                    other.close()
                sidecar.close()  # a worker has its socket, and nothing of the launcher's
                arena.close()
                work(me, own, theirs, folder)
                status = 0
            finally:
                os._exit(status)
        theirs.close()
        controls.append(ours)
        pids.append(pid)
    for own in given.values():
        own.close()
    for control in controls:
        control.send(b"g")
    begin = time.monotonic()
    moves += change_routes(sidecar, controls)
    seconds = time.monotonic() - begin
    for control in controls:
        control.send(b"e")
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    np.save(folder / "moves.npy", np.array(moves, np.int64))
    metrics = {me: counted._asdict() for me, counted in sidecar.metrics().items()}
    strays = inbox.try_pop() is not None
    sidecar.close()
    print(json.dumps({"statuses": statuses, "seconds": seconds, "metrics": metrics, "strays": strays, "agent": AGENT}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
