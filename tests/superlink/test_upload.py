"""The bytes of an object land where they belong and are hashed, in whatever pieces they come."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from flwr.proto.message_pb2 import PushObjectRequest
from hypothesis import given
from hypothesis import strategies as st
from test_body import body

from lifl.superlink.http.targets import SINK_BYTES, Sink, Spool, SpoolBudget
from lifl.superlink.http.upload import Target, Upload
from lifl.superlink.store.content import Landed


class Pieces:
    """A target of several pieces of memory."""

    def __init__(self, sizes: list[int], nbytes: int) -> None:
        self.parts: list[bytearray] = []
        for size in [*sizes, nbytes]:
            self.parts.append(bytearray(min(size, nbytes - sum(map(len, self.parts)))))
        self.is_dropped = False
        self.came_bytes = 0

    def pieces(self) -> list[Any]:
        """Writable, some of them empty."""
        return [memoryview(part) for part in self.parts]

    def came(self, nbytes: int) -> None:
        """Counts what has come."""
        self.came_bytes += nbytes

    def watch(self, on_revoked: Any) -> None:
        """Nobody needs it elsewhere."""

    @property
    def whole(self) -> bytes:
        """The bytes that are there."""
        return b"".join(self.parts)

    def landed(self, digest: str) -> Landed:
        """The object that has landed."""
        return Landed(self.whole, len(self.whole), digest)

    def drop(self) -> None:
        """Notes it."""
        self.is_dropped = True


def feed(upload: Upload, whole: bytes, sizes: list[int], direct: bool) -> None:
    """Brings a body in such pieces: fed, or, once it is aimed and if so wanted, written to its room."""
    at = 0
    for size in [*sizes, len(whole)]:
        data = whole[at : at + size]
        at += len(data)
        if not direct or not upload.is_aimed:
            upload.feed(data)
            continue
        while data:
            room = upload.room()
            n = min(len(room), len(data))
            room[:n] = data[:n]
            upload.advance(n)
            data = data[n:]


@given(
    content=st.binary(max_size=400),
    session_id=st.text("s", max_size=40),
    sizes=st.lists(st.integers(0, 150), max_size=12),
    pieces=st.lists(st.integers(0, 100), max_size=4),
    direct=st.booleans(),
)
def test_bytes_land_right_in_any_pieces(
    content: bytes, session_id: str, sizes: list[int], pieces: list[int], direct: bool
) -> None:
    """The content is in the target, the small fields are beside, and the digest is that of the content alone."""
    whole, target = body(content, session_id), Pieces(pieces, len(content))
    upload = Upload(len(whole), lambda _, nbytes: upload.aim(target) if nbytes == len(content) else None)
    feed(upload, whole, sizes, direct)
    assert upload.is_complete
    request = PushObjectRequest.FromString(upload.fields)
    assert (request.object_id, request.session_id, request.node.node_id) == ("c" * 64, session_id, 7)
    landed = upload.take()
    assert target.whole == content
    assert landed._digest == hashlib.sha256(content).hexdigest()
    assert not target.is_dropped
    upload.drop()
    assert not target.is_dropped, "it is the caller's since it was taken"


@given(sizes=st.lists(st.integers(1, 150), min_size=1, max_size=12), late=st.integers(0, 12))
def test_what_comes_before_there_is_a_place_waits(sizes: list[int], late: int) -> None:
    """The prefix has been seen, the target comes later: nothing is lost."""
    content = bytes(range(250))
    whole, target = body(content), Pieces([], len(content))
    seen: list[tuple[bytes, int]] = []
    upload = Upload(len(whole), lambda *prefix: seen.append(prefix))
    at = 0
    for step, size in enumerate([*sizes, len(whole)]):
        upload.feed(whole[at : at + size])
        at += size
        if seen and not upload.is_aimed and step >= late:
            upload.aim(target)
    if not upload.is_aimed:
        assert not upload.is_complete
        upload.aim(target)
    assert upload.is_complete
    assert len(seen) == 1
    assert seen[0][1] == len(content)
    assert upload.take()._digest == hashlib.sha256(content).hexdigest()
    assert target.whole == content


def test_what_came_with_the_prefix_is_counted_as_copied() -> None:
    """Bytes that came with the prefix are counted as copied, and no others."""
    content = b"x" * 1000
    whole, target = body(content, ""), Pieces([], 1000)
    upload = Upload(len(whole), lambda *_: upload.aim(target))
    feed(upload, whole, [len(whole) - 600], True)
    assert upload.copied_bytes == 400


def test_what_is_no_request_is_told_at_once() -> None:
    """And nothing is asked of anybody."""
    upload = Upload(100, lambda *_: pytest.fail("there is no prefix"))
    with pytest.raises(ValueError, match="wire type 7"):
        upload.feed(b"\x27")


@pytest.mark.parametrize("nbytes", [0, 1, SINK_BYTES - 1, SINK_BYTES, 3 * SINK_BYTES + 5])
def test_what_nobody_wants_is_hashed_and_forgotten(nbytes: int) -> None:
    """A sink takes any length and keeps nothing of it."""
    content = bytes(i % 251 for i in range(nbytes))
    whole = body(content)
    upload = Upload(len(whole), lambda *_: upload.aim(Sink(nbytes)))
    feed(upload, whole, [100, 50_000], True)
    assert upload.is_complete
    landed = upload.take()
    assert (landed._digest, len(landed), landed.content) == (hashlib.sha256(content).hexdigest(), nbytes, b"")
    assert sum(map(len, Sink(nbytes).pieces())) == nbytes
    landed.drop()


@pytest.mark.parametrize("end", [0, 10, 200, 400])
def test_what_is_dropped_gives_its_place_back(end: int) -> None:
    """Once, however often it is dropped, and if it had one."""
    whole, target = body(b"x" * 500), Pieces([], 500)
    upload = Upload(len(whole), lambda *_: upload.aim(target))
    upload.feed(whole[:end])
    upload.drop()
    assert target.is_dropped == (end >= 200)
    target.is_dropped = False
    upload.drop()
    assert not target.is_dropped
    kind: type[Target] = Pieces
    assert isinstance(target, kind)


def test_an_upload_that_cannot_move_gives_both_targets_back() -> None:
    """Memory runs out while the bytes that have come are copied."""
    budget = SpoolBudget(40_000, 2**27)
    whole = body(b"x" * 300_000)
    assert budget.announce("node 7", 300_000) is None
    spool = Spool(None, budget, "node 7", 300_000, lambda: None)
    upload = Upload(len(whole), lambda *_: upload.aim(spool))
    upload.feed(whole[:20_000])
    with pytest.raises(MemoryError):
        upload.move(Sink(300_000))
    upload.drop()
    assert (budget.taken_bytes, dict(budget._announced)) == (0, {})


@given(
    content=st.binary(max_size=300),
    session_id=st.text("abc", max_size=20),
    sizes=st.lists(st.integers(1, 120)),
    moves=st.lists(st.integers(0, 400), max_size=3),
    into=st.lists(st.integers(0, 100), max_size=4),
)
def test_an_upload_that_moves_loses_nothing(
    content: bytes, session_id: str, sizes: list[int], moves: list[int], into: list[int]
) -> None:
    """At any moment, also in the fields behind the content, and more than once."""
    whole = body(content, session_id)
    targets = [Pieces([50, 7], len(content))]
    upload = Upload(len(whole), lambda *_: upload.aim(targets[0]))
    at = 0
    for size in [*sizes, len(whole)]:
        data = whole[at : at + size]
        at += len(data)
        upload.feed(data)
        while upload.is_aimed and moves and at > moves[0]:
            del moves[0]
            targets.append(Pieces(into, len(content)))
            upload.move(targets[-1])
            assert targets[-2].is_dropped
    assert upload.is_complete
    landed = upload.take()
    assert landed._digest == hashlib.sha256(content).hexdigest()
    assert landed.content == content == targets[-1].whole
    assert PushObjectRequest.FromString(upload.fields).session_id == session_id
