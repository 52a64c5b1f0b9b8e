"""The process that starts workers is killed, stopped or refused: it is replaced, and every update counts once."""

from __future__ import annotations

import errno
import os
import random
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lifl
from lifl.errors import AdmissionError, PeerGoneError
from lifl.workers import spawner, supervisor

pytestmark = pytest.mark.transports

UPDATES = 8
SPEC = lifl.TensorSpec.from_arrays({"w": np.zeros(50_000), "n": np.array(0)})
SENT = [{"w": np.full(50_000, 2.0**i), "n": np.array(2**i)} for i in range(UPDATES)]
"""Powers of two: a sum tells exactly who is in it."""
MEAN = (2**UPDATES - 1) / UPDATES
WAIT_S = 60.0
IDLE_S = 0.05
FORMS = [
    *(
        (timing, "any", lifl.Shape(*shape))
        for timing in ("eager", "lazy")
        for shape in ((1, 0), (2, 0), (2, 2), (0, 2))
    ),
    ("jit", "any", None),
    ("eager", "flower", lifl.Shape(0, 2)),
]
"""Timing, order and shape of a round: a leaf that is the top, a tree, shards of two sums, shards of updates."""
EVERY_FORM = pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(map(str, form)))


def spawner_of(node: lifl.Node) -> int:
    """Its pid."""
    assert node._supervisor is not None
    return node._supervisor.spawner.pid


def kill_spawner(node: lifl.Node, sent: int = signal.SIGKILL) -> int:
    """Sends it a signal; the pid that it has had."""
    pid = spawner_of(node)
    os.kill(pid, sent)
    return pid


def run(node: lifl.Node, form: Any = FORMS[0], at: Callable[[int], object] = lambda i: None) -> lifl.RoundReport:
    """A round in which every update must count; `at` is called before each update, and after the last."""
    timing, order, shape = form
    with node.open_round(SPEC, UPDATES, timing, order, shape=shape) as round_:
        for i, update in enumerate(SENT):
            at(i)
            round_.submit(update, client_id=i)
        at(UPDATES)
        result = round_.result(WAIT_S)
        assert sorted(int(one.client_id) for one in result.report.accepted) == list(range(UPDATES))
        assert (result.num_updates, result.rejected) == (UPDATES, ())
        assert (result.arrays["w"] == MEAN).all()
        return result.report


def rest(node: lifl.Node) -> None:
    """Waits until every worker has gone."""
    end = time.monotonic() + WAIT_S
    while node.pids():
        assert time.monotonic() < end, "somebody stays"
        time.sleep(0.01)


def settle(node: lifl.Node, free: int) -> None:
    """The arena has every block back."""
    end = time.monotonic() + 5
    while node.arena.free_bytes != free and time.monotonic() < end:
        time.sleep(0.01)
    assert node.arena.free_bytes == free


# ---------------------------------------------------------------- killed


@EVERY_FORM
def test_killed_at_any_moment_of_a_round(form: Any) -> None:
    """Workers die with it, whatever they do; each has a successor, and every update counts exactly once."""
    with lifl.Node("64MiB", workers=2) as node:
        free = node.arena.free_bytes
        for moment in (0, 1, 5, UPDATES):
            old = {spawner_of(node), *node.pids()}
            run(node, form, lambda i, moment=moment: i == moment and kill_spawner(node))
            end = time.monotonic() + WAIT_S
            while old & {spawner_of(node), *node.pids()}:  # the workers may have ended the round before they died
                assert time.monotonic() < end, "one of the dead has no successor"
                time.sleep(0.001)
            run(node, form)
        settle(node, free)


@pytest.mark.ladder
def test_killed_again_and_again() -> None:
    """At moments of chance, in rounds of every form: nothing that its workers were reading is blamed."""
    choose, over = random.Random(11), threading.Event()
    with lifl.Node("64MiB", workers=3) as node:
        free, kills = node.arena.free_bytes, 0

        def kill() -> None:
            nonlocal kills
            while not over.wait(0.2 + choose.random() * 0.4):
                with node.changed:  # else its pid may be that of one that is being replaced
                    kill_spawner(node)
                kills += 1

        killer = threading.Thread(target=kill)
        killer.start()
        try:
            while kills < 15:
                run(node, choose.choice(FORMS))
        finally:
            over.set()
            killer.join()
        run(node)
        settle(node, free)


