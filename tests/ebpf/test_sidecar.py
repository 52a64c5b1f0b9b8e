"""The launcher: who is in the map, where roles lead, what comes to it that was meant for another, what was counted."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from lifl.ebpf import bpf
from lifl.ebpf.links import ends_of
from lifl.ebpf.record import METRICS_BYTES, RECORD_BYTES, Metrics, Record
from lifl.ebpf.sidecar import Sidecar
from lifl.errors import EbpfUnavailableError, PeerGoneError
from lifl.shm.arena import AGENT, Arena
from lifl.shm.ring import NO_BLOCK, Descriptor, Kind, counts_of
from lifl.workers.transport import open_transport

InFork = Callable[[Callable[[], None]], int]
CLONE_NEWNET = 0x40000000
NOBODY = 65534


def numbered(i: int) -> Descriptor:
    """A descriptor that carries a number."""
    return Descriptor(Kind.UPDATE, i)


def descriptors() -> int:
    """The number of descriptors that this process has open."""
    return len(os.listdir("/proc/self/fd"))


# ---------------------------------------------------------------- who is there


def test_a_workers_socket_is_handed_out_once(sidecar: Sidecar) -> None:
    """The launcher keeps no copy of it: when the worker's is closed, it is out of the map."""
    given = sidecar.admit(1)
    assert 1 in set(sidecar._program.socks)
    os.close(given)
    assert 1 not in set(sidecar._program.socks)


def test_a_successor_takes_the_place_before_it_starts(sidecar: Sidecar, arena: Arena) -> None:
    """From the moment of burial what is sent is kept for it, and it finds nothing of its predecessor's."""
    outbox = sidecar.outbox()
    dead = sidecar.admit(1)
    outbox.push(1, numbered(1))
    os.close(dead)
    assert counts_of(arena, 1) == (1, 0)
    sidecar.bury(1)
    assert counts_of(arena, 1) == (1, 1)
    outbox.push(1, numbered(2))
    inbox, _ = ends_of(arena, sidecar.admit(1), 1)
    assert inbox.try_pop() == (AGENT, numbered(2))
    assert inbox.try_pop() is None
    inbox._socket.close()


def test_a_burial_touches_nobody_else(sidecar: Sidecar, arena: Arena) -> None:
    """Records that others were sent are still there, and still count against their credits."""
    outbox, other = sidecar.outbox(1), sidecar.inbox(3)
    os.close(sidecar.admit(2))
    outbox.push(3, numbered(1))
    sidecar.bury(2)
    assert counts_of(arena, 3) == (1, 0)
    assert other.try_pop() == (1, numbered(1))


def test_a_thousand_admissions_leave_nothing_behind(sidecar: Sidecar) -> None:
    """Workers come and go: two descriptors for each that lives, none for the dead."""
    os.close(sidecar.admit(1))
    before = descriptors()
    for _ in range(1000):
        sidecar.bury(1)
        os.close(sidecar.admit(1))
    assert descriptors() == before
    assert set(sidecar._program.socks) == {0xFFFFFFFF}


def test_no_descriptor_is_inherited_by_programs(sidecar: Sidecar) -> None:
    """A program that this process executes has none of the sidecar's."""
    sidecar.inbox(1)
    count = "import os; print(len(os.listdir('/proc/self/fd')))"
    with_it = subprocess.run([sys.executable, "-c", count], capture_output=True, check=True, close_fds=False).stdout
    sidecar.close()
    without = subprocess.run([sys.executable, "-c", count], capture_output=True, check=True, close_fds=False).stdout
    assert with_it == without


def test_without_descriptors_there_is_no_successor(sidecar: Sidecar) -> None:
    """The limit is told as what it is, nothing is left of the attempt, and what is there goes on."""
    outbox, inbox, before = sidecar.outbox(), sidecar.inbox(1), descriptors()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    try:
        for more in range(3):  # for the listening socket, for the first of the pair, for its anchor
            resource.setrlimit(resource.RLIMIT_NOFILE, (free + more, limits[1]))
            with pytest.raises(PeerGoneError, match=r"no socket for worker 2: .*Too many open files"):
                sidecar.admit(2)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert descriptors() == before
    outbox.push(1, numbered(1))
    assert inbox.try_pop() == (AGENT, numbered(1))
    os.close(sidecar.admit(2))


