"""Fixtures of all tests: above all, that none of them leaves a process, a descriptor or a file behind."""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import lifl
from lifl.shm.arena import Arena
from tests.forkserver import RUNNING

MARK = "LIFL_TESTS"
SETTLE_S = 15.0
"""The time in which a test's processes and descriptors must be gone: a bound on liveness, not a measurement."""

FAILED = pytest.StashKey[bool]()

THINNED = {"bench", "c", "cli", "crash", "ebpf", "faults", "fuzz", "monitor", "node", "process", "round"}
THINNED |= {"strategy", "superlink", "workers"}
MAX_CASES = 2
"""Cases of one test in these folders that ``make test`` runs: the first and the last. ``make check`` runs all."""


def pytest_configure(config: pytest.Config) -> None:
    """Registers the markers and marks this process's environment, which all its descendants inherit."""
    config.addinivalue_line("markers", "big: takes about 8 GiB of memory; deselect with -m 'not big'")
    config.addinivalue_line("markers", "ladder: takes long; `make check` has it, `make test` does not")
    config.addinivalue_line("markers", "transports: runs on rings and on the eBPF sidecar")
    config.addinivalue_line("markers", "leaves(reason): leaves what lifl does not own; exempt from the check")
    os.environ[MARK] = str(os.getpid())
    # Started in the background of a script, this process ignores Ctrl-C, and its children would too.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Remembers that a test failed: its traceback then keeps alive what it held."""
    report = yield
    if call.excinfo is not None:
        item.stash[FAILED] = True
    return report


def processes() -> dict[int, str]:
    """Descendants of this process but the fork server, and those re-parented that carry its mark; zombies too."""
    mark = f"{MARK}={os.getpid()}".encode()
    parents, names, found = {}, {}, set()
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        try:
            with open(f"/proc/{pid}/stat", "rb") as file:
                name, _, rest = file.read().rpartition(b") ")
            state, parent, _ = rest.split(b" ", 2)
            parents[pid], names[pid] = int(parent), f"{name.decode()}) {state.decode()}"
            with open(f"/proc/{pid}/environ", "rb") as file:
                if mark in file.read().split(b"\0"):
                    found.add(pid)
        except OSError:  # it ended meanwhile, or is another user's
            continue
    for pid in parents:
        line = [pid]
        while line[-1] in parents:
            line.append(parents[line[-1]])
        if os.getpid() in line[1:]:
            found.add(pid)
    return {pid: names[pid] for pid in found - RUNNING - {os.getpid()} if pid in names}


def descriptors() -> dict[int, str]:
    """Open file descriptors and what they lead to."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:  # that of the listing itself
            continue
    return found


def shared_memory() -> set[str]:
    """The names in /dev/shm."""
    return set(os.listdir("/dev/shm"))


def are_others(names: set[str]) -> set[str]:
    """The names that processes of other runs have open: other tests run at the same time."""
    mine, found = processes().keys() | {os.getpid()}, set()
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        if pid in mine:
            continue
        try:
            with open(f"/proc/{pid}/maps") as file:
                text = file.read()
            text += " ".join(os.readlink(one.path) for one in os.scandir(f"/proc/{pid}/fd"))
        except OSError:  # it ended meanwhile, or is another user's
            continue
        found |= {name for name in names if f"/dev/shm/{name}" in text}
    return found


def left_behind(before: tuple[dict[int, str], dict[int, str], set[str]]) -> list[str]:
    """The new processes, descriptors and files since `before`, in words."""
    children, fds, files = before
    left = [f"process {pid}: {name}" for pid, name in processes().items() if pid not in children]
    now = descriptors()
    if len(now) > len(fds):
        left += [f"descriptor {fd}: {to}" for fd, to in now.items() if fds.get(fd) != to]
    if names := shared_memory() - files:
        left += [f"/dev/shm/{name}" for name in names - are_others(names)]
    return left


def close_embedded() -> None:
    """Closes the process's embedded Node, which otherwise lives until exit."""
    node = getattr(sys.modules.get("lifl.node.embedded"), "_node", None)
    if node is not None:
        node.close()


