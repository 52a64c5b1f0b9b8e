"""Rung 1 of the ladder: a process is killed at every step of a round.

The worker, its successor at every step of its own, the recovery in between, while peers go on, the process that starts
workers, and the parent.
Every accepted update counts once, or is refused by name, and nothing is lost.

A step is what lies between two accesses to shared memory in the C core, and, in the finest detail, between two
instructions of the worker's Python. ``LIFL_CRASH=all`` leaves out none; without it every n-th is taken.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stepping import SPAWNER, Control, stepping

import lifl
from lifl.round import blocks as assignment
from lifl.round import recovery

pytestmark = pytest.mark.transports

Form = tuple[Any, Any, lifl.Shape]
UPDATES = 4
SPEC = lifl.TensorSpec.from_arrays({"w": np.zeros(64), "n": np.array(0)})
SENT = [{"w": np.full(64, 2.0**i), "n": np.array(2**i)} for i in range(UPDATES)]
"""Powers of two: a sum tells exactly who is in it."""
WAIT_S = 10.0
ALL = os.environ.get("LIFL_CRASH") == "all"
TREE, SHARDS, BOTH = lifl.Shape(2, 0), lifl.Shape(0, 2), lifl.Shape(2, 2)
FORMS: list[Form] = [
    ("eager", "any", TREE),
    ("lazy", "any", TREE),
    ("eager", "any", BOTH),
    ("lazy", "any", SHARDS),
    ("eager", "flower", SHARDS),
]
ROLES = [
    *((role, form) for role in ("leaf", "top") for form in FORMS[:2]),
    ("leaf", FORMS[2]),
    *(("shard", form) for form in FORMS[3:]),
]
"""The role that is killed, and the form of the round: timing, order, shape."""


class Bench:
    """A Node for many cases, and their findings."""

    def __init__(self, node: lifl.Node, control: Control) -> None:
        self.node, self.control = node, control
        self.free, self.fds = node.arena.free_bytes, len(os.listdir("/proc/self/fd"))
        self.singles = self.pairs = 0

    def victim(self, role: str) -> int:
        """The worker that will have this role in the next round."""
        pool = self.node.pool
        first = next(me for me in (1, 2) if (me - pool._turn) % pool.most == 0)
        return first if role in ("top", "shard") else 3 - first

    def run(self, form: Form) -> None:
        """Runs a round; its mean is that of the contributors that it names, and no client is lost."""
        timing, order, shape = form
        with self.node.open_round(SPEC, UPDATES, timing, order, shape=shape) as round_:
            for i, update in enumerate(SENT):
                round_.submit(update, client_id=i)
            result = round_.result(WAIT_S)
            who = {int(c.client_id) for c in result.report.accepted}
            refused = {int(r.client_id) for r in result.rejected if r.rule == "poison"}
            assert who | refused == set(range(UPDATES)), f"somebody is lost: {who} counted, {refused} refused"
            assert not who & refused
            assert result.num_updates == result.weight == len(who)
            mean, said = result.arrays["w"][0], sum(2**i for i in who) / len(who)
            assert mean == pytest.approx(said, rel=1e-15), f"the mean {mean} is not that of {who}, {said}"
            del result
        self.check_nothing_is_lost()

    def spawner_case(self, form: Form, n: int, m: int = 0) -> tuple[bool, bool]:
        """A round in which a worker dies, so that another is started; who does that dies at step n, its successor at m.

        Whether they did. Every update counts: only the one death may have been of an update.
        """
        timing, order, shape = form
        self.control.arm(SPAWNER, n, m)
        with self.node.open_round(SPEC, UPDATES, timing, order, shape=shape) as round_:
            for i, update in enumerate(SENT):
                if i == 2:
                    os.kill(self.node.pids()[0], signal.SIGKILL)
                round_.submit(update, client_id=i)
            result = round_.result(WAIT_S)
            assert {int(c.client_id) for c in result.report.accepted} == set(range(UPDATES)), (form, n, m)
            assert (result.num_updates, result.arrays["w"][0]) == (UPDATES, (2**UPDATES - 1) / UPDATES), (form, n, m)
            del result
        self.check_nothing_is_lost()
        self.check_all_are_there()
        died = self.control.disarm(SPAWNER)
        self.check_all_are_there()
        return died

    def check_all_are_there(self) -> None:
        """Both workers live, as a spawner's children, and nobody else."""
        assert self.node._supervisor is not None
        end = time.monotonic() + WAIT_S
        while True:
            with self.node.changed:
                spawner, pids = self.node._supervisor.spawner.pid, sorted(self.node.pids())
            with suppress(OSError), open(f"/proc/{spawner}/task/{spawner}/children") as file:
                if len(pids) == 2 and sorted(map(int, file.read().split())) == pids:
                    return
            assert time.monotonic() < end, f"workers {pids} are not all there"
            time.sleep(0.001)

    def check_nothing_is_lost(self) -> None:
        """All blocks come back; the last to let go may be a successor that is still reading what it was told."""
        end = time.monotonic() + 5
        while self.node.arena.free_bytes != self.free:
            assert time.monotonic() < end, f"{self.free - self.node.arena.free_bytes:,} bytes are lost"
            time.sleep(0.0005)

    def case(self, role: str, form: Form, n: int, m: int = 0, sent: int = signal.SIGKILL) -> bool:
        """A round whose `role` gets a signal at step n, its successor at step m; false if neither came so far."""
        me = self.victim(role)
        self.control.arm(me, n, m, sent)
        try:
            self.run(form)
        except BaseException:
            print(f"case: {role}, {form}, step {n}, successor's step {m}")
            raise
        first, second = self.control.disarm(me)
        self.singles += first and not m
        self.pairs += second and bool(m)
        return second if m else first

    def steps(self, role: str, form: Form) -> int:
        """The number of steps of the role in a round: the most of several rounds."""
        most = 0
        for _ in range(4):
            me = self.victim(role)
            self.control.arm(me, 0)
            self.run(form)
            most = max(most, self.control.count(me))
        return most


