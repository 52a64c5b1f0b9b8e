"""Frames between a ServerApp and its server, the socket's place, and who may use it."""

from __future__ import annotations

import ctypes
import os
import platform
import socket
import stat
import struct
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lifl import ipc
from lifl.ipc import MAX_BLOB_BYTES, MAX_JSON_BYTES, Reader, encode, uid_of_peer

SETRESUID = {"x86_64": 117, "aarch64": 147}

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
said = st.dictionaries(st.text().filter(lambda name: name != "sizes"), json_values, max_size=4)
frames = st.lists(st.tuples(said, st.lists(st.binary(max_size=50), max_size=4)), max_size=5)


@given(frames, st.lists(st.integers(0, 60), max_size=20))
def test_frames_come_out_as_they_went_in(sent: list[tuple[dict[str, Any], list[bytes]]], sizes: list[int]) -> None:
    """In whatever pieces the stream comes, also of strings without bytes."""
    stream, reader, got, at = b"".join(encode(*frame) for frame in sent), Reader(), [], 0
    for size in [*sizes, len(stream)]:
        got += reader.feed(stream[at : at + size])
        at += size
    assert got == sent
    assert reader.feed(b"") == []


@pytest.mark.parametrize(
    ("json_bytes", "blob_bytes"), [(MAX_JSON_BYTES + 1, 0), (2, MAX_BLOB_BYTES + 1), (2**32 - 1, 2**32 - 1)]
)
def test_a_frame_beyond_any_is_refused_before_it_comes(json_bytes: int, blob_bytes: int) -> None:
    """Its head is enough."""
    with pytest.raises(ValueError, match="beyond any that is sent"):
        Reader().feed(struct.pack("<III", json_bytes, 0, blob_bytes))


def framed(body: bytes, count: int = 0, blobs: bytes = b"") -> bytes:
    """A frame whose parts are given."""
    return struct.pack("<III", len(body), count, len(blobs)) + body + blobs


@pytest.mark.parametrize(
    "frame",
    [
        framed(b"no JSON"),
        framed(b"\xff\xfe"),
        framed(b""),
        framed(b"{}"),
        framed(b'{"sizes": [1]}'),
        framed(b'{"sizes": [3]}', 1, b"12"),
        framed(b'{"sizes": [1, 1]}', 1, b"12"),
        framed(b'{"sizes": [-1, 3]}', 2, b"12"),
        framed(b'{"sizes": ["1"]}', 1, b"1"),
        framed(b'{"sizes": 1}', 1, b"1"),
        framed(b"[]"),
        framed(b"[" * 100_000),
        framed(b'"sizes"'),
        framed(b"7"),
        framed(b"null"),
    ],
    ids=lambda frame: repr(frame[12:32]),
)
def test_what_is_no_frame_is_refused(frame: bytes) -> None:
    """With a ValueError, whatever it is."""
    with pytest.raises(ValueError, match="frame"):
        Reader().feed(frame)


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The runtime folder of this user."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path


def test_the_folder_is_made_for_this_user_alone(runtime: Path) -> None:
    """Mode 0700 whatever the umask; found again it is used again."""
    before = os.umask(0)
    try:
        made = ipc.folder()
    finally:
        os.umask(before)
    assert made == runtime / "lifl"
    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    assert ipc.folder() == made
    assert ipc.path_for(9092) == made / "superlink-9092.sock"


def test_without_a_runtime_folder_it_is_among_the_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under a name with the user's id."""
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert ipc.folder() == tmp_path / f"lifl-{os.getuid()}"


@pytest.mark.parametrize("kind", ["none", "file", "another user's"])
def test_a_runtime_folder_that_is_not_ones_own_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """As sudo -E, su and cron leave it in the environment."""
    runtime = tmp_path / "99999"
    if kind == "file":
        runtime.write_text("")
    if kind == "another user's":
        if os.getuid() != 0:
            pytest.skip("only root can give a folder away")
        runtime.mkdir(mode=0o777)
        os.chown(runtime, 65534, 65534)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert ipc.folder() == tmp_path / f"lifl-{os.getuid()}"


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701, 0o777])
def test_a_folder_that_others_can_enter_is_refused(runtime: Path, mode: int) -> None:
    """It says what to do."""
    (runtime / "lifl").mkdir()
    (runtime / "lifl").chmod(mode)
    with pytest.raises(PermissionError, match=r"is not a folder of mode 0700 of user \d+: remove it"):
        ipc.folder()


def test_what_is_no_folder_is_refused(runtime: Path) -> None:
    """A file, or a link to a folder that would do."""
    (runtime / "lifl").write_text("")
    with pytest.raises(PermissionError, match="is not a folder"):
        ipc.folder()
    (runtime / "lifl").unlink()
    (runtime / "elsewhere").mkdir(mode=0o700)
    (runtime / "lifl").symlink_to(runtime / "elsewhere")
    with pytest.raises(PermissionError, match="is not a folder"):
        ipc.folder()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_another_users_folder_is_refused(runtime: Path) -> None:
    """Even if it is closed to others."""
    (runtime / "lifl").mkdir(mode=0o700)
    os.chown(runtime / "lifl", 65534, 65534)
    with pytest.raises(PermissionError, match="is not a folder"):
        ipc.folder()


@pytest.mark.parametrize("uid", [0, 65534])
@pytest.mark.skipif(os.getuid() != 0 or platform.machine() not in SETRESUID, reason="only root can become another user")
def test_the_kernel_says_who_the_peer_is(uid: int) -> None:
    """By its effective user id when it connected."""
    name = f"\0lifl-test-{os.getpid()}-{uid}"  # of no file: it does not matter who may reach it
    with socket.socket(socket.AF_UNIX) as listening, socket.socket(socket.AF_UNIX) as here:
        listening.bind(name)
        listening.listen(1)

        def connect() -> None:
            # The kernel's call is for this thread alone. The C library's is for all threads.
            assert ctypes.CDLL(None).syscall(SETRESUID[platform.machine()], -1, uid, -1) == 0
            here.connect(name)

        thread = threading.Thread(target=connect)
        thread.start()
        thread.join()
        peer, _ = listening.accept()
        with peer:
            assert uid_of_peer(peer) == uid