def test_a_worker_needs_no_privilege(sidecar: Sidecar, arena: Arena, in_fork: InFork) -> None:
    """Another user without any capability sends and receives through the socket that it was given."""
    inbox, outbox, given, fd = sidecar.inbox(), sidecar.outbox(), sidecar.admit(1), arena.fd
    if os.geteuid() != 0:
        pytest.fail("a process that may load the program can change its user")
    outbox.push(1, numbered(1))

    def work() -> None:
        mine = Arena.attach(fd)
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        with pytest.raises(PermissionError):
            bpf.Map.create(bpf.SOCKHASH, 4, 4, 1, "refused")
        mine_in, mine_out = ends_of(mine, given, 1)
        assert mine_in.try_pop() == (AGENT, numbered(1))
        mine_out.push(AGENT, numbered(2))

    assert in_fork(work) == 0
    os.close(given)
    assert inbox.try_pop() == (1, numbered(2))


# ---------------------------------------------------------------- roles


def test_a_role_leads_where_the_table_says(sidecar: Sidecar) -> None:
    """From the next record on; to nobody: to the launcher, which has nobody to give it to."""
    leaf, inboxes = sidecar.outbox(1), {me: sidecar.inbox(me) for me in (2, 3)}
    for me in (2, 3, 2):
        sidecar.route_top(4, me)
        leaf.push(3, Descriptor(Kind.SUM, 4, me))
        assert inboxes[me].try_pop() == (1, Descriptor(Kind.SUM, 4, me))
    sidecar.route_top(4, None)
    sidecar.route_top(4, None)
    leaf.push(3, Descriptor(Kind.SUM, 4))
    assert all(inbox.try_pop() is None for inbox in inboxes.values())
    assert sidecar.inbox().try_pop() is None
    assert sidecar.metrics()[AGENT].missed == 1


def test_a_round_that_is_over_takes_no_room_in_the_table(sidecar: Sidecar) -> None:
    """More rounds than there are routes, one after another, each with its top."""
    before = set(sidecar._program.routes)
    for number in range(5000):
        sidecar.route_top(number, 2)
        sidecar.route_top(number, None)
    assert set(sidecar._program.routes) == before


# ---------------------------------------------------------------- strays


def test_a_workers_record_for_one_without_a_socket_is_sent_on(sidecar: Sidecar) -> None:
    """It comes to the launcher, which sends it again when asked what has come: then its successor has a socket."""
    worker, agent = sidecar.outbox(1), sidecar.inbox()
    sidecar.outbox()
    os.close(sidecar.admit(2))
    sent = Descriptor(Kind.SUM, 4, 7, 3, 1)
    sidecar.route_top(4, 2)
    worker.push(2, sent)
    sidecar.bury(2)
    assert agent.try_pop() is None
    assert sidecar.inbox(2).try_pop() == (AGENT, sent)


def test_the_agents_own_record_is_not_sent_on(sidecar: Sidecar) -> None:
    """The agent tells a successor all that it has to know: twice would be once too often."""
    outbox, agent = sidecar.outbox(), sidecar.inbox()
    os.close(sidecar.admit(2))
    outbox.push(2, numbered(1))
    sidecar.bury(2)
    assert agent.try_pop() is None
    assert sidecar.inbox(2).try_pop() is None
    assert sidecar.metrics()[2].missed == 1


def test_a_stray_for_nobody_ends(sidecar: Sidecar) -> None:
    """Sent on to a role that nobody has it comes back, and is then the agent's own: it does not go round for ever."""
    worker, agent = sidecar.outbox(1), sidecar.inbox()
    sidecar.outbox()
    worker.push(2, Descriptor(Kind.SUM, 4))
    assert agent.try_pop() is None
    assert agent.try_pop() is None
    assert sidecar.metrics()[AGENT].missed == 2


