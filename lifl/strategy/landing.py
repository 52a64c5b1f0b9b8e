"""Flower's replies into a round of the Node, and the round's mean back into an ArrayRecord.

Knows Messages and records; does no arithmetic. A reply that breaks a rule is replaced by an error reply that
names the rule, as if the client had failed, so that Flower's own code never sees the bad one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import attrs
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.app.error import Error
from flwr.app.message import make_message
from flwr.common.constant import ErrorCode, SType

from lifl.errors import AdmissionError, PeerGoneError, shortened
from lifl.node.embedded import embedded
from lifl.node.node import Node
from lifl.report.entries import Rejection
from lifl.report.report import RoundReport
from lifl.report.result import RoundResult
from lifl.round import admission
from lifl.round.admission import Limits
from lifl.round.round import Round
from lifl.round.settings import Order, Timing
from lifl.strategy import npy
from lifl.strategy.reply import read_reply, widened
from lifl.strategy.server_client import Reply, ServedRound
from lifl.tensor import TensorSpec


@attrs.frozen(eq=False)
class _Landed:
    """A reply that has landed: its refusal if there is one, and its contents if changes must be noticed later."""

    reply: Message
    client: str
    refusal: Rejection | None
    contents: _Contents | None


@attrs.frozen(eq=False)
class _Contents:
    """The bytes objects and weights of a reply; bytes cannot change, so a reply with the same objects is unchanged."""

    datas: Mapping[tuple[str, str], bytes]
    weights: Mapping[str, Any]

    @classmethod
    def of(cls, content: RecordDict, weight_key: str) -> _Contents:
        arrays = content.array_records.items()
        datas = {(name, key): array.data for name, record in arrays for key, array in record.items()}
        return cls(datas, {name: record.get(weight_key) for name, record in content.metric_records.items()})

    def is_same(self, other: _Contents) -> bool:
        same = self.datas.keys() == other.datas.keys() and self.weights == other.weights
        return same and all(data is other.datas[key] for key, data in self.datas.items())


class Landing:
    """Takes the replies of one train round into the arena, and gives the round's mean and report.

    Parameters
    ----------
    node : Node or None
        ``None``: the embedded Node of the process.
    spec : TensorSpec or None
        The model that was sent. ``None``: the spec of most replies (``take_all``).
    expected : int
        Number of replies that may come.
    weight_key : str
        Flower's ``weighted_by_key``.
    keeps : bool
        True: replies stay as they came, because they will be read again. False: accepted replies lose
        their arrays and refused ones become error replies as soon as they have landed.
    limits : Limits
        The server's bounds.
    base : mapping of str to numpy.ndarray or None
        The model that updates are clipped against; ``None``: no clipping.
    round_ : ServedRound, optional
        A round whose replies the server receives; the landing learns of each by :meth:`note`.

    Attributes
    ----------
    expected : int
        Number of nodes that were asked; a quorum is a fraction of it.
    is_exact : bool
        False if ``order="flower"`` was asked for and the mean of the landed replies is not Flower's bit by bit,
        because some replies do not have the model's dtypes.
    """

    def __init__(
        self,
        node: Node | None,
        spec: TensorSpec | None,
        expected: int,
        weight_key: str,
        timing: Timing,
        order: Order,
        keeps: bool,
        limits: Limits,
        base: Mapping[str, Any] | None,
        round_: Round | ServedRound | None = None,
    ) -> None:
        self._node = node
        self._capacity = expected
        self._limits = limits
        self._base = base
        # An update can be clipped only if it has the base model's arrays, so the base model decides the spec.
        self._spec = spec if base is None else TensorSpec.from_arrays(base)
        self._weight_key = weight_key
        self._timing = timing
        self._order = order
        self._keeps = keeps
        self.expected = expected
        self.is_exact = True
        self._model: TensorSpec | None = None
        self._round = round_
        self._landed: list[_Landed] = []
        self._nodes: dict[int, int] = {}  # id() of a reply -> id of the node that was asked
        self._names: Counter[str] = Counter()
        self._late: list[str] = []
        if spec is not None and round_ is None:
            self._open(spec)

    def follow(self, before: Landing, replies: list[Message]) -> None:
        """Takes over, from an earlier landing of the same round, the late nodes and the refusals not in `replies`."""
        again = {id(reply) for reply in replies}
        before._read_round()
        self.expected = before.expected
        self._late = before._late
        self._nodes = before._nodes
        self._landed = [one for one in before._landed if one.refusal is not None and id(one.reply) not in again]
        # Replies that the user's code has changed may have other arrays than the model that was sent.
        self._model = before._spec if before.is_of(replies) else None

    # ------------------------------------------------------------ replies in

    def take(self, reply: Message, node_id: int) -> Message:
        """Lands one reply of a node; returns it, or the error reply that takes its place."""
        self._nodes[id(reply)] = node_id
        return self._settle(reply, self._parse(reply, str(node_id)))

    def note(self, reply: Reply) -> Message:
        """Records a reply that the server has received; returns it, or the error reply that takes its place."""
        message, refusal = reply.message, reply.refusal
        client = reply.client
        if message.has_error():
            refusal = Rejection(client, "error", shortened(str(message.error.reason)))
        elif refusal is not None:
            message = error_reply(message, refusal)
        self._landed.append(_Landed(message, client, refusal, None))
        return message

    def take_all(self, replies: list[Message]) -> list[Message]:
        """Lands replies that have all arrived; returns those that were accepted.

        The round's dtypes and shapes are those of most replies, or of the model that the replies are clipped against.
        """
        nodes = [self._nodes.get(id(reply), reply.metadata.src_node_id) for reply in replies]
        parsed = [self._parse(reply, str(node_id)) for reply, node_id in zip(replies, nodes, strict=True)]
        if self._base is None:
            specs = [TensorSpec.from_arrays(p.views) for p in parsed if isinstance(p, _Update)]
            votes = Counter(frozenset(spec.tensors) for spec in specs)
            self._spec = max(specs, key=lambda spec: votes[frozenset(spec.tensors)], default=None)
        for reply, update in zip(replies, parsed, strict=True):
            self._settle(reply, update)
        return self.accepted(replies)

    def _parse(self, reply: Message, client: str) -> _Update | Rejection:
        self._names[client] += 1
        if self._names[client] > 1:  # as in Flower, a node that received two messages counts twice
            client = f"{client}#{self._names[client]}"
        if reply.has_error():
            return Rejection(client, "error", shortened(str(reply.error.reason)))
        try:
            arrays, weight = read_reply(client, reply.content, self._weight_key)
            views = _views(client, arrays)
            if self._model is not None:
                admission.check_arrays(client, self._model, widened(views, self._model))
            return _Update(client, views, weight)
        except AdmissionError as refusal:
            return _rejection(refusal)

    def _settle(self, reply: Message, update: _Update | Rejection) -> Message:
        refusal = update if isinstance(update, Rejection) else self._submit(update)
        if self._keeps:
            contents = None if reply.has_error() else _Contents.of(reply.content, self._weight_key)
            self._landed.append(_Landed(reply, update.client_id, refusal, contents))
            return reply
        if refusal is not None:
            reply = error_reply(reply, refusal)
        else:
            reply.content = _without_arrays(reply.content)
        self._landed.append(_Landed(reply, update.client_id, refusal, None))
        return reply

    def _submit(self, update: _Update) -> Rejection | None:
        try:
            round_ = self._round or self._open(self._spec or TensorSpec.from_arrays(update.views))
            views = widened(update.views, round_.spec)
            round_.submit(views, update.weight, update.client_id)
            # Flower computes in the dtypes of the replies, so a converted reply may change bits of the mean.
            self.is_exact &= self._order == "any" or all(views[name] is view for name, view in update.views.items())
        except AdmissionError as refusal:
            return _rejection(refusal)
        except PeerGoneError as error:  # the round is lost; result() raises for that
            return Rejection(update.client_id, "error", str(error))
        return None

    def _open(self, spec: TensorSpec) -> Round:
        node = self._node or embedded(spec, self._capacity, self._order)
        self._round = round_ = node.open_round(
            spec, self._capacity, self._timing, self._order, limits=self._limits, base=self._base
        )
        return round_

    def _read_round(self) -> RoundReport:
        """The round's report; marks replies that the round refused after it had accepted them (rule "poison")."""
        if self._round is None:
            return RoundReport(0, self.expected, self._timing, self._order)
        report = self._round.report()
        refusals = {refusal.client_id: refusal for refusal in report.rejected}
        lost = [one for one in self._landed if one.refusal is None and one.client in refusals]
        kept = [one for one in self._landed if one not in lost]
        self._landed = kept + [attrs.evolve(one, refusal=refusals[one.client]) for one in lost]
        return report

    def mark_late(self, node_id: int) -> None:
        """Records that a node did not answer in time."""
        self._late.append(str(node_id))

    # ------------------------------------------------------------ the mean out

    def is_of(self, replies: Iterable[Message]) -> bool:
        """True if `replies` are landed ones, unchanged, with all accepted ones among them."""
        self._read_round()
        known = {id(one.reply): one for one in self._landed}
        present = []
        for reply in replies:
            landed = known.get(id(reply))
            if landed is None:
                return False
            before = landed.contents
            if before and (reply.has_error() or not before.is_same(_Contents.of(reply.content, self._weight_key))):
                return False
            if landed.refusal is None:
                present.append(landed)
        accepted = [one for one in self._landed if one.refusal is None]
        if self._order == "flower":  # the bits of Flower's mean depend on the order of the replies
            return present == accepted
        return len(present) == len(accepted) and set(present) == set(accepted)

    def counted(self, replies: Iterable[Message]) -> list[Message]:
        """`replies` with an error reply in the place of each refused one; ``is_of(replies)`` must be true."""
        refusals = {id(one.reply): one.refusal for one in self._landed}
        return [error_reply(r, refusal) if (refusal := refusals[id(r)]) is not None else r for r in replies]

    def accepted(self, replies: Iterable[Message]) -> list[Message]:
        """The replies that have not been refused, neither when they landed nor later."""
        self._read_round()
        refused = {id(one.reply) for one in self._landed if one.refusal is not None}
        return [reply for reply in replies if id(reply) not in refused]

    @property
    def num_accepted(self) -> int:
        """Number of replies that have landed and have not been refused."""
        self._read_round()
        return sum(one.refusal is None for one in self._landed)

    def result(self) -> RoundResult:
        """The mean of the accepted replies, of which there must be at least one. Ends the round.

        Raises :class:`RoundError` if the round has no mean, because a sum left the range of float64.
        """
        assert self._round is not None, "nothing has landed"
        self._round.close_early()
        return self._round.result()

    def report(self, error: str | None = None) -> RoundReport:
        """The round's report, with the replies that never reached the round, and with `error` if there is no result."""
        report = self._read_round()
        return attrs.evolve(
            report,
            expected=self.expected,
            rejected=tuple(one.refusal for one in self._landed if one.refusal is not None),
            late=tuple(self._late),
            error=error or report.error,
        )

    def close(self) -> None:
        """Closes the round, which frees its memory in the arena."""
        if self._round is not None:
            self._round.close()


