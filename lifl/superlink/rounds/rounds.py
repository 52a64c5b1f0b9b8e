"""The rounds that are open at this server: which messages they are about, and what comes in reply.

Owns who waits for which message and object. A lifl strategy announces a round before it sends its messages; as they
pass, their ids are noted; replies to them are received into the round. Everything else is plain Flower.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from logging import DEBUG, ERROR
from typing import Any

from flwr.app import Error
from flwr.app.message import make_message

from lifl.errors import ShmError
from lifl.node.node import Node
from lifl.report.entries import Rejection
from lifl.round.admission import Limits
from lifl.round.settings import Order, Timing
from lifl.superlink import flower, patches
from lifl.superlink.http.long_poll import LongPolls
from lifl.superlink.rounds.chunk_map import Form, Geometry
from lifl.superlink.rounds.incoming_reply import Place, Reception, Settled
from lifl.superlink.rounds.model_objects import Recognised, recognise
from lifl.superlink.rounds.offering import offer_model
from lifl.superlink.rounds.outgoing import Comings
from lifl.superlink.rounds.reply_index import Awaited
from lifl.superlink.rounds.served_round import Announced, ServedRound
from lifl.superlink.store.content import Landed
from lifl.superlink.store.store import Store, count_of
from lifl.tensor import TensorSpec

_names, _server = flower.part("rounds"), flower.part("server")

WATCH_S = 1.0
"""How often nodes that owe a reply are looked after: Flower makes an error reply for one that is gone."""

IDLE_S = 10.0
"""A reply of which nothing came for so long is looked after too: Flower gives its push session up at some time."""

OPEN_TIMEOUT_S = 60.0
ASSEMBLERS = 4

SLOW_S, SLOW_BYTES_PER_S = 1.0, 2**20
"""A reply of which less than this has come in the last moments holds no block while others wait for room.

