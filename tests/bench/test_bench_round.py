"""Whole rounds, measured on real servers with a tiny model: what the benchmark promises is there, and nothing stays."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lifl import TensorSpec
from lifl.bench import round as bench
from lifl.bench import tree
from lifl.bench.round import COMPARED, measure_round
from lifl.bench.shapes import model_spec, random_update, spec_of, tensors_of
from lifl.bench.work import Work, error_over_tolerance, weight_of
from lifl.errors import LiflError

pytestmark = pytest.mark.ladder

SPEC = TensorSpec.from_arrays(
    {"w": np.empty((300, 70), np.float32), "b": np.empty(70, np.float32), "n": np.empty((), np.int64)}
)
NODES, ROUNDS = 2, 2
WORK = Work(SPEC, NODES, ROUNDS, "eager", None)
FIGURES = {
    *("wall_s", "last_to_model_s", "cpu_s", "idle_bytes", "peak_bytes", "peak_over_updates", "requests", "sent_bytes"),
    *("received_bytes", "objects"),
}


# ---------------------------------------------------------------- rounds


@pytest.fixture(scope="module")
def measured(own_folder: Path) -> dict[str, Any]:
    """Two rounds with two nodes, Flower's strategy and lifl's on Flower's SuperLink, measured once."""
    assert own_folder.is_dir()
    return measure_round("tiny", NODES, ROUNDS, ("flower", "strategy"), spec=SPEC, has_profile=True)


def test_every_side_has_its_figures(measured: dict[str, Any]) -> None:
    """They are there for each side, finite and positive, and can be written as JSON."""
    assert json.loads(json.dumps(measured)) == measured
    assert set(measured) == {
        *("model", "arrays", "update_bytes", "nodes", "rounds", "repetitions", "timing", "memory", "cores", "rows"),
        "is_patient",
    }
    assert [row["side"] for row in measured["rows"]] == ["flower", "strategy"]
    for row in measured["rows"]:
        assert set(row) > FIGURES
        for name in FIGURES:
            assert math.isfinite(row[name]), name
            assert row[name] > 0, name
        assert set(row["over_flower"]) == set(COMPARED)
        assert any("flower-superlin" in name for name in row["cpu_by_process_s"])
        assert row["load_cpu_s"] > 0
        assert row["cpu_s"] == pytest.approx(sum(row["cpu_by_process_s"].values()))
    assert set(measured["rows"][0]["over_flower"].values()) == {1.0}


def test_every_round_is_there(measured: dict[str, Any]) -> None:
    """Each round's updates came before its model, and every node's objects went in and out."""
    for row in measured["rows"]:
        (run,) = row["runs"]
        assert [one["round"] for one in run] == [1, 2]
        for one in run:
            assert 0 < one["last_to_model_s"] < one["wall_s"]
            assert 0 < one["model_out_s"] < one["wall_s"]
            # Down: Message, RecordDict, ArrayRecord, ConfigRecord, and two for each array; up the same with metrics.
            assert one["objects"] == NODES * 2 * (4 + 2 * len(SPEC))
            assert one["requests"] > one["objects"]
            assert one["sent_bytes"] > NODES * SPEC.nbytes
            assert one["received_bytes"] > NODES * SPEC.nbytes
            assert one["repeated"] == 0


def test_only_lifl_superlink_has_a_profile(measured: dict[str, Any]) -> None:
    """The table of the profile shows the first side that has one, so Flower's SuperLink must have none."""
    assert [row["profile_s"] for row in measured["rows"]] == [None, None]


def test_every_model_is_the_mean(measured: dict[str, Any]) -> None:
    """Flower's and lifl's, both as near to it as their roundings allow."""
    assert all(row["error_over_tolerance"] <= 1 for row in measured["rows"])


def test_wrong_arguments_are_told_before_anything_is_started() -> None:
    """A name or a number that cannot be."""
    with pytest.raises(
        ValueError, match="side 'mine' is not known: choose one of flower, strategy, server, unheld, nvflare"
    ):
        measure_round(sides=("mine",))
    with pytest.raises(ValueError, match="nodes=0"):
        measure_round(nodes=0)
    with pytest.raises(ValueError, match="vgg"):
        measure_round("vgg")
    with pytest.raises(ValueError, match="memory='lots'"):
        measure_round(memory="lots")


# ---------------------------------------------------------------- the model


def exact_mean() -> dict[str, Any]:
    """The mean of the nodes' updates."""
    updates, weights = [random_update(SPEC, k) for k in range(NODES)], [weight_of(k) for k in range(NODES)]
    return {name: np.average([update[name] for update in updates], axis=0, weights=weights) for name in SPEC}


def test_a_wrong_model_is_noticed() -> None:
    """A number that is off by a little more than a rounding, or is NaN, is an error."""
    mean = exact_mean()
    mean["n"] = np.rint(mean["n"])
    good = {name: np.asarray(array, SPEC[name].dtype) for name, array in mean.items()}
    assert error_over_tolerance(good, WORK, is_exact=True) <= 1
    for value in (good["w"][7, 7] + np.float32(1e-5), np.nan):
        bad = good | {"w": good["w"].copy()}
        bad["w"][7, 7] = value
        assert error_over_tolerance(bad, WORK, is_exact=True) > 1
        assert error_over_tolerance(bad, WORK, is_exact=False) > 1


def test_a_round_of_too_few_answers_is_no_round() -> None:
    """The figures would be of something else."""
    models = [{"round": 0, "at_s": 1.0}, {"round": 1, "at_s": 2.0}]
    with pytest.raises(LiflError, match="round 1 had 0 answers of 2 nodes"):
        bench._round(*models, [{"got_s": 0.5}, {"got_s": 2.5}], WORK)


def test_a_spec_goes_through_json() -> None:
    """As it is handed to the other processes."""
    for spec in (SPEC, model_spec("resnet18")):
        assert spec_of(json.loads(json.dumps(tensors_of(spec)))) == spec


# ---------------------------------------------------------------- processes

BUSY = """
import os, subprocess, sys, time
def work():
    while time.process_time() < 0.2: pass
if os.fork() == 0:
    work()
    os._exit(0)
os.wait()
block = bytearray(os.urandom(1 << 20)) * 64
subprocess.Popen([sys.executable, "-c", "import time; block = bytearray(b'x' * (1 << 24)); time.sleep(60)"])
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def busy() -> Iterator[int]:
    """A process of 64 MiB that had a busy child, which is dead, and has one of 16 MiB."""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", BUSY], stdin=pipe, stdout=pipe) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process.pid
        for pid in tree._tree(process.pid):
            os.kill(pid, 9)


def test_the_dead_count(busy: int) -> None:
    """CPU time of a child that was waited for is its parent's; of one that lives its own."""
    spent = tree.cpu_s(busy)
    assert 0.15 < sum(spent.values()) < 5
    assert len(tree._tree(busy)) == 2


def test_memory_is_that_of_all(busy: int) -> None:
    """The two blocks are in it."""
    time.sleep(0.3)  # the child's interpreter has to start
    assert 80 << 20 <= tree.pss_bytes(busy) < 200 << 20
    with tree.MemoryLog(busy, 0.01) as log:
        begin = time.monotonic()
        while len(log.looks) < 3:
            time.sleep(0.01)
    assert log.peak_bytes(begin, time.monotonic()) > 80 << 20
    assert log.peak_bytes(0, 1) == 0
