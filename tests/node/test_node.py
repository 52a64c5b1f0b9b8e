"""The Node: every model, every number of workers, every order of arrival gives the mean; then nothing is left."""

from __future__ import annotations

import errno
import gc
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lifl
from lifl.errors import ShmError
from lifl.fold import flower_mean, mean_reference, tolerance
from lifl.shm import sizes
from lifl.shm.machine import available_bytes
from lifl.tensor import DTYPES, Array, Tensor

pytestmark = pytest.mark.transports

WAIT_S = 120.0
UNIT = 65536
Model = Mapping[str, Array]
TINY = {"w": np.ones((2, 3), np.float32)}
TINY_SPEC = lifl.TensorSpec.from_arrays(TINY)
COUNTERS = st.integers(-(2**62), 2**62)
SHAPES = st.sampled_from([(), (0,), (1,), (3,), (2, 5), (2, 0, 3)])
SPECS = st.lists(st.tuples(st.sampled_from(DTYPES), SHAPES), min_size=1, max_size=6).map(
    lambda rows: lifl.TensorSpec(tuple(Tensor(f"t{i}", dtype, shape) for i, (dtype, shape) in enumerate(rows)))
)


def random_model(spec: lifl.TensorSpec, random: np.random.Generator) -> dict[str, Array]:
    """Numbers of ordinary size in every dtype; int64 counters far beyond 2**53; bfloat16 as bits."""
    model = {}
    for name, tensor in spec.items():
        values = random.standard_normal(tensor.shape) * 10
        if tensor.dtype == "bfloat16":
            model[name] = (np.asarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)
        elif tensor.dtype == "int64":
            model[name] = random.integers(-(2**62), 2**62, tensor.shape, np.int64)
        else:
            model[name] = np.asarray(np.abs(values) if tensor.dtype == "uint8" else values).astype(tensor.dtype)
    return {name: np.asarray(array).reshape(spec[name].shape) for name, array in model.items()}


