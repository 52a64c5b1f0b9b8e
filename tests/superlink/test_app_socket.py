"""The socket at which ServerApps find the server: who is let in, what is given, and what nonsense does."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import socket
import stat
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
from flower_objects import update
from flwr.app import Message, RecordDict
from rig import Rig
from scripted_clients import Client, check_mean, flowers, play, says, settled, wait_until

from lifl import ipc
from lifl.errors import LeaseError, PeerGoneError, RoundError
from lifl.report.entries import Rejection
from lifl.round.admission import Limits
from lifl.round.round import core_of
from lifl.shm.arena import Arena, Block
from lifl.strategy import server_client
from lifl.strategy.landing import Landing, spec_of
from lifl.strategy.server_client import Server
from lifl.superlink import app_socket as app_socket_module
from lifl.superlink.app_socket import AppSocket

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")

SETRESUID = {"x86_64": 117, "aarch64": 147}
MODEL = {"w": np.zeros((30, 40), np.float32), "b": np.zeros(3)}
HONEST = [({"w": np.full((30, 40), n, np.float32), "b": np.full(3, float(n))}, float(n)) for n in (1, 3)]


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    """A server for this module."""
    with Rig("16MiB") as made:
        yield made


def path_of(rig: Rig) -> Path:
    """Its socket."""
    return ipc.path_for(rig.port)


class Peer:
    """A connection to a server's socket, on which anything can be said."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self.socket.connect(str(path))  # which waits while many do
        self.socket.settimeout(10)
        self._reader, self._frames = ipc.Reader(), list[ipc.Frame]()
        data, self.fds, _, _ = socket.recv_fds(self.socket, 2**16, 4)
        self._frames += self._reader.feed(data)
        self.welcome = self.hear() if data else None

    def hear(self) -> dict[str, Any] | None:
        """The next frame; None if the server has closed the connection."""
        while not self._frames:
            try:
                data = self.socket.recv(2**16)
            except ConnectionError:
                return None
            if not data:
                return None
            self._frames += self._reader.feed(data)
        return self._frames.pop(0)[0]

    def say(self, **said: Any) -> None:
        """Sends a frame."""
        self.socket.sendall(ipc.encode(said))

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()
        for fd in self.fds:
            os.close(fd)


@pytest.fixture
def app_socket(rig: Rig) -> Iterator[AppSocket]:
    """A second one over the same rounds, which listens nowhere yet."""
    made = AppSocket(rig.plane.rounds, rig.plane.node.arena.fd)
    yield made
    made.close()


# ---------------------------------------------------------------- who is let in


def as_user(uid: int, act: Callable[[], None]) -> None:
    """Does it in a thread of another user's: by the kernel's call, since the C library's is for all threads."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            assert ctypes.CDLL(None).syscall(SETRESUID[platform.machine()], -1, uid, -1) == 0
            act()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


needs_root = pytest.mark.skipif(
    os.getuid() != 0 or platform.machine() not in SETRESUID, reason="only root can become another user"
)


def test_the_socket_is_this_users_alone(rig: Rig) -> None:
    """Mode 0600, in a folder of mode 0700."""
    found = path_of(rig).lstat()
    assert stat.S_ISSOCK(found.st_mode)
    assert stat.S_IMODE(found.st_mode) == 0o600
    assert stat.S_IMODE(path_of(rig).parent.stat().st_mode) == 0o700
    assert found.st_uid == os.getuid()


@needs_root
def test_another_user_cannot_reach_it(rig: Rig) -> None:
    """The file system is in the way."""
    with pytest.raises(PermissionError):
        as_user(65534, lambda: Peer(path_of(rig)).__exit__())


@needs_root
def test_another_user_is_not_let_in(app_socket: AppSocket, rig: Rig, tmp_path: Path) -> None:
    """A caller of another user gets neither a frame nor a descriptor; other callers are served as before."""
    path = tmp_path / "s"
    app_socket.listen(path)
    open_to_all(path)

    def refused() -> None:
        with Peer(path) as peer:
            assert peer.welcome is None
            assert peer.fds == []

    as_user(65534, refused)
    with Peer(path) as peer:
        assert peer.welcome == {"event": "welcome", "pid": os.getpid()}
        assert len(peer.fds) == 1
    assert not rig.plane.rounds.registry.rounds()


def open_to_all(path: Path) -> None:
    """Lets everybody reach a file."""
    path.chmod(0o666)
    for folder in path.parents:
        if folder.stat().st_mode & 0o007 == 0:
            folder.chmod(folder.stat().st_mode | 0o011)


# ---------------------------------------------------------------- what is given


def test_what_is_given_cannot_be_written(rig: Rig) -> None:
    """The arena's descriptor can be mapped to be read, and nothing else."""
    with Peer(path_of(rig)) as peer:
        (fd,) = peer.fds
        size = os.fstat(fd).st_size
        with mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ) as seen:
            assert len(seen) == size
        for protection in (mmap.PROT_WRITE, mmap.PROT_READ | mmap.PROT_WRITE):
            with pytest.raises(PermissionError):
                mmap.mmap(fd, size, mmap.MAP_SHARED, protection)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.write(fd, b"x")
        with pytest.raises(OSError, match=r"Invalid argument|not permitted"):
            os.ftruncate(fd, 0)