@pytest.fixture
def bench(
    request: pytest.FixtureRequest, library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Bench]:
    """A Node of two workers that count in the detail that the test asks for; the first leaf is the top."""
    detail, stall_timeout = request.param
    monkeypatch.setattr(assignment.Assignment, "_choose_top", lambda self: self.leaves[0])
    with (
        stepping(library, tmp_path, detail) as control,
        lifl.Node("8MiB", workers=2, stall_timeout=stall_timeout) as node,
    ):
        bench = Bench(node, control)
        yield bench
        for form in FORMS:
            bench.run(form)
        assert len(os.listdir("/proc/self/fd")) == bench.fds


EVERY_ROLE = pytest.mark.parametrize(
    ("role", "form"), ROLES, ids=[f"{role}-{form[0]}-{form[1]}-{form[2]}" for role, form in ROLES]
)


def some(life: int, n: int, transport: str) -> range:
    """Every n-th step of a life, others on one transport than on the other; all of them if all are wanted."""
    return range(1, life + 1) if ALL else range(1 + n // 2 * (transport == "ebpf"), life + 1, n)


def tell(record_property: Any, bench: Bench) -> None:
    """Puts the figures where a report finds them, and on the screen with -s."""
    record_property("singles", bench.singles)
    record_property("pairs", bench.pairs)
    print(f"{bench.singles} single deaths, {bench.pairs} pairs, no violation")


@pytest.mark.parametrize("bench", [("opcodes", 20.0)], indirect=True)
@EVERY_ROLE
def test_killed_between_any_two_instructions(
    bench: Bench, role: str, form: Form, transport: str, record_property: Any
) -> None:
    """The worker dies between any two instructions of its Python and any two accesses to shared memory."""
    steps = bench.steps(role, form)
    assert steps > 300
    cases = some(steps, 10, transport)
    for n in cases:
        bench.case(role, form, n)
    assert bench.singles > 0.8 * len(cases)
    tell(record_property, bench)


@pytest.mark.parametrize("bench", [("steps", 20.0)], indirect=True)
@EVERY_ROLE
def test_successor_is_killed_too(bench: Bench, role: str, form: Form, transport: str, record_property: Any) -> None:
    """Whoever takes over from the dead dies as well, at each of its steps: (step, step) pairs."""
    steps = bench.steps(role, form)
    stride = 2 if role == "shard" else 4  # who has fewer steps
    for n in some(steps, stride, transport):
        m, was_late = 1, 0
        while was_late < 3:  # the successor's steps depend on n: until it outlives the round
            was_late = 0 if bench.case(role, form, n, m) else was_late + 1
            m += 1 if ALL else stride
    # How many steps a life has varies more on sockets: one call may receive several records.
    assert bench.pairs > (steps**2 / (3 if transport == "rings" else 6) if ALL else 10)
    tell(record_property, bench)


@pytest.mark.ladder
@pytest.mark.parametrize("bench", [("spawner", 20.0)], indirect=True)
@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form[0]}-{form[1]}-{form[2]}")
def test_spawner_is_killed(bench: Bench, form: Form, transport: str, record_property: Any) -> None:
    """The spawner dies between any two of its lines, and so does its successor, and a worker that has not begun."""
    bench.spawner_case(form, 0)
    steps = bench.control.count(SPAWNER)
    assert steps > 20
    for n in some(steps, 6, transport):
        first, _ = bench.spawner_case(form, n)
        bench.singles += first
    for n in some(steps, 20, transport):
        for m in some(steps, 20, transport):
            bench.pairs += bench.spawner_case(form, n, m)[1]
    assert bench.singles > 0.5 * len(some(steps, 6, transport))
    assert bench.pairs > 0
    tell(record_property, bench)


