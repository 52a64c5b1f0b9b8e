"""Flower's FedAvg with the mean made by a Node, while replies are still arriving.

The run's loop, its log and its hooks stay Flower's: `start` gives Flower's own loop a grid whose
`send_and_receive` is event-driven and lands each reply as it comes. `aggregate_train` then has only to
fetch the mean. Called outside a run, with any list of replies, `aggregate_train` folds them through the same workers.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from logging import ERROR, INFO, WARNING
from os import PathLike
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
from flwr.serverapp.strategy import Result as FlowerResult
from flwr.serverapp.strategy.strategy_utils import aggregate_metricrecords
from flwr.supercore import log

from lifl.errors import LiflError, PeerGoneError, RoundError
from lifl.node.node import Node
from lifl.report.report import RoundReport
from lifl.round.admission import Limits
from lifl.round.settings import Order, Timing
from lifl.strategy.exchange import EventGrid, as_it_is, exchange, not_reported, own_exchange, warn_of_grid
from lifl.strategy.journal import kept
from lifl.strategy.landing import Landing, spec_of, to_record, views_of
from lifl.strategy.loop import Outcome
from lifl.strategy.metrics import averageable, consistent
from lifl.strategy.options import RoundOptions
from lifl.strategy.server_client import Server, exchange_served
from lifl.strategy.tensorboard import noted
from lifl.tensor import TensorSpec


@dataclass
class Result(FlowerResult):
    """Flower's Result and, for each round, its report: updates accepted and refused, reasons, and times."""

    reports: dict[int, RoundReport] = field(default_factory=dict)

    __repr__ = FlowerResult.__repr__


def refuse_passed_over(cls: type) -> None:
    """Raises ``TypeError`` for a class that puts lifl's mean before a method which then nobody would call.

    ``class Robust(lifl.strategy.FedAvg, Krum)`` would compute the plain mean under Krum's name.
    """
    mro = cls.__mro__
    for behind in mro[mro.index(Mean) + 1 : mro.index(FlowerFedAvg)]:
        for method in ("aggregate_train", "start"):
            if method in vars(behind):
                first = next(one for one in mro if issubclass(one, Mean) and one.__module__.startswith("lifl."))
                name = behind.__qualname__
                raise TypeError(
                    f"{cls.__qualname__} has lifl's {first.__name__} before {name}, whose {method} would never be "
                    f"called: derive from {name} without lifl's class, or from lifl's class without {name}"
                )


FAULTS_OF_PROGRAMS = {"format", "keys", "shape", "dtype", "weight", "values"}
"""Rules that a program breaks for every client alike; the others are about one client, or about memory."""

MAX_SHOWN = 5
"""Arrays and replies that an error names."""


def common_fault(report: RoundReport) -> str | None:
    """The rule that all replies of a round broke, among them most of the nodes asked; None if there is no such rule.

    Clients that failed sent nothing that could agree or not. One bad client among nodes that are silent stops no run.
    """
    rules = [one.rule for one in report.rejected if one.rule != "error"]
    is_common = len(set(rules)) == 1 and rules[0] in FAULTS_OF_PROGRAMS and not report.accepted
    return rules[0] if is_common and 2 * len(rules) > report.expected else None


def _in_words(spec: TensorSpec | None) -> str:
    if spec is None:
        return "no arrays"
    shown = [f"{t.name!r} {t.dtype} {tuple(t.shape)}" for t in spec.tensors[:MAX_SHOWN]]
    more = len(spec.tensors) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _came_back(report: RoundReport, rule: str) -> str:
    said = [f"from node {one.client_id}: {one.reason}" for one in report.rejected if one.rule == rule]
    more = len(said) - min(len(said), 2)
    return "; ".join(said[:2]) + (f"; and {more} more" if more else "")