def as_floats(array: Array) -> Array:
    """The numbers in an array, bfloat16 ones from their bits."""
    if array.dtype == np.uint16:
        return (array.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return array.astype(np.float64)


def is_within(mean: Model, updates: Sequence[Model], weights: Sequence[float], spec: lifl.TensorSpec) -> bool:
    """True if the mean is the slow reference within the stated tolerance, counters exactly."""
    return is_near(mean, mean_reference(updates, weights), tolerance(updates, weights, spec), spec)


def is_near(mean: Model, reference: Model, bound: Model, spec: lifl.TensorSpec) -> bool:
    """The same, when the slow reference is there already."""
    assert list(mean) == list(spec)
    for name, tensor in spec.items():
        assert (mean[name].shape, mean[name].dtype) == (reference[name].shape, reference[name].dtype)
        if tensor.dtype == "int64" and not np.array_equal(mean[name], reference[name]):
            return False
        if (np.abs(as_floats(mean[name]) - as_floats(reference[name])) > bound[name]).any():
            return False
    return True


def run(
    node: lifl.Node, spec: lifl.TensorSpec, updates: Sequence[Model], weights: Sequence[float], timing: Any
) -> dict[str, Array]:
    """The mean as the Node makes it, in a round of its own; copies."""
    with node.open_round(spec, expected=len(updates), timing=timing) as round_:
        for update, weight in zip(updates, weights, strict=True):
            round_.submit(update, weight)
        return {name: array.copy() for name, array in round_.result(WAIT_S).arrays.items()}


# ---------------------------------------------------------------- models

MODELS = {
    "scalars": {"a": np.array(0.0, np.float32), "n": np.array(0), "h": np.array(0, np.float16)},
    "counters": {"w": np.zeros((3, 4), np.float32), "num_batches_tracked": np.array(0), "seen": np.zeros(5, np.int64)},
    "halves": {"h": np.zeros(1000, np.float16), "w": np.zeros(7, np.float16)},
    "only_empty": {"e": np.zeros(0, np.float32)},
    "with_empty": {"w": np.zeros(3), "e": np.zeros((4, 0, 2), np.int8), "z": np.zeros((0, 7))},
    "every_dtype": {d: np.zeros(37, d) for d in DTYPES if d != "bfloat16"},
    "nothing": {},
}


@pytest.mark.parametrize("timing", ["eager", "lazy"])
@pytest.mark.parametrize("name", MODELS)
def test_model_is_averaged(node: lifl.Node, name: str, timing: Any) -> None:
    """Models of every kind come out as the slow reference says."""
    spec, random = lifl.TensorSpec.from_arrays(MODELS[name]), np.random.default_rng(3)
    updates, weights = [random_model(spec, random) for _ in range(11)], [float(i) for i in range(1, 12)]
    assert is_within(run(node, spec, updates, weights, timing), updates, weights, spec)


@pytest.fixture(scope="session")
def ten_thousand() -> tuple[lifl.TensorSpec, list[Model], list[float], Model, Model]:
    """A model of 10,000 arrays of a few numbers: its spec, updates of it, weights, their slow mean and tolerance."""
    random = np.random.default_rng(4)
    shapes = [(), (1,), (3,), (0,), (2, 2)]
    dtypes = ["float32", "int64", "float16", "float64"]
    spec = lifl.TensorSpec(tuple(Tensor(f"layer{i}", dtypes[i % 4], shapes[i % 5]) for i in range(10_000)))
    updates, weights = [random_model(spec, random) for _ in range(3)], [1.0, 2.0, 5.0]
    return spec, updates, weights, mean_reference(updates, weights), tolerance(updates, weights, spec)


@pytest.mark.parametrize("timing", ["eager", "lazy"])
def test_ten_thousand_tiny_arrays(node: lifl.Node, timing: Any, ten_thousand: Any) -> None:
    """Each of its arrays is averaged, and its result has 10,000 arrays."""
    spec, updates, weights, reference, bound = ten_thousand
    assert is_near(run(node, spec, updates, weights, timing), reference, bound, spec)


@settings(deadline=None, max_examples=40)
@given(st.data(), SPECS, st.integers(0, 2**32), st.integers(1, 12), st.sampled_from(["eager", "lazy"]))
def test_any_order_of_arrival_gives_the_reference(
    warm_node: lifl.Node, data: st.DataObject, spec: lifl.TensorSpec, seed: int, n: int, timing: Any
) -> None:
    """Whatever the model, the weights and the order, by submit or loan: the mean is the reference's."""
    random = np.random.default_rng(seed)
    has_counters = any(t.dtype == "int64" for t in spec.values())
    counts = st.integers(1, 10**6).map(float)
    weights = data.draw(st.lists(counts if has_counters else st.floats(0.01, 1e6), min_size=n, max_size=n))
    order = data.draw(st.permutations(range(n)))
    updates, free = [random_model(spec, random) for _ in range(n)], warm_node.arena.free_bytes
    with warm_node.open_round(spec, expected=n, timing=timing) as round_:
        for i in order:
            if (seed >> i) % 2:
                with round_.loan(i) as loan:
                    for name in spec:
                        loan.arrays[name][...] = updates[i][name]
                    loan.send(weights[i])
            else:
                round_.submit(updates[i], weights[i], client_id=i)
        result = round_.result(WAIT_S)
        assert is_within(result.arrays, updates, weights, spec)
        assert [c.client_id for c in result.report.accepted] == [str(i) for i in order]
    result = None
    assert warm_node.arena.free_bytes == free


@settings(deadline=None, max_examples=20)
@given(st.lists(st.tuples(COUNTERS, st.integers(1, 10**6)), min_size=1, max_size=9), st.sampled_from(["eager", "lazy"]))
def test_counters_keep_every_digit(warm_node: lifl.Node, rows: list[tuple[int, int]], timing: Any) -> None:
    """An int64 counter far beyond 2**53 comes out exactly, over any tree."""
    updates, weights = [{"n": np.array(x)} for x, _ in rows], [float(w) for _, w in rows]
    mean = run(warm_node, lifl.TensorSpec.from_arrays(updates[0]), updates, weights, timing)
    assert mean["n"] == mean_reference(updates, weights)["n"]


@pytest.mark.parametrize("timing", ["eager", "lazy"])
def test_larger_model_in_any_order_from_threads(node: lifl.Node, timing: Any) -> None:
    """Models of several MiB from four threads agree with NumPy's float64 mean to the last bit but one."""
    random = np.random.default_rng(8)
    updates = [
        {"a": random.standard_normal((300, 700)).astype(np.float32), "b": random.standard_normal(1001)}
        for _ in range(24)
    ]
    weights = random.integers(1, 1000, 24).astype(float)
    spec = lifl.TensorSpec.from_arrays(updates[0])
    with node.open_round(spec, expected=24, timing=timing) as round_:
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(lambda i: round_.submit(updates[i], weights[i], client_id=i), random.permutation(24)))
        result = round_.result(WAIT_S)
    bound = tolerance(updates, weights.tolist(), spec)
    for name, array in result.arrays.items():
        mean = np.average([u[name].astype(np.float64) for u in updates], axis=0, weights=weights)
        assert (np.abs(array - mean) <= bound[name]).all()


