"""Local sockets: frames between processes of a machine, the peer's user, and the sockets that a fork must close.

A frame is a JSON object and any number of byte strings. File descriptors are passed beside the first byte. Owns the
format, the place of the socket and the right to use it; knows neither rounds nor Flower. Nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
import struct
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

VARIABLE = "LIFL_AGENT"
"""The environment variable with the path of a server's socket, for the programs that the server starts."""

_HEAD = struct.Struct("<III")  # bytes of JSON, number of byte strings, bytes of all of them
MAX_JSON_BYTES = 64 * 2**20
MAX_BLOB_BYTES = 256 * 2**20

Frame = tuple[dict[str, Any], list[bytes]]


def encode(fields: dict[str, Any], blobs: Sequence[bytes] = ()) -> bytes:
    """The bytes of a frame."""
    body = json.dumps({**fields, "sizes": [len(blob) for blob in blobs]}).encode()
    return b"".join([_HEAD.pack(len(body), len(blobs), sum(map(len, blobs))), body, *blobs])


class Reader:
    """Reads frames from a stream of bytes that comes in pieces."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def feed(self, data: bytes) -> list[Frame]:
        """The frames that `data` completes; raises ``ValueError`` for bytes that are no frame."""
        self._bytes += data
        frames = []
        while len(self._bytes) >= _HEAD.size:
            json_bytes, count, blob_bytes = _HEAD.unpack_from(self._bytes)
            if json_bytes > MAX_JSON_BYTES or blob_bytes > MAX_BLOB_BYTES:
                raise ValueError(f"a frame of {json_bytes:,} + {blob_bytes:,} bytes is beyond any that is sent")
            end = _HEAD.size + json_bytes + blob_bytes
            if len(self._bytes) < end:
                break
            fields, sizes = _parsed(self._bytes[_HEAD.size : _HEAD.size + json_bytes])
            at, blobs = _HEAD.size + json_bytes, []
            if len(sizes) != count or sum(sizes) != blob_bytes:
                raise ValueError(f"a frame says {len(sizes)} byte strings and has {count}")
            for size in sizes:
                blobs.append(bytes(self._bytes[at : at + size]))
                at += size
            del self._bytes[:end]
            frames.append((fields, blobs))
        return frames


def _parsed(body: bytes | bytearray) -> tuple[dict[str, Any], list[int]]:
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"a frame without JSON: {error}") from None
    sizes = fields.pop("sizes", None) if isinstance(fields, dict) else None
    if not isinstance(sizes, list) or not all(isinstance(size, int) and size >= 0 for size in sizes):
        raise ValueError("a frame that does not say the sizes of its byte strings")
    return fields, sizes


def folder() -> Path:
    """The folder of mode 0700 in which servers of this user have their sockets; it is made if need be.

    It is in ``XDG_RUNTIME_DIR`` if that is a folder of this user's (``sudo -E``, ``su`` and cron leave another's), else
    among the temporary files. Raises ``PermissionError`` if the path has another owner, another mode, or is no folder.
    """
    given = os.environ.get("XDG_RUNTIME_DIR")
    path = Path(given) / "lifl" if given and _is_own(given) else Path(tempfile.gettempdir()) / f"lifl-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise PermissionError(f"{path} is not a folder of mode 0700 of user {os.getuid()}: remove it")
    return path


def _is_own(folder: str) -> bool:
    try:
        found = os.stat(folder)
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()


def path_for(port: int) -> Path:
    """The path of the socket of the server that listens on a port."""
    return folder() / f"superlink-{port}.sock"


def uid_of_peer(connection: socket.socket) -> int:
    """The user id of the process at the other end, from the kernel."""
    _, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(uid)


# ---------------------------------------------------------------- forks

_listening: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def keep_from_forks(listening: socket.socket) -> None:
    """Closes the copy of a listening socket in every fork that is made from now on.

    A fork has none of the threads that serve the socket: a client that connected to the copy would wait for ever, and
    the port would be taken for as long as the fork lives.
    """
    _listening.add(listening)


def _close_in_child() -> None:
    for listening in list(_listening):
        listening.close()


if hasattr(os, "register_at_fork"):  # not on Windows, where importing lifl must work too
    os.register_at_fork(after_in_child=_close_in_child)
