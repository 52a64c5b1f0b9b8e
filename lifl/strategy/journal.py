"""A run that can be resumed: Flower's own loop over a strategy, with a checkpoint after each round.

A Journal stands between Flower's loop and the strategy. It records the return values of the strategy's hooks, and
writes the checkpoint before the first hook of each round, when the previous round is over. In a resumed run the loop
also passes through the finished rounds, and the Journal returns the recorded values for them, so that the Result and
the log cover the whole run.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from logging import ERROR, INFO, WARNING
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from flwr.supercore import log

from lifl.errors import CheckpointError
from lifl.report.report import RoundReport
from lifl.strategy import checkpoint

EvaluateFn = Callable[[int, ArrayRecord], "MetricRecord | None"]

NOT_STATE = {
    *("reports", "node", "checkpoint", "resume", "tensorboard", "_landing", "_base", "_is_evaluating"),
    *("_server", "_is_server_lost"),
}
"""Attributes that lifl adds to a strategy: a checkpoint has them elsewhere, or does not have them."""

REVIVE: dict[str, Callable[[Any], Any]] = {
    "ArrayRecord": lambda arrays: ArrayRecord({key: Array(array) for key, array in arrays.items()}),
    "MetricRecord": MetricRecord,
    "ConfigRecord": ConfigRecord,
}


def convert(value: Any) -> tuple[str, Any] | None:
    """The kind and the plain values of a Flower record, for :func:`lifl.strategy.checkpoint.pack`; None for others."""
    if isinstance(value, ArrayRecord):
        return "ArrayRecord", {key: array.numpy() for key, array in value.items()}
    if isinstance(value, MetricRecord):
        return "MetricRecord", dict(value)
    if isinstance(value, ConfigRecord):
        return "ConfigRecord", dict(value)
    return None


@contextmanager
def kept(strategy: Any, num_rounds: int) -> Iterator[Journal | None]:
    """The journal of a strategy's run, whose file is locked until the run ends; None without a checkpoint."""
    if strategy.checkpoint is None:
        yield None
        return
    with checkpoint.locked(strategy.checkpoint):
        yield Journal(strategy, strategy.checkpoint, strategy.resume, num_rounds)


