"""Flower's ObjectStore over the arena: what is large lies in blocks, what is small in bytes.

Owns which objects there are, who refers to them and where their bytes are. Hashing, copying and checking of what
came over the network is done before :meth:`ArenaStore.put`, outside its lock.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import attrs
from sqlalchemy import event

from lifl.superlink import flower
from lifl.superlink.content import Content, Landed, answer_head

_names = flower.part("store")

IS_CHECKING = bool(os.environ.get("LIFL_CHECK_CONTENT"))
"""Hash contents again when they are read and when they go, and raise if they have changed; for tests, it is slow."""

MAX_DEPTH, MAX_OBJECTS = 100, 2**18
"""Of the objects below one: protobuf does not read deeper trees, and no model has so many chunks."""

MAX_HEAD_BYTES = 2**25
"""The ids of half a million objects."""

broken: list[str] = []
"""What that check has found: who reads may swallow the error."""


@attrs.define(eq=False)
class _Entry:
    children: tuple[str, ...] | None  # None: it is here without anybody having registered it
    runs: set[int]
    content: Content | bytes | None = None  # None: not there, or not there any more
    references: int = 0
    beside: frozenset[str] = frozenset()  # what goes with it although it is not below it


class ArenaStore(_names.ObjectStore):  # type: ignore[misc,name-defined] # a base that is found at run time
    """Flower's in-memory store, except that content may be a block of the arena and may be given up while registered.

    `on_available` is called, without the lock, with the id of each object that has come.
    """

    is_durable = False

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}
        self._runs: dict[int, set[str]] = {}
        self._lock = threading.RLock()
        self.on_available: Callable[[str], None] = lambda _: None

    # ------------------------------------------------------------ Flower's methods

    def preregister(self, run_id: int, object_tree: Any) -> list[str]:
        """Notes a tree's objects; the ids of those that have to be pushed, each once."""
        nodes = [
            (node.object_id, tuple(c.object_id for c in node.children)) for node in _names.iterate_tree(object_tree)
        ]
        for object_id, _ in nodes:
            if not _names.is_valid_id(object_id):
                raise ValueError(f"Invalid object ID format: {object_id}")
        missing, is_disputed = dict[str, None](), False
        with self._lock:
            of_run = self._runs.setdefault(run_id, set())
            for object_id, children in nodes:  # children come before their parents
                entry = self._entries.get(object_id)
                if entry is None:
                    entry = self._entries[object_id] = _Entry(None, {run_id})
                if entry.children is None:
                    entry.children = children
                    for child in children:
                        self._entries[child].references += 1
                    if entry.content is not None:
                        self._correct(object_id, entry, entry.content)
                is_disputed |= entry.children != children
                entry.runs.add(run_id)
                of_run.add(object_id)
                if entry.content is None:
                    missing[object_id] = None
            root = self._entries[object_tree.object_id]
            if is_disputed or root.beside:
                self._hold(object_tree.object_id, [object_id for object_id, _ in nodes])
        return list(missing)

    def _hold(self, root_id: str, object_ids: list[str]) -> None:
        """Makes a root hold those of its tree's objects that it does not reach, as long as it is there itself.

        Others have said something else of an object above them. They may be right, or this tree may be. What the root
        was announced with before, and is not any more, it does not hold.
        """
        root, reached, waiting = self._entries[root_id], set[str](), [root_id]
        while waiting:
            if (object_id := waiting.pop()) not in reached:
                reached.add(object_id)
                waiting += self._entries[object_id].children or ()
        before, root.beside = root.beside, frozenset(object_ids) - reached
        for object_id in root.beside - before:
            self._entries[object_id].references += 1
        for object_id in before - root.beside:
            self._entries[object_id].references -= 1
            self.delete(object_id)

    def get_object_tree(self, object_id: str) -> Any:
        """The tree below an object."""
        with self._lock:
            entry = self._entries.get(object_id)
            if entry is None:
                raise _names.NoObjectInStoreError(f"Object with ID '{object_id}' was not pre-registered.")
            try:
                children = [self.get_object_tree(child) for child in entry.children or ()]
            except _names.NoObjectInStoreError as error:
                raise _names.NoObjectInStoreError(
                    f"Object tree for object ID '{object_id}' contains missing children. This may indicate a "
                    "corrupted object store."
                ) from error
            return _names.ObjectTree(object_id=object_id, children=children)

    def put(self, object_id: str, object_content: bytes | Landed) -> None:
        """Takes an object's content: bytes, which are checked here, or what landed and was checked on the way."""
        landed = object_content if isinstance(object_content, Landed) else Landed.of(object_content)
        landed.check(object_id)
        with self._lock:
            entry = self._entries.get(object_id)
            if entry is None:
                raise _names.NoObjectInStoreError(f"Object with ID '{object_id}' was not pre-registered.")
            if entry.content is not None:
                landed.drop()
                return
            if landed.is_sunk:
                raise _gone(object_id)
            self._correct(object_id, entry, landed.content)
            entry.content = landed.take()
        self.on_available(object_id)

    def _correct(self, object_id: str, entry: _Entry, content: Content | bytes) -> None:
        """An object's content says what is below it; who announced it may have said something else.

        Else whoever announces another's object first could hide its chunks from everybody. Raises ``ValueError`` if
        what the content says does not go with what has been announced of the objects below.
        """
        if entry.children is None:  # nobody has announced it
            return
        children = _children_of(content)
        if children == entry.children:
            return
        above, waiting = {object_id: 0}, [(child, 1) for child in children]
        while waiting:
            below, depth = waiting.pop()
            if below == object_id or depth > MAX_DEPTH or len(above) > MAX_OBJECTS:
                raise ValueError(f"object {object_id} is announced as a part of what it has, or of too much")
            if above.get(below, 0) < depth:
                above[below] = depth
                found = self._entries.get(below)
                waiting += [(child, depth + 1) for child in (found.children or () if found else ())]
        for child in children:
            known = self._entries.setdefault(child, _Entry(None, set()))
            known.references += 1
            for run_id in entry.runs:
                known.runs.add(run_id)
                self._runs.setdefault(run_id, set()).add(child)
        before, entry.children = entry.children, children
        for child in before:
            self._entries[child].references -= 1
            if not self._entries[child].references:
                self.delete(child)

    def get(self, object_id: str) -> bytes | None:
        """An object's content, copied; ``b""`` if it is registered and not there, None if it is not registered."""
        with self._lock:
            entry = self._entries.get(object_id)
            if entry is None:
                return None
            if entry.content is None:
                return b""
            _check(object_id, entry.content, "is read")
            return bytes(entry.content)

    def delete(self, object_id: str) -> None:
        """Forgets an object that nothing refers to, and what below it nothing else refers to."""
        with self._lock:
            waiting = [object_id]
            while waiting:
                entry = self._entries.get(object_id := waiting.pop())
                if entry is None or entry.references:
                    continue
                del self._entries[object_id]
                for run_id in entry.runs:
                    if run_id in self._runs:
                        self._runs[run_id].discard(object_id)
                _release(object_id, entry)
                for child in (*(entry.children or ()), *entry.beside):
                    self._entries[child].references -= 1
                    waiting.append(child)

    def delete_objects_in_run(self, run_id: int) -> None:
        """Forgets what only this run has registered."""
        with self._lock:
            for object_id in list(self._runs.get(run_id, ())):
                entry = self._entries.get(object_id)
                if entry is None:
                    continue
                entry.runs.discard(run_id)
                if not entry.references:  # a message; what is below goes with it
                    self.delete(object_id)
            self._runs.pop(run_id, None)

    def clear(self) -> None:
        """Forgets everything."""
        with self._lock:
            for object_id, entry in self._entries.items():
                _release(object_id, entry)
            self._entries.clear()
            self._runs.clear()

    def __contains__(self, object_id: object) -> bool:
        with self._lock:
            return object_id in self._entries

    def __len__(self) -> int:
        with self._lock:
            return len(self._entries)

    # ------------------------------------------------------------ beside them

    def close(self) -> None:
        """Lets go of everything that is held."""
        self.clear()

    def offer(self, contents: Mapping[str, Content | bytes]) -> set[str]:
        """Has objects here before anybody registers them, so that nobody has to push them.

        Their ids must be their hashes. They stay until they are withdrawn, also if all who refer to them are gone.
        Returns those that are held for the caller: what is here already with its content is not.
        """
        taken = set()
        with self._lock:
            for object_id, content in contents.items():
                entry = self._entries.get(object_id)
                if entry is None:
                    entry = self._entries[object_id] = _Entry(None, set())
                if entry.content is None:
                    self._correct(object_id, entry, content)
                    entry.content = content
                    entry.references += 1
                    taken.add(object_id)
        for object_id in taken:
            self.on_available(object_id)
        return taken

    def withdraw(self, object_ids: Iterable[str]) -> None:
        """What was offered is not held any more: it goes, unless somebody refers to it."""
        with self._lock:
            for object_id in object_ids:
                entry = self._entries.get(object_id)
                if entry is not None:
                    entry.references -= 1
                    if not entry.runs or not entry.references:
                        self.delete(object_id)

    def answer(self, object_id: str) -> tuple[int, tuple[Any, ...]] | None:
        """An object's length, and a PullObjectResponse with it in parts one after another; None if it is not there.

        The parts may be memory of the arena; while they are held, the memory stays as it is.
        """
        with self._lock:
            entry = self._entries.get(object_id)
            if entry is None or not entry.content:
                return None
            _check(object_id, entry.content, "is sent")
            nbytes = len(entry.content)
            if isinstance(entry.content, bytes):
                return nbytes, (answer_head(nbytes), entry.content)
            return nbytes, entry.content.answer()

    def read(self, object_id: str, most_bytes: int) -> tuple[int, bytes]:
        """An object's length, 0 if it is not there, and its content, copied, unless it is longer than `most_bytes`."""
        with self._lock:
            entry = self._entries.get(object_id)
            if entry is None or entry.content is None:
                return 0, b""
            length = len(entry.content)
            return length, b"" if length > most_bytes else self.get(object_id) or b""

    def begin(self, object_id: str, nbytes: int) -> tuple[int, bytes] | None:
        """An object's length and its first bytes, at most so many; None if it is not there."""
        with self._lock:
            entry = self._entries.get(object_id)
            if entry is None or entry.content is None:
                return None
            content = entry.content
            return len(content), content[:nbytes] if isinstance(content, bytes) else content.begin(nbytes)

    def peek_at(self, object_id: str) -> Content | bytes | None:
        """What holds an object's content, to be told from another; its bytes may go at any time."""
        with self._lock:
            entry = self._entries.get(object_id)
            return None if entry is None else entry.content

    def is_wanted(self, object_id: str) -> bool:
        """True for an object that is registered and not there."""
        with self._lock:
            entry = self._entries.get(object_id)
            return entry is not None and entry.content is None

    def keep(self, object_ids: Iterable[str]) -> None:
        """Copies contents that are about to go with the block they are in, for others who need them too."""
        with self._lock:
            for object_id in object_ids:
                entry = self._entries.get(object_id)
                if entry is not None and isinstance(entry.content, Content) and not entry.content.is_lasting:
                    _check(object_id, entry.content, "is kept")
                    content, entry.content = entry.content, bytes(entry.content)
                    content.release()


