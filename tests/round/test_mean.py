"""The mean in ranges: the same numbers as a tree's, and what becomes of those who are killed by what they read."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lifl
from lifl import fold
from lifl.errors import PeerGoneError, RoundError
from lifl.shm.messages import Kind
from lifl.tensor import Tensor

pytestmark = pytest.mark.transports

SPEC = lifl.TensorSpec.from_arrays({"w": np.zeros(8)})
WAIT_S = 60.0
FORMS: list[Any] = [("any", lifl.Shape(0, 2)), ("any", lifl.Shape(0, 3)), ("flower", lifl.Shape(0, 2))]
IDS = ["any-2", "any-3", "flower-2"]

ODD = lifl.TensorSpec(
    (
        *(Tensor(f"f{n}", "float32", (n,)) for n in (0, 1, 511, 512, 513, 5000)),
        *(Tensor("h", "float16", (1025,)), Tensor("b", "bfloat16", (700,)), Tensor("d", "float64", ())),
        *(Tensor("n", "int64", (2049,)), Tensor("i", "int32", (3,)), Tensor("u", "uint8", (600,))),
        *(Tensor("t", "bool", (513,)), Tensor("s", "int8", (1,)), Tensor("e", "int16", (0, 3))),
    )
)


def odd_update(seed: int) -> dict[str, Any]:
    """Numbers of every dtype; bfloat16 as bits of small floats."""
    random = np.random.default_rng(seed)
    update = {}
    for name, tensor in ODD.items():
        if tensor.dtype == "bfloat16":
            bits = random.standard_normal(tensor.shape).astype(np.float32).view(np.uint32) >> 16
            update[name] = bits.astype(np.uint16)
        elif tensor.dtype.startswith("float"):
            update[name] = np.asarray(random.standard_normal(tensor.shape)).astype(tensor.dtype)
        else:
            update[name] = np.asarray(random.integers(0, 2 if tensor.dtype == "bool" else 100, tensor.shape)).astype(
                tensor.dtype
            )
    return update


@pytest.fixture(scope="session")
def odd() -> tuple[list[dict[str, Any]], list[float], dict[str, Any], dict[str, Any]]:
    """Updates, weights, their slow mean and its tolerance."""
    updates, weights = [odd_update(i) for i in range(5)], [3.0, 1.0, 4.5, 1e-3, 700.0]
    return updates, weights, fold.mean_reference(updates, weights), fold.tolerance(updates, weights, ODD)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "shape", [lifl.Shape(1, 0), lifl.Shape(2, 0), *(lifl.Shape(n, s) for n in (0, 1, 2) for s in (1, 2, 3, 7))], ids=str
)
@pytest.mark.parametrize("timing", ["eager", "lazy", "jit"])
def test_every_shape_gives_the_reference(workers: int, shape: lifl.Shape, timing: Any, odd: Any) -> None:
    """Odd lengths of every dtype, in ranges that end in the middle of them: as exact as the slow mean says."""
    updates, weights, expected, bound = odd
    with (
        lifl.Node("32MiB", workers=workers) as node,
        node.open_round(ODD, 5, timing, shape=shape) as round_,
    ):
        for i, (update, weight) in enumerate(zip(updates, weights, strict=True)):
            with round_.loan(i) as loan:
                for name, array in update.items():
                    loan.arrays[name][...] = array
                loan.send(weight)
        result = round_.result(WAIT_S)
        for name in ODD:
            difference = np.abs(
                as_float(ODD[name].dtype, result.arrays[name]) - as_float(ODD[name].dtype, expected[name])
            )
            assert (difference <= bound[name]).all(), name
        assert result.report.shards == shape.shards
        assert {span.role for span in result.report.spans} >= {"gateway", "shard" if shape.shards else "top"}


def as_float(dtype: str, array: Any) -> Any:
    """Its numbers in float64."""
    if dtype == "bfloat16":
        return (np.asarray(array).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return np.asarray(array).astype(np.float64)


@pytest.mark.parametrize("shards", [1, 2, 3, 7, 255])
@pytest.mark.parametrize("count", [0, 1, 511, 512, 1024, 100_003])
def test_ranges_are_all_and_do_not_overlap(count: int, shards: int) -> None:
    """Each element is in one range; no two ranges share a cache line."""
    bounds = [fold.shard_bounds(count, (i, shards)) for i in range(shards)]
    assert bounds[0][0] == 0
    assert bounds[-1][1] == count
    assert all(a[1] == b[0] for a, b in pairwise(bounds))
    assert all(begin % fold.SHARD_ALIGNMENT == 0 for begin, _ in bounds)


def test_a_worker_gets_its_range_of_the_last_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the pages of that range mapped: with the other one the mean takes twice as long."""
    given: list[list[int]] = []
    with lifl.Node("16MiB", workers=3) as node:
        push = node.outbox.push

        def note(worker: int, message: Any) -> None:
            if message.kind == Kind.SHARD:
                given[-1].append(worker)
            push(worker, message)

        monkeypatch.setattr(node.outbox, "push", note)
        for _ in range(4):
            given.append([])
            with node.open_round(SPEC, expected=2, timing="lazy", shape=lifl.Shape(0, 3)) as round_:
                for k in range(2):
                    round_.submit({"w": np.full(8, float(k))}, client_id=k)
                round_.result(WAIT_S)
    assert given == [[1, 2, 3]] * 4