def test_an_arena_is_attached_by_it_read_only(rig: Rig) -> None:
    """As a strategy does it: what is there can be seen, of a block's right generation."""
    node = rig.plane.node.arena
    block = node.alloc(100_000)
    assert block is not None
    memoryview(node.buffer(block))[:5] = b"hello"
    with Peer(path_of(rig)) as peer:
        arena = Arena.attach(peer.fds[0])
        assert bytes(memoryview(arena.buffer(block)).toreadonly()[:5]) == b"hello"
        with pytest.raises(LeaseError):
            arena.buffer(Block(block.index, block.generation + 1, block.nbytes))
        arena.close()
    node.reclaim(block)


# ---------------------------------------------------------------- where it listens


def test_a_second_server_is_told_that_there_is_one(app_socket: AppSocket, rig: Rig) -> None:
    """The first one's socket stays as it is."""
    with pytest.raises(OSError, match="another lifl-superlink listens there"):
        app_socket.listen(path_of(rig))
    with Peer(path_of(rig)) as peer:
        assert peer.welcome is not None


@pytest.mark.parametrize("left", ["a socket of a server that was killed", "a file"])
def test_what_nobody_listens_at_is_replaced(app_socket: AppSocket, tmp_path: Path, left: str) -> None:
    """A server that was killed could not remove it."""
    path = tmp_path / "s"
    if left == "a file":
        path.write_text("")
    else:
        with socket.socket(socket.AF_UNIX) as killed:
            killed.bind(str(path))
            killed.listen()
    assert path.exists()
    app_socket.listen(path)
    with Peer(path) as peer:
        assert peer.welcome is not None
    app_socket.close()
    assert not path.exists()
    app_socket.close()