class Journal:
    """A stand-in for the strategy that Flower's loop calls.

    Parameters
    ----------
    strategy : Strategy
        A lifl strategy at the start of a run.
    path : str or path
        The checkpoint file.
    resume : bool
        True: continue from the file, if it exists. False: an existing file is an error.
    num_rounds : int
        Number of rounds of the whole run.

    Raises
    ------
    CheckpointError
        If the file cannot be read, was damaged, belongs to another strategy class or to a longer run, or exists
        without `resume`.
    """

    def __init__(self, strategy: Any, path: str | PathLike[str], resume: bool, num_rounds: int) -> None:
        self._strategy = strategy
        self._path = Path(path)
        self._begin = {name: self._packed(name) for name in vars(strategy)}
        self._warned: set[str] = set()  # attributes that a warning has named
        self.arrays: ArrayRecord | None = None
        """The model after the last round; None before the first checkpoint."""
        self.last = 0
        """The last round that is over."""
        # Metrics by round: of training, of the clients' evaluation, and of the central evaluation.
        self._train: dict[int, MetricRecord | None] = {}
        self._evaluate: dict[int, MetricRecord | None] = {}
        self._central: dict[int, MetricRecord | None] = {}
        if resume:
            self._load()
        elif self._path.exists():
            raise CheckpointError(
                f"there is a checkpoint at {self._path}: set resume=True to go on from it, or move it away"
            )
        if self.last > num_rounds:
            raise CheckpointError(
                f"the checkpoint {self._path} was written after round {self.last}, and num_rounds={num_rounds}: give "
                "the number of rounds of the whole run"
            )
        self._resumed = self.last

    @property
    def _name(self) -> str:
        return type(self._strategy).__qualname__

    def start(self, *run: Any) -> Result:
        """Runs Flower's loop with the journal as its strategy."""
        return Strategy.start(self, *run)  # type: ignore[arg-type]

    # ------------------------------------------------------------ the methods that Flower's loop calls

    # The loop logs `self.__class__.__name__` at its start; `self` is the journal, and the log must name the user's
    # strategy. So `__class__` is a property that gives the class of the strategy; type(journal) is still Journal.
    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """The strategy's class, whose name Flower logs."""
        return type(self._strategy)

    def __getattr__(self, name: str) -> Any:
        """Every other attribute of the strategy."""
        return getattr(self._strategy, name)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Saves a checkpoint and calls the strategy; no messages for a round that is over."""
        if server_round <= self._resumed:
            return []
        if self.arrays is None or server_round > self._resumed + 1:
            self.save(server_round - 1, arrays)
        messages: Iterable[Message] = self._strategy.configure_train(server_round, arrays, config, grid)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Calls the strategy and records its metrics; returns recorded ones for a round that is over."""
        if server_round <= self._resumed:
            return None, self._train[server_round]
        arrays, metrics = self._strategy.aggregate_train(server_round, replies)
        self._train[server_round] = metrics
        return arrays, metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Calls the strategy; no messages for a round that is over."""
        if server_round <= self._resumed:
            return []
        messages: Iterable[Message] = self._strategy.configure_evaluate(server_round, arrays, config, grid)
        return messages

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Calls the strategy and records its metrics; returns recorded ones for a round that is over."""
        if server_round > self._resumed:
            self._evaluate[server_round] = self._strategy.aggregate_evaluate(server_round, replies)
        return self._evaluate[server_round]

    def noted(self, evaluate_fn: EvaluateFn) -> EvaluateFn:
        """The user's central evaluation, with its metrics recorded; rounds that are over are not evaluated again."""

        def central(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
            # A checkpoint has only the last model, so earlier rounds without a recorded value stay without one.
            if server_round not in self._central and server_round >= self._resumed:
                self._central[server_round] = evaluate_fn(server_round, arrays)
            return self._central.get(server_round)

        return central

    # ------------------------------------------------------------ the file

    def end(self, num_rounds: int, arrays: ArrayRecord) -> None:
        """Saves the checkpoint of the last round."""
        if num_rounds > self._resumed:
            self.save(num_rounds, arrays)

    def save(self, server_round: int, arrays: ArrayRecord) -> None:
        """Writes the state after a round. Raises a failure before round 1; logs a later one, and the run goes on."""
        tensors: checkpoint.Tensors = {}
        try:
            try:
                packed = self._state(server_round, arrays, tensors)
            except TypeError as error:
                raise CheckpointError(f"the run cannot be saved: {error}, which no checkpoint can hold") from error
            checkpoint.save(self._path, packed, tensors)
        except CheckpointError as error:
            if self.arrays is None:
                raise
            log(ERROR, "%s; the one after round %s is still there", error, self.last)
            return
        self.arrays, self.last = arrays, server_round

    def _state(self, server_round: int, arrays: ArrayRecord, tensors: checkpoint.Tensors) -> Any:
        strategy = self._strategy
        changed = {}
        for name in vars(strategy):
            if name in NOT_STATE or name.startswith("__"):
                continue
            fresh: checkpoint.Tensors = {}
            try:
                value = checkpoint.pack(vars(strategy)[name], f"state/{name}", fresh, convert)
            except TypeError as error:
                self._warn(name, error)
                continue
            if not _same((value, fresh), self._begin.get(name)):
                changed[name] = value
                tensors.update(fresh)
        return {
            "strategy": self._name,
            "round": server_round,
            "model": checkpoint.pack(arrays, "model", tensors, convert),
            "state": changed,
            "random": checkpoint.pack(random.getstate(), "random", tensors),
            "numpy": checkpoint.pack(np.random.get_state(), "numpy", tensors),
            "reports": checkpoint.pack({n: r.to_dict() for n, r in strategy.reports.items()}, "reports", tensors),
            "metrics": [
                checkpoint.pack(part, f"metrics/{i}", tensors, convert)
                for i, part in enumerate((self._train, self._evaluate, self._central))
            ],
        }

    def _packed(self, name: str) -> tuple[Any, checkpoint.Tensors] | None:
        """An attribute as it is at the start of the run; None if it cannot be saved."""
        tensors: checkpoint.Tensors = {}
        try:
            packed = checkpoint.pack(vars(self._strategy)[name], f"state/{name}", tensors, convert)
        except TypeError:
            return None
        # The strategy may change an array in place, so the values at the start are copied.
        return packed, {name: array.copy() for name, array in tensors.items()}

    def _warn(self, name: str, error: TypeError) -> None:
        """Logs once that a resumed run will lack an attribute; functions and lifl's settings are given anew."""
        is_setting = callable(vars(self._strategy)[name]) or name == "limits"
        if not is_setting and name not in self._warned:
            self._warned.add(name)
            log(WARNING, "checkpoint: %s.%s cannot be saved (%s): a resumed run has a new one", self._name, name, error)

    def _load(self) -> None:
        try:
            packed, tensors = checkpoint.load(self._path)
        except FileNotFoundError:
            log(INFO, "There is no checkpoint at %s yet: the run begins with round 1", self._path)
            return
        if packed["strategy"] != self._name:
            raise CheckpointError(
                f"the checkpoint {self._path} is of a run of {packed['strategy']}, this is {self._name}: use that "
                "class, or another checkpoint="
            )

        def unpacked(part: Any) -> Any:
            return checkpoint.unpack(part, tensors, REVIVE)

        self.last, self.arrays = packed["round"], unpacked(packed["model"])
        for name, value in packed["state"].items():
            setattr(self._strategy, name, unpacked(value))
        self._strategy.reports = {n: RoundReport.from_dict(fields) for n, fields in unpacked(packed["reports"]).items()}
        self._train, self._evaluate, self._central = map(unpacked, packed["metrics"])
        random.setstate(unpacked(packed["random"]))
        np.random.set_state(unpacked(packed["numpy"]))
        log(INFO, "Resumed from %s, written after round %s", self._path, self.last)


def _same(now: tuple[Any, checkpoint.Tensors], begin: tuple[Any, checkpoint.Tensors] | None) -> bool:
    """True if an attribute still has the value that it had at the start of the run."""
    if begin is None or now[0] != begin[0] or now[1].keys() != begin[1].keys():
        return False
    return all(
        array.dtype == begin[1][name].dtype and np.array_equal(array, begin[1][name]) for name, array in now[1].items()
    )
