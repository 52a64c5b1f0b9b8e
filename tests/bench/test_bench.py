"""The benchmarks run, say what they promise and leave nothing behind; no test asserts a time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from terminal import shown

from lifl import TensorSpec
from lifl.bench import echo, fold, handoff, limits, pair, shapes
from lifl.bench.fold import fold_table, measure_fold
from lifl.bench.handoff import handoff_table, measure_handoff
from lifl.bench.limits import limits_table, measure_limits
from lifl.ebpf import probe
from lifl.errors import PeerGoneError
from lifl.node import calibration
from lifl.tensor import CODES

SMALL = TensorSpec.from_arrays(
    {
        "w": np.empty((300, 70), np.float32),
        "b": np.empty(5, np.float64),
        "h": np.empty((3, 3), np.float16),
        "n": np.empty((), np.int64),
        "none": np.empty((0, 4), np.float32),
    }
)


# ---------------------------------------------------------------- shapes


@pytest.mark.parametrize(
    ("model", "parameters", "tensors"),
    [
        ("resnet18", 11_689_512, 122),
        ("resnet34", 21_797_672, 218),
        ("resnet152", 60_192_808, 932),
        ("small2000", 400_000, 2000),
    ],
)
def test_a_model_has_torchvisions_number_of_parameters_and_tensors(model: str, parameters: int, tensors: int) -> None:
    """The counts are those of torchvision's state dicts."""
    spec = shapes.model_spec(model)
    assert sum(t.size for t in spec.tensors if not t.name.endswith(shapes.RUNNING)) == parameters
    assert len(spec) == tensors


def test_names_and_shapes_are_torchvisions() -> None:
    """Some tensors of each kind, in torchvision's order."""
    spec = shapes.model_spec("resnet152")
    assert list(spec)[:7] == [
        "conv1.weight",
        "bn1.weight",
        "bn1.bias",
        "bn1.running_mean",
        "bn1.running_var",
        "bn1.num_batches_tracked",
        "layer1.0.conv1.weight",
    ]
    assert list(spec)[-2:] == ["fc.weight", "fc.bias"]
    assert spec["conv1.weight"].shape == (64, 3, 7, 7)
    assert spec["layer1.0.downsample.0.weight"].shape == (256, 64, 1, 1)
    assert spec["layer3.35.conv2.weight"].shape == (256, 256, 3, 3)
    assert spec["layer4.2.bn3.running_var"].shape == (2048,)
    assert (spec["bn1.num_batches_tracked"].dtype, spec["bn1.num_batches_tracked"].shape) == ("int64", ())
    basic = shapes.model_spec("resnet18")
    assert "layer1.0.downsample.0.weight" not in basic
    assert basic["layer2.0.downsample.0.weight"].shape == (128, 64, 1, 1)
    assert basic["fc.weight"].shape == (1000, 512)


def test_an_unknown_model_is_refused_with_the_known_ones() -> None:
    """The message lists what there is."""
    with pytest.raises(ValueError, match=r"'vgg'.*resnet18, resnet34, resnet152, small2000"):
        shapes.model_spec("vgg")


# ---------------------------------------------------------------- fold


LIFLS = ["tree", "shards", "planned", "eager"]


