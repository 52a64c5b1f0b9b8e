"""A run that can be resumed: Flower's own loop over a strategy, with a checkpoint after each round.

A Journal stands between Flower's loop and the strategy. It records the return values of the strategy's hooks, and
writes the checkpoint before the first hook of each round, when the previous round is over. In a resumed run the loop
also passes through the finished rounds, and the Journal returns the recorded values for them, so that the Result and
the log cover the whole run. Metrics and reports of earlier rounds are in the run's history, so that a checkpoint has
the same size after each round.
"""

from __future__ import annotations

import json
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
from flwr.supercore import log

from lifl.errors import CheckpointError
from lifl.report.report import RoundReport
from lifl.strategy import checkpoint
from lifl.strategy.history import History
from lifl.strategy.loop import StandIn

EvaluateFn = Callable[[int, ArrayRecord], "MetricRecord | None"]

NOT_STATE = {
    *("reports", "node", "checkpoint", "resume", "tensorboard", "_landing", "_base", "_is_evaluating"),
    *("_server", "_is_server_lost", "_is_running", "_has_warned", "_sent", "stop_if_all_refused"),
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
    with checkpoint.locked(strategy.checkpoint) as is_locked:
        if not is_locked:
            log(
                WARNING,
                "The file system of the checkpoint %s has no locks (flock): a second run on it is not kept away",
                strategy.checkpoint,
            )
        yield Journal(strategy, strategy.checkpoint, strategy.resume, num_rounds)


class Journal(StandIn):
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
        super().__init__(strategy)
        self._strategy = strategy
        self._path = Path(path)
        self._begin = {name: self._packed(name) for name in vars(strategy)}
        self._warned: set[str] = set()  # attributes that a warning has named
        self._has_warned_of_folder = False
        self.arrays: ArrayRecord | None = None
        """The model after the last round; None before the first checkpoint."""
        self.last = 0
        """The last round that is over."""
        # Metrics by round: of training, of the clients' evaluation, and of the central evaluation.
        self._train: dict[int, MetricRecord | None] = {}
        self._evaluate: dict[int, MetricRecord | None] = {}
        self._central: dict[int, MetricRecord | None] = {}
        self._fresh: set[int] = set()  # rounds of which something is not in the file yet
        self._recent: list[str] = []  # the lines in the last checkpoint: the next one has them in the history
        self._history = History(self._path)
        self._configs: dict[str, dict[str, Any]] = {}  # by name, as they stood after the last round
        self._given: dict[str, ConfigRecord] = {}  # those that the loop hands to the hooks
        self._begun_with: dict[str, dict[str, Any]] = {}  # their values at the start of this process's part
        self._is_of: dict[str, list[Any]] | None = None  # dtype and shape of each array of the run's first model
        if resume:
            self._load()
        elif self._path.exists():
            raise CheckpointError(
                f"there is a checkpoint at {self._path}: set resume=True to go on from it, or move it away"
            )
        if self.arrays is None and self._history.path.exists():
            raise CheckpointError(
                f"the history {self._history.path} is there, and its checkpoint {self._path} is not: move it to where "
                "the checkpoint is, or remove it"
            )
        if self.last > num_rounds:
            raise CheckpointError(
                f"the checkpoint {self._path} was written after round {self.last}, and num_rounds={num_rounds}: give "
                "the number of rounds of the whole run"
            )
        self._resumed = self.last

    def begin(
        self, arrays: ArrayRecord, train_config: ConfigRecord | None, evaluate_config: ConfigRecord | None
    ) -> tuple[ArrayRecord, ConfigRecord, ConfigRecord]:
        """The model and the configurations that the loop begins with: as they stood after the last round, or as given.

        A value of a configuration that hooks have changed is as it stood. The given configurations are changed in
        place, as Flower's hooks change them.

        Raises
        ------
        CheckpointError
            If the given model has other arrays than the one that the run began with.
        """
        given = {name: [array.dtype, list(array.shape)] for name, array in arrays.items()}
        if self.arrays is not None:
            # An older file has only the last model, whose counters may have become floats.
            had = self._is_of or {
                name: [given.get(name, [array.dtype])[0], list(array.shape)] for name, array in self.arrays.items()
            }
            if difference := _first_difference(had, given):
                raise CheckpointError(
                    f"the checkpoint {self._path} is of another model: {difference}; give initial_arrays of the run's "
                    "model, or another checkpoint="
                )
        self._is_of = given
        self._given = {}
        for name, config in (("train", train_config), ("evaluate", evaluate_config)):
            self._given[name] = ConfigRecord() if config is None else config
            self._begun_with[name] = dict(self._given[name])
            for key, value in self._configs.get(name, {}).items():
                if value is None:
                    self._given[name].pop(key, None)
                else:
                    self._given[name][key] = value
        model = arrays if self.arrays is None else self.arrays  # which may be empty, and false then
        return model, self._given["train"], self._given["evaluate"]

    @property
    def _name(self) -> str:
        return type(self._strategy).__qualname__

    # ------------------------------------------------------------ the methods that Flower's loop calls

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
            return None, self._train.get(server_round)
        arrays, metrics = self._strategy.aggregate_train(server_round, replies)
        self._train[server_round] = metrics
        self._fresh.add(server_round)
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
            self._fresh.add(server_round)
        return self._evaluate.get(server_round)

    def noted(self, evaluate_fn: EvaluateFn) -> EvaluateFn:
        """The user's central evaluation, with its metrics recorded; rounds that are over are not evaluated again."""

        def central(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
            # A checkpoint has only the last model, so earlier rounds without a recorded value stay without one.
            if server_round not in self._central and server_round >= self._resumed:
                self._central[server_round] = evaluate_fn(server_round, arrays)
                self._fresh.add(server_round)
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
                lines = [self._line(one) for one in sorted(self._fresh)]
            except TypeError as error:
                raise CheckpointError(f"the run cannot be saved: {error}, which no checkpoint can hold") from error
            mark = self._history.append(self._recent)
            if not checkpoint.save(self._path, packed | {"history": mark, "recent": lines}, tensors):
                self._warn_of_folder()
        except CheckpointError as error:
            if self.arrays is None:
                raise
            log(ERROR, "%s; the one after round %s is still there", error, self.last)
            return
        self._history.commit()
        self._recent = lines
        self._fresh.clear()
        self.arrays, self.last = arrays, server_round

    def _line(self, server_round: int) -> str:
        """A round's metrics and report, for the history."""
        entry: dict[str, Any] = {"round": server_round}
        for kind, metrics in self._metrics().items():
            if server_round in metrics:
                entry[kind] = metrics[server_round]
        if server_round in self._strategy.reports:
            entry["report"] = self._strategy.reports[server_round].to_dict()
        arrays: checkpoint.Tensors = {}
        packed = checkpoint.pack(entry, f"round {server_round}", arrays, convert)
        if arrays:
            raise TypeError(f"{next(iter(arrays))} is an array")
        return json.dumps(packed)

    def _metrics(self) -> dict[str, dict[int, MetricRecord | None]]:
        return {"train": self._train, "evaluate": self._evaluate, "central": self._central}

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
            "configs": {
                name: checkpoint.pack(self._changed(name), f"configs/{name}", tensors, convert) for name in self._given
            },
            "is_of": self._is_of,
        }

    def _changed(self, name: str) -> dict[str, Any]:
        """The values of a configuration that are not those that were given; None for one that was taken away."""
        now, given = dict(self._given[name]), self._begun_with[name]
        changed = {key: value for key, value in now.items() if key not in given or given[key] != value}
        return changed | {key: None for key in given if key not in now}

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

    def _warn_of_folder(self) -> None:
        """Logs once that the last checkpoint may be lost with the power; not with the process."""
        if not self._has_warned_of_folder:
            self._has_warned_of_folder = True
            log(
                WARNING,
                "The file system of the checkpoint %s cannot sync a folder: after a power cut an older one may be back",
                self._path,
            )

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
        if "history" in packed:
            lines = self._history.read(packed["history"])
            if lines is None:
                log(
                    WARNING,
                    "There is no history %s: metrics and reports of the rounds up to %s are missing in the result",
                    self._history.path,
                    self.last,
                )
            self._recent = packed["recent"]
            self._configs, self._is_of = {n: unpacked(c) for n, c in packed["configs"].items()}, packed["is_of"]
            entries = [unpacked(json.loads(line)) for line in (*(lines or ()), *self._recent)]
        else:  # lifl before the history: all rounds are in the checkpoint
            reports = unpacked(packed["reports"])
            old = dict(zip(self._metrics(), map(unpacked, packed["metrics"]), strict=True)) | {"report": reports}
            self._fresh = {number for values in old.values() for number in values}
            entries = [{"round": n} | {kind: v[n] for kind, v in old.items() if n in v} for n in sorted(self._fresh)]
        for entry in entries:
            number = entry["round"]
            for kind, metrics in self._metrics().items():
                if kind in entry:
                    metrics[number] = entry[kind]
            if "report" in entry:
                self._strategy.reports[number] = RoundReport.from_dict(entry["report"])
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


def _first_difference(had: dict[str, list[Any]], given: dict[str, list[Any]]) -> str:
    """The first array of two models that differs, in words; empty if none does."""
    for name in (*had, *given):
        if had.get(name) != given.get(name):
            there, here = (
                "not there" if one is None else f"{one[0]} {tuple(one[1])}" for one in (had.get(name), given.get(name))
            )
            return f"{name!r} is {there} in the checkpoint and {here} in initial_arrays"
    return ""