def test_a_mean_that_is_not_finite_fails_the_round() -> None:
    """Whichever range it is in."""
    with lifl.Node("8MiB", workers=2) as node:
        spec = lifl.TensorSpec.from_arrays({"w": np.zeros(5000)})
        for at in (0, 4999):
            update = np.zeros(5000)
            update[at] = 1.7e308
            with node.open_round(spec, 2, shape=lifl.Shape(0, 2)) as round_:
                for _ in range(2):
                    round_.submit({"w": update})
                with pytest.raises(RoundError, match="range of float64"):
                    round_.result(WAIT_S)


# ---------------------------------------------------------------- who dies of what


def poison(monkeypatch: pytest.MonkeyPatch, folder: Path, body: str) -> None:
    """Workers that are started from here on run `body`, which may see to their end, before each fold."""
    (folder / "sitecustomize.py").write_text(
        "import ctypes, os, signal\n"
        "import lifl.fold as fold\n"
        "def is_in(updates):\n"
        "    return any(ctypes.c_double.from_address(u).value == 13.0 for u in updates)\n"
        f"def before(name, sums, updates):\n    {body}\n"
        "def wrap(name, pick):\n"
        "    real = getattr(fold, name)\n"
        "    def call(*args):\n"
        "        before(name, *pick(args))\n"
        "        return real(*args)\n"
        "    setattr(fold, name, call)\n"
        "wrap('fold_at', lambda a: ([], a[3]))\n"
        "wrap('finish_at', lambda a: (a[2], a[4] if len(a) > 4 else []))\n"
        "wrap('flower_at', lambda a: ([], a[2]))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)


@pytest.mark.parametrize(("order", "shape"), FORMS, ids=IDS)
@pytest.mark.parametrize("sent", ["SIGKILL", "SIGSTOP"])
def test_who_kills_its_reader_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, order: Any, shape: lifl.Shape, sent: str
) -> None:
    """All are read at once, so all are suspects; read alone, the culprit is found, named, and the rest counts."""
    poison(monkeypatch, tmp_path, f"is_in(updates) and os.kill(os.getpid(), signal.{sent})")
    with (
        lifl.Node("16MiB", workers=2, stall_timeout=0.3) as node,
        node.open_round(SPEC, 5, "lazy", order, shape=shape) as round_,
    ):
        for i in range(5):
            round_.submit({"w": np.full(8, 13.0 if i == 2 else float(i))}, client_id=i)
        result = round_.result(WAIT_S)
        assert [(r.client_id, r.rule) for r in result.rejected] == [("2", "poison")]
        assert [c.client_id for c in result.report.accepted] == ["0", "1", "3", "4"]
        np.testing.assert_allclose(result.arrays["w"], 2.0, rtol=1e-15)
        assert 2 <= result.report.deaths <= 3