@pytest.mark.parametrize("workers", [0, 2])
def test_fold_returns_what_it_documents_and_agrees_with_flower(workers: int) -> None:
    """Every documented key is there, and lifl's mean is Flower's within what their roundings allow."""
    said: list[str] = []
    figures = measure_fold("small", 5, workers, 2, spec=SMALL, on_progress=said.append)
    assert said
    assert json.loads(json.dumps(figures)) == figures
    rows = figures.pop("rows")
    assert set(figures) == {
        "model",
        "updates",
        "update_bytes",
        "workers",
        "cores",
        "repetitions",
        "goal_share",
        "read_all_cores_gb_per_s",
        "error_over_tolerance",
    }
    assert 0 <= figures["error_over_tolerance"] <= 1
    assert [row["way"] for row in rows] == ["flower", "nvflare", *LIFLS, *(["alone"] if workers else [])]
    rows = [row for row in rows if "skipped" not in row]
    keys = {"way", "title", "workers", "shape", "median_s", "min_s", "gb_per_s", "times_flower", "share_of_read"}
    assert all(set(row) == keys for row in rows)
    assert rows[0]["times_flower"] == 1.0
    shapes_of = {row["way"]: row["shape"] for row in rows}
    assert shapes_of["tree"] == ("2 leaves" if workers else "1 leaf")
    assert shapes_of["shards"] == ("2 shards" if workers else "1 shard")
    assert shapes_of["flower"] == ""
    assert shapes_of["planned"]


def test_nvflare_has_the_same_updates() -> None:
    """Its mean is Flower's within some roundings of float32, and of float16 where the updates are that."""
    pytest.importorskip("nvflare")
    from lifl.strategy import reference

    weights = [1.0, 2.0, 3.0]
    replies = [reference.make_reply(shapes.random_update(SMALL, k), weight) for k, weight in enumerate(weights)]
    inputs = fold.Inputs(SMALL, replies, [reference.view_reply(reply) for reply in replies], weights)
    ours, theirs = fold._flower(inputs, lambda: None).mean, fold._nvflare(inputs, lambda: None).mean
    assert set(ours) == set(theirs)
    for name, array in ours.items():
        np.testing.assert_allclose(theirs[name], array, rtol=1e-2 if name == "h" else 1e-6, atol=1e-6)


def test_fold_says_how_to_get_nvflare_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The row says what to install; the others are measured."""
    monkeypatch.setitem(sys.modules, "nvflare", None)
    figures = measure_fold("small", 2, 0, 1, spec=SMALL)
    assert figures["rows"][1] == {
        "way": "nvflare",
        "title": "NVFLARE (one core)",
        "skipped": "not installed: pip install 'lifl[peers]'",
    }
    assert [row["way"] for row in figures["rows"]] == ["flower", "nvflare", *LIFLS]
    assert "NVFLARE (one core): not installed: pip install 'lifl[peers]'" in shown(fold_table(figures))


def test_the_comparison_notices_a_wrong_mean() -> None:
    """A mean that is off by one part in a million is above the tolerance, and so is a NaN."""
    from lifl.strategy import reference

    updates = [shapes.random_update(SMALL, k) for k in range(3)]
    replies = [reference.make_reply(update, 1.0) for update in updates]
    mean = reference.view_arrays(reference.aggregate(replies))
    assert fold._error_over_tolerance(SMALL, mean, replies, [1.0] * 3) == 0
    assert fold._error_over_tolerance(SMALL, {**mean, "w": mean["w"] * 1.00001}, replies, [1.0] * 3) > 1
    broken = {**mean, "b": np.full(5, np.nan)}
    assert fold._error_over_tolerance(SMALL, broken, replies, [1.0] * 3) == float("inf")


def test_updates_can_have_every_dtype_that_numpy_and_flower_have() -> None:
    """The benchmark's own updates fit their spec."""
    names = [name for name in CODES if name != "bfloat16"]
    spec = TensorSpec.from_arrays({name: np.zeros(3, name) for name in names})
    assert TensorSpec.from_arrays(shapes.random_update(spec, 1)) == spec


@pytest.mark.parametrize("wrong", [{"updates": 0}, {"repetitions": 0}, {"workers": -1}, {"model": "vgg"}])
def test_fold_refuses_wrong_arguments(wrong: dict[str, object]) -> None:
    """Nothing is started for arguments that make no sense."""
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        measure_fold(**wrong)  # type: ignore[arg-type]


