"""A process that is SIGKILLed at any system call of writing a checkpoint leaves the old one or the new one."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lifl.strategy import checkpoint
from lifl.strategy.history import History

TRACEME, KILL, SYSCALL, SETOPTIONS = 0, 8, 24, 0x4200
EXITKILL = 0x100000
libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]


def killed_after(stops: int, work: Callable[[], None]) -> bool:
    """Does `work` in a fork that is killed at its `stops`-th entry to or exit from a system call; false if it ended."""
    pid = os.fork()
    if pid == 0:
        libc.ptrace(TRACEME, 0, None, None)
        os.kill(os.getpid(), signal.SIGSTOP)
        try:
            work()
        finally:
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSTOPPED(status)
    libc.ptrace(SETOPTIONS, pid, None, EXITKILL)
    for _ in range(stops):
        assert libc.ptrace(SYSCALL, pid, None, None) == 0, os.strerror(ctypes.get_errno())
        _, status = os.waitpid(pid, 0)
        if os.WIFEXITED(status):
            return False
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return True


def a_run(number: int) -> tuple[object, checkpoint.Tensors]:
    """A checkpoint of a size that takes more than one write."""
    tensors: checkpoint.Tensors = {}
    packed = checkpoint.pack({"round": number, "w": np.full(70_000, number, np.float32)}, "v", tensors)
    return packed, tensors


def number_of(path: Path) -> int:
    """The number of the run that is in the file; the whole run is there."""
    packed, tensors = checkpoint.load(path)
    value = checkpoint.unpack(packed, tensors, {})
    assert (value["w"] == value["round"]).all()
    return int(value["round"])


@pytest.mark.timeout(120)
def test_killed_at_every_system_call(tmp_path: Path) -> None:
    """Old or new, never between; and the next write goes through, whatever the dead one left."""
    path = tmp_path / "run"
    checkpoint.save(path, *a_run(1))
    stops, seen = 0, []
    while True:
        stops += 1
        if not killed_after(stops, lambda: checkpoint.save(path, *a_run(2))):
            break
        seen.append(number_of(path))
        checkpoint.save(path, *a_run(1))
        assert os.listdir(tmp_path) == ["run"]
    assert number_of(path) == 2  # the one that was not killed
    assert seen == sorted(seen)  # up to the rename the old one, from then on the new one
    assert seen.count(1) > 10
    assert seen.count(2) >= 2  # the folder's sync comes after the rename
    print(f"\ncheckpoint: killed at {len(seen)} entries to and exits from system calls")


@pytest.mark.timeout(120)
def test_killed_between_history_and_checkpoint(tmp_path: Path) -> None:
    """A checkpoint and the lines that it counts are there together, and a line that no checkpoint counts goes."""
    path = tmp_path / "run"

    def write(number: int) -> None:
        history = History(path)
        if number > 1:
            history.read(checkpoint.load(path)[0])
        checkpoint.save(path, history.append([f"line {number}" * 1000]), {})
        history.commit()

    def lines() -> list[str]:
        return History(path).read(checkpoint.load(path)[0]) or []

    write(1)
    stops, seen = 0, set()
    while True:
        stops += 1
        for file in (path, path.with_name("run.history")):
            shutil.copy(file, tmp_path / f"{file.name}.old")
        if not killed_after(stops, lambda: write(2)):
            break
        seen.add(len(lines()))
        assert lines() == [f"line {number}" * 1000 for number in (1, 2)[: len(lines())]]
        for file in (path, path.with_name("run.history")):
            os.replace(tmp_path / f"{file.name}.old", file)
    assert seen == {1, 2}
    write(3)
    assert lines() == [f"line {number}" * 1000 for number in (1, 2, 3)]


@pytest.mark.timeout(120)
def test_first_write_killed(tmp_path: Path) -> None:
    """A first write leaves no file or a whole one."""
    stops = 0
    found = set()
    while True:
        stops += 1
        path = tmp_path / str(stops) / "run"
        if not killed_after(stops, lambda path=path: checkpoint.save(path, *a_run(2))):  # type: ignore[misc]
            break
        found.add(path.exists())
        assert not path.exists() or number_of(path) == 2
    assert found == {False, True}


def locked_write(path: Path) -> None:
    """The write of a run, in short."""
    with checkpoint.locked(path):
        checkpoint.save(path, *a_run(2))


@pytest.mark.timeout(120)
def test_killed_with_the_lock(tmp_path: Path) -> None:
    """Wherever who has the lock is killed, taking it and letting it go included, the next one gets it at once."""
    stops, left = 0, set()
    while True:
        stops += 1
        path = tmp_path / str(stops) / "run"
        if not killed_after(stops, lambda path=path: locked_write(path)):  # type: ignore[misc]
            break
        left.add(path.with_name("run.lock").exists())
        locked_write(path)
        assert number_of(path) == 2
        assert os.listdir(path.parent) == ["run"]
    assert left == {False, True}
