"""The benchmarks of trickling updates, role changes and idling: what they promise is there, and true of tiny rounds."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from terminal import shown
from typer.testing import CliRunner

from lifl import Node, TensorSpec
from lifl.bench import idle, roles, trickle
from lifl.bench.idle import idle_table, measure_idle
from lifl.bench.roles import measure_roles, roles_table
from lifl.bench.trickle import TIMINGS, measure_trickle, trickle_table
from lifl.cli import main as cli
from lifl.errors import LiflError
from lifl.shm.sizes import round_bytes

SPEC = TensorSpec.from_arrays({"w": np.empty((300, 70), np.float32), "n": np.empty((), np.int64)})


# ---------------------------------------------------------------- trickle


@pytest.fixture(scope="module")
def trickled() -> dict[str, Any]:
    """Five small updates in a fifth of a second, measured once."""
    return measure_trickle(5, 0.2, "small", 2, 2, spec=SPEC)


def test_trickle_returns_what_it_documents(trickled: dict[str, Any]) -> None:
    """Every timing has its row, and all of a row's figures are there."""
    assert json.loads(json.dumps(trickled)) == trickled
    rows = trickled["rows"]
    assert [row["timing"] for row in rows] == list(TIMINGS)
    assert set(trickled) == {
        *("model", "updates", "update_bytes", "over_s", "workers", "cores", "repetitions", "goal_folds"),
        *("fold_one_s", "rows"),
    }
    for row in rows:
        assert set(row) == {
            *("timing", "shape", "last_to_model_s", "worst_s", "folds", "arrived_to_model_s", "cpu_s", "peak_bytes"),
            "after_last",
        }
        assert 0 < row["arrived_to_model_s"] <= row["worst_s"]
        assert row["last_to_model_s"] <= row["worst_s"]
        assert row["folds"] == pytest.approx(row["last_to_model_s"] / trickled["fold_one_s"])
        assert row["cpu_s"] > 0


def test_trickle_sees_every_update_in_the_arena_at_once_if_nothing_is_folded_ahead(trickled: dict[str, Any]) -> None:
    """Lazy holds all of them beside the mean; no timing takes more than the arena was made for."""
    lazy = next(row for row in trickled["rows"] if row["timing"] == "lazy")
    assert lazy["peak_bytes"] >= 5 * trickled["update_bytes"] + trickled["update_bytes"]
    assert all(row["peak_bytes"] <= round_bytes(SPEC, 2, 5) for row in trickled["rows"])


def test_trickle_tells_what_was_done_after_the_last_update(trickled: dict[str, Any]) -> None:
    """Something was: the mean, by the top or in ranges; and it ends after it begins."""
    for row in trickled["rows"]:
        assert {span["role"] for span in row["after_last"]} & {"top", "shard"}
        for span in row["after_last"]:
            assert span["begin_ms"] <= span["end_ms"]
            assert span["end_ms"] > 0


def test_trickle_takes_as_long_as_its_updates_take_to_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """The updates are spread evenly: the waits are known before they are made."""
    waits: list[float] = []
    monkeypatch.setattr(trickle.time, "sleep", waits.append)
    monkeypatch.setattr(trickle.time, "perf_counter", lambda: 100.0)
    with Node(round_bytes(SPEC, 0, 5), workers=0) as node:
        trickle._round(node, SPEC, "lazy", [trickle._filled(SPEC, value) for value in (1, 3)], 5, 10.0)
    assert waits == [0.0, 2.5, 5.0, 7.5, 10.0]


def test_trickle_notices_a_wrong_mean() -> None:
    """Updates that are not what they should be are told on."""
    wrong = [trickle._filled(SPEC, value) for value in (1, 4)]
    with (
        Node(round_bytes(SPEC, 0, 4), workers=0) as node,
        pytest.raises(LiflError, match=r"eager: the mean of 4 updates is wrong in w: 2\.0 was expected"),
    ):
        trickle._round(node, SPEC, "eager", wrong, 4, 0.0)


def test_trickle_table_shows_every_timing(trickled: dict[str, Any]) -> None:
    """The goal stands below, and no number is cut off in a pipe."""
    text = shown(trickle_table(trickled), width=80)
    assert "…" not in text
    assert "5 updates of small, 0.1 MB each, evenly over 0.2 s" in text
    assert all(timing in text for timing in TIMINGS)
    assert text.count("under 1") == 1


# ---------------------------------------------------------------- roles


@pytest.fixture(scope="module")
def changed() -> dict[str, Any]:
    """Two repetitions, measured once."""
    return measure_roles(2, 2)