def test_fold_table_shows_every_row() -> None:
    """The table names each side and its ratio to Flower."""
    table = fold_table(measure_fold("small", 3, 1, 1, spec=SMALL))
    assert "…" not in shown(table, width=80)
    text = shown(table)
    assert "The mean of 3 updates of small" in text
    assert all(title in text for title in fold.TITLES.values())
    assert "as planned (1 shard)" in text
    assert "the goal of shards is 80%" in text
    assert "1.0 x" in text


# ---------------------------------------------------------------- handoff


@pytest.mark.ladder
def test_handoff_returns_every_way() -> None:
    """Each way has its figures, on two cores and on one; only the quickest is measured with all the messages."""
    support = probe.support()
    if not support.available and os.environ.get("CI"):
        pytest.fail(f"{support.reason}; {support.remedy}")
    figures = measure_handoff(50)
    assert json.loads(json.dumps(figures)) == figures
    assert [row["way"] for row in figures["rows"]] == list(handoff.TITLES)
    for row in figures["rows"]:
        if "skipped" in row:
            assert row["way"] == "ebpf"
            continue
        beside = row["same_core"]
        assert set(row) == {"way", "title", "slower_than_spinning", "same_core", *beside}
        assert set(beside) == {"messages", "median_us", "p99_us", "cpu_us"}
        assert (row["messages"], beside["messages"]) == (50 if row["way"] == "ring_spinning" else 5, 5)
        for one in (row, beside):
            assert 0 < one["median_us"] <= one["p99_us"]
            assert one["cpu_us"] > 0
    text = shown(handoff_table(figures))
    assert all(title in text for title in handoff.TITLES.values())
    assert "Choose the eBPF sidecar where" in text


def test_handoff_says_why_a_way_cannot_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The row says what to do about it, below the table too; the others are measured."""
    monkeypatch.setitem(sys.modules, "grpc", None)
    monkeypatch.setattr(probe, "support", lambda: probe.Support(False, None, "no CAP_BPF", "run as [root]"))
    monkeypatch.setattr(pair, "run", lambda way, messages, **_: pair.Trips([2000] * messages, 3000 * messages))
    rows = measure_handoff(10)["rows"]
    skipped = {row["way"]: row["skipped"] for row in rows if "skipped" in row}
    assert skipped == {
        "ebpf": "no CAP_BPF; run as [root]",
        "grpc": "grpcio is not installed: pip install 'lifl[bench]'",
    }
    text = shown(handoff_table(measure_handoff(10)))
    assert "gRPC unary call: grpcio is not installed: pip install 'lifl[bench]'" in text
    assert "lifl socket, eBPF sidecar: no CAP_BPF; run as [root]" in text


def test_one_way_is_half_a_round_trip() -> None:
    """Nanoseconds there and back become microseconds one way; CPU time is of the mean message."""
    of_three = handoff.one_way(pair.Trips([4000, 2000, 6000], 30_000))
    assert of_three == {"messages": 3, "median_us": 2.0, "p99_us": 3.0, "cpu_us": 5.0}
    assert handoff.one_way(pair.Trips([1000], 0))["p99_us"] == 0.5


def test_cpu_time_of_all_processes_is_counted(in_fork: Callable[[Callable[[], None]], int]) -> None:
    """The count includes the CPU time of a forked side while the side lives."""

    def check() -> None:
        (done, say), (until, end) = os.pipe(), os.pipe()

        def burn() -> None:
            os.close(end)
            begin = time.process_time()
            while time.process_time() - begin < 0.05:
                pass
            os.write(say, b"d")
            os.read(until, 1)

        with echo.forked(burn):
            os.read(done, 1)
            assert echo.spent_ns() - time.process_time_ns() >= 50_000_000
            os.close(end)
        assert echo.spent_ns() - time.process_time_ns() < 1_000_000

    assert in_fork(check) == 0


@pytest.mark.parametrize("is_same_core", [False, True])
def test_sides_keep_to_their_cores(in_fork: Callable[[Callable[[], None]], int], is_same_core: bool) -> None:
    """Each to its half, a proxy to the echo's; or all to one core."""
    cores = sorted(os.sched_getaffinity(0))

    def check() -> None:
        (heard, say) = os.pipe()
        if is_same_core:
            echo.share_a_core()

        def tell() -> None:
            os.write(say, json.dumps(sorted(os.sched_getaffinity(0))).encode().ljust(4096))

        with echo.forked(tell), echo.forked(tell):
            theirs = [json.loads(os.read(heard, 4096)) for _ in range(2)]
            mine = sorted(os.sched_getaffinity(0))
        if is_same_core or len(cores) == 1:
            assert [mine, *theirs] == [cores[:1]] * 3
        else:
            assert mine == cores[::2]
            assert theirs == [cores[1::2]] * 2

    assert in_fork(check) == 0


