"""The rounds that this server folds: messages of a strategy pass, replies to them are received into its round.

Owns the threads that read whole replies, and the changes to Flower's LinkState by which messages and replies are seen.
A lifl strategy announces a round before it sends its messages; as they pass they are bound to the round. Everything
else is plain Flower.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from logging import DEBUG, ERROR
from typing import Any

from lifl.errors import ShmError
from lifl.node.node import Node
from lifl.report.entries import Rejection
from lifl.round.admission import Limits
from lifl.round.round import Round
from lifl.round.settings import Order, Timing
from lifl.superlink import flower, patches
from lifl.superlink.http.long_poll import LongPolls
from lifl.superlink.rounds.chunk_map import Geometry
from lifl.superlink.rounds.incoming_reply import Place, Reception, Settled
from lifl.superlink.rounds.model_objects import objects_of_model, recognise
from lifl.superlink.rounds.outgoing import Outgoing
from lifl.superlink.rounds.registry import Registry
from lifl.superlink.rounds.served_round import Announced, AskedMessage, ServedRound
from lifl.superlink.rounds.watcher import Watcher
from lifl.superlink.store.content import Landed, PartContent
from lifl.superlink.store.store import Store, count_of
from lifl.tensor import TensorSpec

_names, _server = flower.part("rounds"), flower.part("server")

OPEN_TIMEOUT_S = 60.0
RETRY_S = 0.1
ASSEMBLERS = 4

SLOW_S, SLOW_BYTES_PER_S = 1.0, 2**20
"""A reply of which less than this has come in the last moments holds no block while others wait for room.

