"""A run's scalars for TensorBoard: numbers of updates, times of the stages, and the metrics of the strategy.

Scalars stand between Flower's loop and a strategy, or its journal, and write the return values of the hooks. Each value
is written at once and in the calling thread, so that it is in the file even if the process is killed. (tensorboardX's
own writer uses a thread, which ends at the first error, and the caller would then wait for it.) A write that fails is
logged, and the run goes on.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from logging import ERROR
from os import PathLike
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.supercore import log

from lifl.report.report import RoundReport
from lifl.strategy.landing import spec_of
from lifl.strategy.loop import StandIn

EvaluateFn = Callable[[int, ArrayRecord], "MetricRecord | None"]

MAX_LIST = 64
"""A metric that is a list has a scalar for each element; a longer one is left out."""


def require() -> None:
    """Raises ``ModuleNotFoundError``, with the command that installs it, if tensorboardX is not installed."""
    if importlib.util.find_spec("tensorboardX") is None:
        raise ModuleNotFoundError(
            "tensorboard= writes its files with tensorboardX, which is not installed: pip install 'lifl[tensorboard]'",
            name="tensorboardX",
        )


@contextmanager
def noted(strategy: Any, journal: Any | None) -> Iterator[Scalars | None]:
    """The scalars of a strategy's run, in front of its journal if it has one; None without a ``tensorboard`` folder."""
    if strategy.tensorboard is None:
        yield None
        return
    last = None if journal is None or journal.arrays is None else journal.last
    if last is None or not _is_in(strategy.tensorboard_run, strategy.tensorboard):
        strategy.tensorboard_run = _new_run(strategy.tensorboard)
    scalars = Scalars(strategy if journal is None else journal, strategy.tensorboard_run, last)
    try:
        yield scalars
    finally:
        scalars.close()


def _is_in(run: str | None, folder: str | PathLike[str]) -> bool:
    return run is not None and Path(run).parent == Path(folder).absolute()


def _new_run(folder: str | PathLike[str]) -> str | None:
    """A new folder for this run, in `folder`, with the first free number; None if it cannot be made (then logged)."""
    for number in itertools.count(1):
        path = Path(folder).absolute() / f"run-{number}"
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            log(ERROR, "There will be no scalars for TensorBoard: %s", error)
            return None
        return str(path)
    raise AssertionError("itertools.count() does not end")


class Scalars(StandIn):
    """A stand-in for the strategy or its journal that Flower's loop calls.

    Parameters
    ----------
    inner : Strategy or Journal
        The strategy or journal that every call is passed on to.
    folder : str or None
        The run's folder for event files; None: nothing is written.
    last : int or None
        The last finished round of a resumed run. The files have the scalars up to that round; those of later,
        unfinished rounds are declared void.
    """

    def __init__(self, inner: Any, folder: str | None, last: int | None) -> None:
        super().__init__(inner)
        self._folder = folder
        self._last = last
        self._void_from = None if last is None else last + 1  # for the first event file; None afterwards
        self._update_bytes: int | None = None
        self._file: Any = None

    # ------------------------------------------------------------ the methods that Flower's loop calls

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Calls the strategy; keeps the size of the model, for ``round/bytes``."""
        with suppress(TypeError, ValueError):  # the strategy raises for a model that lifl cannot fold
            self._update_bytes = spec_of(arrays).nbytes
        messages: Iterable[Message] = self._inner.configure_train(server_round, arrays, config, grid)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Calls the strategy; writes the scalars of the round and of its metrics."""
        arrays, metrics = self._inner.aggregate_train(server_round, replies)
        report = self._inner.reports.get(server_round)
        values = {} if report is None else round_scalars(report, self._update_bytes)
        self._write(server_round, values | metric_scalars("train_clientapp", metrics))
        return arrays, metrics

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Calls the strategy; writes the scalars of its metrics."""
        metrics: MetricRecord | None = self._inner.aggregate_evaluate(server_round, replies)
        self._write(server_round, metric_scalars("evaluate_clientapp", metrics))
        return metrics

    def noted(self, evaluate_fn: EvaluateFn) -> EvaluateFn:
        """The user's central evaluation, with the scalars of its metrics written."""

        def central(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
            metrics = evaluate_fn(server_round, arrays)
            self._write(server_round, metric_scalars("evaluate_serverapp", metrics))
            return metrics

        return central

    # ------------------------------------------------------------ the file

    def _write(self, server_round: int, values: Mapping[str, float]) -> None:
        is_over = self._last is not None and server_round <= self._last
        if self._folder is None or is_over or not values:
            return
        try:
            if self._file is None:
                self._file = _open(self._folder, self._void_from)
            self._file.write_event(_event(server_round, values))
            self._file.flush()
            self._void_from = None
        except Exception as error:  # tensorboardX raises errors of its own
            log(ERROR, "Scalars of round %s cannot be written to %s: %s", server_round, self._folder, error)
            # No reader gets past a record that was cut off, so the next record begins a new file.
            self.close()

    def close(self) -> None:
        """Closes the file; harmless without one."""
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):  # every record that could be written has been flushed
                file.close()


def round_scalars(report: RoundReport, update_bytes: int | None) -> dict[str, float]:
    """The scalars of a round's report: counts, the weight, bytes of accepted updates, and seconds of the stages."""
    counts: dict[str, float] = {
        "round/accepted": len(report.accepted),
        "round/refused": len(report.rejected),
        "round/late": len(report.late),
        "round/weight": report.weight,
    }
    if update_bytes is not None:
        counts["round/bytes"] = len(report.accepted) * update_bytes
    return counts | {f"round_seconds/{stage}": seconds for stage, seconds in report.stages.items()}


def metric_scalars(where: str, metrics: MetricRecord | None) -> dict[str, float]:
    """A record of metrics as scalars below `where`; each element of a list is one scalar, named by its index."""
    values: dict[str, float] = {}
    for name, value in (metrics or {}).items():
        if not isinstance(value, list):
            values[f"{where}/{name}"] = value
        elif len(value) <= MAX_LIST:
            values |= {f"{where}/{name}/{at}": element for at, element in enumerate(value)}
    return values


def _open(folder: str, void_from: int | None) -> Any:
    """A new event file, which declares void the records of round `void_from` and later in older files."""
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    Path(folder).mkdir(parents=True, exist_ok=True)
    # tensorboardX names a file by the second and the host; the suffix keeps two files of one second apart.
    file = EventsWriter(os.path.join(folder, "events"), f".{time.time_ns()}")
    file.write_event(Event(wall_time=time.time(), file_version="brain.Event:2"))
    if void_from is not None:
        start = SessionLog(status=SessionLog.START)
        file.write_event(Event(wall_time=time.time(), step=void_from, session_log=start))
    return file


def _event(step: int, values: Mapping[str, float]) -> Any:
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.summary_pb2 import Summary

    scalars = [Summary.Value(tag=tag, simple_value=float(value)) for tag, value in values.items()]
    return Event(wall_time=time.time(), step=step, summary=Summary(value=scalars))