def test_a_failing_pair_is_an_error_with_its_output() -> None:
    """The message carries what the process said."""
    with pytest.raises(PeerGoneError, match="KeyError: 'pigeon'"):
        pair.run("pigeon", 1)


def test_a_pair_dies_with_the_process_that_asked() -> None:
    """A SIGKILL leaves neither of the two processes behind (the fixture looks for them)."""
    code = "from lifl.bench import pair; pair.run('ring_spinning', 10**12)"
    with subprocess.Popen([sys.executable, "-c", code]) as asker:
        deadline = time.monotonic() + 60
        while _num_descendants(asker.pid) < 2:
            assert asker.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        asker.send_signal(signal.SIGKILL)


def _num_descendants(pid: int) -> int:
    with open(f"/proc/{pid}/task/{pid}/children") as children:
        return sum(1 + _num_descendants(int(child)) for child in children.read().split())


# ---------------------------------------------------------------- limits


@pytest.mark.ladder
def test_limits_returns_what_it_documents(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every documented figure is there and above 0; the costs are those that a Node plans with from now on."""
    monkeypatch.setenv("LIFL_CACHE", str(tmp_path))
    figures = measure_limits(memory_bytes=2**20, repetitions=1, round_trips=20)
    assert json.loads(json.dumps(figures)) == figures
    assert set(figures) == {
        "cores",
        "vector_width",
        "memory_bytes",
        "read_one_core_gb_per_s",
        "read_all_cores_gb_per_s",
        "copy_gb_per_s",
        "sha256_gb_per_s",
        "wake_spin_us",
        "wake_futex_us",
        "wake_eventfd_us",
        "node_cold_s",
        "worker_cold_s",
        "worker_start_s",
        "worker_warm_s",
        "costs",
    }
    assert figures["costs"] == calibration.costs().to_dict()
    assert all(figure > 0 for figure in figures.values() if not isinstance(figure, (str, dict)))
    text = shown(limits_table(figures))
    assert text.count("cost model: ") == len(figures["costs"]) - 1  # the cores stand in the title
    assert "read memory, all cores" in text
    assert "a new Node, to its first result" in text


def test_medians_runs_all_ways_in_turn() -> None:
    """A figure is the median of its own runs, which alternate with the others'."""
    calls: list[str] = []
    values = iter([1.0, 10.0, 3.0, 30.0, 2.0, 20.0])

    def way(name: str) -> float:
        calls.append(name)
        return next(values)

    assert limits.medians({"a": lambda: way("a"), "b": lambda: way("b")}, 3) == {"a": 2.0, "b": 20.0}
    assert calls == ["a", "b"] * 3


@pytest.mark.parametrize("wrong", [{"memory_bytes": 1}, {"repetitions": 0}, {"round_trips": 0}])
def test_limits_refuses_wrong_arguments(wrong: dict[str, int]) -> None:
    """Nothing is started for arguments that make no sense."""
    with pytest.raises(ValueError, match="at least"):
        measure_limits(**wrong)  # type: ignore[arg-type]