def _children_of(content: Content | bytes) -> tuple[str, ...]:
    """The ids that an object's content names as below it, each once."""
    begin = content[:12] if isinstance(content, bytes) else content.begin(12)
    if begin == b"ArrayChunk  ":  # most are, and large: they are not copied
        return ()
    begin = content if isinstance(content, bytes) else content.begin(MAX_HEAD_BYTES)
    return tuple(dict.fromkeys(filter(None, begin.partition(b"\0")[0].decode().split(" ")[1].split(","))))


def _check(object_id: str, content: Content | bytes, when: str) -> None:
    if IS_CHECKING and (found := hashlib.sha256(bytes(content)).hexdigest()) != object_id:
        broken.append(f"object {object_id} holds the bytes of {found} when it {when}")
        raise AssertionError(broken[-1])


def _release(object_id: str, entry: _Entry) -> None:
    if entry.content is not None:
        _check(object_id, entry.content, "goes")
    content, entry.content = entry.content, None
    if isinstance(content, Content):
        content.release()


def _gone(object_id: str) -> Exception:
    error: Exception = _names.NoObjectInStoreError(f"Object with ID '{object_id}' went while it came again: push it.")
    return error


class DurableStore(_names.SqlObjectStore):  # type: ignore[misc,name-defined]
    """Flower's store in a database: what was acknowledged is there after a crash too.

    An object is landed and checked as with :class:`ArenaStore`, then written to the database, from which it is read.
    """

    is_durable = True

    def __init__(self, database: str) -> None:
        super().__init__(database, verify=False)  # that is done in `put`, once
        self.initialize()
        self.on_available: Callable[[str], None] = lambda _: None

    def put(self, object_id: str, object_content: bytes | Landed) -> None:
        """Takes an object's content: bytes, or what landed."""
        landed = object_content if isinstance(object_content, Landed) else Landed.of(object_content)
        landed.check(object_id)
        if landed.is_sunk and self.is_wanted(object_id):
            raise _gone(object_id)
        with self.session() as session:
            super().put(object_id, bytes(landed.content))
            # The LinkState stores objects within a transaction of its own: till that ends nobody else sees them.
            event.listen(session, "after_commit", lambda _: self.on_available(object_id), once=True)
        landed.drop()

    def answer(self, object_id: str) -> tuple[int, tuple[Any, ...]] | None:
        """An object's length, and a PullObjectResponse with it in parts; None if it is not there."""
        content = self.get(object_id)
        return (len(content), (answer_head(len(content)), content)) if content else None

    def read(self, object_id: str, most_bytes: int) -> tuple[int, bytes]:
        """An object's length, 0 if it is not there, and its content unless it is longer than `most_bytes`."""
        content = self.get(object_id) or b""
        return len(content), b"" if len(content) > most_bytes else content

    def begin(self, object_id: str, nbytes: int) -> tuple[int, bytes] | None:
        """An object's length and its first bytes, at most so many; None if it is not there."""
        content = self.get(object_id)
        return (len(content), content[:nbytes]) if content else None

    def peek_at(self, object_id: str) -> bytes | None:
        """An object's content, or None if it is not there."""
        return self.get(object_id) or None

    def is_wanted(self, object_id: str) -> bool:
        """True for an object that is registered and not there."""
        return bool(self.get(object_id) == b"")

    def keep(self, object_ids: Iterable[str]) -> None:
        """Nothing: the database has a copy."""

    def offer(self, contents: Mapping[str, Content | bytes]) -> set[str]:
        """Nothing: what a client did not push would not be in the database."""
        return set()

    def withdraw(self, object_ids: Iterable[str]) -> None:
        """Nothing was offered."""

    def close(self) -> None:
        """Lets go of the database."""
        if self._engine is not None:
            self._engine.dispose()


Store = ArenaStore | DurableStore
