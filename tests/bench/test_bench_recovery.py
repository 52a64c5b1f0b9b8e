"""The benchmark of recovery kills workers that hold what it says, and notices what is not recovered."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from terminal import shown
from typer.testing import CliRunner

from lifl import TensorSpec
from lifl.bench import recovery
from lifl.bench.recovery import SPANS, WAYS, measure_recovery, recovery_table, spread_ms
from lifl.cli import main as cli
from lifl.errors import LiflError
from lifl.round.blocks import Assignment
from lifl.round.recovery import Remains
from lifl.shm.arena import State

SPEC = TensorSpec.from_arrays({"w": np.empty((2048, 512), np.float32), "n": np.empty((), np.int64)})
"""Four MB: large enough to be met while it is folded."""


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    """Six deaths of each way, measured once for the tests of what comes out."""
    return measure_recovery(6, 4, 2, spec=SPEC)


def test_every_way_and_span_is_measured(figures: dict[str, Any]) -> None:
    """Each row has its deaths, and a worker that was folding or waiting held all of its updates."""
    assert json.loads(json.dumps(figures)) == figures
    assert set(figures) == {"cores", "workers", "updates", "update_bytes", "goal_ms", "rows"}
    rows = figures["rows"]
    assert [(row["way"], row["span"]) for row in rows] == [(way, span) for way in WAYS for span in SPANS]
    for row in rows:
        assert set(row) == {"way", "span", "title", "deaths", "updates_held", "median_ms", "p99_ms", "worst_ms"}
        assert row["deaths"] == 6
        assert row["updates_held"] in ((3.5, 4.0) if row["way"] == "waiting" else (4.0,))
        assert 0 < row["median_ms"] <= row["p99_ms"] <= row["worst_ms"]


def test_spans_add_up(figures: dict[str, Any]) -> None:
    """Nobody is heard before all is reclaimed, and nothing is reclaimed before the death is seen.

    In whole nanoseconds, as they were taken: the sum of two figures in ms is not exact.
    """
    for way in WAYS:
        worst = {row["span"]: round(row["worst_ms"] * 1e6) for row in figures["rows"] if row["way"] == way}
        assert worst["kill_to_seen"] < worst["kill_to_reclaimed"] < worst["kill_to_heard"]
        assert worst["kill_to_reclaimed"] <= worst["kill_to_seen"] + worst["seen_to_reclaimed"]


def test_the_table_shows_every_row(figures: dict[str, Any]) -> None:
    """The text of the table has every row, and each goal beside its figure."""
    text = shown(recovery_table(figures))
    assert all(row["title"] in text for row in figures["rows"])
    assert text.count("under 100") == len(WAYS)


def test_updates_that_are_left_behind_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Node that does not requeue what a dead worker was reading is not measured but told on."""
    real = Assignment.sweep

    def sweep(self: Assignment, me: int, *more: Any) -> Remains:
        remains = real(self, me, *more)
        for update in remains.again:
            if update.block.index in remains.suspects:
                self._host.arena.move(update.block, (me, State.READY), (me, State.READING))
        return remains

    monkeypatch.setattr(Assignment, "sweep", sweep)
    monkeypatch.setattr("lifl.round.core.CLOSE_TIMEOUT_S", 0.5)
    with pytest.raises(LiflError, match=r"4 updates of the dead worker [12] were neither reclaimed nor requeued"):
        measure_recovery(2, 4, 2, spec=SPEC)


@pytest.mark.parametrize("wrong", [(0, 8, 2), (1, 0, 2), (1, 8, 0), (1, 9, 2), (1, 1, 1)])
def test_wrong_arguments_are_refused(wrong: tuple[int, int, int]) -> None:
    """Nothing is started for arguments that make no sense."""
    with pytest.raises(ValueError, match=f"deaths={wrong[0]}, workers={wrong[2]}, updates={wrong[1]}"):
        measure_recovery(*wrong)


def test_spread_is_median_p99_and_worst() -> None:
    """Nanoseconds become milliseconds; 200 times have their 99th percentile at the last but one."""
    assert spread_ms([2_000_000, 1_000_000, 9_000_000]) == {"median_ms": 2.0, "p99_ms": 9.0, "worst_ms": 9.0}
    assert spread_ms([n * 1_000_000 for n in range(200)])["p99_ms"] == 198.0


def test_the_command_passes_its_options_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """`lifl bench recovery` calls the benchmark with what it was given, and prints what it gets."""
    calls = []

    def measure(*args: Any, on_progress: Any) -> dict[str, Any]:
        on_progress("something")
        calls.append(args)
        return {"figure_ms": 1.5}

    monkeypatch.setattr(recovery, "measure_recovery", measure)
    for options in ([], ["--deaths", "3", "--updates", "4", "--workers", "1"]):
        result = CliRunner().invoke(cli.main, ["bench", "recovery", *options, "--json"])
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout) == {"figure_ms": 1.5}
    assert calls == [(200, 8, 2), (3, 4, 1)]