@EVERY_FORM
def test_killed_while_all_rest(form: Any) -> None:
    """Nobody is there who would notice: the next round starts another one, and is right."""
    with lifl.Node("64MiB", workers=2, idle_timeout=IDLE_S) as node:
        free = node.arena.free_bytes
        run(node, form)
        rest(node)
        old = kill_spawner(node)
        run(node, form)
        assert spawner_of(node) != old
        with pytest.raises(ProcessLookupError):  # it was reaped
            os.kill(old, 0)
        settle(node, free)


def test_killed_again_before_its_first_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """A spawner that dies while it starts is followed by another one."""
    with lifl.Node("64MiB", workers=2) as node:
        real, killed = spawner.Spawner.start_worker, []

        def start_worker(self: spawner.Spawner, *how: Any) -> tuple[int, int]:
            if len(killed) < 2:
                killed.append(self.pid)
                os.kill(self.pid, signal.SIGKILL)
            return real(self, *how)

        monkeypatch.setattr(spawner.Spawner, "start_worker", start_worker)
        kill_spawner(node)
        run(node)
        assert len({*killed, spawner_of(node)}) == 3


@pytest.mark.parametrize("program", ["/bin/false", "/nonexistent"])
def test_no_other_one_can_be_had(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    """After a few tries open rounds end with PeerGoneError, which says why; nothing waits, nothing is left."""
    with lifl.Node("64MiB", workers=2) as node, node.open_round(SPEC, 2) as round_:
        round_.submit(SENT[0])
        monkeypatch.setattr(sys, "executable", program)
        kill_spawner(node)
        with pytest.raises(PeerGoneError, match=r"has no successor: .*\(3 tries\): see the log"):
            round_.result(WAIT_S)
        assert not node.is_open


@pytest.mark.ladder
def test_one_that_always_dies_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed again and again before a worker has done anything, it is not replaced for ever."""
    monkeypatch.setattr(supervisor.Supervisor, "heard", lambda *_: None)  # nothing is ever done
    with lifl.Node("64MiB", workers=1) as node, node.open_round(SPEC, 2) as round_:
        round_.submit(SENT[0])
        end = time.monotonic() + WAIT_S
        killed = 0
        while node.is_open and time.monotonic() < end:
            if node.pids() and spawner_of(node) != killed:
                killed = kill_spawner(node)
            time.sleep(0.005)
        with pytest.raises(PeerGoneError, match="died 8 times before a worker had done anything"):
            round_.result(WAIT_S)


# ---------------------------------------------------------------- stopped


@pytest.mark.parametrize("is_at_rest", [False, True])
def test_stopped_one_is_killed_and_replaced(monkeypatch: pytest.MonkeyPatch, is_at_rest: bool) -> None:
    """It is waited for a while, not for ever, and the round goes on without it."""
    monkeypatch.setattr(spawner, "FORK_TIMEOUT_S", 0.3)
    with lifl.Node("64MiB", workers=2, idle_timeout=IDLE_S if is_at_rest else None) as node:
        run(node)
        if is_at_rest:
            rest(node)
        old = kill_spawner(node, signal.SIGSTOP)
        run(node, FORMS[1], lambda i: not is_at_rest and i == 4 and os.kill(node.pids()[0], signal.SIGKILL))
        assert spawner_of(node) != old
        with pytest.raises(ProcessLookupError):
            os.kill(old, 0)


def test_stopped_for_a_moment_it_goes_on() -> None:
    """A stop that is shorter than the wait costs only itself."""
    with lifl.Node("64MiB", workers=2, idle_timeout=IDLE_S) as node:
        run(node)
        rest(node)
        old = kill_spawner(node, signal.SIGSTOP)
        timer = threading.Timer(0.3, os.kill, (old, signal.SIGCONT))
        timer.start()
        run(node)
        timer.join()
        assert spawner_of(node) == old


@pytest.mark.ladder
def test_every_new_one_stops(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each try ends when its time is over, and all of them with an error that says so; a start has time of its own."""
    (tmp_path / "sitecustomize.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGSTOP)")
    monkeypatch.setattr(spawner, "FORK_TIMEOUT_S", 0.1)
    monkeypatch.setattr(supervisor, "RESTART_TIMEOUT_S", 0.4)
    with lifl.Node("64MiB", workers=1) as node, node.open_round(SPEC, 2) as round_:
        monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
        kill_spawner(node)
        with pytest.raises(PeerGoneError, match=r"gave no answer for 0\.4 s and was killed \(3 tries\)"):
            round_.result(WAIT_S)


def test_slow_start_is_waited_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Python may take its time to start on a busy machine: the wait for a fork does not hold for it."""
    (tmp_path / "sitecustomize.py").write_text("import time; time.sleep(1)")
    monkeypatch.setattr(spawner, "FORK_TIMEOUT_S", 0.2)
    with lifl.Node("64MiB", workers=2) as node:
        monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
        first = kill_spawner(node)
        run(node)
        made = spawner_of(node)
        run(node)
        assert first != made == spawner_of(node)


def test_ctrl_c_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker that was asked for meanwhile never begins: the next one of its number is alone."""
    with lifl.Node("64MiB", workers=1, idle_timeout=IDLE_S) as node, node.open_round(SPEC, 2) as round_:
        old = kill_spawner(node, signal.SIGSTOP)
        rest(node)
        timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            round_.submit(SENT[0])
        timer.join()
        os.kill(old, signal.SIGCONT)
        round_.submit(SENT[1])
        assert (round_.result(WAIT_S).arrays["w"] == 1.5).all()
        assert spawner_of(node) == old
        (worker,) = node.pids()
        children = Path(f"/proc/{old}/task/{old}/children")
        end = time.monotonic() + 5
        while (left := set(map(int, children.read_text().split()))) != {worker} and time.monotonic() < end:
            time.sleep(0.01)
        assert left == {worker}


# ---------------------------------------------------------------- refused


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bool], None]]:
    """Has the kernel refuse every fork, or stop to."""
    real, is_refused = spawner.Spawner.start_worker, False

    def start_worker(self: spawner.Spawner, *how: Any) -> tuple[int, int]:
        if is_refused:
            raise PeerGoneError(f"the process that starts workers could not start one: {os.strerror(errno.EAGAIN)}")
        return real(self, *how)

    def refuse(what: bool) -> None:
        nonlocal is_refused
        is_refused = what

    monkeypatch.setattr(spawner.Spawner, "start_worker", start_worker)
    return refuse