# ---------------------------------------------------------------- memory


def test_model_larger_than_the_arena_is_told(node: lifl.Node) -> None:
    """A round that cannot fit is ENOSPC with what it needs, and the Node goes on."""
    spec = lifl.TensorSpec((Tensor("w", "float32", (2**28,)),))
    with pytest.raises(ShmError, match=r"give the Node at least memory=(\d+)") as caught:
        node.open_round(spec, expected=2)
    assert caught.value.errno == errno.ENOSPC
    assert run(node, TINY_SPEC, [TINY], [1.0], "eager")["w"].tolist() == [[1.0] * 3] * 2


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("order", ["any", "flower"])
def test_advised_memory_is_enough(workers: int, order: Any) -> None:
    """A Node with the memory that the refusal asks for runs the round, all updates after one another."""
    spec = lifl.TensorSpec((Tensor("w", "float32", (100_003,)), Tensor("n", "int64", ())))
    with lifl.Node(UNIT, workers=workers) as node, pytest.raises(ShmError) as caught:
        node.open_round(spec, expected=5, order=order)
    memory = int(str(caught.value).rpartition("memory=")[2].partition(",")[0])
    with lifl.Node(memory, workers=workers) as node:
        updates = [{"w": np.full(100_003, i, np.float32), "n": np.array(i)} for i in range(5)]
        with node.open_round(spec, expected=5 if order == "any" else 1, order=order) as round_:
            for update in updates if order == "any" else updates[2:3]:
                round_.submit(update)
            assert round_.result(WAIT_S).arrays["w"].max() == 2


def test_round_bytes_is_enough_for_all_workers() -> None:
    """With the memory that `round_bytes` tells, every worker takes part and the updates fit side by side."""
    spec = lifl.TensorSpec((Tensor("w", "float32", (50_000,)), Tensor("n", "int64", ())))
    shape = lifl.Shape(leaves=3, shards=0)
    with (
        lifl.Node(sizes.round_bytes(spec, 3, 4), workers=3) as node,
        node.open_round(spec, 4, "lazy", shape=shape) as round_,
    ):
        loans = [round_.loan() for _ in range(4)]
        for loan in loans:
            loan.arrays["w"][...] = loan.arrays["n"][...] = 1
            loan.send(1)
        assert round_.result(WAIT_S).report.runtimes == 3