def test_two_culprits_are_both_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And if there is nobody left, the round says so."""
    poison(monkeypatch, tmp_path, "is_in(updates) and os.kill(os.getpid(), signal.SIGKILL)")
    with lifl.Node("16MiB", workers=2) as node:
        with node.open_round(SPEC, 3, "lazy", shape=lifl.Shape(0, 2)) as round_:
            for i in range(3):
                round_.submit({"w": np.full(8, 13.0 if i else 5.0)}, client_id=i)
            result = round_.result(WAIT_S)
            assert {r.client_id for r in result.rejected} == {"1", "2"}
            assert (result.arrays["w"] == 5).all()
        with node.open_round(SPEC, 2, "lazy", shape=lifl.Shape(0, 2)) as round_:
            for i in range(2):
                round_.submit({"w": np.full(8, 13.0)}, client_id=i)
            with pytest.raises(RoundError, match="no update is left"):
                round_.result(WAIT_S)


@pytest.mark.parametrize("shape", [lifl.Shape(2, 0), lifl.Shape(2, 2)], ids=str)
def test_a_round_that_kills_everybody_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shape: lifl.Shape) -> None:
    """A round whose workers die of sums has no update to refuse: it fails after some deaths; the Node goes on."""
    poison(monkeypatch, tmp_path, "sums and os.kill(os.getpid(), signal.SIGKILL)")
    with lifl.Node("16MiB", workers=2) as node:
        free = node.arena.free_bytes
        with node.open_round(SPEC, 4, shape=shape) as round_:
            for i in range(4):
                time.sleep(0.2 if i == 3 else 0)  # the others are folded ahead
                round_.submit({"w": np.full(8, float(i))}, client_id=i)
            with pytest.raises(RoundError, match="workers died of it, one after another"):
                round_.result(WAIT_S)
            assert round_.report().deaths < 20
        with node.open_round(SPEC, 1, shape=lifl.Shape(0, 1)) as round_:
            round_.submit({"w": np.ones(8)})
            assert (round_.result(WAIT_S).arrays["w"] == 1).all()
        end = time.monotonic() + WAIT_S
        while node.arena.free_bytes != free:
            assert time.monotonic() < end, "blocks are lost"
            time.sleep(0.01)


@pytest.mark.parametrize("shape", [lifl.Shape(2, 0), lifl.Shape(0, 2), lifl.Shape(2, 2)], ids=str)
def test_workers_that_cannot_start_accuse_nobody(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shape: lifl.Shape
) -> None:
    """A worker that dies before its first message has read nothing: no update is refused; the Node names the fault."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os\nimport lifl.workers.aggregator as aggregator\naggregator.main = lambda *_: os._exit(3)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with (
        lifl.Node("16MiB", workers=2) as node,
        suppress(PeerGoneError),
        node.open_round(SPEC, 4, shape=shape) as round_,
    ):
        with suppress(PeerGoneError):  # it may be known before the last is handed in
            for i in range(4):
                round_.submit({"w": np.full(8, float(i))}, client_id=i)
        with pytest.raises(PeerGoneError, match="before it had started"):
            round_.result(WAIT_S)
        assert not round_.report().rejected


@pytest.mark.parametrize(("order", "shape"), FORMS, ids=IDS)
def test_a_kill_by_chance_costs_nobody_anything(order: Any, shape: lifl.Shape) -> None:
    """Suspects that are read alone without harm count, all of them."""
    with lifl.Node("64MiB", workers=2, stall_timeout=30.0) as node:
        spec = lifl.TensorSpec.from_arrays({"w": np.zeros(100_000)})
        for _ in range(10):
            with node.open_round(spec, 6, "lazy", order, shape=shape) as round_:
                for pid in node.pids():
                    os.kill(pid, signal.SIGSTOP)
                for i in range(6):
                    round_.submit({"w": np.full(100_000, float(i))}, client_id=i)
                before = node.pids()
                os.kill(before[0], signal.SIGKILL)
                for pid in before[1:]:
                    os.kill(pid, signal.SIGCONT)
                result = round_.result(WAIT_S)
                assert result.num_updates == 6
                assert not result.rejected
                np.testing.assert_allclose(result.arrays["w"], 2.5, rtol=1e-15)
                del result
