"""A virtual SuperNode: for the server like a real one, but it trains nothing and starts no process.

Owns a node's conversation with the Fleet API: the order of the calls, the number of simultaneous calls, and the
pauses. The reply is made before.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from typing import Generic, TypeVar

import attrs
from flwr.app import Message
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL
from flwr.common.serde import message_from_proto
from flwr.proto import fab_pb2, fleet_pb2, heartbeat_pb2, message_pb2, node_pb2, run_pb2
from flwr.supercore.constant import FLWR_PRIVATE_MAX_CONCURRENT_OBJ_PULLS
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import get_num_workers
from google.protobuf.message import Message as Proto

from lifl.bench.fleet.caller import Body, Caller, Identity, Traffic
from lifl.bench.fleet.canned_reply import Prebuilt
from lifl.errors import PeerGoneError

AWAY_S, MAX_AWAY_S = 0.1, 1.0
"""The first and the longest pause before a missing object is asked for again.

A SuperNode's pauses are ten times as long, and a short measurement would mostly consist of them.
"""

PATIENCE = 10
"""Factor from these pauses to a SuperNode's."""

OK, FORBIDDEN = 200, 403
CONTENT_TAG = message_pb2.PushObjectRequest.DESCRIPTOR.fields_by_name["object_content"].number << 3 | 2


class RunIsOverError(Exception):
    """The server refuses this run's messages because the run is over; a SuperNode then drops its work for the run."""


P = TypeVar("P", bound=Proto)


@attrs.frozen
class Call(Generic[P]):
    """A kind of call: its path, and the type of its answer."""

    path: str
    answer: type[P]

    def parse(self, status: int, body: bytes) -> P:
        """The answer; raises :class:`RunIsOverError` or, for any other failure, :class:`PeerGoneError`."""
        if status == FORBIDDEN:
            raise RunIsOverError
        if status != OK:
            raise PeerGoneError(f"{self.path} failed with status {status}: {body[:500].decode(errors='replace')}")
        parsed: P = self.answer.FromString(body)
        return parsed


ACTIVATE = Call("/v1/fleet/activate-node", fleet_pb2.ActivateNodeResponse)
CONFIRM = Call("/v1/fleet/confirm-message-received", message_pb2.ConfirmMessageReceivedResponse)
DEACTIVATE = Call("/v1/fleet/deactivate-node", fleet_pb2.DeactivateNodeResponse)
GET_FAB = Call("/v1/fleet/get-fab", fab_pb2.GetFabResponse)
GET_RUN = Call("/v1/fleet/get-run", run_pb2.GetRunResponse)
HEARTBEAT = Call("/v1/fleet/send-node-heartbeat", heartbeat_pb2.SendNodeHeartbeatResponse)
PULL_MESSAGES = Call("/v1/fleet/pull-messages", fleet_pb2.PullMessagesResponse)
PULL_OBJECT = Call("/v1/fleet/pull-object", message_pb2.PullObjectResponse)
PUSH_MESSAGES = Call("/v1/fleet/push-messages", fleet_pb2.PushMessagesResponse)
PUSH_OBJECT = Call("/v1/fleet/push-object", message_pb2.PushObjectResponse)
REGISTER = Call("/v1/fleet/register-node", fleet_pb2.RegisterNodeFleetResponse)
UNREGISTER = Call("/v1/fleet/unregister-node", fleet_pb2.UnregisterNodeFleetResponse)


@attrs.frozen
class Answered:
    """An answered message; times are of CLOCK_MONOTONIC, which all processes of a machine share.

    Attributes
    ----------
    node : int
        Index of the node in the fleet.
    got_s, pulled_s, acknowledged_s : float
        Times at which the message was received, all its objects were pulled, and the last object of the reply was
        acknowledged.
    pulled, pushed : int
        Number of objects.
    waits : int
        Number of pulls of an object that was still missing.
    traffic : Traffic
        Traffic of this node since its last answer, polls and heartbeats included.
    """

    node: int
    got_s: float
    pulled_s: float
    acknowledged_s: float
    pulled: int
    pushed: int
    waits: int
    traffic: Traffic