@attrs.frozen(eq=False)
class _Update:
    """A reply that could be read: its arrays as views of its bytes, and the weight as it came."""

    client_id: str
    views: Mapping[str, Any]
    weight: Any


def _views(client: str, arrays: ArrayRecord) -> dict[str, Any]:
    views = {}
    for key, array in arrays.items():
        if array.stype != SType.NUMPY:
            raise AdmissionError(client, "format", f"{key!r} is {array.stype!r}, not {SType.NUMPY!r}", array.stype)
        try:
            views[key] = npy.view(array.data)
        except ValueError as error:
            raise AdmissionError(client, "format", f"{key!r}: {error}", array.dtype) from None
    return views


def _rejection(error: AdmissionError) -> Rejection:
    """The refusal without its exception, whose traceback would keep the refused update in memory."""
    return Rejection(error.client_id, error.rule, error.reason)


def error_reply(reply: Message, refusal: Rejection) -> Message:
    """The error reply in the place of a refused reply, with the same metadata; an error reply is returned as it is."""
    if reply.has_error():
        return reply
    error = AdmissionError(refusal.client_id, refusal.rule, refusal.reason)
    return make_message(metadata=reply.metadata, error=Error(ErrorCode.MOD_FAILED_PRECONDITION, str(error)))


def _without_arrays(content: RecordDict) -> RecordDict:
    """The same records, but arrays without data; `content` may be shared and is not changed."""
    emptied = RecordDict(dict(content))
    for name, record in content.array_records.items():
        arrays = {k: Array(dtype=a.dtype, shape=tuple(a.shape), stype=a.stype, data=b"") for k, a in record.items()}
        emptied[name] = ArrayRecord(arrays)
    return emptied


def spec_of(arrays: ArrayRecord) -> TensorSpec:
    """The spec of a Flower model; raises ``TypeError`` or ``ValueError`` if lifl cannot fold one of its arrays."""
    return TensorSpec.from_arrays(views_of(arrays))


def views_of(arrays: ArrayRecord) -> dict[str, Any]:
    """The arrays of a Flower model as NumPy views, without a copy; raises ``ValueError`` if one cannot be read."""
    views = {}
    for key, array in arrays.items():
        try:
            views[key] = npy.view(array.data)
        except ValueError as error:
            raise ValueError(f"lifl cannot fold array {key!r} of the model: {error}") from None
    return views


def to_record(result: RoundResult) -> ArrayRecord:
    """A mean as an ArrayRecord; the arrays are copied out of the arena once."""
    return ArrayRecord(
        {
            key: Array(dtype=str(a.dtype), shape=tuple(a.shape), stype=SType.NUMPY, data=npy.encode(a))
            for key, a in result.arrays.items()
        }
    )
