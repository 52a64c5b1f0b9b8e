"""lifl's object stores do what Flower's do, operation by operation, and beside that what the data plane needs."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from types import ModuleType
from typing import Any

import attrs
import pytest
from flower_objects import FlowerObject
from flwr.proto.message_pb2 import ObjectTree, PullObjectResponse
from flwr.supercore import date
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, OBJECT_PUSH_SESSION_TTL_SECONDS
from flwr.supercore.corestate import in_memory_corestate, sql_corestate
from flwr.supercore.object_store import NoObjectInStoreError
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore
from flwr.superlink.config_loader import get_federation_manager, get_objectstore_linkstate_factories
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from lifl.shm.arena import Arena
from lifl.superlink.store import store as store_module
from lifl.superlink.store.content import BlockContent, Content, Landed
from lifl.superlink.store.store import ArenaStore, DurableStore

UNIT = 65536


CHUNKS = [FlowerObject("ArrayChunk", body=bytes([n]) * size) for n, size in enumerate((0, 5, 1000, 70_000))]
ARRAYS = [
    FlowerObject("Array", (CHUNKS[0], CHUNKS[1])),
    FlowerObject("Array", (CHUNKS[1],)),
    FlowerObject("Array", tuple(CHUNKS[2:])),
]
RECORDS = [FlowerObject("ArrayRecord", (ARRAYS[0], ARRAYS[1])), FlowerObject("ArrayRecord", (ARRAYS[1], ARRAYS[2]))]
ROOTS = [FlowerObject("RecordDict", (record,), bytes([n])) for n, record in enumerate((*RECORDS, RECORDS[0]))]
MESSAGES = [FlowerObject("Message", (root,), bytes([n])) for n, root in enumerate((*ROOTS, ROOTS[0]))]
THINGS = list(dict.fromkeys(one for message in MESSAGES for one in message.all()))


@pytest.fixture(scope="module")
def room() -> Iterator[Arena]:
    """An arena for what is large."""
    arena = Arena.create(64 * UNIT, 1, debug=True)
    yield arena
    arena.close()


class Stores:
    """The store in question, by name; all of one kind share what is slow to make."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self._durable = DurableStore(":memory:")  # SQLite's, which is as any file and does not wait for the disk

    def new(self, kind: str) -> Any:
        """An empty one."""
        if kind == "DurableStore":
            self._durable.clear()
            return self._durable
        return {"ArenaStore": ArenaStore, "Flower's": InMemoryObjectStore}[kind]()

    def landed(self, content: bytes) -> Landed:
        """As the gateway hands an object over: large ones in a block."""
        if len(content) < 1000:
            return Landed.of(content)
        block = BlockContent.make(self.arena, len(content))
        assert block is not None
        block.view[:] = content
        return Landed(block, len(content), hashlib.sha256(content).hexdigest())

    def close(self) -> None:
        """Lets go of the database."""
        self._durable._engine.dispose()


@pytest.fixture(scope="module")
def stores(room: Arena) -> Iterator[Stores]:
    """Stores of all kinds."""
    made = Stores(room)
    yield made
    made.close()


def one_of(kind: str, stores: Stores) -> Iterator[Any]:
    """An empty store; afterwards the arena has every block back."""
    free = stores.arena.free_bytes
    made = stores.new(kind)
    yield made
    made.clear()
    assert stores.arena.free_bytes == free


@pytest.fixture(params=["Flower's", "ArenaStore", "DurableStore"])
def store(request: pytest.FixtureRequest, stores: Stores) -> Iterator[Any]:
    """A store of each kind, Flower's own in-memory store first."""
    yield from one_of(request.param, stores)


def content_of(answer: Any) -> bytes:
    """The object in an answer, which says that it is found and available."""
    nbytes, parts = answer
    response = PullObjectResponse.FromString(b"".join(parts))
    assert response.object_found
    assert response.object_available
    assert len(response.object_content) == nbytes
    return bytes(response.object_content)


def sent(store: Any, object_id: str) -> bytes | None:
    """The object as a client gets it."""
    answer = store.answer(object_id)
    return None if answer is None else content_of(answer)


def fill(store: Any, message: FlowerObject, run_id: int = 1) -> None:
    """Registers a message and puts all that is missing."""
    contents = {one.id: one.content for one in message.all()}
    for object_id in dict.fromkeys(store.preregister(run_id, message.tree)):
        store.put(object_id, contents[object_id])


# ---------------------------------------------------------------- as Flower documents it


