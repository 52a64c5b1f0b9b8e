"""Flower's replies into a round of the Node, and the round's mean back into an ArrayRecord.

Knows Messages and records; does no arithmetic. A reply that breaks a rule becomes an error reply that
names it, as if the client had failed, so that Flower's own code never meets it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import attrs
import numpy as np
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.app.error import Error
from flwr.app.message import make_message
from flwr.common.constant import ErrorCode, SType

from lifl import npy
from lifl.embedded import embedded
from lifl.errors import AdmissionError
from lifl.metrics import Rejection, RoundReport
from lifl.result import RoundResult
from lifl.round import Order, Round, Timing
from lifl.runtime import Node
from lifl.tensor import TensorSpec


class Landing:
    """One train round's replies on their way into the arena.

    Parameters
    ----------
    node : Node or None
        ``None``: the process's embedded one.
    spec : TensorSpec or None
        The model that was sent. ``None``: that of the first readable reply.
    expected : int
        Replies that may come.
    weight_key : str
        Flower's ``weighted_by_key``.
    keeps : bool
        Whether the replies keep their arrays after they are in the arena, because the user's own code
        will look at them.
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
    ) -> None:
        self._node, self._spec, self.expected = node, spec, expected
        self._weight_key, self._timing, self._order, self._keeps = weight_key, timing, order, keeps
        self._round: Round | None = None
        # The bytes objects that were folded, per reply: bytes cannot change, so finding the same ones
        # in a reply later proves that it says the same.
        self._folded: dict[str, tuple[float, dict[str, bytes]]] = {}
        self.refused: list[AdmissionError] = []
        self._late: list[str] = []
        if spec is not None:
            self._open(spec)

    def _open(self, spec: TensorSpec) -> Round:
        node = self._node or embedded(spec, self.expected)
        self._spec, self._round = spec, node.open_round(spec, self.expected, self._timing, self._order)
        return self._round

    def take(self, reply: Message) -> Message:
        """Lands one reply. Returns it, or the error reply that takes its place if it was refused."""
        client = str(reply.metadata.src_node_id)
        if reply.has_error():
            self.refused.append(AdmissionError(client, "error", str(reply.error.reason), reply.error.code))
            return reply
        try:
            arrays, weight = self._read(client, reply.content)
            views = self._views(client, arrays)
            round_ = self._round or self._open(TensorSpec.from_arrays(views))
            round_.submit(_widened(views, round_.spec), weight, client)
        except AdmissionError as error:
            self.refused.append(error)
            return make_message(metadata=reply.metadata, error=Error(ErrorCode.MOD_FAILED_PRECONDITION, str(error)))
        datas = {key: array.data for key, array in arrays.items()} if self._keeps else {}
        self._folded[reply.metadata.message_id or client] = (weight, datas)
        if not self._keeps:
            for key, array in arrays.items():
                arrays[key] = Array(dtype=array.dtype, shape=tuple(array.shape), stype=array.stype, data=b"")
        return reply

    def _read(self, client: str, content: RecordDict) -> tuple[ArrayRecord, float]:
        for name, records in (("ArrayRecord", content.array_records), ("MetricRecord", content.metric_records)):
            if len(records) != 1:
                raise AdmissionError(client, "format", f"{len(records)} {name}s, one is expected", len(records))
        metrics = next(iter(content.metric_records.values()))
        if self._weight_key not in metrics:
            reason = f"no {self._weight_key!r} among the metrics {sorted(metrics)}"
            raise AdmissionError(client, "weight", reason, sorted(metrics))
        return next(iter(content.array_records.values())), metrics[self._weight_key]  # type: ignore[return-value]

    def _views(self, client: str, arrays: ArrayRecord) -> dict[str, Any]:
        views = {}
        for key, array in arrays.items():
            if array.stype != SType.NUMPY:
                raise AdmissionError(client, "format", f"{key!r} is {array.stype!r}, not {SType.NUMPY!r}", array.stype)
            try:
                views[key] = npy.view(array.data)
            except ValueError as error:
                raise AdmissionError(client, "format", f"{key!r}: {error}", array.dtype) from None
        return views

    def mark_late(self, node_id: int) -> None:
        """Notes that a node did not answer in time."""
        self._late.append(str(node_id))

    def is_of(self, replies: Iterable[Message]) -> bool:
        """True if `replies` are those that were folded, all of them and unchanged."""
        left = dict(self._folded)
        for reply in replies:
            if reply.has_error():
                continue
            weight, datas = left.pop(reply.metadata.message_id or str(reply.metadata.src_node_id), (None, {}))
            if weight is None:
                return False
            if self._keeps:
                if len(reply.content.array_records) != 1 or len(reply.content.metric_records) != 1:
                    return False
                arrays = next(iter(reply.content.array_records.values()))
                metrics = next(iter(reply.content.metric_records.values()))
                if metrics.get(self._weight_key) != weight or arrays.keys() != datas.keys():
                    return False
                if any(array.data is not datas[key] for key, array in arrays.items()):
                    return False
        return not left

    @property
    def num_accepted(self) -> int:
        """Replies in the arena."""
        return len(self._folded)

    def result(self) -> RoundResult:
        """The mean of what has been accepted, which must not be nothing. Ends the round."""
        assert self._round is not None, "nothing has landed"
        self._round.close_early()
        return self._round.result()

    def report(self, error: str | None = None) -> RoundReport:
        """The round's books: with the replies that never reached it, and why it has no result if so."""
        if self._round is not None:
            report = self._round.report()
        else:
            report = RoundReport(0, self.expected, self._timing, self._order)
        rejected = tuple(Rejection(e.client_id, e.rule, e.reason) for e in self.refused)
        return attrs.evolve(report, rejected=rejected, late=tuple(self._late), error=error or report.error)

    def close(self) -> None:
        """Gives back what the round holds."""
        if self._round is not None:
            self._round.close()


def _widened(views: Mapping[str, Any], spec: TensorSpec) -> Mapping[str, Any]:
    """Arrays whose dtype the model's holds without loss are converted, as Flower's clients expect.

    A model that has become float64 on the server (Flower's adaptive strategies do that) still gets
    float32 replies from PyTorch. Everything else is left to admission.
    """
    widened = dict(views)
    for name, view in views.items():
        wanted = spec.get(name)
        if wanted is None or view.dtype.name == wanted.dtype or wanted.dtype == "bfloat16":
            continue
        if np.can_cast(view.dtype, wanted.dtype, "safe"):
            widened[name] = view.astype(wanted.dtype)
    return widened


def spec_of(arrays: ArrayRecord) -> TensorSpec:
    """The spec of a model as Flower holds it.

    Raises ``TypeError`` or ``ValueError`` if lifl cannot fold one of its arrays.
    """
    return TensorSpec.from_arrays({key: npy.view(array.data) for key, array in arrays.items()})


def to_record(result: RoundResult) -> ArrayRecord:
    """A mean as Flower holds models; the arrays are copied out of the arena once."""
    return ArrayRecord(
        {
            key: Array(dtype=str(a.dtype), shape=tuple(a.shape), stype=SType.NUMPY, data=npy.encode(a))
            for key, a in result.arrays.items()
        }
    )