def check_nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """The body of the two fixtures below."""
    before = (processes(), descriptors(), shared_memory())
    yield
    close_embedded()
    if request.node.stash.get(FAILED, False) or request.node.get_closest_marker("leaves"):
        return
    deadline, generation = time.monotonic() + SETTLE_S, 1
    while (left := left_behind(before)) and time.monotonic() < deadline:
        # Only now, and first what is young: a full collection takes longer than most tests.
        gc.collect(generation)
        generation = 2
        time.sleep(0.01)
    assert not left, "left behind: " + "; ".join(left)


@pytest.fixture(autouse=True, scope="module")
def module_leaves_nothing(request: pytest.FixtureRequest) -> Iterator[None]:
    """Everything that a module's fixtures made is gone when they are."""
    yield from check_nothing_left(request)


@pytest.fixture(autouse=True)
def test_leaves_nothing(request: pytest.FixtureRequest) -> Iterator[None]:
    """Everything that a test made is gone when it ends."""
    yield from check_nothing_left(request)


@pytest.fixture
def arena() -> Iterator[Arena]:
    """A small arena of 16 units for four participants that poisons what is freed."""
    arena = Arena.create(16 * 65536, 4, debug=True)
    yield arena
    arena.close()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests with the marker ``transports`` run on both."""
    if metafunc.definition.get_closest_marker("transports"):
        if "transport" not in metafunc.fixturenames:
            metafunc.fixturenames.insert(0, "transport")
        metafunc.parametrize("transport", ["rings", "ebpf"], indirect=True, scope="module")


def pytest_itemcollected(item: pytest.Item) -> None:
    """They use the fixture although they do not ask for it, before any other: what pytest has dropped is put back."""
    if item.get_closest_marker("transports") and "transport" not in item.fixturenames:  # type: ignore[attr-defined]
        item.fixturenames.insert(0, "transport")  # type: ignore[attr-defined]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves most cases of tests that start processes, arenas or servers to the ladder."""
    cases: dict[tuple[Path, str], list[pytest.Item]] = {}
    for item in items:
        if isinstance(item, pytest.Function) and item.path.parent.name in THINNED:
            cases.setdefault((item.path, item.originalname), []).append(item)
    for found in cases.values():
        for item in found[MAX_CASES - 1 : -1]:
            item.add_marker(pytest.mark.ladder)


@pytest.fixture(scope="module")
def transport(request: pytest.FixtureRequest) -> Iterator[str]:
    """The transport of the Nodes of a module's tests, and of the processes that the tests start."""
    name, before = getattr(request, "param", "rings"), os.environ.get("LIFL_TRANSPORT")
    if name == "ebpf":
        request.getfixturevalue("ebpf")
    os.environ["LIFL_TRANSPORT"] = name
    yield name
    del os.environ["LIFL_TRANSPORT"]
    if before is not None:
        os.environ["LIFL_TRANSPORT"] = before


@pytest.fixture(scope="module", params=[0, 1, 2, 5], ids="{}-workers".format)
def warm_node(request: pytest.FixtureRequest, transport: str) -> Iterator[lifl.Node]:
    """A long-lived Node for each number of workers: for property tests, which use it for every example."""
    with lifl.Node("64MiB", workers=request.param, debug=True) as node:
        yield node


@pytest.fixture
def node(warm_node: lifl.Node, request: pytest.FixtureRequest) -> Iterator[lifl.Node]:
    """The long-lived Node; after the test its arena has every block back."""
    free = warm_node.arena.free_bytes
    yield warm_node
    if request.node.stash.get(FAILED, False):
        return
    deadline, generation = time.monotonic() + SETTLE_S, 1
    while warm_node.arena.free_bytes < free and time.monotonic() < deadline:
        gc.collect(generation)
        generation = 2
        time.sleep(0.01)
    assert warm_node.arena.free_bytes >= free, "the arena has not every block back"
    assert not warm_node.has_rounds


@pytest.fixture(scope="session")
def ebpf() -> None:
    """The eBPF sidecar can be had; in CI it must be."""
    from lifl.ebpf.probe import support

    found = support()
    if not found.available and os.environ.get("CI") != "true":
        pytest.skip(f"no eBPF here: {found.reason}; {found.remedy}")
    assert found.available, found


@pytest.fixture
def in_fork() -> Callable[[Callable[[], None]], int]:
    """Runs a function in a fork of this process and gives its exit status: 0 if it returned."""

    def run(function: Callable[[], None]) -> int:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                function()
                status = 0
            except BaseException as error:
                print(f"in the fork: {error!r}", file=sys.stderr, flush=True)
            finally:
                os._exit(status)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    return run