class Mean(FlowerFedAvg):
    """Flower's FedAvg with the mean made by a Node; takes Flower's arguments only (for lifl's see RoundOptions)."""

    quorum: float | int | None = None
    deadline: float | None = None
    timing: Timing = "eager"
    order: Order = "any"
    node: Node | None = None
    limits: Limits = Limits()
    checkpoint: str | PathLike[str] | None = None
    resume: bool = False
    tensorboard: str | PathLike[str] | None = None
    stop_if_all_refused: bool = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        refuse_passed_over(type(self))
        super().__init__(*args, **kwargs)
        self.reports: dict[int, RoundReport] = {}
        self._landing: Landing | None = None
        self._base: Mapping[str, Any] | None = None  # the model that was sent, if replies are clipped against it
        self._is_evaluating = False
        self._server: Server | None = None
        self._is_server_lost = False  # True after a lifl-superlink went away, until a new connection to one
        self._is_running = False
        self._sent: TensorSpec | None = None  # the form of the model that the round's nodes were sent
        self._has_warned = False  # of a loop that is not lifl's
        self.tensorboard_run: str | None = None

    # ------------------------------------------------------------ the run

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Flower's ``Strategy.start``, event-driven; the same arguments, hooks and log.

        Returns Flower's Result, with ``reports`` in addition. If no round had a result, its ``arrays`` are
        `initial_arrays`.
        """
        self.reports, self.tensorboard_run = {}, None
        with kept(self, num_rounds) as journal, noted(self, journal) as scalars:
            if journal is not None:
                initial_arrays, train_config, evaluate_config = journal.begin(
                    initial_arrays, train_config, evaluate_config
                )
                evaluate_fn = evaluate_fn and journal.noted(evaluate_fn)
            if scalars is not None:
                evaluate_fn = evaluate_fn and scalars.noted(evaluate_fn)
            events = EventGrid(grid, self._send_and_receive)
            self._is_server_lost = False
            warn_of_grid(grid)
            self._find_server(grid)
            run = (events, initial_arrays, num_rounds, timeout, train_config, evaluate_config, evaluate_fn)
            outcome = Outcome(scalars or journal or self)
            self._is_running = True
            try:
                result = outcome.start(*run)
            finally:
                self._is_running = False
                self._drop_landing()
                self._base, self._is_evaluating = None, False
                if self._server is not None:
                    self._server.close()
                    self._server = None
            if not outcome.has_result:
                result.arrays = initial_arrays
            if journal is not None:
                journal.end(num_rounds, result.arrays)
            return Result(**vars(result), reports=dict(self.reports))

    def summary(self) -> None:
        """Logs lifl's settings, then Flower's."""
        where = "embedded" if self.node is None else repr(self.node)
        if self._server is not None:
            where = "the lifl-superlink's"
        quorum = "1 update" if self.quorum is None else self.quorum
        deadline = "Flower's timeout" if self.deadline is None else f"{self.deadline:g}s"
        log(INFO, "\t├──> lifl settings:")
        log(INFO, "\t│\t├── Timing: %s | order: %s", self.timing, self.order)
        log(INFO, "\t│\t├── Quorum: %s | deadline: %s", quorum, deadline)
        if self.limits != Limits():
            norm = "none" if self.limits.clipping_norm is None else f"{self.limits.clipping_norm:g}"
            each, total = (
                "any" if n is None else f"{n:,}" for n in (self.limits.client_bytes, self.limits.total_bytes)
            )
            log(INFO, "\t│\t├── Weights up to: %g | clipping norm: %s", self.limits.max_weight, norm)
            log(INFO, "\t│\t├── Bytes of a client: %s | of a round: %s", each, total)
        if self.checkpoint is not None:
            log(INFO, "\t│\t├── Checkpoint: %s%s", self.checkpoint, " (resumed if there)" if self.resume else "")
        if self.tensorboard_run is not None:
            log(INFO, "\t│\t├── TensorBoard: %s", self.tensorboard_run)
        log(INFO, "\t│\t└── Node: %s", where)
        super().summary()

    def _send_and_receive(self, grid: Grid, messages: list[Message], timeout: float | None) -> list[Message]:
        """One exchange of messages and replies; Flower's loop calls it for training and for evaluation."""
        self._drop_landing()
        own = own_exchange(grid)
        if self.deadline is not None:
            timeout = self.deadline if timeout is None else min(timeout, self.deadline)
        if not messages:
            return [] if own is None else list(grid.send_and_receive([], timeout=timeout))
        is_train = messages[0].metadata.message_type.split(".")[0] == MessageType.TRAIN
        self._base, self._is_evaluating = None, not is_train
        take: Callable[[Message, int], Message] = as_it_is
        missing: Callable[[int], None] = not_reported
        reply_bytes = 0
        are_pushed = False
        if is_train:
            sent = messages[0].content.array_records.get(self.arrayrecord_key)
            try:
                spec = None if sent is None else spec_of(sent)
            except (TypeError, ValueError):
                if not self._aggregates_itself():
                    raise
                # Nothing of the replies is folded unless the user's method calls lifl's, which then raises.
                self._is_evaluating = False
                return (own or exchange)(grid, messages, timeout, 0, take, missing)
            self._sent = spec
            reply_bytes = 0 if spec is None else spec.nbytes
            self._base = None if sent is None or self.limits.clipping_norm is None else views_of(sent)
            if self._server is not None and self._server.is_gone():  # between two rounds
                self._server.close()
                self._server, self._is_server_lost = None, True
            if self._is_server_lost:
                self._find_server(grid)
            # The server folds a model block by block, and a model without numbers has no block.
            if spec is not None and spec.nbytes and self._server is not None and self._may_be_served():
                replies, timeout = self._be_served(grid, messages, timeout, spec)
                if replies is not None:
                    return replies
                are_pushed = any(m.metadata.message_id for m in messages)
            self._landing = landing = self._new_landing(spec, len(messages), keeps=self._is_looked_at())
            take, missing = landing.take, landing.mark_late
        if own is not None:
            return own(grid, messages, timeout, reply_bytes, take, missing)
        return exchange(grid, messages, timeout, reply_bytes, take, missing, are_pushed=are_pushed)

    def _may_be_served(self) -> bool:
        """True if the server can take the round: no option needs the ServerApp's Node or the arrays of a reply."""
        has_defaults = self.node is None and self.order == "any" and self.limits.clipping_norm is None
        return has_defaults and not self._is_looked_at()

    def _find_server(self, grid: Grid) -> None:
        """Connects to the lifl-superlink on this machine, if one is running and can take rounds of this strategy."""
        may_be_served = self._may_be_served() and own_exchange(grid) is None
        self._server = Server.find(grid) if may_be_served else None
        if self._server is not None:
            self._is_server_lost = False
            log(INFO, "lifl: rounds are folded by the lifl-superlink on this machine")

    def _be_served(
        self, grid: Grid, messages: list[Message], timeout: float | None, spec: TensorSpec
    ) -> tuple[list[Message] | None, float | None]:
        """A round that the lifl-superlink folds: the replies, and the seconds that are left of `timeout`.

        None in place of the replies if the server refuses the round (then later rounds are not offered to it), or if
        the server went away. A server with a database still has the messages and replies of the round after a restart:
        they are pulled from it as from Flower's SuperLink.
        """
        server = self._server
        assert server is not None, "the caller checks"
        settings = (self.weighted_by_key, self.timing, self.order)
        try:
            round_ = server.open_round(grid.run.run_id, messages, spec, *settings, self.limits)
            landing = Landing(None, spec, len(messages), *settings, False, self.limits, None, round_)
            replies = exchange_served(grid, server, messages, timeout, landing.note, landing.mark_late)
            if replies is not None:
                if landing.num_accepted >= self._needed(landing.expected):
                    # The mean is fetched here, because here the replies can still be pulled if the server goes away.
                    with contextlib.suppress(RoundError):  # landing.result() raises it again in aggregate_train
                        round_.result()
                self._landing = landing
                return replies, timeout
        except PeerGoneError as error:
            self._is_server_lost = True
            log(WARNING, "lifl-superlink was lost during a round, which the ServerApp now folds itself: %s", str(error))
        except LiflError as error:
            # Only the text is logged: a log record with the traceback would keep the model and the server's memory.
            log(WARNING, "lifl-superlink does not fold this run's rounds, so the ServerApp folds them: %s", str(error))
        server.close()
        self._server = None
        if timeout is not None and server.waiting_since_s is not None:
            timeout = max(0.0, timeout - (time.monotonic() - server.waiting_since_s))
        return None, timeout

    def _new_landing(self, spec: Any, expected: int, *, keeps: bool) -> Landing:
        if self.limits.clipping_norm is not None and self._base is None:
            raise ValueError(
                f"clipping_norm={self.limits.clipping_norm:g} needs the model that the clients were sent, and there is "
                f"none: call start(), whose messages have it under {self.arrayrecord_key!r}, or leave clipping_norm out"
            )
        settings = (self.weighted_by_key, self.timing, self.order, keeps)
        return Landing(self.node, spec, expected, *settings, self.limits, self._base)

    def _drop_landing(self) -> None:
        if self._landing is not None:
            self._landing.close()
            self._landing = None

    def _is_looked_at(self) -> bool:
        """True if the replies are read again after they have landed: by the user's code, or for Flower's order."""
        if self.order == "flower":  # the replies may have other dtypes than the model, see Landing.is_exact
            return True
        if self.train_metrics_aggr_fn is not aggregate_metricrecords:
            return True
        return self._aggregates_itself() or self._overrides("_check_and_log_replies")

    def _aggregates_itself(self) -> bool:
        """True if the user's code has an ``aggregate_train`` of its own, which may call lifl's or not."""
        return self._overrides("aggregate_train")

    def _overrides(self, method: str) -> bool:
        """True if a class of the user's has this method, or the strategy itself as an attribute."""
        classes = [vars(cls) for cls in type(self).__mro__ if not cls.__module__.startswith(("lifl.", "flwr."))]
        return any(method in names for names in (*classes, vars(self)))

    # ------------------------------------------------------------ the mean

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The weighted mean of the replies' arrays and metrics.

        Replies that landed during :meth:`start` are folded already; other replies, or changed ones, are
        folded now. A round with fewer accepted updates than the quorum has no result: the failure is logged as
        an error and is in the round's report, the run goes on, and the model stays as it was.

        Raises
        ------
        flwr.serverapp.exception.InconsistentMessageReplies
            As in Flower, if the method is called outside a run with replies that do not have the same keys.
        """
        if not self._is_running:
            self._warn_of_own_loop()
        replies = list(replies)
        landing, self._landing = self._landing, None
        try:
            if landing is not None and landing.is_exact and landing.is_of(replies):
                valid, _ = self._check_and_log_replies(landing.counted(replies), is_train=True, validate=False)
            else:
                # One bad reply must not end a run: there the landing refuses that reply alone, so Flower's validation,
                # which raises for all of them, is used only outside a run.
                valid, _ = self._check_and_log_replies(replies, is_train=True, validate=landing is None)
                if landing is None and not valid:
                    return None, None
                landing = self._land_again(landing, replies)
                valid = landing.take_all(replies)
            return self._conclude(server_round, landing, valid)
        finally:
            if landing is not None:
                landing.close()

    def _warn_of_own_loop(self) -> None:
        """Says once which arguments have no effect, because another loop than lifl's :meth:`start` runs the rounds."""
        names = ("deadline", "checkpoint", "tensorboard")
        ineffective = [f"{name}={getattr(self, name)!r}" for name in names if getattr(self, name) is not None]
        if ineffective and not self._has_warned:
            self._has_warned = True
            log(
                WARNING,
                "%s: %s without effect, since this loop is not lifl's: call super().start(), or leave them out",
                type(self).__qualname__,
                " and ".join(ineffective),
            )

    def _land_again(self, before: Landing | None, replies: list[Message]) -> Landing:
        landing = self._new_landing(None, len(replies), keeps=True)
        if before is not None:
            landing.follow(before, replies)
            before.close()
        return landing

    def _conclude(
        self, server_round: int, landing: Landing, valid: list[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        needed = self._needed(landing.expected)
        short = f"{{}} of {landing.expected} updates were accepted, the quorum is {needed}"
        if (have := landing.num_accepted) < needed:
            return self._fail(server_round, landing.report(short.format(have)))
        try:
            result = landing.result()
        except (RoundError, PeerGoneError) as error:
            return self._fail(server_round, landing.report(str(error)))
        if (have := result.num_updates) < needed:  # accepted updates that killed workers do not count
            return self._fail(server_round, landing.report(short.format(have)))
        self.reports[server_round] = report = landing.report()
        log(INFO, "\t└──> lifl: %s", report)
        contents = [m.content for m in landing.accepted(valid)]
        is_flowers = self.train_metrics_aggr_fn is aggregate_metricrecords
        metrics = self.train_metrics_aggr_fn(consistent(contents, is_flowers), self.weighted_by_key)
        return to_record(result), metrics

    def _fail(self, server_round: int, report: RoundReport) -> tuple[None, None]:
        self.reports[server_round] = report
        log(ERROR, "aggregate_train: round %s has no new model, the model stays as it was: %s", server_round, report)
        if self._is_running and self.stop_if_all_refused and (rule := common_fault(report)) is not None:
            raise RoundError(
                f"round {server_round}: all replies were refused for the same reason ({rule}), so the next round would "
                f"end as this one. Sent: {_in_words(self._sent)}. Came back: {_came_back(report, rule)}. Make the "
                "ClientApp and the model agree, or go on all the same with stop_if_all_refused=False"
            )
        return None, None

    def _needed(self, expected: int) -> int:
        if self.quorum is None:
            return 1
        # The product is rounded before ceil(), because 0.07 * 100 is a little more than 7.
        return self.quorum if isinstance(self.quorum, int) else max(1, math.ceil(round(self.quorum * expected, 9)))

    # ------------------------------------------------------------ evaluation

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Flower's weighted mean of the replies' metrics.

        During a run, replies whose metrics cannot be averaged are left out, and a warning names them; outside a run
        Flower's method refuses all replies if it cannot average one.
        """
        if self._is_evaluating:
            is_flowers = self.evaluate_metrics_aggr_fn is aggregate_metricrecords
            replies = averageable(server_round, list(replies), self.weighted_by_key, is_flowers, self.limits.max_weight)
        return super().aggregate_evaluate(server_round, replies)


class FedAvg(RoundOptions, Mean):
    """Federated Averaging (McMahan et al., 2017, https://arxiv.org/abs/1602.05629), Flower's class.

    Takes Flower's arguments and those of :class:`RoundOptions`: ``quorum``, ``deadline``, ``timing``, ``order``,
    ``node``, ``max_weight``, ``clipping_norm``, ``client_bytes``, ``total_bytes``, ``checkpoint``, ``resume``,
    ``tensorboard``.
    """
