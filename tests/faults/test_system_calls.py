"""System calls that fail, one after another: a clear error or no difference at all, and nothing is left."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.ladder, pytest.mark.transports]

EACH = """
name, error, workers = {name!r}, {error}, {workers}
before, said = fds(), []
for nth in range(1, 200):
    faults.lifl_fail(name.encode(), nth, error)
    try:
        with lifl.Node("4MiB", workers=workers) as node:
            a_round(node)
        outcome = "ok"
    except (LiflError, OSError) as problem:
        outcome = f"{{type(problem).__name__}}: {{problem}}"
    is_fired = faults.lifl_fired()
    faults.lifl_fail(b"", 0, 0)
    check_nothing_left(before)
    if not is_fired:
        break
    said.append(outcome)
assert not is_fired
with lifl.Node("4MiB", workers=workers) as node:
    a_round(node)
print(json.dumps(said))
"""


@pytest.mark.parametrize(
    ("name", "number", "workers", "says"),
    [
        ("memfd_create", errno.ENFILE, 0, "Too many open files in system"),
        ("posix_fallocate", errno.ENOSPC, 0, "No space left"),
        ("posix_fallocate", errno.ENOMEM, 0, "Cannot allocate memory"),
        ("pwrite", errno.EIO, 0, "Input/output error"),
        ("pwrite", 0, 0, "Input/output error"),
        ("mmap", errno.ENOMEM, 0, "Cannot allocate memory"),
        ("eventfd", errno.EMFILE, 1, "Too many open files"),
        ("socketpair", errno.EMFILE, 1, "Too many open files"),
    ],
)
def test_each_call_fails_once(program: Any, shim: Path, name: str, number: int, workers: int, says: str) -> None:
    """The n-th call fails, for each n: an error that says which, nothing left, and another Node works."""
    said = program(EACH.format(name=name, error=number, workers=workers), preload=shim)
    assert said
    for outcome in said:
        assert says in outcome, outcome


def test_short_read_at_an_attach(program: Any, shim: Path) -> None:
    """A header that is not read whole is no arena: the error names what was attached to, and the next attempt works."""
    said = program(
        """
from lifl.errors import ArenaCorruptError
from lifl.shm.arena import Arena
before, said = fds(), []
arena = Arena.create(2**20, 4)
for nth in (1, 2):
    faults.lifl_fail(b"pread", 1, 0)
    mine = fds()
    try:
        Arena.attach(arena.fd)
    except ArenaCorruptError as error:
        said.append([error.errno, str(error), arena.fd, bool(faults.lifl_fired())])
    assert fds() == mine
Arena.attach(arena.fd).close()
arena.close()
check_nothing_left(before)
print(json.dumps(said))
""",
        preload=shim,
    )
    assert len(said) == 2
    for number, message, fd, is_fired in said:
        assert number == errno.EBADMSG
        assert f"attach to the arena at descriptor {fd}" in message
        assert is_fired


@pytest.mark.parametrize("number", [0, errno.EIO], ids=["short", "EIO"])
def test_no_worker_can_read_the_arena(program: Any, shim: Path, number: int) -> None:
    """Each worker's attach fails: the Node ends with an error that says that none has started, and nothing is left."""
    said = program(
        f"""
before, said = fds(), []
os.environ["LIFL_FAULT"] = "pread 1 {number}"  # for the workers, each of which has its own count
try:
    with lifl.Node("4MiB", workers=2) as node, node.open_round(SPEC, 6) as round_:
        round_.result(30)
except PeerGoneError as error:
    said.append(str(error))
check_nothing_left(before)
del os.environ["LIFL_FAULT"]
with lifl.Node("4MiB", workers=2) as node:
    a_round(node)
print(json.dumps(said))
""",
        preload=shim,
    )
    (message,) = said
    assert "died and has no successor" in message
    assert "before it had started" in message


def test_interrupted_polls_are_invisible(program: Any, shim: Path) -> None:
    """EINTR of the agent's sleep makes no difference."""
    code = EACH.format(name="poll", error=errno.EINTR, workers=1).replace("range(1, 200)", "range(1, 8)")
    said = program(code.replace("assert not is_fired\n", ""), preload=shim)
    assert said
    assert set(said) == {"ok"}


def test_signals_a_thousand_times_a_second(program: Any) -> None:
    """Interval timers interrupt whatever the process is in: every round is exact."""
    ticks, rounds = program("""
ticks = 0
def tick(*_):
    global ticks
    ticks += 1
signal.signal(signal.SIGALRM, tick)
with lifl.Node("8MiB", workers=2) as node, lifl.Node("4MiB", workers=0) as inline:
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    end, rounds = time.monotonic() + 4, 0
    while time.monotonic() < end:
        a_round(node, kill=rounds % 10 == 9, timing=("eager", "lazy")[rounds % 2])
        a_round(inline)
        rounds += 1
    signal.setitimer(signal.ITIMER_REAL, 0)
print(json.dumps([ticks, rounds]))
""")
    assert ticks > 500
    assert rounds > 20


def test_wall_clock_jumps(program: Any, shim: Path) -> None:
    """A day forth and a year back: time-outs are neither cut short nor drawn out, and no worker is blamed."""
    said = program(
        """
with lifl.Node("8MiB", workers=2, stall_timeout=1.0) as node:
    pids, waited = node.pids(), []
    with node.open_round(SPEC, 6) as round_:
        round_.submit(SENT[0], client_id=0)
        for jump in (86400, -365 * 86400, 0):
            threading.Timer(0.2, faults.lifl_jump, [ctypes.c_long(jump)]).start()
            before, begin = time.time(), time.monotonic()
            try:
                round_.result(0.5)
            except RoundError as error:
                assert "after 0.5 s" in str(error)
            waited.append(time.monotonic() - begin)
            assert abs(time.time() - before) > 3600
        for i in range(1, 6):
            round_.submit(SENT[i], client_id=i)
        report = round_.result(30).report
    assert node.pids() == pids
    print(json.dumps([waited, report.stages]))
""",
        preload=shim,
    )
    waited, stages = said
    assert min(waited) >= 0.5
    assert all(0 <= seconds < 3600 for seconds in [*waited, *stages.values()])


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EPIPE, errno.ECONNRESET, errno.ENOMEM, errno.ENOBUFS])
def test_a_descriptor_that_a_socket_does_not_take_is_sent_later(
    program: Any, shim: Path, ebpf: None, number: int
) -> None:
    """With the eBPF sidecar each of a round's descriptors is refused once by the kernel: the mean is as ever."""
    count = program(
        f"""
before = fds()
with lifl.Node("4MiB", workers=1, transport="ebpf") as node:
    for nth in range(1, 200):
        faults.lifl_fail(b"send", nth, {number})
        with node.open_round(SPEC, 6, shape=lifl.Shape(1, 0)) as round_:
            for i, update in enumerate(SENT):
                round_.submit(update, client_id=i)
            assert (round_.result(30).arrays["w"] == 63 / 6).all()
        is_fired = faults.lifl_fired()
        faults.lifl_fail(b"", 0, 0)
        if not is_fired:
            break
check_nothing_left(before)
print(json.dumps(nth - 1))
""",
        preload=shim,
    )
    assert 8 <= count < 199