The reply goes on beside the arena, which costs a copy.
"""

TOO_LARGE = "twice the model and 128 MiB"
"""The most bytes of a reply, in words; see ``Reception``."""


class Rounds:
    """All rounds of a server; the gateway's ``Placer``.

    Parameters
    ----------
    node : Node
        The rounds are opened there.
    store : ArenaStore or DurableStore
        The objects of messages and replies.
    long_polls : LongPolls
        The SuperNodes that wait for messages.

    Attributes
    ----------
    registry : Registry
        The open rounds and their messages.
    relieve : Callable
        Frees memory of the arena that slow readers hold; any thread. The plane sets it.
    served : int
        Rounds so far.
    messages, replies : int
        Messages and replies that were stored so far, of rounds or not; one that is sent again counts again.
    copied_bytes : int
        Bytes of replies that did not land where they belong.
    """

    def __init__(self, node: Node, store: Store, long_polls: LongPolls) -> None:
        self._node, self.store = node, store
        self.registry = Registry(self._assemble)
        self._outgoing = Outgoing(long_polls)
        self._geometries: dict[TensorSpec, Geometry] = {}
        self._state: Any = None
        self._watcher: Watcher | None = None
        self._lock = threading.Lock()  # guards the counts and the geometries
        self.served = 0
        self.messages = 0
        self.replies = 0
        self.copied_bytes = 0
        # Whole replies are read there while the server's loop receives others; in several threads, since a reply may
        # wait for room. `close` ends them.
        self._assemblers = ThreadPoolExecutor(ASSEMBLERS, "lifl-assembler")
        self.relieve: Callable[[], None] = lambda: None
        self._closing = threading.Event()
        store.on_available = self._outgoing.available

    def attach(self, state: Any) -> None:
        """Listens to what a LinkState stores, and watches for nodes that are gone."""
        self._state = state
        store_message, store_object = state.store_message_and_object_tree, state.store_object

        def store_and_note(message: Any, object_tree: Any, session_id: str) -> Any:
            if message.metadata.reply_to_message_id:
                return self._store_reply(store_message, message, object_tree, session_id)
            return self._store_message(store_message, message, object_tree, session_id)

        def put_and_note(run_id: int, session_id: str, object_id: str, object_content: Any) -> Any:
            if not self.registry.may_push(session_id):
                return False
            # The gateway has counted what landed, see `place`.
            if not isinstance(object_content, Landed) and not self._admit(session_id, object_id, len(object_content)):
                return False
            stored = store_object(run_id, session_id, object_id, object_content)
            if stored:
                self.registry.pushed(session_id, object_id)
            return stored

        patches.replace_store_message(state, store_and_note)
        patches.replace_store_object(state, put_and_note)
        self._watcher = Watcher(self.registry, self._outgoing, self.store, state, self._give_up)
        self._watcher.start()

    def close(self) -> None:
        """Ends every round."""
        self._closing.set()
        if self._watcher is not None:
            self._watcher.close()
        for served in self.registry.rounds():
            self.end(served)
        self._assemblers.shutdown(wait=False, cancel_futures=True)

    # ------------------------------------------------------------ rounds

    def is_running(self, run_id: int) -> bool:
        """True for a run of this server's that may have rounds."""
        return bool(self._state.get_run_info(run_ids=[run_id]))

    def open(
        self,
        announced: Announced,
        spec: TensorSpec,
        timing: Timing,
        order: Order,
        limits: Limits,
        on_settled: Callable[[Settled], None],
    ) -> ServedRound:
        """Opens a round for messages that will be sent; waits for room in the arena.

        `on_settled` is called with each reply, from any thread. Raises :class:`ShmError` if there is no room, and else
        what ``Node.open_round`` raises.
        """
        served = ServedRound(
            announced=announced,
            round=self._open_round(spec, len(announced.nodes), timing, order, limits),
            geometry=self._geometry_of(spec),
            on_settled=on_settled,
            expected=Counter(announced.nodes),
        )
        self.registry.open(served)
        with self._lock:
            self.served += 1
        return served

    def _open_round(self, spec: TensorSpec, expected: int, timing: Timing, order: Order, limits: Limits) -> Round:
        left_s = OPEN_TIMEOUT_S
        while True:
            try:
                return self._node.open_round(spec, expected, timing, order, limits=limits)
            except ShmError:
                # Objects of a round before may be in the way; they go when the nodes have them.
                if left_s <= 0 or not self._node.used_bytes or self._closing.wait(RETRY_S):
                    raise
                self.relieve_arena()
                self.relieve()
                left_s -= RETRY_S

    def _geometry_of(self, spec: TensorSpec) -> Geometry:
        """The cut of a model, which remembers from round to round in which forms nodes reply."""
        with self._lock:
            geometry = self._geometries.get(spec)
            if geometry is None:
                self._geometries.clear()  # a run has one model
                geometry = self._geometries[spec] = Geometry(spec, int(_names.MAX_CHUNK_BYTES))
            return geometry

    def end(self, served: ServedRound, *, deletes: bool = True) -> None:
        """Takes no more of a round's replies, and closes the round; harmless when it is closed.

        If it `deletes`, the messages and their objects are deleted, and replies that come later are not stored. A
        message that is bound and not stored yet is unknown to Flower then, and stays in its state when it is stored.
        """
        if (left := self.registry.close(served, clears=deletes)) is None:
            return
        receptions, sessions = left
        for reception in receptions:
            reception.drop()
        if deletes:
            self._end_sessions(sessions)
            roots = [object_id for reception in receptions for object_id in reception.roots]
            self._delete(served.asked, [*roots, *served.replies])
        served.round.close()

    def offer_model(self, served: ServedRound, mean: Any) -> set[str]:
        """Puts the objects of a model that has just been made into the store, so that its sender need not push them.

        `mean` is the memory of the model's block, which stays in the arena as long as one of the objects does. Returns
        the ids of the objects that the store holds until they are withdrawn.
        """
        held = set[str]()
        if self.store.is_durable:
            return held  # a database has only what was pushed
        for object_id, head, numbers in objects_of_model(served.geometry, mean):
            held |= self.store.offer({object_id: head if numbers is None else PartContent(head, numbers)})
        return held

    # ------------------------------------------------------------ messages pass

    def _store_message(self, store: Callable[..., Any], message: Any, tree: Any, session_id: str) -> Any:
        """Stores a message to a node, and binds it to the round that expects it."""
        meta, is_stored = message.metadata, False
        asked = self.registry.bind(meta)  # before it is stored: a reply may come at once
        try:
            with self._outgoing.registering():
                is_stored, missing = store(message, tree, session_id)
                if is_stored:
                    with self._lock:
                        self.messages += 1
                    if asked is not None:
                        self.registry.stored(asked)
                    self._outgoing.add(meta.message_id, meta.dst_node_id, set(missing))
        finally:
            if asked is not None and not is_stored:
                reception, sessions = self.registry.unbind(asked)
                if reception is not None:
                    self._forget_reply(reception, sessions)
        return is_stored, missing

    def _store_reply(self, store: Callable[..., Any], message: Any, tree: Any, session_id: str) -> Any:
        """Stores a reply that a node announces, and expects its objects if it is one to a round's message.

        True and no missing objects are the answer to a reply of which nothing is needed.
        """
        if self._refuse_if_wide(message, tree):
            return True, []
        with self.registry.announcing(message.metadata) as is_needed:
            if not is_needed:  # announced again, while it is folded or after
                return True, []
            asked = self.registry.find(message.metadata.reply_to_message_id)
            form, objects = None, dict[str, bytes]()
            if asked is not None:
                recognised = recognise(asked.served.geometry, tree, message.metadata.src_node_id)
                form, objects = recognised.form, recognised.objects
            # Offered while the reply is stored: what the server can write itself is not among the missing objects then.
            offered = self.store.offer(objects)
            try:
                is_stored, missing = store(message, tree, session_id)
            finally:
                self.store.withdraw(offered)
            if is_stored:
                with self._lock:
                    self.replies += 1
                self.registry.announced(message, tree, set(missing), session_id, form)
                # After `announced`: a round that ends from here on finds the reply, and clears it itself.
                if asked is not None and self.registry.is_cleared(asked):
                    self._end_sessions([session_id])
                    self._delete([], [message.metadata.message_id])
                    return True, []
            return is_stored, missing

    def _forget_reply(self, reception: Reception, sessions: Iterable[str]) -> None:
        """Gives everything back that a reply holds of which nobody learns."""
        reception.drop()
        self._end_sessions(sessions)
        self._delete([], reception.roots)

    def _refuse_if_wide(self, message: Any, tree: Any) -> bool:
        """True if a reply does not count for the number of its objects, before anything of it is stored."""
        meta = message.metadata
        asked = self.registry.find(meta.reply_to_message_id)
        if asked is None or asked.node_id != meta.src_node_id:
            return False
        most = asked.served.geometry.max_objects
        if count_of(tree, most) <= most or self.registry.is_known(asked, meta.message_id):
            return False
        if self.registry.settle_unread(asked, meta.message_id):
            self._delete_answered(asked, [])
            refusal = Rejection(asked.client, "format", f"more than {most:,} objects in a reply")
            asked.served.on_settled(Settled(asked.client, message, {}, refusal))
        return True

    # ------------------------------------------------------------ replies are settled

    def _assemble(self, asked: AskedMessage, reception: Reception) -> None:
        """Has a whole reply read. The registry's lock is held."""
        self._assemblers.submit(self._settle, asked, reception)

    def _settle(self, asked: AskedMessage, reception: Reception) -> None:
        """Reads a whole reply and folds it; in a thread of the assemblers."""
        settled = _failed(reception)
        with _logging(reception):
            settled = reception.settle(self.store, lambda: self._release(asked, reception))
        with _logging(reception):
            self._release(asked, reception)
        with self._lock:
            self.copied_bytes += reception.copied_bytes
        if self.registry.settle(asked):
            if not self.store.is_durable:
                self._delete_answered(asked, [asked.reply_id])
            # After the deletion: when a strategy has all its replies nothing is left of them.
            self._tell(asked, reception, settled)

    def _tell(self, asked: AskedMessage, reception: Reception, settled: Settled) -> None:
        """Tells the strategy how a reply ended; that the server failed, if the reply cannot be told of."""
        for one in (settled, _failed(reception)):
            with _logging(reception):
                asked.served.on_settled(one)
                return

    def _release(self, asked: AskedMessage, reception: Reception) -> None:
        """Has the store let go of a reply's objects; an object that others refer to, a model or a reply, stays."""
        self.registry.forget(asked)
        if self.store.is_durable:
            return  # a ServerApp that starts anew after a crash pulls the reply as from Flower's server
        for object_id in reception.roots:
            self.store.delete(object_id)
        self.store.keep(reception.object_ids)

    def _give_up(self, asked: AskedMessage, settled: Settled) -> None:
        """Ends a message whose reply is arriving: the reply does not count, and what has come of it is deleted."""
        if (reception := self.registry.give_up(asked)) is not None:
            reception.drop()
            self._discard(asked, settled, reception)

    def _discard(self, asked: AskedMessage, settled: Settled, reception: Reception) -> None:
        """Deletes a reply that was given up, and tells the strategy."""
        with _logging(reception):
            # Flower ends the sessions before the registry forgets them: at no moment an object passes in one of them.
            self._end_sessions(list(asked.sessions))
            self.registry.forget(asked)
            self._delete_answered(asked, reception.roots)
        if self.registry.settle(asked):
            self._tell(asked, reception, settled)

    # ------------------------------------------------------------ the gateway asks

    def place(self, object_id: str, node_id: int, nbytes: int) -> Place | None:
        """A target in the block of an update that the object is a part of; see ``Placer``."""
        asked = self.registry.sender(object_id, node_id)
        reception = None if asked is None else asked.reception
        if asked is None or reception is None:
            return None
        if not reception.admit(object_id, nbytes):
            self._refuse_large(asked, reception)
            raise ValueError(f"this reply has more bytes than {TOO_LARGE}")
        return reception.place(object_id, nbytes)

    def is_part(self, object_id: str, node_id: int) -> bool:
        """True for an object of a reply that the node is sending into a round."""
        return self.registry.sender(object_id, node_id) is not None

    def session_of(self, object_id: str, node_id: int) -> str | None:
        """The session of a node's push that names none; "" if nobody awaits the object, None: only others do."""
        return self.registry.session_of(object_id, node_id)

    def is_incoming(self, node_id: int) -> bool:
        """True while a message for a node is announced whose objects have not all come."""
        return self._outgoing.is_incoming(node_id)

    def relieve_arena(self) -> None:
        """Makes replies that hold a block and hardly come give it back, for others that wait for room. Any thread."""
        now_s = time.monotonic()
        for reception in self.registry.arriving():
            if reception.is_slow(now_s, SLOW_S, SLOW_BYTES_PER_S):
                reception.give_way(self.store)

    def _admit(self, session_id: str, object_id: str, nbytes: int) -> bool:
        """Counts an object that Flower's own routes took, past the gateway; false if it is refused."""
        found = self.registry.pushing(session_id, object_id)
        if found and not session_id:  # Flower does not say here which node sends it
            return False
        for asked in found:
            reception = asked.reception
            if reception is not None and not reception.admit(object_id, nbytes):
                self._refuse_large(asked, reception)
                return False
        return True

    def _refuse_large(self, asked: AskedMessage, reception: Reception) -> None:
        """Refuses a reply that is too large, whatever it may say."""
        refusal = Rejection(reception.client, "format", f"more than {TOO_LARGE}")
        settled = Settled(reception.client, reception.message, {}, refusal)
        # The reply is given up at once, so that no more of it is taken, and its block too: the assemblers may wait for
        # it. One of them deletes its objects: the server's loop may be here, and must not wait for a database.
        if self.registry.give_up(asked) is not None:
            reception.drop()
            self._assemblers.submit(self._discard, asked, settled, reception)

    # ------------------------------------------------------------ Flower's state is cleaned

    def _end_sessions(self, sessions: Iterable[str]) -> None:
        """Ends push sessions in which nothing more is pushed; Flower would keep what they miss until the run ends."""
        try:
            for session_id in sessions:
                self._state._cleanup_push_session(session_id, cleanup_messages=False)
        except Exception as error:
            _server.log(DEBUG, "push sessions could not be ended: %r", error)

    def _delete(self, asked: Iterable[str], replies: Iterable[str]) -> None:
        message_ids = set(asked)
        try:
            self._state.delete_messages(message_ins_ids=message_ids)
            for object_id in (*replies, *message_ids):
                self.store.delete(object_id)
        except Exception as error:  # Flower cleans up when the run ends
            _server.log(ERROR, "messages of a round could not be deleted: %s", error)

    def _delete_answered(self, asked: AskedMessage, replies: Iterable[str]) -> None:
        """Deletes a message with its reply; the message when the round ends, if its ServerApp still pushes it.

        A node may reply before it has the message: then the push would fail, and the ServerApp push all of them again.
        """
        is_pushed = asked.message_id not in self._outgoing
        self._delete([asked.message_id] if is_pushed else [], replies)


@contextlib.contextmanager
def _logging(reception: Reception) -> Iterator[None]:
    """Lasts while something is done for a reply that must not keep the reply from its end; what fails is logged."""
    try:
        yield
    except Exception as error:
        _server.log(ERROR, "a reply of node %s could not be settled: %r", reception.client, error)


def _failed(reception: Reception) -> Settled:
    """The end of a reply that the server could not read, delete or tell of."""
    refusal = Rejection(reception.client, "error", "the server failed at the end of this reply: see its log")
    return Settled(reception.client, reception.message, {}, refusal)