def test_what_is_not_there_is_asked_for(store: Any) -> None:
    """Objects nobody has registered, and those registered that have not come; the rest is not asked for again."""
    message = MESSAGES[0]
    everything = [one.id for one in message.all()]
    assert list(dict.fromkeys(store.preregister(1, message.tree))) == everything
    assert list(dict.fromkeys(store.preregister(1, message.tree))) == everything
    store.put(CHUNKS[0].id, CHUNKS[0].content)
    assert set(store.preregister(2, message.tree)) == set(everything) - {CHUNKS[0].id}
    fill(store, message)
    assert store.preregister(3, message.tree) == []


def test_content_is_empty_until_it_comes(store: Any) -> None:
    """Before it is registered there is none, then it is empty, then it is there."""
    one = CHUNKS[2]
    assert store.get(one.id) is None
    assert one.id not in store
    store.preregister(1, one.tree)
    assert store.get(one.id) == b""
    assert one.id in store
    store.put(one.id, one.content)
    assert store.get(one.id) == one.content
    assert len(store) == 1


def test_what_nobody_registered_cannot_be_put(store: Any) -> None:
    """Nor what has been deleted."""
    with pytest.raises(NoObjectInStoreError):
        store.put(CHUNKS[1].id, CHUNKS[1].content)
    store.preregister(1, CHUNKS[1].tree)
    store.delete(CHUNKS[1].id)
    with pytest.raises(NoObjectInStoreError):
        store.put(CHUNKS[1].id, CHUNKS[1].content)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"nothing of the kind",
        b"ArrayChunk  5\x001234",
        b"ArrayChunk  3\x001234",
        b"ArrayChunk  4 \x001234",
        b"ArrayChunk 4\x001234",
        b"ArrayChunk " + b"a" * 63 + b" 4\x001234",
        b"ArrayChunk  x\x001234",
        b"SomethingElse  4\x001234",
        b"\xff\xff 4\x001234",
    ],
    ids=lambda content: repr(content[:16]),
)
def test_content_must_be_formed_as_an_object(store: Any, content: bytes) -> None:
    """Also if it hashes to its id: Flower's check decides."""
    object_id = hashlib.sha256(content).hexdigest()
    store.preregister(1, ObjectTree(object_id=object_id))
    with pytest.raises(Exception, match="unexpected structure"):
        store.put(object_id, content)
    assert store.get(object_id) == b""


@pytest.mark.parametrize("content", [b"ArrayChunk  04\x001234", b"ArrayChunk  +4\x001234", b"ArrayChunk  0\x00"])
def test_forms_that_flower_takes_are_taken(store: Any, content: bytes) -> None:
    """However strange the number looks."""
    object_id = hashlib.sha256(content).hexdigest()
    store.preregister(1, ObjectTree(object_id=object_id))
    store.put(object_id, content)
    assert store.get(object_id) == content


def test_content_must_have_the_hash_that_is_its_id(store: Any) -> None:
    """Another object's content is refused, and the right one can still come."""
    store.preregister(1, CHUNKS[1].tree)
    with pytest.raises(ValueError, match="does not match content hash"):
        store.put(CHUNKS[1].id, CHUNKS[2].content)
    assert store.get(CHUNKS[1].id) == b""
    store.put(CHUNKS[1].id, CHUNKS[1].content)
    store.put(CHUNKS[1].id, CHUNKS[1].content)
    assert store.get(CHUNKS[1].id) == CHUNKS[1].content


@pytest.mark.parametrize("object_id", ["", "a" * 63, "g" * 64, "a" * 65])
def test_an_id_must_be_a_hash(store: Any, object_id: str) -> None:
    """64 hexadecimal digits."""
    with pytest.raises(ValueError, match="Invalid object ID format"):
        store.preregister(1, ObjectTree(object_id=object_id))


def test_deletion_cascades_to_what_nothing_else_refers_to(store: Any) -> None:
    """A chunk that two messages share goes with the second."""
    fill(store, MESSAGES[0])
    fill(store, MESSAGES[1])
    store.delete(CHUNKS[1].id)
    assert store.get(CHUNKS[1].id) == CHUNKS[1].content, "it is referred to"
    store.delete(MESSAGES[0].id)
    assert CHUNKS[0].id not in store
    assert store.get(CHUNKS[1].id) == CHUNKS[1].content
    store.delete(MESSAGES[1].id)
    store.delete(MESSAGES[1].id)
    assert len(store) == 0


def test_a_run_ends_with_what_only_it_has(store: Any) -> None:
    """Objects that another run's messages refer to stay."""
    fill(store, MESSAGES[0], 1)
    fill(store, MESSAGES[1], 2)
    store.delete_objects_in_run(3)
    store.delete_objects_in_run(1)
    assert {one.id for one in THINGS if one.id in store} == {one.id for one in MESSAGES[1].all()}
    store.delete_objects_in_run(2)
    assert len(store) == 0


def test_a_run_that_never_had_anything_can_end(store: Any) -> None:
    """And end again."""
    store.delete_objects_in_run(7)
    fill(store, MESSAGES[0], 7)
    store.delete_objects_in_run(7)
    store.delete_objects_in_run(7)
    assert len(store) == 0