@pytest.mark.parametrize("bench", [("steps", 20.0)], indirect=True)
@pytest.mark.parametrize("role", ["leaf", "top"])
def test_recovery_is_killed(
    bench: Bench, role: str, transport: str, monkeypatch: pytest.MonkeyPatch, record_property: Any
) -> None:
    """The sweep is killed at each of its writes to shared memory and done again, while the peer goes on."""
    real_sweep, real_move = recovery.sweep, lifl.shm.Arena.move
    writes_left, was_killed = 0, False

    def move(arena: lifl.shm.Arena, *how: Any) -> bool:
        nonlocal writes_left
        writes_left -= 1
        if writes_left == 0:  # before this write; before the next one is after this one
            os.kill(os.getpid(), signal.SIGKILL)
        return real_move(arena, *how)

    def sweep(arena: lifl.shm.Arena, me: int, sums: Any, updates: Any) -> Any:
        """First in a process that is killed: what it wrote stays, what it knew is gone with it."""
        nonlocal was_killed
        updates = list(updates)
        if (pid := os.fork()) == 0:
            arena.forked = False
            lifl.shm.Arena.move = move  # type: ignore[method-assign]
            real_sweep(arena, me, sums, updates)
            os._exit(0)
        was_killed = os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        return real_sweep(arena, me, sums, updates)

    monkeypatch.setattr(assignment.recovery, "sweep", sweep)
    pairs = 0
    for form in FORMS[:3]:
        for n in some(bench.steps(role, form), 2, transport):
            for m in range(1, 20):
                writes_left, was_killed = m, False
                bench.case(role, form, n)
                if not was_killed:
                    break
                pairs += 1
    bench.pairs = pairs
    assert pairs > (60 if ALL else 30)
    tell(record_property, bench)


@pytest.mark.ladder
@pytest.mark.timeout(1800)  # with LIFL_CRASH=all some fifteen hundred processes, one after another
def test_killed_parent(library: Path, transport: str, tmp_path: Path, record_property: Any) -> None:
    """Whoever made the Node, submits, lends and recovers is killed at a step: all its processes are gone soon."""
    with stepping(library, tmp_path, "lines"):
        program = [sys.executable, str(Path(__file__).parent / "parents.py")]

        def run(*steps: int) -> list[dict[str, float]]:
            done = subprocess.run([*program, *map(str, steps)], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
            return [json.loads(line) for line in done.stdout.splitlines()]

        life = int(max(said["steps"] for said in run(0, 0)[:-1]))
        steps = some(life - 1, max(1, life // 15), transport)
        *_, found = run(*steps)
    assert found["killed"] > 0.8 * len(steps)
    record_property("parents", found)
    print(f"{found['killed']} parents killed at {life} steps, all gone after at most {found['worst_s']:.3f} s")


@pytest.mark.parametrize("bench", [("steps", 0.02)], indirect=True)
@pytest.mark.parametrize(("role", "form"), [("leaf", FORMS[0]), ("top", FORMS[0]), ("shard", FORMS[3])])
def test_stopped_at_any_step(bench: Bench, role: str, form: Form, transport: str, record_property: Any) -> None:
    """A worker that stops for ever at any step is killed when its time is over; it writes nothing afterwards."""
    for n in some(bench.steps(role, form), 2, transport):
        bench.case(role, form, n, sent=signal.SIGSTOP)
    assert bench.singles > (15 if role != "shard" else 1)
    tell(record_property, bench)
