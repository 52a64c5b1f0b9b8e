"""A program whose child makes a Node, runs rounds, and is killed at the n-th step: is everything gone with it.

Arguments: the steps to be killed at. Prints, as JSON, how many children were killed, how many lived to the end,
the longest time until every process of a killed one was gone, and how many steps a whole life has.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import signal
import sys
import threading
import time

import numpy as np
import sitecustomize

import lifl
from lifl.node import node as runtime
from lifl.round import blocks as assignment
from lifl.round import core, loan, recovery, round
from lifl.round import mean as finish
from lifl.round import record as books
from lifl.workers import pool, spawner, supervisor

PR_SET_CHILD_SUBREAPER = 36
GONE_S = 5.0
OTHERS_S = 60.0
SPEC = lifl.TensorSpec.from_arrays({"w": np.zeros(64), "n": np.array(0)})


def live() -> None:
    """The life of a parent: a Node, a round with submits and a loan, and a round that is left open."""
    with lifl.Node("8MiB", workers=2) as node:
        with node.open_round(SPEC, 3) as first:
            for i in range(2):
                first.submit({"w": np.full(64, 2.0**i), "n": np.array(2**i)}, client_id=i)
            with first.loan("loan") as lent:
                lent.arrays["w"][...] = 4.0
                lent.arrays["n"][...] = 4
                lent.send(1.0)
            assert first.result(20).arrays["w"][0] == 7 / 3
        second = node.open_round(SPEC, 2, "lazy")
        second.submit({"w": np.zeros(64), "n": np.array(0)})


def child(page: str, n: int) -> None:
    """Lives until step n, of every thread."""
    with open(page, "r+b") as file:
        words = np.frombuffer(mmap.mmap(file.fileno(), 4096), np.int64)
        words[:4] = 0, n, 0, signal.SIGKILL
    sitecustomize.lib.lifl_steps_use(page.encode(), 0)
    rooms = [assignment, books, supervisor, finish, core, loan, spawner, pool, recovery, round, runtime]
    trace = sitecustomize.tracer(rooms)
    threading.settrace(trace)
    sys.settrace(trace)
    live()
    sys.settrace(None)
    print(json.dumps({"steps": int(words[0])}), flush=True)
    os._exit(0)


def wait_for_all(first: int) -> tuple[int, float]:
    """The first child's status, and the seconds until every orphan of it was gone too; workers die as well."""
    _, status = os.waitpid(first, 0)
    begin = time.monotonic()
    while True:
        try:
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                if time.monotonic() - begin > GONE_S:
                    sys.exit(f"processes of a killed parent live on after {GONE_S:g} s")
                time.sleep(0.001)
        except ChildProcessError:
            return status, time.monotonic() - begin


def main() -> None:
    """Runs the children one after another."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    page, names = os.environ["LIFL_STEPS_PAGE"], set(os.listdir("/dev/shm"))
    killed = lived = 0
    worst = 0.0
    for n in map(int, sys.argv[1:]):
        pid = os.fork()
        if pid == 0:
            child(page, n)
        status, seconds = wait_for_all(pid)
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            killed, worst = killed + 1, max(worst, seconds)
        elif status == 0:
            lived += 1
        else:
            sys.exit(f"the parent that was to be killed at step {n} ended with status {status}")
    until = time.monotonic() + OTHERS_S
    while (left := set(os.listdir("/dev/shm")) - names) and time.monotonic() < until:
        time.sleep(0.1)  # of other tests beside this one, perhaps
    assert not left
    print(json.dumps({"killed": killed, "lived": lived, "worst_s": worst}))


main()