# ---------------------------------------------------------------- what was counted


def test_kinds_are_counted_apart(sidecar: Sidecar) -> None:
    """Records and updates at who gets them; what was folded, and how long that took, at who says so."""
    agent, worker = sidecar.outbox(), sidecar.outbox(1)
    sidecar.inbox(1)
    agent.push(1, Descriptor(Kind.OPEN, 1))
    for _ in range(3):
        agent.push(1, numbered(1))
    for _ in range(2):
        worker.spent.ns += 5_000
        worker.push(AGENT, Descriptor(Kind.FOLDED, 1))
    metrics = sidecar.metrics()
    leaf, mine = metrics[1], metrics[AGENT]
    assert (leaf.records, leaf.bytes, leaf.updates, leaf.folded, leaf.busy_ns) == (4, 4 * RECORD_BYTES, 3, 2, 10_000)
    assert (mine.records, mine.bytes, mine.updates, mine.folded, mine.busy_ns) == (2, 2 * RECORD_BYTES, 0, 0, 0)
    assert 0 < leaf.first_ns < leaf.last_ns < mine.first_ns < mine.last_ns


def test_what_the_agent_reports_is_its_own_too(sidecar: Sidecar, arena: Arena) -> None:
    """It is counted at another key than what the agent gets, and told together with that."""
    sidecar.outbox(1).push(AGENT, numbered(1))
    sidecar.inbox(1)
    outbox = sidecar.outbox()
    outbox.spent.ns = 3_000
    outbox.push(1, numbered(1))
    mine = sidecar.metrics()[AGENT]
    assert (mine.records, mine.busy_ns) == (1, 3_000)
    assert set(sidecar.metrics()) == {AGENT, 1}


def test_counts_of_all_cpus_are_added_up(sidecar: Sidecar) -> None:
    """A sender that moves from CPU to CPU is counted on each; together it is what was sent."""
    outbox, cpus = sidecar.outbox(), sorted(os.sched_getaffinity(0))
    sidecar.inbox(1)
    try:
        for count, cpu in enumerate(cpus, 1):
            os.sched_setaffinity(0, {cpu})
            for _ in range(count):
                outbox.push(1, numbered(0))
    finally:
        os.sched_setaffinity(0, cpus)
    counted = sidecar._program.metrics.lookup(1)
    assert counted is not None
    each = [int.from_bytes(counted[at : at + 8], "little") for at in range(0, len(counted), METRICS_BYTES)]
    assert {cpu: n for cpu, n in enumerate(each) if n} == {cpu: n for n, cpu in enumerate(cpus, 1)}
    assert sidecar.metrics()[1].records == sum(range(1, 1 + len(cpus)))


def test_merging_takes_sums_the_first_and_the_last() -> None:
    """The times of a CPU that has counted nothing are left out."""
    parts = [(2, 64, 1, 500, 900, 3, 7, 0), (0,) * 8, (5, 160, 0, 400, 800, 0, 1, 2)]
    data = b"".join(number.to_bytes(8, "little") for part in parts for number in part)
    assert Metrics.merged(data) == Metrics(7, 224, 1, 400, 900, 3, 8, 2)
    assert Metrics.merged(bytes(2 * METRICS_BYTES)) == Metrics()


def test_a_full_table_of_metrics_loses_no_record(sidecar: Sidecar) -> None:
    """A participant that is not counted is served all the same."""
    outbox, inbox = sidecar.outbox(), sidecar.inbox(1)
    table = sidecar._program.metrics
    for key in range(100_000, 100_000 + 4096):
        value = ctypes.create_string_buffer(table.value_bytes)
        table._call(bpf._UPDATE, bpf._key(key), value)
    outbox.push(1, numbered(8))
    assert inbox.try_pop() == (AGENT, numbered(8))
    assert 1 not in sidecar.metrics()


