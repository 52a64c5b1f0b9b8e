"""The checkpoint file: what comes back, what is refused, and that it is old or new but never between."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lifl import checkpoint
from lifl.errors import CheckpointError

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
    """What would not come back as it was is a TypeError that names where it is."""
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