def test_fragmented_arena_takes_any_round_that_fits(node: lifl.Node) -> None:
    """Updates that fit in no hole are laid over several, and are averaged all the same."""
    hold = node.open_round(TINY_SPEC, expected=10_000)
    loans = [hold.loan() for _ in range(node.arena.free_bytes // UNIT)]
    for loan in loans[::2]:
        loan.release()
    spec = lifl.TensorSpec((Tensor("w", "float64", (40_000,)),))
    updates = [{"w": np.random.default_rng(i).standard_normal(40_000)} for i in range(6)]
    mean = run(node, spec, updates, [1.0] * 6, "eager")["w"]
    assert np.allclose(mean, np.mean([u["w"] for u in updates], axis=0), rtol=1e-14, atol=1e-15)
    for loan in loans[1::2]:
        loan.release()
    hold.close()


def test_result_stays_valid_after_round_and_node() -> None:
    """A result's arrays are the mean also after the round and the Node are closed and the worker is gone."""
    with lifl.Node("4MiB", workers=1, debug=True) as node:
        with node.open_round(TINY_SPEC, expected=1) as round_:
            round_.submit(TINY)
            result = round_.result(WAIT_S)
        for i in range(20):
            assert run(node, TINY_SPEC, [{"w": TINY["w"] * i}], [1.0], "eager")["w"][0, 0] == i
    assert result.arrays["w"].tolist() == [[1.0] * 3] * 2
    result.arrays["w"][...] = 5
    row = result.arrays["w"][1]
    del result, round_, node
    gc.collect()
    assert row.tolist() == [5.0] * 3


def test_kept_results_hold_their_memory_and_no_more(node: lifl.Node) -> None:
    """A result keeps the block of its mean until its last array is gone."""
    free = node.arena.free_bytes
    with node.open_round(TINY_SPEC, expected=1) as round_:
        round_.submit(TINY)
        result = round_.result(WAIT_S)
    assert node.arena.free_bytes == free - UNIT
    row = result.arrays["w"][0]
    del result
    assert node.arena.free_bytes == free - UNIT
    assert row.tolist() == [1.0] * 3
    del row
    assert node.arena.free_bytes == free


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("memory", "nbytes"),
    [
        *(
            (1, 1),
            (2**30, 2**30),
            ("1", 1),
            ("100b", 100),
            ("2GiB", 2**31),
            ("512 MiB", 2**29),
            (" 1.5 gib ", 3 * 2**29),
        ),
        *(("3kb", 3000), ("7MB", 7 * 10**6), ("1TiB", 2**40)),
    ],
)
def test_sizes_are_understood(memory: str | int, nbytes: int) -> None:
    """Sizes are bytes, or a number with a decimal or binary unit."""
    assert sizes.parse_bytes(memory) == nbytes


@pytest.mark.parametrize("memory", ["", "lots", "2 GiBs", "-1", "1..5MiB", "0.0001b", 0, -5, "MiB", "9" * 400])
def test_other_sizes_are_refused(memory: str | int) -> None:
    """A text that is no size is a ValueError, before anything is started."""
    with pytest.raises(ValueError, match=r"size|bytes|float"):
        lifl.Node(memory, workers=0)


@pytest.mark.parametrize("workers", [-1, 256])
def test_other_numbers_of_workers_are_refused(workers: int) -> None:
    """From 0 to 255 workers."""
    with pytest.raises(ValueError, match=f"workers={workers}"):
        lifl.Node("1MiB", workers=workers)


def test_more_memory_than_there_is_is_refused() -> None:
    """A Node that the machine has no memory for is ENOMEM at its start and leaves nothing."""
    with pytest.raises(ShmError, match="available") as caught:
        lifl.Node(available_bytes() + 2**34, workers=1)
    assert caught.value.errno == errno.ENOMEM


@pytest.mark.parametrize(
    "arguments",
    [
        {"expected": 0},
        {"expected": -1},
        {"expected": 2, "timing": "soon"},
        {"expected": 2, "order": "random"},
    ],
    ids=str,
)
def test_senseless_rounds_are_refused(node: lifl.Node, arguments: dict[str, Any]) -> None:
    """An impossible number of updates, timing or order is a ValueError that shows it."""
    with pytest.raises(ValueError, match=r"use|at least 1"):
        node.open_round(TINY_SPEC, **arguments)


def test_number_of_updates_is_whole(node: lifl.Node) -> None:
    """NumPy's integers will do as a number of updates, fractions will not."""
    node.open_round(TINY_SPEC, expected=np.int64(2)).close()
    with pytest.raises((TypeError, ValueError), match=r"integer|whole number"):
        node.open_round(TINY_SPEC, expected=1.5)  # type: ignore[arg-type]


def test_flower_order_has_no_bfloat16(node: lifl.Node) -> None:
    """Flower has no bfloat16, so its order cannot be asked for with it."""
    with pytest.raises(ValueError, match="bfloat16"):
        node.open_round(lifl.TensorSpec((Tensor("h", "bfloat16", (2,)),)), expected=1, order="flower")


def test_defaults_are_a_worker_per_core() -> None:
    """Without arguments a Node may have one worker per core that the process may use; one of them is warm."""
    with lifl.Node("1MiB") as node:
        assert node.workers == len(os.sched_getaffinity(0))
        assert len(node.pids()) == 1
        assert f"{node.workers} workers" in repr(node)
    assert "closed" in repr(node)


def test_flower_order_equals_flower_mean_over_rounds(node: lifl.Node) -> None:
    """Round after round, whichever worker does it, order="flower" gives the same bits."""
    spec, random = (
        lifl.TensorSpec((Tensor("w", "float32", (999,)), Tensor("n", "int64", (3,)))),
        np.random.default_rng(2),
    )
    updates = [random_model(spec, random) for _ in range(5)]
    expected = flower_mean(spec, updates, [3.0, 1.0, 4.0, 1.0, 5.0])
    for _ in range(6):
        with node.open_round(spec, expected=5, order="flower") as round_:
            for update, weight in zip(updates, (3, 1, 4, 1, 5), strict=True):
                round_.submit(update, weight)
            arrays = round_.result(WAIT_S).arrays
        assert all(arrays[name].tobytes() == expected[name].tobytes() for name in spec)
