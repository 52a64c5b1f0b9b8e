"""Flower's ObjectStore over the arena: large objects lie in blocks, small ones in bytes.

Owns the objects, the references to them and the place of their bytes. Objects from the network are hashed, copied and
checked before :meth:`ArenaStore.put`, outside its lock.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import attrs
from sqlalchemy import delete, event, insert, select, text, update

from lifl.superlink import flower
from lifl.superlink.store.content import Content, Landed, answer_head

_names = flower.part("store")

IS_CHECKING = bool(os.environ.get("LIFL_CHECK_CONTENT"))
"""Hash contents again when they are read and when they go, and raise if they have changed; for tests, it is slow."""

MAX_OBJECTS = 2**16
"""Most objects in one announced tree. A model has three for each array, and more if arrays are large."""

MAX_IDS = 1000
"""Most ids in one SQL statement: databases limit them."""

broken: list[str] = []
"""Errors that the check has found; kept here, since a caller may swallow the exception."""


@attrs.define(eq=False)
class _Entry:
    """An object. It goes when it has no references and no offers.

    Attributes
    ----------
    content : Content, bytes or None
        None if the object has not come, or was given up.
    tree : bytes
        The tree as it was announced, if this object is the root of one.
    runs : set of int
        The runs that have announced it as a root.
    references : int
        The number of announced trees that it is in, its own too.
    offers : int
        The number of offers that have not been withdrawn.
    """

    content: Content | bytes | None = None
    tree: bytes = b""
    runs: set[int] = attrs.field(factory=set)
    references: int = 0
    offers: int = 0


class ArenaStore(_names.ObjectStore):  # type: ignore[misc,name-defined] # a base that is found at run time
    """Flower's in-memory store, except that content may be a block of the arena and may be given up while registered.

    An announced tree holds every object in it until its root is deleted, whatever other trees have of the same objects:
    a tree is one client's word, so it decides about nobody else's objects. All methods: any thread.

    Attributes
    ----------
    on_available : callable
        Called, without the lock, with the id of each object that has come.
    """

    is_durable = False

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}
        self._roots: dict[int, set[str]] = {}  # by run
        # Guards the entries, the roots and each content's place: an entry's bytes are not released while they are read.
        # Taken again by methods that call others.
        self._lock = threading.RLock()
        self.on_available: Callable[[str], None] = lambda _: None

    # ------------------------------------------------------------ Flower's methods

    def preregister(self, run_id: int, object_tree: Any) -> list[str]:
        """Registers a tree's objects; returns the ids of those that have to be pushed, each once."""
        object_ids, root_id = _checked(_ids_of(object_tree)), object_tree.object_id
        tree, missing = object_tree.SerializeToString(), list[str]()
        with self._lock:
            for object_id in object_ids:
                entry = self._entries.get(object_id)
                if entry is None:
                    entry = self._entries[object_id] = _Entry()
                if entry.content is None:
                    missing.append(object_id)
            root = self._entries[root_id]
            root.runs.add(run_id)
            self._roots.setdefault(run_id, set()).add(root_id)
            if root.tree != tree:
                before, root.tree = root.tree, tree
                # The new tree takes its references first, so that an object in both trees does not go.
                for object_id in object_ids:
                    self._entries[object_id].references += 1
                self._let_go(before)
        return missing

    def _let_go(self, tree: bytes) -> None:
        """Takes a tree's references to its objects back."""
        for object_id in _ids_of(_names.ObjectTree.FromString(tree)) if tree else ():
            self._entries[object_id].references -= 1
            self._remove(object_id)

    def _remove(self, object_id: str) -> None:
        """Forgets an object, if nothing holds it."""
        entry = self._entries[object_id]
        if not entry.references and not entry.offers:
            del self._entries[object_id]
            _release(object_id, entry)

    def get_object_tree(self, object_id: str) -> Any:
        """The tree below an object."""
        with self._lock:
            entry = self._entries.get(object_id)
            if entry is None:
                raise _names.NoObjectInStoreError(f"Object with ID '{object_id}' was not pre-registered.")
            if entry.tree:
                return _names.ObjectTree.FromString(entry.tree)
            for other in self._entries.values():  # Flower asks for whole messages only
                for node in _names.iterate_tree(_names.ObjectTree.FromString(other.tree)) if other.tree else ():
                    if node.object_id == object_id:
                        return node
            return _names.ObjectTree(object_id=object_id)

    def put(self, object_id: str, object_content: bytes | Landed) -> None:
        """Takes an object: bytes, which are hashed here, or an object that landed and was hashed on its way."""
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
            entry.content = landed.take()
        self.on_available(object_id)

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
        """Forgets an announced tree by its root, and those of its objects that no other tree has."""
        with self._lock:
            entry = self._entries.get(object_id)
            if entry is not None:
                for run_id in entry.runs:
                    self._roots[run_id].discard(object_id)
                entry.runs.clear()
                tree, entry.tree = entry.tree, b""
                self._let_go(tree)

    def delete_objects_in_run(self, run_id: int) -> None:
        """Forgets the trees that a run has announced."""
        with self._lock:
            for object_id in list(self._roots.get(run_id, ())):
                self.delete(object_id)
            self._roots.pop(run_id, None)

    def clear(self) -> None:
        """Forgets everything."""
        with self._lock:
            for object_id, entry in self._entries.items():
                _release(object_id, entry)
            self._entries.clear()
            self._roots.clear()

    def __contains__(self, object_id: object) -> bool:
        with self._lock:
            return object_id in self._entries

    def __len__(self) -> int:
        with self._lock:
            return len(self._entries)

    # ------------------------------------------------------------ beside them

    def close(self) -> None:
        """Releases the contents of all objects."""
        self.clear()

    def offer(self, contents: Mapping[str, Content | bytes]) -> set[str]:
        """Stores objects before they are registered, so that nobody has to push them.

        Their ids must be their hashes. They stay until they are withdrawn, also when no tree refers to them any more.
        Returns the ids that are held for the caller; an object whose content is here already is not held.
        """
        taken = set()
        with self._lock:
            for object_id, content in contents.items():
                entry = self._entries.get(object_id)
                if entry is None:
                    entry = self._entries[object_id] = _Entry()
                if entry.content is None:
                    entry.content = content
                    entry.offers += 1
                    taken.add(object_id)
        for object_id in taken:
            self.on_available(object_id)
        return taken

    def withdraw(self, object_ids: Iterable[str]) -> None:
        """Withdraws offers: an offered object goes, unless a tree refers to it."""
        with self._lock:
            for object_id in object_ids:
                entry = self._entries.get(object_id)
                if entry is not None:
                    entry.offers -= 1
                    self._remove(object_id)

    def answer(self, object_id: str) -> tuple[int, tuple[Any, ...]] | None:
        """An object's length, and a PullObjectResponse with the object in parts; None if it is not there.

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
        """An object's length and its first bytes, at most `nbytes`; None if it is not there."""
        with self._lock:
            entry = self._entries.get(object_id)
            if entry is None or entry.content is None:
                return None
            content = entry.content
            return len(content), content[:nbytes] if isinstance(content, bytes) else content.begin(nbytes)

    def peek_at(self, object_id: str) -> Content | bytes | None:
        """The content of an object, to be compared with another by identity; its bytes may go at any time."""
        with self._lock:
            entry = self._entries.get(object_id)
            return None if entry is None else entry.content

    def is_wanted(self, object_id: str) -> bool:
        """True for an object that is registered and not there."""
        with self._lock:
            entry = self._entries.get(object_id)
            return entry is not None and entry.content is None

    def keep(self, object_ids: Iterable[str]) -> None:
        """Copies contents that are about to go with the block they are in, for other trees that hold them too."""
        with self._lock:
            for object_id in object_ids:
                entry = self._entries.get(object_id)
                if entry is not None and isinstance(entry.content, Content) and not entry.content.is_lasting:
                    _check(object_id, entry.content, "is kept")
                    content, entry.content = entry.content, bytes(entry.content)
                    content.release()


