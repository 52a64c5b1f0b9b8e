"""A run's state in one file: old or new after a crash, never between, and never executed.

Values of closed kinds (no pickle) and tensors go into a safetensors file, with a checksum over all of it. Knows
neither Flower nor rounds: the caller decides what the state of a run is.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from lifl.errors import CheckpointError

FORMAT = "lifl-checkpoint-1"
INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
DTYPES = ("bool", *INTEGERS, "float16", "float32", "float64")
MAX_DEPTH = 50
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}
"""``flock`` on a file system without locks: Lustre without ``-o flock``, some NFS."""
NO_FOLDER_SYNC = {errno.EINVAL, errno.EOPNOTSUPP, errno.EBADF, errno.EACCES, errno.EISDIR}
"""``open`` and ``fsync`` of a folder on a file system that has no such thing: some FUSE, CIFS, cloud drives."""

Tensors = dict[str, Any]
Convert = Callable[[Any], "tuple[str, Any] | None"]


def pack(value: Any, name: str, tensors: Tensors, convert: Convert = lambda value: None) -> Any:
    """`value` in a form that JSON can hold; its arrays go into `tensors`, under names that begin with `name`.

    Kinds: None, bool, int, float, str, bytes, list, tuple, dict, NumPy scalars and arrays of ``DTYPES``, and
    every value that `convert` turns into a pair: the name of a foreign kind, and a value of the kinds above.

    Raises
    ------
    TypeError
        For anything else, subclasses of these kinds too, because they would come back as another type.
    """
    return _pack(value, name, tensors, convert, 0)


def _pack(value: Any, name: str, tensors: Tensors, convert: Convert, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise TypeError(f"{name} is nested more than {MAX_DEPTH} deep")
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) is bytes:
        return {"bytes": value.hex()}
    if type(value) in (list, tuple):
        packed = [_pack(item, f"{name}/{i}", tensors, convert, depth + 1) for i, item in enumerate(value)]
        return {type(value).__name__: packed}
    if type(value) is dict:
        pairs = []
        for i, (key, item) in enumerate(value.items()):
            at = f"{name}/{key if isinstance(key, str) else i}"
            pairs.append([_pack(key, at, tensors, convert, depth + 1), _pack(item, at, tensors, convert, depth + 1)])
        return {"dict": pairs}
    if (type(value) is np.ndarray or isinstance(value, np.generic)) and value.dtype.name in DTYPES:
        at = name
        while at in tensors:
            at += "'"
        native = value.dtype.newbyteorder("=")
        tensors[at] = np.ascontiguousarray(value, native).reshape(value.shape)
        return {"array" if type(value) is np.ndarray else "scalar": at}
    if (foreign := convert(value)) is not None:
        return {"foreign": [foreign[0], _pack(foreign[1], name, tensors, convert, depth + 1)]}
    raise TypeError(f"{name} is a {type(value).__name__}")


def unpack(packed: Any, tensors: Tensors, revive: Mapping[str, Callable[[Any], Any]]) -> Any:
    """The value that :func:`pack` received; `revive` has, for each foreign kind, the function that builds it."""
    if not isinstance(packed, dict):
        return packed
    ((kind, inner),) = packed.items()
    if kind == "bytes":
        return bytes.fromhex(inner)
    if kind in ("list", "tuple"):
        items = [unpack(item, tensors, revive) for item in inner]
        return items if kind == "list" else tuple(items)
    if kind == "dict":
        return {unpack(key, tensors, revive): unpack(item, tensors, revive) for key, item in inner}
    if kind == "array":
        return tensors[inner]
    if kind == "scalar":
        return tensors[inner][()]
    if kind == "foreign":
        return revive[inner[0]](unpack(inner[1], tensors, revive))
    raise ValueError(f"unknown kind {kind!r}")


def save(path: str | os.PathLike[str], packed: Any, tensors: Tensors) -> bool:
    """Replaces the file at `path`, atomically; when the call returns true, the new file is on the disk.

    False: the file is, and its folder cannot be synced on this file system. After a power cut the old one may be back.

    The new file is made in memory, written beside the old one (its name with ``.tmp`` added), synced and renamed over
    it; then the folder is synced. A process that dies in between leaves the old file.

    Raises
    ------
    CheckpointError
        If the new file cannot be written; the old file is as it was.
    """
    from safetensors.numpy import save as to_bytes

    path = Path(path)
    beside = path.with_name(path.name + ".tmp")
    state = json.dumps(packed)
    metadata = {"format": FORMAT, "state": state, "sha256": _checksum(state, tensors)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            # safetensors' own save_file() writes a second temporary file, which would stay if this process died.
            with open(beside, "wb") as file:
                file.write(to_bytes(tensors, metadata))
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        except BaseException:
            with suppress(OSError):
                beside.unlink()
            raise
        return _sync(path.parent)
    except Exception as error:  # safetensors raises errors of its own
        raise CheckpointError(f"cannot write the checkpoint {path}: {error}; {_advice(error)}") from error


def _sync(folder: Path) -> bool:
    """True if the names in a folder are on the disk; false if its file system syncs no folders."""
    try:
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        if error.errno not in NO_FOLDER_SYNC:
            raise
        return False
    return True


def _advice(error: Exception) -> str:
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "make room or choose another checkpoint=" if full else "choose another checkpoint="


@contextmanager
def locked(path: str | os.PathLike[str]) -> Iterator[bool]:
    """Keeps other runs away from the file at `path`, in any process that sees the file, until the block ends.

    The lock is a file beside it (its name with ``.lock`` added), locked with ``flock``: the kernel releases the lock
    when the process ends, however it dies, and a lock file that a dead process left blocks nobody. Yields false on a
    file system without locks: there nobody is kept away.

    Raises
    ------
    CheckpointError
        If another run holds the lock, or the lock file cannot be made.
    """
    path = Path(path)
    beside = path.with_name(path.name + ".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = _lock(beside)
    except BlockingIOError:
        raise CheckpointError(
            f"another run uses the checkpoint {path} (it holds {beside}): wait until that one ends, or choose another "
            "checkpoint="
        ) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise CheckpointError(f"cannot lock the checkpoint {path}: {error}; {_advice(error)}") from error
        with suppress(OSError):
            beside.unlink()
        yield False
        return
    try:
        yield True
    finally:
        with suppress(OSError):
            beside.unlink()
        # A fork may still have the descriptor, so closing it here would not release the lock.
        fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)


def _lock(beside: Path) -> int:
    """The descriptor of the locked file `beside`; raises ``BlockingIOError`` if another run has the lock."""
    while True:
        fd = os.open(beside, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The last holder may have removed the file after this open(): then the lock is on a file without a name,
            # which no other run would find.
            if os.path.samestat(os.fstat(fd), os.stat(beside)):
                return fd
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def load(path: str | os.PathLike[str]) -> tuple[Any, Tensors]:
    """The packed state and the tensors that :func:`save` wrote; the arrays belong to the caller.

    Raises
    ------
    FileNotFoundError
        If there is no file at `path`.
    CheckpointError
        If the file is no checkpoint of lifl, or its bytes are not those that were written.
    """
    from safetensors import SafetensorError, safe_open

    advice = "restore it from a copy, or move it away and begin anew"
    try:
        with safe_open(str(path), framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise CheckpointError(f"{path} is no checkpoint of this lifl ({FORMAT}): choose another checkpoint=")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (`file` is no dict)
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"cannot read the checkpoint {path}: {error}; {advice}") from error
    state = metadata.get("state", "")
    if metadata.get("sha256") != _checksum(state, tensors):
        raise CheckpointError(f"the checkpoint {path} was damaged: its checksum is another; {advice}")
    return json.loads(state), tensors


def _checksum(state: str, tensors: Tensors) -> str:
    digest = hashlib.sha256(state.encode())
    for name in sorted(tensors):
        array = tensors[name]
        digest.update(f"\0{name}\0{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