@EVERY_FORM
def test_a_refused_fork_fails_the_round_once(form: Any, refusing: Callable[[bool], None]) -> None:
    """An update counts and its call returns, or it raises and does not; the result says why, and the Node goes on."""
    timing, order, shape = form
    with lifl.Node("64MiB", workers=2, idle_timeout=IDLE_S) as node:
        free = node.arena.free_bytes
        run(node, form)
        rest(node)
        refusing(True)
        with node.open_round(SPEC, 2, timing, order, shape=shape) as round_:
            counted = []
            for i in range(2):
                with suppress(AdmissionError):  # the round has failed, so that this one does not count
                    round_.submit(SENT[i], client_id=i)
                    counted.append(str(i))
            assert [one.client_id for one in round_.report().accepted] == counted != []
            with pytest.raises(PeerGoneError, match="Resource temporarily unavailable"):
                round_.result(WAIT_S)
        refusing(False)
        run(node, form)
        settle(node, free)


def test_a_refused_fork_costs_no_leaf_that_is_there(refusing: Callable[[bool], None]) -> None:
    """The workers that are there do the work when no other can join."""
    with lifl.Node("64MiB", workers=3, warm=1) as node:
        with node.open_round(SPEC, 1, shape=lifl.Shape(1, 0)) as round_:
            round_.submit(SENT[0])
            round_.result(WAIT_S)
        refusing(True)
        (pid,) = node.pids()
        with node.open_round(SPEC, 40, shape=lifl.Shape(3, 0)) as round_:
            os.kill(pid, signal.SIGSTOP)
            for i in range(40):
                round_.submit(SENT[i % 8])
            os.kill(pid, signal.SIGCONT)
            result = round_.result(WAIT_S)
            assert (result.num_updates, result.report.leaves) == (40, 1)