# ---------------------------------------------------------------- the end, and without


def test_close_is_harmless_twice_and_says_nothing_afterwards(arena: Arena, kernel: None) -> None:
    """All descriptors are gone after the first, and a number that another file has by now is left alone."""
    before = descriptors()
    sidecar = Sidecar(arena)
    sidecar.inbox(1)
    os.close(sidecar.admit(2))
    sidecar.close()
    assert descriptors() == before
    read, write = os.pipe()
    sidecar.close()
    os.write(write, b"x")
    assert os.read(read, 1) == b"x"
    os.close(read)
    os.close(write)
    assert sidecar.metrics() == {}


def test_a_forks_close_is_its_own(sidecar: Sidecar, in_fork: InFork) -> None:
    """A child that lets go of its copies, or just ends, takes nothing from this process."""
    inbox, outbox = sidecar.inbox(1), sidecar.outbox()
    assert in_fork(sidecar.close) == 0
    assert in_fork(lambda: None) == 0
    outbox.push(1, numbered(1))
    assert inbox.try_pop() == (AGENT, numbered(1))
    assert sidecar.metrics()[1].records == 1


def test_a_killed_launcher_leaves_nothing_in_the_kernel(kernel: None) -> None:
    """Its program and maps go with it, and its workers read end-of-file."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        try:
            ours.close()
            sidecar = Sidecar(Arena.create(1, 4))
            with open(f"/proc/self/fdinfo/{sidecar._program.fd}") as file:
                number = next(line.split()[1] for line in file if line.startswith("prog_id"))
            socket.send_fds(theirs, [number.encode()], [sidecar.admit(1)])
            signal.pause()
        finally:
            os._exit(1)
    theirs.close()
    number, fds, _, _ = socket.recv_fds(ours, 64, 1)
    ours.close()
    with socket.socket(fileno=fds[0]) as own:
        assert program_exists(int(number))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        own.settimeout(60)
        assert own.recv(RECORD_BYTES) == b""
    # The last to hold it was the map, and to hold that, this socket: the kernel tidies up a moment later.
    for _ in range(600):
        if not program_exists(int(number)):
            break
        time.sleep(0.1)
    assert not program_exists(int(number))


def program_exists(number: int) -> bool:
    """True if the kernel has a program of this id: BPF_PROG_GET_FD_BY_ID."""
    try:
        fd = bpf.bpf(13, number.to_bytes(4, "little") + bytes(8))
    except FileNotFoundError:
        return False
    os.close(fd)
    return True


def test_without_a_loopback_device_it_says_what_to_do(namespaces: None, in_fork: InFork) -> None:
    """In a network namespace whose device is down there is no sidecar; with "auto" there are rings."""

    def check() -> None:
        assert ctypes.CDLL(None).unshare(CLONE_NEWNET) == 0
        arena = Arena.create(1, 2)
        before = descriptors()
        with pytest.raises(EbpfUnavailableError, match="ip link set lo up") as caught:
            Sidecar(arena)
        assert "loopback" in caught.value.reason
        del caught
        assert descriptors() == before
        assert open_transport("auto", arena).name == "rings"

    assert in_fork(check) == 0


def test_a_record_that_names_a_worker_beyond_the_arena_is_let_go(sidecar: Sidecar) -> None:
    """A worker that is out of its mind cannot end the agent with it."""
    agent = sidecar.inbox()
    sidecar.outbox()
    with socket.socket(fileno=sidecar.admit(1)) as own:
        for src, line in ((1, 60_000), (60_000, 2), (60_000, 60_000)):
            own.sendall(Record(77, src, line, 5, 0, NO_BLOCK, 0, 0, Kind.SUM, 0).pack())
        own.sendall(Record(AGENT, 60_000, 0, 5, 0, NO_BLOCK, 0, 0, Kind.HELLO, 0).pack())
    assert agent.try_pop() is None