def count_of(object_tree: Any, most: int) -> int:
    """The number of objects in a tree, each as often as it is named; counted up to a little more than `most`."""
    count, waiting = 1, [object_tree]
    while waiting and count <= most:
        node = waiting.pop()
        count += len(node.children)
        waiting.extend(node.children)
    return count


def _ids_of(object_tree: Any) -> list[str]:
    """The objects of a tree, each once, children before their parents; the root is the last, whatever is below it."""
    found = dict.fromkeys(node.object_id for node in _names.iterate_tree(object_tree))
    del found[object_tree.object_id]
    return [*found, object_tree.object_id]


def _checked(object_ids: list[str]) -> list[str]:
    """The same ids; raises ``ValueError`` if one is no id."""
    for object_id in object_ids:
        if not _names.is_valid_id(object_id):
            raise ValueError(f"Invalid object ID format: {object_id}")
    return object_ids


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


INDEXES = {"lifl_children": "object_children (child_id)", "lifl_runs": "run_objects (object_id)"}
"""Indexes: SQLite looks into both tables for each object that is deleted, and would read all of them."""


class DurableStore(_names.SqlObjectStore):  # type: ignore[misc,name-defined]
    """Flower's store in a database: acknowledged objects are there after a crash too.

    An object is landed and checked as with :class:`ArenaStore`, then written to the database, from which it is read.
    Trees hold objects as there. In Flower's tables all objects of a tree are children of its root, the root too. A tree
    that Flower's server has left there has no such root; it is read and deleted as Flower does it.
    """

    is_durable = True

    def __init__(self, database: str) -> None:
        super().__init__(database, verify=False)  # `put` verifies
        self.initialize()
        with self.session() as session:
            for name, index in INDEXES.items():
                session.execute(text(f"CREATE INDEX IF NOT EXISTS {name} ON {index}"))
        self.on_available: Callable[[str], None] = lambda _: None

    def preregister(self, run_id: int, object_tree: Any) -> list[str]:
        """Registers a tree's objects; returns the ids of those that have to be pushed, each once."""
        object_ids, root_id = _checked(_ids_of(object_tree)), object_tree.object_id
        objects, children, run = _names.StoredObject, _names.ObjectChild, _names.signed(run_id)
        with self._mutation_session() as session:
            rows = [{"object_id": one, "content": b"", "is_available": 0, "ref_count": 0} for one in object_ids]
            session.execute(self.dialect_insert(objects).on_conflict_do_nothing(), rows)
            root = {"run_id": run, "object_id": root_id}
            session.execute(self.dialect_insert(_names.RunObject).on_conflict_do_nothing(), root)
            held = set(session.scalars(_held_by(root_id)))
            if new := [one for one in object_ids if one not in held]:
                session.execute(insert(children), [{"parent_id": root_id, "child_id": one} for one in new])
                self._count(session, new, 1)
            self._let_go(session, root_id, list(held.difference(object_ids)))
            missing = set[str]()
            for at in range(0, len(object_ids), MAX_IDS):
                some = objects.object_id.in_(object_ids[at : at + MAX_IDS])
                missing |= set(session.scalars(select(objects.object_id).where(some, objects.is_available == 0)))
        return [one for one in object_ids if one in missing]

    def get_object_tree(self, object_id: str) -> Any:
        """A root, and right below it all others in its tree: a tree is read only for the objects to pull."""
        with self.session() as session:
            held = dict.fromkeys(session.scalars(_held_by(object_id)))
        if object_id not in held:
            return super().get_object_tree(object_id)
        del held[object_id]
        return _names.ObjectTree(object_id=object_id, children=[_names.ObjectTree(object_id=one) for one in held])

    def delete(self, object_id: str) -> None:
        """Forgets an announced tree by its root, and those of its objects that no other tree has."""
        with self._mutation_session() as session:
            held = list(session.scalars(_held_by(object_id)))
            if object_id in held:
                self._let_go(session, object_id, held)
            else:
                super().delete(object_id)

    def _let_go(self, session: Any, root_id: str, object_ids: list[str]) -> None:
        """Takes a tree's references to some of its objects back."""
        objects, children = _names.StoredObject, _names.ObjectChild
        self._count(session, object_ids, -1)
        for at in range(0, len(object_ids), MAX_IDS):
            some = object_ids[at : at + MAX_IDS]
            session.execute(delete(children).where(children.parent_id == root_id, children.child_id.in_(some)))
            session.execute(delete(objects).where(objects.object_id.in_(some), objects.ref_count == 0))

    def _count(self, session: Any, object_ids: list[str], change: int) -> None:
        objects = _names.StoredObject
        for at in range(0, len(object_ids), MAX_IDS):
            those = update(objects).where(objects.object_id.in_(object_ids[at : at + MAX_IDS]))
            session.execute(those.values(ref_count=objects.ref_count + change))

    def put(self, object_id: str, object_content: bytes | Landed) -> None:
        """Takes an object: bytes, or an object that landed."""
        landed = object_content if isinstance(object_content, Landed) else Landed.of(object_content)
        landed.check(object_id)
        if landed.is_sunk and self.is_wanted(object_id):
            raise _gone(object_id)
        with self.session() as session:
            super().put(object_id, bytes(landed.content))
            # The LinkState stores objects within a transaction of its own, and nobody else sees them before it ends.
            event.listen(session, "after_commit", lambda _: self.on_available(object_id), once=True)
        landed.drop()

    def answer(self, object_id: str) -> tuple[int, tuple[Any, ...]] | None:
        """An object's length, and a PullObjectResponse with the object in parts; None if it is not there."""
        content = self.get(object_id)
        return (len(content), (answer_head(len(content)), content)) if content else None

    def read(self, object_id: str, most_bytes: int) -> tuple[int, bytes]:
        """An object's length, 0 if it is not there, and its content unless it is longer than `most_bytes`."""
        content = self.get(object_id) or b""
        return len(content), b"" if len(content) > most_bytes else content

    def begin(self, object_id: str, nbytes: int) -> tuple[int, bytes] | None:
        """An object's length and its first bytes, at most `nbytes`; None if it is not there."""
        content = self.get(object_id)
        return (len(content), content[:nbytes]) if content else None

    def peek_at(self, object_id: str) -> bytes | None:
        """An object's content, or None if it is not there."""
        return self.get(object_id) or None

    def is_wanted(self, object_id: str) -> bool:
        """True for an object that is registered and not there."""
        return bool(self.get(object_id) == b"")

    def keep(self, object_ids: Iterable[str]) -> None:
        """Does nothing: the database has a copy."""

    def offer(self, contents: Mapping[str, Content | bytes]) -> set[str]:
        """Holds nothing: an object that no client pushed would not be in the database after a crash."""
        return set()

    def withdraw(self, object_ids: Iterable[str]) -> None:
        """Does nothing: nothing was offered."""

    def close(self) -> None:
        """Closes the database."""
        if self._engine is not None:
            self._engine.dispose()


def _held_by(object_id: str) -> Any:
    """The query for the objects that a root in the database holds."""
    return select(_names.ObjectChild.child_id).where(_names.ObjectChild.parent_id == object_id)


Store = ArenaStore | DurableStore
