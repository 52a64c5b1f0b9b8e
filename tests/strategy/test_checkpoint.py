"""The checkpoint file: what comes back, what is refused, and that it is old or new but never between."""

from __future__ import annotations

import errno
import fcntl
import math
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lifl.errors import CheckpointError
from lifl.strategy import checkpoint

VALUE: dict[Any, Any] = {
    "nothing": None,
    "flags": (True, False),
    "numbers": [0, -(2**70), 1.5, math.inf, -0.0, 5e-324],
    "text": "é\ud800\0",
    "bytes": b"\0\xff",
    7: {"nested": ({"deep": [()]},)},
    "array": np.arange(6, dtype=np.float32).reshape(2, 3).T,
    "0-d": np.array(3, np.int64),
    "empty": np.zeros((0, 4), np.float16),
    "scalar": np.float64(2.5),
    "booleans": np.array([True, False]),
    "swapped": np.arange(3, dtype=">i4"),
}


def there_and_back(value: Any, path: Path) -> Any:
    """A value by way of a file."""
    tensors: checkpoint.Tensors = {}
    checkpoint.save(path, checkpoint.pack(value, "v", tensors), tensors)
    packed, tensors = checkpoint.load(path)
    return checkpoint.unpack(packed, tensors, {})


def same(a: Any, b: Any) -> bool:
    """Equal in kind, dtype, shape and every bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, np.ndarray):
        return a.shape == b.shape and a.dtype.newbyteorder("=") == b.dtype and np.array_equal(a, b)
    return repr(a) == repr(b)


def test_values_come_back(tmp_path: Path) -> None:
    """Every kind, with odd values: the same when it is read."""
    assert same(VALUE, there_and_back(VALUE, tmp_path / "a" / "new" / "run.safetensors"))


def test_tensors_of_one_name_are_kept_apart(tmp_path: Path) -> None:
    """Keys that make the same name do not make the same tensor."""
    value = {"a/b": np.array(1), "a": {"b": np.array(2)}}
    assert same(value, there_and_back(value, tmp_path / "run"))


class Mine(dict):  # type: ignore[type-arg]
    """A user's own class."""


@pytest.mark.parametrize(
    "value", [object(), {1, 2}, Mine(), 1j, np.array(["a"]), np.array([None]), np.array([1j]), len]
)
def test_other_kinds_are_refused(value: object) -> None:
    """A value that would not come back as it was is a TypeError that names its place."""
    with pytest.raises(TypeError, match=r"^v/0/inner"):
        checkpoint.pack([{"inner": value}], "v", {})


def test_depth_is_bounded() -> None:
    """A value that contains itself ends in an error."""
    value: list[Any] = []
    value.append(value)
    with pytest.raises(TypeError, match="nested more than"):
        checkpoint.pack(value, "v", {})


def test_none_there(tmp_path: Path) -> None:
    """No file is not a damaged file."""
    with pytest.raises(FileNotFoundError):
        checkpoint.load(tmp_path / "run")


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    """Whichever byte changes, the file is refused or (in the header's spelling) says the same."""
    path = tmp_path / "run"
    value = {"w": np.arange(5, dtype=np.float32), "round": 3}
    there_and_back(value, path)
    good = path.read_bytes()
    refused = 0
    for at in range(len(good)):
        bad = bytearray(good)
        bad[at] ^= 0x10
        path.write_bytes(bad)
        try:
            packed, tensors = checkpoint.load(path)
        except CheckpointError:
            refused += 1
        else:
            assert same(value, checkpoint.unpack(packed, tensors, {}))
    assert refused > len(good) * 0.8


@pytest.mark.parametrize("cut", [0, 1, 8, 100, -1])
def test_torn_file(tmp_path: Path, cut: int) -> None:
    """A file that ends too soon is refused."""
    path = tmp_path / "run"
    there_and_back(VALUE, path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match="move it away"):
        checkpoint.load(path)


def test_foreign_files(tmp_path: Path) -> None:
    """A model that somebody else saved, a text, a folder: refused, with what to do."""
    from safetensors.numpy import save_file

    save_file({"w": np.zeros(3)}, tmp_path / "model")
    with pytest.raises(CheckpointError, match="choose another"):
        checkpoint.load(tmp_path / "model")
    (tmp_path / "text").write_text("hello " * 100)
    with pytest.raises(CheckpointError, match="cannot read"):
        checkpoint.load(tmp_path / "text")
    with pytest.raises(CheckpointError, match="cannot read"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_failure_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """A full disk, whenever it shows: an error, the old file, and nothing beside it."""
    path = tmp_path / "run"
    there_and_back(1, path)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, call, full)
        with pytest.raises(CheckpointError, match=r"No space left.*make room"):
            checkpoint.save(path, 2, {})
    assert checkpoint.load(path)[0] == 1
    assert os.listdir(tmp_path) == ["run"]