def test_roles_returns_every_way(changed: dict[str, Any]) -> None:
    """Each with its figures, all held against the role change."""
    assert json.loads(json.dumps(changed)) == changed
    assert set(changed) == {"cores", "repetitions", "goal_times", "rows", "reuse"}
    assert [row["way"] for row in changed["rows"]] == list(roles.TITLES)
    for row in changed["rows"]:
        assert set(row) == {"way", "title", "median_us", "min_us", "times_change"}
        assert 0 < row["min_us"] <= row["median_us"]
    assert changed["rows"][0]["times_change"] == 1.0


def test_the_second_round_starts_no_process(changed: dict[str, Any]) -> None:
    """The first starts all workers of a Node that had none; the second has the same."""
    assert changed["reuse"] == {"workers": 2, "started": [2, 0], "is_same": True}


def test_roles_table_says_what_was_started(changed: dict[str, Any]) -> None:
    """The goal stands beside the cold starts, and the second round's starts below."""
    text = shown(roles_table(changed))
    assert "the first round started 2, the second 0; the processes were the same." in text
    assert text.count("over 100 x") == 2


# ---------------------------------------------------------------- idle


@pytest.fixture(scope="module")
def idled() -> dict[str, Any]:
    """A tenth of a second, measured once."""
    return measure_idle(0.1, 2)


def test_idle_returns_every_node(idled: dict[str, Any]) -> None:
    """The parts add up, and of a Node that is scaled to zero only the spawner is left."""
    assert json.loads(json.dumps(idled)) == idled
    assert set(idled) == {"cores", "workers", "transport", "seconds", "goal_ms_per_s", "rows"}
    assert [(row["way"], row["processes"]) for row in idled["rows"]] == [("warm", 3), ("open", 3), ("zero", 1)]
    for row in idled["rows"]:
        parts = [row[f"{part}_ms_per_s"] for part in ("owner", "spawner", "workers")]
        assert row["ms_per_s"] == pytest.approx(sum(parts))
        assert min(parts) >= 0
    text = shown(idle_table(idled))
    assert all(title in text for title in idle.TITLES.values())


def test_cpu_time_of_a_process_and_a_thread_is_read_in_nanoseconds() -> None:
    """Both counts include the work of this thread; a process that is gone has taken no time."""
    before = idle.process_ns(os.getpid()), idle.thread_ns(threading.get_native_id())
    begin = time.thread_time_ns()
    while time.thread_time_ns() - begin < 20_000_000:
        pass
    after = idle.process_ns(os.getpid()), idle.thread_ns(threading.get_native_id())
    # The books of a running thread are up to date at its last tick, 10 ms ago at most.
    assert all(new - old > 5_000_000 for old, new in zip(before, after, strict=True))
    assert idle.process_ns(2**22 + 1) == idle.thread_ns(2**22 + 1) == 0


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("measure", "wrong", "words"),
    [
        (measure_trickle, {"updates": 1}, "updates=1"),
        (measure_trickle, {"over_s": -1.0}, "over_s=-1.0"),
        (measure_trickle, {"repetitions": 0}, "repetitions=0"),
        (measure_trickle, {"model": "vgg"}, "vgg"),
        (measure_roles, {"repetitions": 0}, "repetitions=0"),
        (measure_roles, {"workers": 0}, "workers=0"),
        (measure_idle, {"seconds": 0.0}, "seconds=0.0"),
        (measure_idle, {"seconds": float("nan")}, "seconds=nan"),
        (measure_idle, {"workers": 0}, "workers=0"),
        (measure_idle, {"transport": "pigeon"}, "transport='pigeon'"),
    ],
)
def test_wrong_arguments_are_refused(measure: Callable[..., Any], wrong: dict[str, Any], words: str) -> None:
    """Nothing is started for arguments that make no sense."""
    with pytest.raises(ValueError, match=words):
        measure(**wrong)


def test_the_commands_pass_their_options_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each calls its benchmark with what it was given, and prints what it gets."""
    calls: list[tuple[Any, ...]] = []

    def measure(*args: Any, on_progress: Callable[[str], None], **named: Any) -> dict[str, Any]:
        on_progress("something")
        calls.append((*args, named))
        return {"figure_ms": 1.5}

    for module, name in ((trickle, "measure_trickle"), (roles, "measure_roles"), (idle, "measure_idle")):
        monkeypatch.setattr(module, name, measure)
    for words in (
        ["trickle"],
        ["trickle", "--updates", "3", "--seconds", "1.5", "--workers", "0", "--repetitions", "1"],
        ["roles", "--repetitions", "3", "--workers", "1"],
        ["idle", "--seconds", "5", "--workers", "1"],
        ["idle", "--transport", "ebpf"],
    ):
        result = CliRunner().invoke(cli.main, ["bench", *words, "--json"])
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout) == {"figure_ms": 1.5}
    assert calls == [
        (32, 10.0, {"workers": None, "repetitions": 3}),
        (3, 1.5, {"workers": 0, "repetitions": 1}),
        (3, 1, {}),
        (5.0, 1, None, {}),
        (60.0, None, "ebpf", {}),
    ]