It goes on beside the arena, which costs a copy.
"""

TOO_LARGE = "twice the model and 128 MiB"
"""In words, what a reply may have, see ``Reception``."""


class Rounds:
    """All of a server's; the gateway's ``Placer``."""

    def __init__(self, node: Node, store: Store, holding: LongPolls) -> None:
        self._node, self.store = node, store
        self._lock = threading.RLock()
        self._open: list[ServedRound] = []
        self._asked: dict[str, ServedRound] = {}
        self._awaited = Awaited()
        self._comings = Comings(holding)
        self._geometries: dict[TensorSpec, Geometry] = {}
        self._state: Any = None
        self._arriving: set[str] = set()  # messages of which a reply is being stored now
        self.served = 0  # rounds so far
        self.messages = self.replies = 0  # stored so far, of rounds or not; what is said again counts again
        self.copied_bytes = 0  # of replies that did not land where they belong
        # Replies are completed while the loop receives others; several at a time, since one may wait for room.
        self._assembler = ThreadPoolExecutor(ASSEMBLERS, "lifl-assembler")
        self.relieve: Callable[[], None] = lambda: None  # frees memory that slow readers hold; set by the plane
        self._stop = threading.Event()
        self._watch = threading.Thread(target=self._look_after, name="lifl-watch", daemon=True)
        store.on_available = self._comings.available

    def attach(self, state: Any) -> None:
        """Listens to what a LinkState stores."""
        self._state, original = state, state.store_message_and_object_tree

        def store_and_note(message: Any, object_tree: Any, session_id: str) -> Any:
            if self._has_refused(message, object_tree):
                return True, []
            recognised, stored = self._recognise(message, object_tree), False
            known = self.store.offer(recognised.objects)
            with self._lock:
                if self._is_taken(message):  # said again, while it is folded and after: nothing of it is needed
                    self.store.withdraw(known)
                    return True, []
                served = self._bind(message)  # before it is stored: a reply may come at once
                # Who looks after nodes that are gone would have Flower take it for delivered.
                self._arriving.add(message.metadata.reply_to_message_id)
            try:
                with self._comings.noting():
                    try:
                        stored, missing = original(message, object_tree, session_id)
                    finally:
                        self.store.withdraw(known)
                        if served is not None and not stored:
                            self._unbind(served, message)
                    if stored:
                        if served is not None:
                            with self._lock:
                                served.stored.add(message.metadata.message_id)
                        self._stored(message, object_tree, set(missing), session_id, recognised.form)
            finally:
                self._arriving.discard(message.metadata.reply_to_message_id)
            return stored, missing

        put = state.store_object

        def put_and_note(run_id: int, session_id: str, object_id: str, object_content: Any) -> Any:
            if not isinstance(object_content, Landed) and not self._admit(session_id, object_id, len(object_content)):
                return False
            stored = put(run_id, session_id, object_id, object_content)
            if stored:
                self._pushed(session_id, object_id)
            return stored

        patches.replace_store_message(state, store_and_note)
        patches.replace_store_object(state, put_and_note)
        self._watch.start()

    def close(self) -> None:
        """Ends every round."""
        self._stop.set()
        for served in list(self._open):
            self.end(served)
        self._assembler.shutdown(wait=False, cancel_futures=True)

    # ------------------------------------------------------------ rounds

    def is_running(self, run_id: int) -> bool:
        """True for a run of this server's that may have rounds."""
        return bool(self._state.get_run_info(run_ids=[run_id]))

    def open(
        self,
        said: Announced,
        spec: TensorSpec,
        timing: Timing,
        order: Order,
        limits: Limits,
        tell: Callable[[Settled], None],
    ) -> ServedRound:
        """Opens a round for messages that will be sent; waits for room in the arena.

        Raises :class:`ShmError` if there is none.
        """
        waits = OPEN_TIMEOUT_S
        while True:
            try:
                round_ = self._node.open_round(spec, len(said.nodes), timing, order, limits=limits)
                break
            except ShmError:
                # What is in the way may be objects of a round before, which go when the nodes have them.
                if waits <= 0 or not self._node.used_bytes or self._stop.wait(0.1):
                    raise
                self.relieve_arena()
                self.relieve()
                waits -= 0.1
        with self._lock:
            geometry = self._geometries.get(spec)
            if geometry is None:
                self._geometries.clear()  # a run has one model
                geometry = self._geometries[spec] = Geometry(spec, int(_names.MAX_CHUNK_BYTES))
            served = ServedRound(said, round_, geometry, tell, Counter(said.nodes))
            self._open.append(served)
            self.served += 1
        return served

    def end(self, served: ServedRound, *, deletes: bool = True) -> None:
        """Takes no more of a round's replies, and closes it: messages and objects go, late ones are not stored."""
        with self._lock:
            if served.is_closed:
                return
            served.is_closed = True
            self._open.remove(served)
            for message_id in served.asked:
                self._asked.pop(message_id, None)
            receptions = list(served.receptions.values())
            served.receptions.clear()
            sessions = [one for reception in receptions for one in self._awaited.forget(reception)]
        for reception in receptions:
            reception.drop()
        if deletes:
            self._end_sessions(sessions)
            replies = [object_id for reception in receptions for object_id in reception.roots]
            self._delete(set(served.asked), [*replies, *served.settled])
        served.round.close()

    def _end_sessions(self, sessions: list[str]) -> None:
        """Nothing more is pushed for these replies; Flower would keep the ids of what is missing until the run ends."""
        try:
            for session_id in sessions:
                self._state._cleanup_push_session(session_id, cleanup_messages=False)
        except Exception as error:
            _server.log(DEBUG, "push sessions could not be ended: %r", error)

    def _delete(self, asked: set[str], replies: list[str]) -> None:
        try:
            self._state.delete_messages(message_ins_ids=asked)
            for object_id in (*replies, *asked):
                self.store.delete(object_id)
        except Exception as error:  # Flower cleans up when the run ends
            _server.log(ERROR, "messages of a round could not be deleted: %s", error)

    def _delete_answered(self, asked: str, replies: list[str]) -> None:
        """Deletes a message with its reply; the message when the round ends, if its ServerApp still pushes it.

        A node may answer before it has the message: then the push would fail, and the ServerApp push all of them again.
        """
        self._delete(set() if asked in self._comings else {asked}, replies)

    def offer_model(self, served: ServedRound, mean: Any) -> set[str]:
        """Has a mean's objects in the store; the ids of those that the store holds until they are withdrawn."""
        return offer_model(self.store, served.geometry, mean)

    # ------------------------------------------------------------ what passes

    def _stored(self, message: Any, tree: Any, missing: set[str], session_id: str, form: Form | None) -> None:
        meta = message.metadata
        if not meta.reply_to_message_id:
            with self._lock:
                self.messages += 1
            self._comings.add(meta.message_id, meta.dst_node_id, missing)
            return
        with self._lock:
            self.replies += 1
            served = self._asked.get(meta.reply_to_message_id)
            if served is None:
                return
            known = served.receptions.get(meta.message_id)
            if known is not None and known.message.metadata.reply_to_message_id != meta.reply_to_message_id:
                return  # a reply of another node has that id
            if meta.reply_to_message_id in served.replied if known is None else known.is_settling:
                return
            served.replied.add(meta.reply_to_message_id)
            if known is None:
                client = served.name(served.asked[meta.reply_to_message_id])
                settings = (served.round, served.geometry, served.said.weight_key)
                known = Reception(*settings, client, message, tree, missing, form)
                served.receptions[meta.message_id] = known
            self._awaited.expect(known, missing, session_id)
            self._settle_if_complete(served, known)

    def _has_refused(self, message: Any, tree: Any) -> bool:
        """True if a reply does not count for the number of its objects, before anything is stored of it."""
        meta = message.metadata
        with self._lock:
            served = self._asked.get(meta.reply_to_message_id)
            if served is None or served.asked.get(meta.reply_to_message_id) != meta.src_node_id:
                return False
            most = served.geometry.max_objects
            if meta.message_id in served.taken or meta.message_id in served.receptions or count_of(tree, most) <= most:
                return False
            is_first = meta.reply_to_message_id not in served.replied
            served.replied.add(meta.reply_to_message_id)
            served.taken.add(meta.message_id)
            client = served.name(meta.src_node_id) if is_first else ""
        if is_first:
            self._delete_answered(meta.reply_to_message_id, [])
            served.tell(Settled(message, {}, Rejection(client, "format", f"more than {most:,} objects in a reply")))
        return True

    def _recognise(self, message: Any, tree: Any) -> Recognised:
        """What the tree of a reply to one of a round's messages tells."""
        with self._lock:
            served = self._asked.get(message.metadata.reply_to_message_id)
        if served is None:
            return Recognised(None, {})
        return recognise(served.geometry, tree, message.metadata.src_node_id)

    def _bind(self, message: Any) -> ServedRound | None:
        """The round that a message is of, if it is of one: replies to it are received there from now on."""
        meta = message.metadata
        if meta.reply_to_message_id:
            return None
        for served in self._open:
            said = served.said
            is_its = (meta.run_id, meta.message_type, meta.group_id) == (said.run_id, said.message_type, said.group_id)
            if is_its and served.expected[meta.dst_node_id] > 0:
                served.expected[meta.dst_node_id] -= 1
                served.asked[meta.message_id] = meta.dst_node_id
                self._asked[meta.message_id] = served
                return served
        return None

    def _unbind(self, served: ServedRound, message: Any) -> None:
        with self._lock:
            served.expected[message.metadata.dst_node_id] += 1
            served.asked.pop(message.metadata.message_id, None)
            self._asked.pop(message.metadata.message_id, None)

    def _pushed(self, session_id: str, object_id: str) -> None:
        """A client has pushed an object; who has pushed all that it was asked for has replied."""
        with self._lock:
            for reception in self._awaited.pushed(session_id, object_id):
                served = self._asked.get(reception.message.metadata.reply_to_message_id)
                if served is not None:
                    self._settle_if_complete(served, reception)

    def _is_taken(self, message: Any) -> bool:
        served = self._asked.get(message.metadata.reply_to_message_id)
        return served is not None and message.metadata.message_id in served.taken

    def _settle_if_complete(self, served: ServedRound, reception: Reception) -> None:
        if not reception.missing and not reception.is_settling:
            reception.is_settling = True
            served.taken.add(reception.message.metadata.message_id)
            self._assembler.submit(self._settle, served, reception)

    def _settle(self, served: ServedRound, reception: Reception) -> None:
        try:
            settled = reception.settle(self.store, lambda: self._release(reception))
            self._release(reception)
            self.copied_bytes += reception.copied_bytes
            with self._lock:
                is_its = served.receptions.pop(reception.message.metadata.message_id, None) is not None
                # Who replies before it can have read the message must not take it from the ServerApp that pushes it.
                is_pushed = reception.message.metadata.reply_to_message_id not in self._comings
            if is_its:
                meta = reception.message.metadata
                if self.store.is_durable or not is_pushed:
                    served.settled.append(meta.message_id)
                else:
                    self._delete({meta.reply_to_message_id}, [meta.message_id])
                served.tell(settled)
        except Exception as error:
            _server.log(ERROR, "a reply of node %s could not be settled: %r", reception.client, error)

    def _release(self, reception: Reception) -> None:
        """The store lets go of a reply's objects; what others refer to as well, a model or another reply, stays."""
        with self._lock:
            self._awaited.forget(reception)
        if self.store.is_durable:
            return  # a ServerApp that starts anew after a crash pulls the reply as from Flower's server
        for object_id in reception.roots:
            self.store.delete(object_id)
        self.store.keep(reception.object_ids)

    # ------------------------------------------------------------ what the gateway asks

    def place(self, object_id: str, node_id: int, nbytes: int) -> Place | None:
        """A target in the block of an update that the object is a part of; see ``Placer``."""
        with self._lock:
            waiting = self._awaited.waiting(object_id)
        for reception in waiting:
            if reception.message.metadata.src_node_id == node_id:
                if not reception.admit(object_id, nbytes):
                    self._refuse(reception)
                    raise ValueError(f"this reply has more bytes than {TOO_LARGE}")
                return reception.place(object_id, nbytes)
        return None

    def is_part(self, object_id: str, node_id: int) -> bool:
        """True for an object of a reply that the node is sending into a round."""
        with self._lock:
            waiting = self._awaited.waiting(object_id)
        return any(one.message.metadata.src_node_id == node_id for one in waiting)

    def session_of(self, object_id: str, node_id: int) -> str | None:
        """The session of a node's push that names none; "" if nobody awaits the object, None: only others do."""
        with self._lock:
            return self._awaited.session_of(object_id, node_id)

    def _admit(self, session_id: str, object_id: str, nbytes: int) -> bool:
        """Counts an object that has come past the gateway, as Flower's own routes take it."""
        with self._lock:
            found = self._awaited.pushing(session_id, object_id)
        if found and not session_id:  # whose it is Flower does not say here
            return False
        for reception in found:
            if not reception.admit(object_id, nbytes):
                self._refuse(reception)
                return False
        return True

    def _refuse(self, reception: Reception) -> None:
        """A reply is too large, whatever it may say: it does not count, and what has come of it goes."""
        meta = reception.message.metadata
        with self._lock:
            served = self._asked.get(meta.reply_to_message_id)
            if served is None or reception.is_settling or served.receptions.pop(meta.message_id, None) is None:
                return
            reception.is_settling = True
            served.taken.add(meta.message_id)
            sessions = self._awaited.forget(reception)
        self._assembler.submit(self._give_up, served, reception, sessions)

    def _give_up(self, served: ServedRound, reception: Reception, sessions: list[str]) -> None:
        reception.drop()
        self._end_sessions(sessions)
        self._delete_answered(reception.message.metadata.reply_to_message_id, [*reception.roots])
        served.tell(Settled(reception.message, {}, Rejection(reception.client, "format", f"more than {TOO_LARGE}")))

    def relieve_arena(self) -> None:
        """Somebody waits for room: replies that hold a block and hardly come give it back. Any thread."""
        with self._lock:
            receptions = [reception for served in self._open for reception in served.receptions.values()]
        now_s = time.monotonic()
        for reception in receptions:
            if reception.is_slow(now_s, SLOW_S, SLOW_BYTES_PER_S):
                reception.give_way(self.store)

    def is_incoming(self, node_id: int) -> bool:
        """True while a message for a node is announced whose objects have not all come."""
        return self._comings.is_incoming(node_id)

    # ------------------------------------------------------------ nodes that are gone

    def _look_after(self) -> None:
        while not self._stop.wait(WATCH_S):
            self._comings.forget_stale()
            for served in list(self._open):
                with self._lock:
                    # Of one that is being stored Flower would say that it never existed.
                    owed = served.stored - served.replied - self._arriving
                try:
                    if owed and not served.is_closed:
                        self._look_for_errors(served, owed)
                    self._look_for_broken(served)
                except Exception as error:
                    _server.log(ERROR, "nodes of a round could not be looked after: %r", error)

    def _look_for_errors(self, served: ServedRound, owed: set[str]) -> None:
        for message in self._state.get_message_res(message_ids=owed, run_id=served.said.run_id):
            asked = message.metadata.reply_to_message_id
            with self._lock:
                if not message.has_error() or asked in served.replied or served.is_closed:
                    continue  # a reply that came this moment, and is received as any other
                served.replied.add(asked)
                served.name(served.asked[asked])
                served.settled.append(message.metadata.message_id)  # Flower has stored it for who pulls replies
            served.tell(Settled(message, {}, None))

    def _look_for_broken(self, served: ServedRound) -> None:
        """Replies whose push session is over before they had come whole: an error, as Flower's grid makes of them."""
        now_s = time.monotonic()
        with self._lock:
            idle = [r for r in served.receptions.values() if r.missing and now_s - r.heard_s > IDLE_S]
            awaited = [(reception, list(reception.missing)) for reception in idle]
        for reception, missing in awaited:
            object_id = next((one for one in missing if self.store.is_wanted(one)), None)
            if object_id is None:  # others have brought all of it
                with self._lock:
                    reception.missing.clear()
                    self._settle_if_complete(served, reception)
                continue
            # Who asks for an object of a session that is too old ends it, and the message with it.
            if self._state.get_object(served.said.run_id, object_id) is not None:
                continue
            meta = reception.message.metadata
            with self._lock:
                if reception.is_settling or served.receptions.pop(meta.message_id, None) is None:
                    continue
                self._awaited.forget(reception)
            reception.drop()
            self._delete({meta.reply_to_message_id}, [*reception.roots])
            error = Error(_names.ErrorCode.MESSAGE_UNAVAILABLE, "the reply was announced and has not come whole")
            served.tell(Settled(make_message(metadata=meta, error=error), {}, None))