def test_the_tree_of_what_is_registered_is_known(store: Any) -> None:
    """From any of its objects down; of what is not there it is not."""
    store.preregister(1, MESSAGES[1].tree)
    if isinstance(store, DurableStore):  # all that a message holds is right below it
        tree = store.get_object_tree(MESSAGES[1].id)
        assert tree.object_id == MESSAGES[1].id
        assert {one.object_id for one in tree.children} == {one.id for one in MESSAGES[1].all()[:-1]}
        assert not any(one.children for one in tree.children)
    else:
        assert store.get_object_tree(MESSAGES[1].id) == MESSAGES[1].tree
        assert store.get_object_tree(ARRAYS[2].id) == ARRAYS[2].tree
    with pytest.raises(NoObjectInStoreError, match="was not pre-registered"):
        store.get_object_tree(MESSAGES[0].id)


# ---------------------------------------------------------------- the same operations, the same answers


class SameAnswers(RuleBasedStateMachine):
    """Any sequence of operations on lifl's stores and on Flower's, side by side."""

    stores: Stores

    def __init__(self) -> None:
        super().__init__()
        self.oracle = self.stores.new("Flower's")
        self.ours = [self.stores.new("ArenaStore"), self.stores.new("DurableStore")]
        self.free = self.stores.arena.free_bytes

    def same(self, act: Callable[[Any], Any]) -> None:
        """Does it to all, and compares what they answer or raise."""

        def outcome(store: Any) -> Any:
            try:
                return act(store)
            except Exception as error:
                return type(error)

        expected = outcome(self.oracle)
        for store in self.ours:
            assert outcome(store) == expected, type(store).__name__

    @rule(run_id=st.integers(1, 2), message=st.sampled_from(MESSAGES))
    def preregister(self, run_id: int, message: FlowerObject) -> None:
        """Registers a message."""
        self.same(lambda store: list(dict.fromkeys(store.preregister(run_id, message.tree))))

    @rule(run_id=st.integers(1, 2), message=st.sampled_from(MESSAGES))
    def fill(self, run_id: int, message: FlowerObject) -> None:
        """Registers a message and puts all of it."""
        self.same(lambda store: fill(store, message, run_id))

    @rule(one=st.sampled_from(THINGS))
    def put(self, one: FlowerObject) -> None:
        """Puts an object."""
        self.same(lambda store: store.put(one.id, one.content))

    @rule(one=st.sampled_from(THINGS), other=st.sampled_from(THINGS))
    def land(self, one: FlowerObject, other: FlowerObject) -> None:
        """Puts an object as the gateway does, mostly a wrong one."""

        def act(store: Any) -> None:
            if isinstance(store, InMemoryObjectStore):
                store.put(one.id, other.content)
                return
            landed = self.stores.landed(other.content)
            try:
                store.put(one.id, landed)
            except Exception:
                landed.drop()
                raise

        self.same(act)

    @rule(one=st.sampled_from(THINGS))
    def delete(self, one: FlowerObject) -> None:
        """Deletes an object, if nothing refers to it."""
        self.same(lambda store: store.delete(one.id))

    @rule(run_id=st.integers(1, 2))
    def end_run(self, run_id: int) -> None:
        """Ends a run."""
        self.same(lambda store: store.delete_objects_in_run(run_id))

    @invariant()
    def have_the_same(self) -> None:
        """The same objects with the same contents."""
        self.same(lambda store: [store.get(one.id) for one in THINGS])
        self.same(len)

    @rule(one=st.sampled_from(THINGS))
    def look(self, one: FlowerObject) -> None:
        """Asks for an object in every way."""
        self.same(lambda store: one.id in store)
        for store in self.ours:
            content = store.get(one.id)
            assert store.is_wanted(one.id) == (content == b"")
            assert sent(store, one.id) == (content or None)
            nbytes, read = store.read(one.id, 2**30)
            assert (nbytes, read) == (len(content or b""), content or b"")
            assert store.read(one.id, nbytes - 1) == (nbytes, b"")

    def teardown(self) -> None:
        """All is given back."""
        for store in self.ours:
            store.clear()
        assert self.stores.arena.free_bytes == self.free