def test_close_early_without_workers(refusing: Callable[[bool], None]) -> None:
    """It does not raise, the result does."""
    with lifl.Node("64MiB", workers=2, warm=0) as node:
        refusing(True)
        with node.open_round(SPEC, 2, "lazy") as round_:
            round_.submit(SENT[0])
            round_.close_early()
            with pytest.raises(PeerGoneError):
                round_.result(WAIT_S)


# ---------------------------------------------------------------- its children are reaped by others

SIGCHLD = """
import os, signal, subprocess, sys, time
import numpy as np
import lifl
spec = lifl.TensorSpec.from_arrays({"w": np.zeros(1000)})
def go(node, n=4):
    with node.open_round(spec, n) as round_:
        for i in range(n):
            round_.submit({"w": np.full(1000, 2.0**i)}, client_id=i)
        result = round_.result(30)
        assert (result.arrays["w"] == (2**n - 1) / n).all() and result.num_updates == n
def rest(node):
    end = time.monotonic() + 30
    while node.pids() and time.monotonic() < end:
        time.sleep(0.01)
    assert not node.pids()
seen = []
def reap(*_):
    try:
        while (pid := os.waitpid(-1, os.WNOHANG)[0]):
            seen.append(pid)
    except ChildProcessError:
        pass
{set}
before = signal.getsignal(signal.SIGCHLD)
with lifl.Node("32MiB", workers=2, idle_timeout=0.05) as node:
    for _ in range(3):
        go(node)
        rest(node)
    go(node)
    for pid in node.pids()[:1]:
        os.kill(pid, signal.SIGKILL)
    go(node)
    os.kill(node._supervisor.spawner.pid, signal.SIGKILL)
    go(node)
    rest(node)
    os.kill(node._supervisor.spawner.pid, signal.SIGKILL)
    go(node)
    begin = time.monotonic()
assert time.monotonic() - begin < 3, "close had to kill"
assert signal.getsignal(signal.SIGCHLD) is before
print("all is right")
"""


@pytest.mark.ladder
@pytest.mark.parametrize(
    "how",
    ["signal.signal(signal.SIGCHLD, signal.SIG_IGN)", "signal.signal(signal.SIGCHLD, reap)", ""],
    ids=["ignored", "a handler reaps", "inherited"],
)
def test_sigchld_is_the_users(how: str) -> None:
    """Ignored by the program or who started it, or with a handler that reaps all: rounds go on, close ends."""
    prefix = [] if how else ["sh", "-c", "trap '' CHLD; exec \"$@\"", "sh"]
    command = [*prefix, sys.executable, "-c", SIGCHLD.replace("{set}", how)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert done.stdout == "all is right\n", done.stderr
    assert "Traceback" not in done.stderr


# ---------------------------------------------------------------- who is not known does not begin


def test_worker_that_the_agent_does_not_know_never_begins() -> None:
    """Its parent dies when it is forked, before the agent has its pidfd: it ends without a word in shared memory."""
    with lifl.Node("64MiB", workers=1, idle_timeout=IDLE_S) as node:
        rest(node)
        assert node._supervisor is not None
        spawner = node._supervisor.spawner
        spawner._send({"start": 1}, [])  # forks one, and nobody takes the answer
        children, end = Path(f"/proc/{spawner.pid}/task/{spawner.pid}/children"), time.monotonic() + WAIT_S
        while not (there := children.read_text().split()) and time.monotonic() < end:
            time.sleep(0.01)
        unknown = os.pidfd_open(int(there[0]))
        time.sleep(0.3)  # it would have begun
        assert "memfd:lifl" not in Path(f"/proc/{there[0]}/maps").read_text(), "it has mapped the arena"
        os.kill(spawner.pid, signal.SIGKILL)
        try:
            run(node)
            poll = select.poll()
            poll.register(unknown, select.POLLIN)
            assert poll.poll(0), "it lives"
        finally:
            os.close(unknown)