@pytest.mark.parametrize("wrong", ["mode", "file"])
def test_a_server_without_a_folder_for_it_runs_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    """Its ServerApps fold for themselves; it does not listen where others could come in."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv(ipc.VARIABLE, raising=False)
    if wrong == "mode":
        (tmp_path / "lifl").mkdir()
        (tmp_path / "lifl").chmod(0o755)
    else:
        (tmp_path / "lifl").write_text("")
    with Rig("4MiB") as rig:
        assert ipc.VARIABLE not in os.environ
        assert not list(tmp_path.rglob("*.sock"))
        assert "ServerApps" not in str(rig.plane)  # its line in the log names no socket
        run_id, token = rig.start_run()
        with rig.grid(run_id, token) as grid:
            assert Server.find(grid) is None


# ---------------------------------------------------------------- nonsense


def framed(body: bytes, count: int = 0, blobs: bytes = b"") -> bytes:
    """A frame whose parts are given."""
    return struct.pack("<III", len(body), count, len(blobs)) + body + blobs


OPEN: dict[str, Any] = {
    "do": "open",
    "run_id": 0,  # the test's
    "message_type": "train",
    "group_id": "1",
    "nodes": [5],
    "weight_key": "num-examples",
    "spec": [["w", "float32", [3]]],
    "timing": "eager",
    "order": "any",
    "limits": {"max_weight": 10.0, "clipping_norm": None, "client_bytes": None, "total_bytes": None},
}

NONSENSE: dict[str, bytes | dict[str, Any]] = {
    "bytes": b"GET / HTTP/1.1\r\n\r\n" * 10,
    "a frame without end": struct.pack("<III", 2**32 - 1, 0, 0),
    "no JSON": framed(b"\xff\xfe"),
    "a number": framed(b"7"),
    "a string": framed(b'"do"'),
    "a deep nest": framed(b"[" * 100_000),
    "sizes that lie": framed(b'{"sizes": [5]}', 1, b"abc"),
    "nothing to do": {},
    "something else": {"do": "format_disk"},
    "an attribute": {"do": "_init__"},
    "a number to do": {"do": 5},
    "no messages": {"do": "bound"},
    "messages by number": {"do": "bound", "messages": 5},
    "a round of nothing": {"do": "open"},
    "a run by name": {**OPEN, "run_id": "seven"},
    "nodes by name": {**OPEN, "nodes": ["you"]},
    "no nodes": {**OPEN, "nodes": []},
    "a tensor of a dtype that is none": {**OPEN, "spec": [["w", "complex64", [3]]]},
    "a tensor of less than nothing": {**OPEN, "spec": [["w", "float32", [-3]]]},
    "a tensor beyond all bounds": {**OPEN, "spec": [["w", "float32", [2**62, 2**62]]]},
    "a spec that is none": {**OPEN, "spec": 5},
    "the same tensor twice": {**OPEN, "spec": [["w", "float32", [3]], ["w", "float32", [3]]]},
    "another timing": {**OPEN, "timing": "never"},
    "another order": {**OPEN, "order": "alphabetic"},
    "limits that are none": {**OPEN, "limits": {"max_weight": -1}},
    "limits that nobody knows": {**OPEN, "limits": {"more": 1}},
}


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_ends_only_its_connection(rig: Rig, name: str) -> None:
    """Or is answered by a refusal; who is connected beside is served, and no round stays open."""
    run_id, _ = rig.start_run()
    said = NONSENSE[name]
    with Peer(path_of(rig)) as beside, Peer(path_of(rig)) as peer:
        if isinstance(said, bytes):
            peer.socket.sendall(said)
        else:
            peer.say(**({**said, "run_id": run_id} if said.get("run_id") == 0 else said))
        heard = peer.hear()
        assert heard is None or heard["event"] == "failed" or heard == {"event": "bound", "count": 0}, heard
        beside.say(do="bound", messages=["x"])
        assert beside.hear() == {"event": "bound", "count": 0}
    wait_until(lambda: not rig.plane.rounds.registry.rounds())
    rig.settle()
    rig.state.stop_run(run_id)


def test_who_goes_before_a_word_is_said_is_forgotten(rig: Rig) -> None:
    """Also many of them."""
    for _ in range(50):
        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect(str(path_of(rig)))  # which waits while more than a few are
    wait_until(lambda: not rig.plane.app_socket._connections)
    with Peer(path_of(rig)) as peer:
        assert peer.welcome is not None
    wait_until(lambda: not rig.plane.app_socket._connections)


def test_what_needs_a_round_says_that_there_is_none(rig: Rig) -> None:
    """And the connection goes on; closing what is not open is harmless."""
    with Peer(path_of(rig)) as peer:
        for what in ("report", "finish"):
            peer.say(do=what)
            assert peer.hear() == {"event": "failed", "kind": "RoundError", "reason": "no round is open"}
        for what in ("close", "leave"):
            peer.say(do=what)
            assert peer.hear() == {"event": "closed"}


def test_after_all_that_a_round_is_right(rig: Rig) -> None:
    """With nonsense beside it."""
    with Peer(path_of(rig)) as peer:
        peer.socket.sendall(b"\0" * 11)  # all but a head
        round_, _ = play(rig, MODEL, HONEST)
        check_mean(round_, HONEST)


# ---------------------------------------------------------------- one round at a time


def test_a_new_round_ends_the_one_before(rig: Rig) -> None:
    """A connection has one; what was asked for the first is the first's, and does not count in the second."""

    def try_to_answer(client: Client, asked: Message) -> None:
        client.push(asked, client.announce(asked, update(HONEST[0][0])))

    client = Client(rig, try_to_answer)
    run_id, token = rig.start_run()
    with rig.grid(run_id, token) as grid:
        server = Server.find(grid)
        assert server is not None
        spec = spec_of(flowers(MODEL))
        content = RecordDict({"arrays": flowers(MODEL)})
        for group in ("1", "2"):
            messages = [Message(content, client.node.id, "train", group_id=group)]
            round_ = server.open_round(run_id, messages, spec, "num-examples", "eager", "any", Limits())
            assert len(rig.plane.rounds.registry.rounds()) == 1
            assert grid.push_messages(messages)
            assert server.count_bound([messages[0].metadata.message_id]) == 1
        replied = ""
        while replied != messages[0].metadata.message_id:
            replied = next(server.replies(10)).message.metadata.reply_to_message_id
        assert round_.result().num_updates == 1
        server.close()
    client.close()
    settled(rig)
    rig.state.stop_run(run_id)