HOLDER = """
import sys, time
from lifl.strategy import checkpoint

with checkpoint.locked(sys.argv[1]):
    print(1, flush=True)
    time.sleep(600)
"""


def refused(path: Path) -> str:
    """The error of a run that wants the checkpoint of another run."""
    with pytest.raises(CheckpointError) as said, checkpoint.locked(path):
        pass
    return str(said.value)


def test_a_locked_checkpoint_is_one_runs(tmp_path: Path, in_fork: Callable[[Callable[[], None]], int]) -> None:
    """While one run has it another gets an error that says which file and what to do, in any process; then it may."""
    path, other = tmp_path / "new" / "run", tmp_path / "new" / "other"

    def elsewhere() -> None:
        assert "another run uses" in refused(path)
        with checkpoint.locked(other):  # the folder is not locked, only the file
            pass

    with checkpoint.locked(path):
        said = refused(path)
        assert in_fork(elsewhere) == 0
        checkpoint.save(path, 1, {})
    assert said == (
        f"another run uses the checkpoint {path} (it holds {path}.lock): wait until that one ends, or choose another "
        "checkpoint="
    )
    assert os.listdir(path.parent) == ["run"]
    with checkpoint.locked(path):
        pass


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    """Whoever is killed leaves a file and no lock."""
    path = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"1\n"
        assert "another run uses" in refused(path)
        process.send_signal(signal.SIGKILL)
    assert os.listdir(tmp_path) == ["run.lock"]
    with checkpoint.locked(path):
        pass
    assert os.listdir(tmp_path) == []


def test_a_fork_does_not_keep_the_lock(tmp_path: Path) -> None:
    """A child that was forked meanwhile, and lives on, has the descriptor, and no lock when the run has ended."""
    path = tmp_path / "run"
    with checkpoint.locked(path):
        child = os.fork()
        if child == 0:
            signal.pause()
            os._exit(0)
    try:
        with checkpoint.locked(path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_lock_that_was_removed_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one before ends between the opening of the file and its lock: there is a new file, and one lock."""
    path, real, removed = tmp_path / "run", fcntl.flock, []

    def flock(fd: int, how: int) -> None:
        if not removed:
            removed.append(path.with_name("run.lock").unlink())
        real(fd, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with checkpoint.locked(path):
        assert removed
        assert "another run uses" in refused(path)


def test_many_want_one_lock(tmp_path: Path) -> None:
    """Processes that take it and let it go, over and over: never two at once."""
    path, inside = tmp_path / "run", tmp_path / "inside"

    def often() -> None:
        for _ in range(300):
            try:
                with checkpoint.locked(path):
                    os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
                    inside.unlink()
            except CheckpointError as error:
                if "another run uses" not in str(error):
                    raise

    children = []
    for _ in range(4):
        children.append(os.fork())
        if children[-1] == 0:
            status = 1
            try:
                often()
                status = 0
            finally:
                os._exit(status)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert os.listdir(tmp_path) == []


def test_no_lock_can_be_had(tmp_path: Path) -> None:
    """A folder that is a file: an error that says so, and nothing left open."""
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot lock the checkpoint .*file/run.*; choose another") as said:
        checkpoint.locked(tmp_path / "file" / "run").__enter__()
    assert "make room" not in str(said.value)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """The run goes on; the caller is told that nobody is kept away, and no lock file is left."""

    def none(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", none)
    with checkpoint.locked(tmp_path / "run") as is_locked:
        assert not is_locked
        there_and_back(1, tmp_path / "run")
    assert os.listdir(tmp_path) == ["run"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP, errno.EACCES])
def test_a_folder_that_cannot_be_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """The file is written, and the caller is told; another error of the folder is still one."""
    real = os.fsync

    def fsync(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(number, os.strerror(number))
        real(fd)

    assert checkpoint.save(tmp_path / "run", 1, {})
    monkeypatch.setattr(os, "fsync", fsync)
    assert not checkpoint.save(tmp_path / "run", 2, {})
    assert checkpoint.load(tmp_path / "run")[0] == 2
    number = errno.EIO
    with pytest.raises(CheckpointError, match="Input/output error"):
        checkpoint.save(tmp_path / "run", 3, {})