class VirtualNode:
    """A node that answers every message with `reply`.

    `is_checking`: pulled objects are hashed, and one whose hash is not its id raises
    :class:`PeerGoneError`. All methods except :meth:`interrupt` and :meth:`heartbeat` are for one thread.
    """

    def __init__(
        self,
        address: str,
        index: int,
        reply: Prebuilt,
        stop: threading.Event,
        *,
        is_checking: bool = False,
        is_patient: bool = False,
    ) -> None:
        self.index = index
        self.reply = reply
        self._stop = stop
        self._is_checking = is_checking
        self._patience = PATIENCE if is_patient else 1
        self._identity = Identity()
        self._node = node_pb2.Node()
        # A SuperNode pulls or pushes this many objects at a time.
        width = get_num_workers(FLWR_PRIVATE_MAX_CONCURRENT_OBJ_PULLS)
        self._callers = [Caller(address, self._identity, stop) for _ in range(width)]
        self._pulse = Caller(address, self._identity, stop)
        self._others = ThreadPoolExecutor(max(1, width - 1), f"node-{index}")
        self._runs: set[int] = set()
        self._before = Traffic()
        self._waits: list[float] = []

    @property
    def node_id(self) -> int:
        """The server's id of the node; 0 before the node has joined."""
        return self._node.node_id

    @property
    def traffic(self) -> Traffic:
        """Traffic of this node's connections so far."""
        return sum((one.traffic for one in [*self._callers, self._pulse]), Traffic())

    def join(self) -> None:
        """Registers and activates the node."""
        key, caller = self._identity.public_key, self._callers[0]
        self._ask(caller, REGISTER, fleet_pb2.RegisterNodeFleetRequest(public_key=key))
        request = fleet_pb2.ActivateNodeRequest(public_key=key, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
        self._node = node_pb2.Node(node_id=self._ask(caller, ACTIVATE, request).node_id)

    def leave(self) -> None:
        """Deactivates and unregisters the node, for good."""
        caller, node_id = self._callers[0], self.node_id
        self._ask(caller, DEACTIVATE, fleet_pb2.DeactivateNodeRequest(node_id=node_id))
        self._ask(caller, UNREGISTER, fleet_pb2.UnregisterNodeFleetRequest(node_id=node_id))

    def heartbeat(self) -> None:
        """Sends a heartbeat of the node."""
        request = heartbeat_pb2.SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
        self._ask(self._pulse, HEARTBEAT, request)

    def interrupt(self) -> None:
        """Makes calls that are under way fail."""
        for caller in [*self._callers, self._pulse]:
            caller.interrupt()

    def close(self) -> None:
        """Closes the connections and ends the threads."""
        self._others.shutdown()
        for caller in [*self._callers, self._pulse]:
            caller.close()

    def poll(self) -> fleet_pb2.PullMessagesResponse | None:
        """Asks the server once for a message; None if there is none."""
        request = fleet_pb2.PullMessagesRequest(node=self._node)
        response = self._ask(self._callers[0], PULL_MESSAGES, request)
        return response if response.messages_list else None

    def answer(self, polled: fleet_pb2.PullMessagesResponse) -> Answered | None:
        """Pulls the message's objects and pushes the reply; None if the run ends meanwhile."""
        got_s = time.monotonic()
        self._waits.clear()
        message = message_from_proto(polled.messages_list[0])
        try:
            pulled = self._pull(message, polled.message_object_trees[0])
            pulled_s = time.monotonic()
            pushed, acknowledged_s = self._push(message)
        except RunIsOverError:
            return None
        before, self._before = self._before, self.traffic
        return Answered(
            node=self.index,
            got_s=got_s,
            pulled_s=pulled_s,
            acknowledged_s=acknowledged_s,
            pulled=pulled,
            pushed=pushed,
            waits=len(self._waits),
            traffic=self._before - before,
        )

    def _pull(self, message: Message, tree: message_pb2.ObjectTree) -> int:
        run_id, caller = message.metadata.run_id, self._callers[0]
        if run_id not in self._runs:
            run = self._ask(caller, GET_RUN, run_pb2.GetRunRequest(node=self._node, run_id=run_id)).run
            fab = fab_pb2.GetFabRequest(node=self._node, hash_str=run.fab_hash, run_id=run_id)
            self._ask(caller, GET_FAB, fab)
            self._runs.add(run_id)
        wanted = list(dict.fromkeys(node.object_id for node in iterate_object_tree(tree)))

        def pull(caller: Caller, object_id: str) -> None:
            request = message_pb2.PullObjectRequest(node=self._node, run_id=run_id, object_id=object_id)
            pause_s = AWAY_S * self._patience
            while True:
                response = self._ask(caller, PULL_OBJECT, request)
                if not response.object_found:
                    raise PeerGoneError(f"the server does not know object {object_id} of a message that it sent")
                if response.object_available:
                    break
                self._waits.append(pause_s)
                if self._stop.wait(pause_s):
                    raise PeerGoneError(f"object {object_id} had not come when the fleet was stopped")
                pause_s = min(2 * pause_s, MAX_AWAY_S * self._patience)
            if self._is_checking and sha256(response.object_content).hexdigest() != object_id:
                raise PeerGoneError(f"the server sent something else for object {object_id}")

        self._for_all(wanted, pull)
        confirm = message_pb2.ConfirmMessageReceivedRequest(
            node=self._node, run_id=run_id, message_object_id=message.metadata.message_id
        )
        self._ask(caller, CONFIRM, confirm)
        return len(wanted)

    def _push(self, message: Message) -> tuple[int, float]:
        run_id, answer = message.metadata.run_id, self.reply.answer(message)
        request = fleet_pb2.PushMessagesRequest(
            node=self._node,
            messages_list=[answer.message],
            message_object_trees=[answer.tree],
            clientapp_runtime_list=[0.0],
        )
        response = self._ask(self._callers[0], PUSH_MESSAGES, request)
        asked_for = set(response.objects_to_push)
        wanted = [object_id for object_id in answer.order if object_id in asked_for]
        acknowledged_s = time.monotonic()

        def push(caller: Caller, object_id: str) -> None:
            nonlocal acknowledged_s
            parts = push_request(self._node, run_id, object_id, answer.objects[object_id], response.session_id)
            if not PUSH_OBJECT.parse(*caller.call(PUSH_OBJECT.path, *parts)).stored:
                raise PeerGoneError(f"the server did not store object {object_id}: its push session is over")
            acknowledged_s = time.monotonic()

        self._for_all(wanted, push)
        return len(wanted), acknowledged_s

    def _for_all(self, object_ids: Iterable[str], act: Callable[[Caller, str], None]) -> None:
        """Calls `act` for every object in order, one on each caller at a time; the first error ends the calls."""
        rest, has_failed = iter(object_ids), threading.Event()
        lock = threading.Lock()  # guards `rest`, from which all callers' threads take objects

        def work(caller: Caller) -> None:
            while not has_failed.is_set():
                with lock:
                    object_id = next(rest, None)
                if object_id is None:
                    return
                try:
                    act(caller, object_id)
                except BaseException:
                    has_failed.set()
                    raise

        others = [self._others.submit(work, caller) for caller in self._callers[1:]]
        try:
            work(self._callers[0])
        finally:
            errors = [error for other in others if (error := other.exception()) is not None]
        if errors:
            raise errors[0]

    def _ask(self, caller: Caller, call: Call[P], request: Proto) -> P:
        return call.parse(*caller.call(call.path, request.SerializeToString(deterministic=True)))


def push_request(node: node_pb2.Node, run_id: int, object_id: str, content: bytes, session_id: str) -> tuple[Body, ...]:
    """The parts of a PushObjectRequest, which joined are protobuf's bytes; `content` is not copied."""
    begin = message_pb2.PushObjectRequest(node=node, run_id=run_id, object_id=object_id)
    end = message_pb2.PushObjectRequest(session_id=session_id)
    before, after = (part.SerializeToString(deterministic=True) for part in (begin, end))
    return bytes([*before, CONTENT_TAG, *_varint(len(content))]), content, after


def _varint(number: int) -> list[int]:
    groups = []
    while number > 127:
        groups.append(number & 127 | 128)
        number >>= 7
    return [*groups, number]