def test_a_mean_that_takes_long_is_waited_for(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that makes a mean may take longer than for any other answer."""
    monkeypatch.setattr(server_client, "ANSWER_TIMEOUT_S", 0.5)
    monkeypatch.setattr(app_socket_module, "core_of", lambda round_: time.sleep(1.5) or core_of(round_))
    round_, _ = play(rig, MODEL, HONEST)
    assert round_.report.error is None
    check_mean(round_, HONEST)


def test_the_replies_of_a_node_with_two_messages_have_two_names(rig: Rig) -> None:
    """A refusal of one of them, when it has been accepted, is that one's."""
    client = Client(rig, says(update(HONEST[0][0])))
    run_id, token = rig.start_run()
    with rig.grid(run_id, token) as grid:
        server = Server.find(grid)
        assert server is not None
        content, spec = RecordDict({"arrays": flowers(MODEL)}), spec_of(flowers(MODEL))
        messages = [Message(content, client.node.id, "train", group_id="1") for _ in range(2)]
        round_ = server.open_round(run_id, messages, spec, "num-examples", "eager", "any", Limits())
        landing = Landing(None, spec, 2, "num-examples", "eager", "any", False, Limits(), None, round_)
        assert grid.push_messages(messages)
        came = server.replies(10)
        replies = [next(came) for _ in messages]
        assert {reply.client for reply in replies} == {client.name, f"{client.name}#2"}
        for reply in replies:
            landing.note(reply)
        for count, name in ((1, f"{client.name}#2"), (0, client.name)):
            refused = attrs.evolve(round_.report(), rejected=(Rejection(name, "poison", "it kills workers"),))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(round_, "report", lambda refused=refused: refused)
                assert landing.num_accepted == count
        server.close()
    client.close()
    settled(rig)
    rig.state.stop_run(run_id)


def test_a_round_that_is_left_leaves_its_messages_to_the_serverapp(rig: Rig) -> None:
    """Replies that have come, into the update's block too, can be pulled as from Flower's server."""
    theirs = HONEST[0][0]
    client = Client(rig, says(update(theirs)))
    run_id, token = rig.start_run()
    with rig.grid(run_id, token) as grid:
        server = Server.find(grid)
        assert server is not None
        messages = [Message(RecordDict({"arrays": flowers(MODEL)}), client.node.id, "train", group_id="1")]
        server.open_round(run_id, messages, spec_of(flowers(MODEL)), "num-examples", "eager", "any", Limits())
        assert server.ask({"do": "leave"}, "closed") == {"event": "closed"}
        assert not rig.plane.rounds.registry.rounds()
        ids = list(grid.push_messages(messages))
        replies: list[Message] = []
        wait_until(lambda: replies.extend(grid.pull_messages(ids)) or replies)
        got = replies[0].content.array_records["arrays"]
        for name, array in got.items():
            np.testing.assert_array_equal(array.numpy(), theirs[name])
        with pytest.raises(RoundError, match="no round is open"):
            server.ask({"do": "finish"}, "result")
        server.close()
    client.close()
    rig.state.stop_run(run_id)
    rig.settle()


def test_who_does_not_read_holds_nobody_up(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames wait for a ServerApp that does not read; others' replies are settled, and in the end it is dropped."""
    monkeypatch.setattr("lifl.superlink.app_socket.SEND_TIMEOUT_S", 2)
    wait_until(lambda: not rig.plane.app_socket._connections)
    with Peer(path_of(rig)):
        (connection,) = rig.plane.app_socket._connections
        for _ in range(16):  # more than a socket holds: this thread would not come back
            connection._send({"event": "reply"}, [bytes(2**20)])
        round_, _ = play(rig, MODEL, HONEST)
        check_mean(round_, HONEST)
        wait_until(lambda: not rig.plane.app_socket._connections)


def test_a_server_that_ends_is_told() -> None:
    """A strategy that is connected hears of it at once."""
    with Rig("4MiB") as rig:
        run_id, token = rig.start_run()
        with rig.grid(run_id, token) as grid:
            server = Server.find(grid)
            assert server is not None
            rig.plane.app_socket.close()
            with pytest.raises(PeerGoneError, match=r"closed the connection|is gone"):
                server.count_bound(["x"])
            server.close()
    assert not path_of(rig).exists()