def test_any_sequence_of_operations_is_answered_as_by_flower(stores: Stores) -> None:
    """The same objects are missing, there, raised and left as with Flower's store."""
    SameAnswers.stores = stores
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        SameAnswers,
        settings=settings(
            max_examples=15, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


# ---------------------------------------------------------------- beside Flower's methods


@pytest.fixture
def arena_store(stores: Stores) -> Iterator[ArenaStore]:
    """A store whose `came` has the ids of objects that have come; afterwards the arena has every block back."""
    free = stores.arena.free_bytes
    made = ArenaStore()
    made.came = []  # type: ignore[attr-defined]
    made.on_available = made.came.append  # type: ignore[attr-defined]
    yield made
    made.close()
    assert stores.arena.free_bytes == free


class Passing(Content):
    """Content in a block that will go."""

    is_lasting = False

    def __init__(self, content: bytes) -> None:
        self.view = memoryview(bytearray(content))
        self.releases = 0

    def __len__(self) -> int:
        return len(self.view)

    def __bytes__(self) -> bytes:
        return bytes(self.view)

    def begin(self, nbytes: int) -> bytes:
        """The first bytes."""
        return bytes(self.view[:nbytes])

    def release(self) -> None:
        """Counts."""
        self.releases += 1


def test_what_comes_is_told_once(arena_store: Any, stores: Stores) -> None:
    """Each object, when its content is there; not when it comes again."""
    arena_store.preregister(1, ARRAYS[2].tree)
    for one in (*ARRAYS[2].all(), CHUNKS[3]):
        arena_store.put(one.id, stores.landed(one.content))
    assert arena_store.came == [one.id for one in ARRAYS[2].all()]


def test_a_second_copy_is_given_back(arena_store: Any, stores: Stores) -> None:
    """The first one counts; the block of the second is free at once."""
    arena_store.preregister(1, CHUNKS[3].tree)
    free = stores.arena.free_bytes
    for _ in range(3):
        arena_store.put(CHUNKS[3].id, stores.landed(CHUNKS[3].content))
        assert free - stores.arena.free_bytes == 2 * UNIT
    arena_store.delete(CHUNKS[3].id)
    assert stores.arena.free_bytes == free


def test_a_block_stays_as_long_as_somebody_sends_it(arena_store: Any, stores: Stores) -> None:
    """An object that is deleted while an answer is written is not overwritten."""
    arena_store.preregister(1, CHUNKS[3].tree)
    free = stores.arena.free_bytes
    arena_store.put(CHUNKS[3].id, stores.landed(CHUNKS[3].content))
    _, (answer,) = arena_store.answer(CHUNKS[3].id)
    arena_store.delete(CHUNKS[3].id)
    assert stores.arena.free_bytes == free - 2 * UNIT
    assert bytes(answer).endswith(CHUNKS[3].content)
    del answer
    assert stores.arena.free_bytes == free


def test_what_was_read_away_is_not_taken_for_content(store: Any) -> None:
    """It was there when it was read into the sink and is not any more: it is refused, and can be pushed again."""
    if isinstance(store, InMemoryObjectStore):
        return
    one = CHUNKS[2]
    sunk = Landed(b"", len(one.content), one.id)
    fill(store, one)
    store.put(one.id, sunk)
    assert store.get(one.id) == one.content
    store.delete(one.id)
    store.preregister(1, one.tree)
    with pytest.raises(NoObjectInStoreError):
        store.put(one.id, sunk)
    assert store.is_wanted(one.id)
    assert store.preregister(1, one.tree) == [one.id]


def test_what_is_about_to_go_is_copied_for_others(arena_store: Any) -> None:
    """Kept, it is bytes; what lasts, or is gone, is left alone."""
    passing = Passing(CHUNKS[1].content)
    arena_store.preregister(1, ARRAYS[0].tree)
    arena_store.put(CHUNKS[1].id, Landed(passing, len(passing), CHUNKS[1].id, b"ArrayChunk  5\0"))
    assert arena_store.peek_at(CHUNKS[1].id) is passing
    arena_store.keep([CHUNKS[1].id, CHUNKS[0].id, "f" * 64])
    passing.view[:] = bytes(len(passing))
    assert passing.releases == 1
    assert arena_store.get(CHUNKS[1].id) == CHUNKS[1].content


def test_a_look_at_what_does_not_last_is_a_copy(arena_store: Any) -> None:
    """A sender to a client has the content also when the block is gone."""
    passing = Passing(CHUNKS[1].content)
    arena_store.preregister(1, CHUNKS[1].tree)
    arena_store.put(CHUNKS[1].id, Landed(passing, len(passing), CHUNKS[1].id, b"ArrayChunk  5\0"))
    seen = arena_store.answer(CHUNKS[1].id)
    arena_store.delete(CHUNKS[1].id)
    passing.view[:] = bytes(len(passing))
    assert content_of(seen) == CHUNKS[1].content


def test_what_is_offered_need_not_be_pushed(arena_store: Any) -> None:
    """It is not missing; it stays until it is withdrawn, and then as long as a message refers to it."""
    offered = {one.id: one.content for one in ARRAYS[0].all()}
    assert arena_store.offer(offered) == set(offered)
    assert arena_store.came == list(offered) or set(arena_store.came) == set(offered)
    missing = arena_store.preregister(1, MESSAGES[0].tree)
    assert not set(missing) & set(offered)
    arena_store.withdraw(offered)
    assert arena_store.get(CHUNKS[0].id) == CHUNKS[0].content
    arena_store.delete(MESSAGES[0].id)
    assert len(arena_store) == 0


def test_what_is_offered_outlives_a_message(arena_store: Any) -> None:
    """The message goes first, then the offer."""
    offered = {one.id: one.content for one in ARRAYS[0].all()}
    arena_store.offer(offered)
    arena_store.preregister(1, MESSAGES[0].tree)
    arena_store.delete(MESSAGES[0].id)
    assert {one.id for one in THINGS if one.id in arena_store} == set(offered)
    arena_store.delete_objects_in_run(1)
    assert arena_store.get(CHUNKS[0].id) == CHUNKS[0].content
    arena_store.withdraw(offered)
    assert len(arena_store) == 0


def test_what_is_offered_and_not_used_goes(arena_store: Any) -> None:
    """Nobody registered it."""
    offered = {CHUNKS[1].id: CHUNKS[1].content}
    assert arena_store.offer(offered) == set(offered)
    assert arena_store.offer(offered) == set(), "it is there: it is held once"
    arena_store.withdraw(offered)
    assert len(arena_store) == 0
    arena_store.withdraw(["f" * 64])


def test_an_offer_for_what_is_awaited_is_what_came(arena_store: Any) -> None:
    """It was registered and missing: it is told as if it had been pushed, and stays."""
    arena_store.preregister(1, ARRAYS[1].tree)
    taken = arena_store.offer({CHUNKS[1].id: CHUNKS[1].content})
    assert arena_store.came == [CHUNKS[1].id]
    arena_store.withdraw(taken)
    assert arena_store.get(CHUNKS[1].id) == CHUNKS[1].content
    assert arena_store.preregister(1, ARRAYS[1].tree) == [ARRAYS[1].id]


# ---------------------------------------------------------------- push sessions, with both link states


class Clock:
    """Flower's, moved by hand."""

    def __init__(self) -> None:
        self.later = timedelta()

    def now(self) -> Any:
        """As late as it was made."""
        return date.now() + self.later


@attrs.define
class Link:
    """A LinkState, a run's id, and its clock."""

    state: Any
    run_id: int
    clock: Clock


def clocked(patch: pytest.MonkeyPatch, modules: tuple[ModuleType, ...]) -> Clock:
    """Has these modules ask a clock of the test's."""
    clock = Clock()
    for module in modules:
        patch.setattr(module, "now", clock.now)
    return clock


@pytest.fixture(
    scope="module", params=["memory, Flower's", "memory, ArenaStore", "SQLite, Flower's", "SQLite, DurableStore"]
)
def state(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Both of Flower's LinkStates, each with Flower's store and with lifl's."""
    where, whose = request.param.split(", ")
    is_durable = where == "SQLite"
    database = str(tmp_path_factory.mktemp("state") / "state.db") if is_durable else FLWR_IN_MEMORY_DB_NAME
    objects, states = get_objectstore_linkstate_factories(database, get_federation_manager())
    if whose != "Flower's":
        objects.store_instance = DurableStore(database) if is_durable else ArenaStore()
    made = states.state()
    yield made
    for one in (made, made.object_store):
        if (engine := getattr(one, "_engine", None)) is not None:
            engine.dispose()


@pytest.fixture
def link(state: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Link]:
    """A run in it; a run's id may reach 2**64."""
    run_id = 2**63 + 7
    yield Link(state, run_id, clocked(monkeypatch, (in_memory_corestate, sql_corestate)))
    state.delete_sessions_in_run(run_id)
    state.object_store.clear()


def push(link: Link, session_id: str, one: FlowerObject, run_id: int | None = None) -> bool:
    """Pushes an object."""
    return bool(link.state.store_object(run_id or link.run_id, session_id, one.id, one.content))


def test_a_session_takes_what_it_lacks(link: Link) -> None:
    """Each object once, until all are there; then it is over."""
    session_id = link.state.start_session(link.run_id)
    missing = link.state.preregister_object_tree(MESSAGES[1].tree, session_id)
    assert dict.fromkeys(missing) == dict.fromkeys(one.id for one in MESSAGES[1].all())
    for one in MESSAGES[1].all():
        assert push(link, session_id, one)
        assert not push(link, session_id, one), "it is not missing any more"
        assert link.state.get_object(link.run_id, one.id) == one.content
    assert not push(link, session_id, MESSAGES[1])


def test_a_session_of_another_run_or_of_nobody_takes_nothing(link: Link) -> None:
    """Nor what was never announced to it."""
    session_id = link.state.start_session(link.run_id)
    link.state.preregister_object_tree(ARRAYS[1].tree, session_id)
    assert not push(link, session_id, CHUNKS[1], run_id=8)
    assert not push(link, "no such session", CHUNKS[1])
    assert not push(link, session_id, CHUNKS[3])
    assert link.state.get_object(link.run_id, CHUNKS[1].id) == b""
    assert push(link, session_id, CHUNKS[1])


def test_an_old_supernode_names_no_session(link: Link) -> None:
    """The one that lacks the object is found."""
    assert not push(link, "", CHUNKS[1])
    session_id = link.state.start_session(link.run_id)
    link.state.preregister_object_tree(ARRAYS[1].tree, session_id)
    assert push(link, "", CHUNKS[1])
    assert not push(link, "", CHUNKS[1])


def test_a_session_that_is_too_old_takes_nothing_and_its_message_goes(link: Link) -> None:
    """With all that only it refers to."""
    session_id = link.state.start_session(link.run_id)
    link.state.preregister_object_tree(MESSAGES[1].tree, session_id)
    assert push(link, session_id, CHUNKS[1])
    link.clock.later += timedelta(seconds=OBJECT_PUSH_SESSION_TTL_SECONDS - 1)
    assert push(link, session_id, CHUNKS[2]), "every object renews it"
    link.clock.later += timedelta(seconds=OBJECT_PUSH_SESSION_TTL_SECONDS - 1)
    assert push(link, session_id, CHUNKS[3])
    link.clock.later += timedelta(seconds=OBJECT_PUSH_SESSION_TTL_SECONDS + 1)
    assert not push(link, session_id, ARRAYS[1])
    assert len(link.state.object_store) == 0
    assert not push(link, session_id, ARRAYS[1])


def test_who_asks_for_an_object_of_an_old_session_is_told_that_there_is_none(link: Link) -> None:
    """While it is young the object is on its way."""
    session_id = link.state.start_session(link.run_id)
    link.state.preregister_object_tree(MESSAGES[1].tree, session_id)
    assert link.state.get_object(link.run_id, CHUNKS[1].id) == b""
    link.clock.later += timedelta(seconds=OBJECT_PUSH_SESSION_TTL_SECONDS + 1)
    assert link.state.get_object(8, CHUNKS[1].id) == b"", "of another run"
    assert link.state.get_object(link.run_id, CHUNKS[1].id) is None
    assert len(link.state.object_store) == 0


def test_a_message_that_is_announced_again_has_the_new_session(link: Link) -> None:
    """A node that has restarted: what came stays, the rest goes through the new session alone."""
    before = link.state.start_session(link.run_id)
    link.state.preregister_object_tree(MESSAGES[1].tree, before)
    assert push(link, before, CHUNKS[1])
    again = link.state.start_session(link.run_id)
    missing = link.state.preregister_object_tree(MESSAGES[1].tree, again)
    assert set(missing) == {one.id for one in MESSAGES[1].all()} - {CHUNKS[1].id}
    assert not push(link, before, CHUNKS[2])
    for one in MESSAGES[1].all():
        assert push(link, again, one) == (one != CHUNKS[1])


def test_two_messages_that_share_objects_each_lack_them(link: Link) -> None:
    """Pushed for one they are there for both, and the other may push them all the same."""
    first, second = (link.state.start_session(link.run_id) for _ in range(2))
    link.state.preregister_object_tree(MESSAGES[0].tree, first)
    assert CHUNKS[1].id in link.state.preregister_object_tree(MESSAGES[1].tree, second)
    assert push(link, first, CHUNKS[1])
    assert push(link, second, CHUNKS[1])
    assert link.state.get_object(link.run_id, CHUNKS[1].id) == CHUNKS[1].content


def test_what_is_refused_stays_missing(link: Link) -> None:
    """Wrong content is not stored, and the session takes the right one."""
    session_id = link.state.start_session(link.run_id)
    link.state.preregister_object_tree(ARRAYS[1].tree, session_id)
    assert not link.state.store_object(link.run_id, session_id, CHUNKS[1].id, CHUNKS[2].content)
    assert push(link, session_id, CHUNKS[1])


def test_the_end_of_a_run_ends_its_sessions(link: Link) -> None:
    """Nothing more is taken."""
    session_id = link.state.start_session(link.run_id)
    link.state.preregister_object_tree(ARRAYS[1].tree, session_id)
    link.state.delete_sessions_in_run(link.run_id)
    assert not push(link, session_id, CHUNKS[1])
    with pytest.raises(ValueError, match="Unknown object push session"):
        link.state.preregister_object_tree(ARRAYS[1].tree, session_id)


def test_what_came_is_told_when_everybody_can_read_it(link: Link) -> None:
    """Not before the transaction that stores it has ended."""
    store, seen = link.state.object_store, list[Any]()
    if not hasattr(store, "on_available"):
        return

    def look(object_id: str) -> None:
        reader = threading.Thread(target=lambda: seen.append(store.get(object_id)))
        reader.start()
        reader.join()

    session_id = link.state.start_session(link.run_id)
    link.state.preregister_object_tree(ARRAYS[1].tree, session_id)
    before, store.on_available = store.on_available, look
    try:
        assert push(link, session_id, CHUNKS[1])
        assert not push(link, session_id, CHUNKS[1])
    finally:
        store.on_available = before
    assert seen == [CHUNKS[1].content]


# ---------------------------------------------------------------- who announces what is below an object

INNER = FlowerObject("ArrayChunk", body=b"inner")
OUTER = FlowerObject("Array", (INNER,), b"outer")


def lie(one: FlowerObject, *children: str) -> Any:
    """A tree that says that other objects are below."""
    return ObjectTree(object_id=one.id, children=[ObjectTree(object_id=child) for child in children])


def ids_of(tree: Any) -> set[str]:
    """The ids of all objects in a tree."""
    return {tree.object_id}.union(*map(ids_of, tree.children))


@pytest.fixture(params=["ArenaStore", "DurableStore"])
def lied_to(request: pytest.FixtureRequest, stores: Stores) -> Iterator[Any]:
    """Both of lifl's stores."""
    yield from one_of(request.param, stores)


LIES = {
    "hides": [lie(OUTER)],
    "adds": [lie(OUTER, "a" * 64)],
    "contains itself": [ObjectTree(object_id=OUTER.id, children=[lie(INNER, OUTER.id)])],
    "upside down": [lie(INNER, OUTER.id)],
    "in a ring": [lie(INNER, OUTER.id), lie(OUTER, INNER.id)],
    "root and leaf": [lie(OUTER, INNER.id), lie(INNER), lie(INNER, OUTER.id, "b" * 64)],
}


@pytest.mark.parametrize("is_offered", [False, True], ids=["pushed", "offered"])
@pytest.mark.parametrize("lies", LIES.values(), ids=LIES)
def test_lies_about_anothers_objects_cost_nobody_anything(lied_to: Any, lies: list[Any], is_offered: bool) -> None:
    """An honest tree holds all its objects and lacks those that have not come, whoever said what of them before."""
    honest = FlowerObject("RecordDict", (OUTER,), b"honest")
    liars = [f"{n:064x}" for n in range(len(lies))]
    for liar, said in zip(liars, lies, strict=True):
        lied_to.preregister(1, said)
        lied_to.preregister(1, ObjectTree(object_id=liar, children=[said]))
    held = lied_to.offer({OUTER.id: OUTER.content}) if is_offered else set()
    missing = lied_to.preregister(2, honest.tree)
    assert set(missing) == {one.id for one in honest.all()} - held
    for one in (OUTER, INNER, honest):  # parents before their children too
        lied_to.put(one.id, one.content)
    assert ids_of(lied_to.get_object_tree(honest.id)) == {one.id for one in honest.all()}
    for liar, said in zip(liars, lies, strict=True):
        lied_to.delete(liar)
        lied_to.delete(said.object_id)
    lied_to.delete_objects_in_run(1)
    assert all(sent(lied_to, one.id) == one.content for one in honest.all())
    lied_to.withdraw(held)
    lied_to.delete(honest.id)
    assert len(lied_to) == 0


def test_messages_that_contain_each_other_go(lied_to: Any) -> None:
    """And what is below them, unless another message has it."""
    first, second = (FlowerObject("Message", (), name) for name in (b"first", b"second"))
    for one, other in ((first, second), (second, first)):
        below = [ObjectTree(object_id=other.id), OUTER.tree, CHUNKS[3].tree]
        lied_to.preregister(1, ObjectTree(object_id=one.id, children=below))
    fill(lied_to, FlowerObject("Message", (OUTER,), b"third"), run_id=2)
    lied_to.put(CHUNKS[3].id, CHUNKS[3].content)
    lied_to.delete(first.id)
    assert first.id in lied_to
    lied_to.delete(second.id)
    assert len(lied_to) == 3
    lied_to.delete_objects_in_run(1)
    assert len(lied_to) == 3
    assert sent(lied_to, INNER.id) == INNER.content
    lied_to.delete_objects_in_run(2)
    assert len(lied_to) == 0


def test_a_message_holds_what_it_was_announced_with_last(lied_to: Any) -> None:
    """Announced again with other objects below it, it lets go of those before."""
    message = FlowerObject("Message", (), b"again and again")
    for n in range(5):
        inner = [hashlib.sha256(b"%d %d" % (n, i)).hexdigest() for i in range(100)]
        tree = ObjectTree(object_id=message.id, children=[lie(OUTER, *inner)])
        assert {*inner, OUTER.id, message.id} == set(lied_to.preregister(1, tree))
        assert len(lied_to) == 102
    lied_to.delete(message.id)
    assert len(lied_to) == 0


RUNS = st.integers(1, 2)


class Liars(RuleBasedStateMachine):
    """Trees with any objects below any others, of which the contents say something else, in any order."""

    stores: Stores
    kind: str

    def __init__(self) -> None:
        super().__init__()
        self.store, self.free = self.stores.new(self.kind), self.stores.arena.free_bytes
        self.held: set[str] = set()  # what honest messages hold

    @rule(path=st.lists(st.sampled_from(THINGS), min_size=1, max_size=6), run_id=RUNS, to=st.integers(0, 3))
    def lie(self, path: list[FlowerObject], run_id: int, to: int) -> None:
        """Announces some objects one below the other, or all below the first."""
        tree = ObjectTree(object_id=path[-1].id)
        for at, one in reversed(list(enumerate(path[:-1]))):
            tree = ObjectTree(object_id=one.id, children=[tree, *(ObjectTree(object_id=one.id) for one in path[:at])])
            tree = tree if at > to else ObjectTree(object_id=one.id, children=[tree])
        if tree.object_id not in {one.id for one in MESSAGES}:  # nobody can know what another's will be
            self.store.preregister(run_id, tree)

    @rule(message=st.sampled_from(MESSAGES))
    def announce(self, message: FlowerObject) -> None:
        """An honest one."""
        missing = self.store.preregister(3, message.tree)
        assert {one.id for one in message.all() if not self.store.get(one.id)} == set(missing)
        self.held |= {message.id}

    @rule(one=st.sampled_from(THINGS))
    def put(self, one: FlowerObject) -> None:
        """In a block of its own."""
        if one.id in self.store:
            self.store.put(one.id, self.stores.landed(one.content))

    @rule(one=st.sampled_from(THINGS))
    def delete(self, one: FlowerObject) -> None:
        """Deletes an object, if nothing refers to it."""
        if one.id not in self.held:
            self.store.delete(one.id)

    @rule(run_id=st.integers(1, 2))
    def end_run(self, run_id: int) -> None:
        """Ends a run of liars."""
        self.store.delete_objects_in_run(run_id)

    @invariant()
    def honest_messages_are_whole(self) -> None:
        """Each of their objects is registered."""
        for message in MESSAGES:
            if message.id in self.held:
                assert all(one.id in self.store for one in message.all())

    def teardown(self) -> None:
        """Ends all runs: nothing is left, and everything is given back."""
        for run_id in (1, 2, 3):
            self.store.delete_objects_in_run(run_id)
        assert len(self.store) == 0
        assert self.stores.arena.free_bytes == self.free


@pytest.mark.parametrize("kind", ["ArenaStore", "DurableStore"])
def test_any_sequence_of_lies_leaves_honest_messages_whole(stores: Stores, kind: str) -> None:
    """And nothing at the end."""
    Liars.stores, Liars.kind = stores, kind
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        Liars,
        settings=settings(
            max_examples=60 if kind == "ArenaStore" else 15,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_a_changed_content_is_found(arena_store: Any) -> None:
    """The check that these tests run with fails when an id's bytes are not its bytes."""
    passing = Passing(CHUNKS[1].content)
    arena_store.preregister(1, CHUNKS[1].tree)
    arena_store.put(CHUNKS[1].id, Landed(passing, len(passing), CHUNKS[1].id, b"ArrayChunk  5\0"))
    passing.view[-1] ^= 1
    with pytest.raises(AssertionError, match="holds the bytes of"):
        arena_store.get(CHUNKS[1].id)
    assert len(store_module.broken) == 1
    store_module.broken.clear()
    passing.view[-1] ^= 1


def test_a_lie_about_a_whole_reply_hides_nothing(arena_store: Any) -> None:
    """Somebody has announced another's reply as empty: all of it can be pushed, also what the server writes itself."""
    reply, liar = FlowerObject("RecordDict", (OUTER,), b"reply"), FlowerObject("RecordDict", (), b"liar")
    message = FlowerObject("Message", (reply,), b"honest")
    arena_store.preregister(1, ObjectTree(object_id=liar.id, children=[ObjectTree(object_id=reply.id)]))
    held = arena_store.offer({OUTER.id: OUTER.content})
    assert set(arena_store.preregister(1, message.tree)) == {INNER.id, reply.id, message.id}
    arena_store.withdraw(held)
    arena_store.delete(liar.id)
    for one in (INNER, reply, message):
        arena_store.put(one.id, one.content)
    assert arena_store.get_object_tree(message.id) == message.tree
    assert all(sent(arena_store, one.id) == one.content for one in message.all())
    arena_store.delete(message.id)
    assert len(arena_store) == 0
