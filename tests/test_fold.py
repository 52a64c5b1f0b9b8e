"""The fold against its slow reference, the reference against hand-made figures, Flower's mean against Flower."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lifl.fold import (
    MANTISSA_BITS,
    SMALLEST,
    Sum,
    _nearest,
    finish,
    finish_at,
    flower_factors,
    flower_mean,
    fold,
    init,
    mean_reference,
    merge,
    tolerance,
)
from lifl.shm import kernels
from lifl.tensor import DTYPES, Array, Layout, Segment, Tensor, TensorSpec

Model = Mapping[str, Array]
INTEGERS = ("int8", "int16", "int32", "int64", "uint8")
SHAPES = st.sampled_from([(), (0,), (1,), (3,), (2, 5), (2, 0, 3), (4, 1, 2)])
SPECS = st.lists(st.tuples(st.sampled_from(DTYPES), SHAPES), min_size=1, max_size=5).map(
    lambda rows: TensorSpec(tuple(Tensor(f"t{i}", dtype, shape) for i, (dtype, shape) in enumerate(rows)))
)
COUNTS = st.integers(1, 100_000).map(float)
WEIGHTS = st.one_of(COUNTS, st.floats(0.01, 1e6), st.sampled_from([1.0, 0.1, 1 / 3, 2.0**40]))


def spec_of(spec_dtypes: Sequence[str], count: int) -> TensorSpec:
    """A spec with one tensor of `count` elements for each dtype, named after it."""
    return TensorSpec(tuple(Tensor(d, d, (count,)) for d in spec_dtypes))


def random_model(spec: TensorSpec, random: np.random.Generator) -> dict[str, Array]:
    """Every bit pattern that is a finite number, subnormal ones too; integers over their whole range."""
    model = {}
    for name, tensor in spec.items():
        bits = random.integers(0, 256, (tensor.size, 8), np.uint8)
        if tensor.dtype == "bool":
            array = bits[:, 0] % 2 == 0
        elif tensor.dtype in INTEGERS:
            array = bits.view(np.int64)[:, 0].astype(tensor.dtype)
        elif tensor.dtype == "bfloat16":
            array = bits.view(np.uint16)[:, 0].copy()
            array[(array & 0x7F80) == 0x7F80] = 0
        else:
            array = bits.view(tensor.dtype)[:, 0].copy()
            array[~np.isfinite(array)] = 0
            if tensor.dtype == "float64":
                # Weighted sums of larger ones leave float64's range, of smaller ones its precision.
                array[(np.abs(array) > 1e300) | (np.abs(array) < 1e-290)] = 0
            if random.integers(2):
                array = random.standard_normal(tensor.size).astype(tensor.dtype)
        model[name] = np.asarray(array).reshape(tensor.shape)
    return model


def as_floats(array: Array) -> Array:
    """The numbers in an array, bfloat16 ones from their bits."""
    if array.dtype == np.uint16:
        return (array.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return array.astype(np.float64)


def exact_mean(column: Sequence[Any], weights: Sequence[float]) -> Fraction:
    """The weighted mean of one element."""
    exact = [Fraction(w) for w in weights]
    return sum((w * Fraction(x) for w, x in zip(exact, column, strict=True)), Fraction()) / sum(exact)


def check(spec: TensorSpec, mean: Model, updates: Sequence[Model], weights: Sequence[float]) -> None:
    """The mean is the reference within the stated tolerance; integers as its docstring says exactly."""
    reference, bound = mean_reference(updates, weights), tolerance(updates, weights, spec)
    assert list(mean) == list(spec)
    for name, tensor in spec.items():
        assert mean[name].shape == tensor.shape
        assert mean[name].dtype == updates[0][name].dtype
        if tensor.dtype not in INTEGERS:
            off = np.abs(as_floats(mean[name]) - as_floats(reference[name])) > bound[name]
            assert not off.any(), (tensor, mean[name][off], reference[name][off])
            continue
        for at in map(tuple, np.argwhere(mean[name] != reference[name])):
            exact = exact_mean([int(u[name][at]) for u in updates], weights)
            size = float(exact_mean([abs(int(u[name][at])) for u in updates], weights))
            u = 2.0**-100 if tensor.dtype == "int64" else 2.0**-53
            assert abs(int(mean[name][at]) - int(reference[name][at])) == 1, (tensor, exact, mean[name][at])
            assert abs(abs(exact - round(exact)) - Fraction(1, 2)) <= 4 * len(updates) * u * size


# ---------------------------------------------------------------- the reference, by hand


@pytest.mark.parametrize(
    ("dtype", "values", "weights", "mean"),
    [
        ("float64", [1.0, 2.0, 3.0], [1, 1, 2], 2.25),
        ("float64", [1.0, -890.0], [1.0, 1.0], -444.5),
        ("float64", [0.0, 1.0], [2, 1], 1 / 3),
        ("float32", [1.0, 1.0 + 2**-23], [1, 1], 1.0),
        ("float32", [1.0 + 2**-23, 1.0 + 2**-22], [1, 1], 1.0 + 2**-22),
        ("float32", [3.4028234663852886e38, 3.4028234663852886e38], [1, 5], 3.4028234663852886e38),
        ("float16", [2048, 2050], [1, 1], 2048),
        ("float16", [2050, 2052], [1, 1], 2052),
        ("float16", [2048, 2050], [0.9999, 1], 2050),
        ("float16", [2**-24, 0], [1, 1], 0.0),
        ("float16", [3 * 2**-24, 0], [1, 1], 2 * 2**-24),
        ("int8", [0, 1], [1, 1], 0),
        ("int8", [1, 2], [1, 1], 2),
        ("int8", [-1, -2], [1, 1], -2),
        ("int8", [-128, 127], [1, 3], 63),
        ("uint8", [255, 255, 254], [1, 1, 1], 255),
        ("int64", [2**62, 2**62 + 1], [1, 3], 2**62 + 1),
        ("int64", [2**63 - 1, 2**63 - 1], [0.1, 0.2], 2**63 - 1),
        ("int64", [2**63 - 1, -(2**63)], [1, 1], 0),
        ("bool", [True, False], [1, 1], False),
        ("bool", [True, False], [2, 1], True),
    ],
)
def test_reference_is_right(dtype: str, values: list[Any], weights: list[float], mean: Any) -> None:
    """The oracle's own results are those that one can work out by hand."""
    got = mean_reference([{"x": np.array([v], dtype)} for v in values], weights)["x"]
    assert got.dtype == dtype
    assert got.tolist() == [mean]


@pytest.mark.parametrize(
    ("bits", "weights", "mean"),
    [
        ([0x3F80, 0x3F80], [1, 2], 0x3F80),
        ([0x3F80, 0x4000], [1, 1], 0x3FC0),
        ([0x3F80, 0x3F81], [1, 1], 0x3F80),
        ([0x3F81, 0x3F82], [1, 1], 0x3F82),
        ([0xBF81, 0xBF82], [1, 1], 0xBF82),
        ([0x0001, 0x0000], [1, 1], 0x0000),
        ([0x0003, 0x0000], [1, 1], 0x0002),
        ([0x7F7F, 0x7F7F], [1, 1], 0x7F7F),
    ],
)
def test_reference_is_right_for_bfloat16(bits: list[int], weights: list[float], mean: int) -> None:
    """So are those in bfloat16, which comes and goes as its bits: 1.0 is 0x3F80."""
    got = mean_reference([{"x": np.array(b, np.uint16)} for b in bits], weights)["x"]
    assert (got.dtype, got.shape, int(got)) == (np.uint16, (), mean)


@given(st.floats(allow_nan=False, allow_infinity=False, width=64))
def test_reference_rounds_as_numpy_does(value: float) -> None:
    """The oracle's one rounding is NumPy's, for every dtype that NumPy has."""
    for dtype, largest in (("float64", 1.8e308), ("float32", 3.4e38), ("float16", 65504.0)):
        value = float(np.clip(value, -largest, largest))
        assert np.array(_nearest(Fraction(value), dtype), dtype) == np.array(value).astype(dtype)


def test_reference_keeps_shapes_and_dtypes() -> None:
    """0-d and empty arrays stay what they are."""
    update = {"s": np.array(3, np.int64), "e": np.zeros((0, 4), np.float16), "m": np.ones((2, 3), np.float32)}
    mean = mean_reference([update, update], [1, 2])
    assert {k: (v.shape, v.dtype) for k, v in mean.items()} == {k: (v.shape, v.dtype) for k, v in update.items()}


# ---------------------------------------------------------------- the fold


@settings(deadline=None, max_examples=200)
@given(st.data(), SPECS, st.integers(0, 2**32), st.integers(1, 9))
def test_any_tree_and_order_gives_the_reference(data: Any, spec: TensorSpec, seed: int, n: int) -> None:
    """Whatever the dtypes, the shapes, the order and the split into partial sums: it is the mean."""
    has_int64 = any(t.dtype == "int64" for t in spec.values())
    weights = data.draw(st.lists(COUNTS if has_int64 else WEIGHTS, min_size=n, max_size=n))
    leaves = data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n))
    order = data.draw(st.permutations(range(n)))
    random = np.random.default_rng(seed)
    updates = [random_model(spec, random) for _ in range(n)]
    sums: dict[int, Sum] = {}
    batch: dict[int, list[int]] = {}
    for position, i in enumerate(order):
        leaf = leaves[i]
        batch.setdefault(leaf, []).append(i)
        if (seed >> position) % 2 or leaf not in leaves[position + 1 :]:
            mine = batch.pop(leaf)
            state = sums.get(leaf, init(spec))
            sums[leaf] = fold(state, [updates[k] for k in mine], [weights[k] for k in mine])
    for leaf, mine in batch.items():
        sums[leaf] = fold(sums.get(leaf, init(spec)), [updates[k] for k in mine], [weights[k] for k in mine])
    assert sum(s.num_updates for s in sums.values()) == n
    check(spec, merge(*sums.values()), updates, weights)


@pytest.mark.parametrize("count", [1, 7, 2047, 2048, 2049, 4099])
def test_every_length_and_batch_size(count: int) -> None:
    """Vector tails and chunk ends are right for every dtype, one to nine updates in one pass."""
    spec, random = spec_of(DTYPES, count), np.random.default_rng(count)
    n = 1 + count % 9
    updates, weights = [random_model(spec, random) for _ in range(n)], [float(w) for w in range(1, n + 1)]
    check(spec, finish(fold(init(spec), updates, weights)), updates, weights)


@given(st.lists(st.tuples(st.integers(-(2**63), 2**63 - 1025), COUNTS), min_size=1, max_size=8))
def test_int64_is_exact_beyond_float64(rows: list[tuple[int, float]]) -> None:
    """A counter above 2**53 keeps its last digit when the weights are counts of examples."""
    updates, weights = [{"n": np.array(x)} for x, _ in rows], [w for _, w in rows]
    spec = TensorSpec.from_arrays(updates[0])
    mean = finish(fold(init(spec), updates, weights))["n"]
    assert int(mean) == round(exact_mean([x for x, _ in rows], weights))


@pytest.mark.parametrize("value", [2**63 - 512, 2**63 - 2])
def test_int64_is_exact_up_to_its_largest(value: int) -> None:
    """Also the last few numbers before the largest int64 are their own mean."""
    updates = [{"n": np.array(value)}]
    assert int(finish(fold(init(TensorSpec.from_arrays(updates[0])), updates, [1.0]))["n"]) == value


def test_int64_is_within_its_tolerance_for_weights_that_are_no_counts() -> None:
    """Weights whose sum is no float64 do not cost a large counter its last digits."""
    updates, weights = [{"n": np.array(2**62)}] * 3, [0.1, 0.2, 0.3]
    spec = TensorSpec.from_arrays(updates[0])
    assert int(finish(fold(init(spec), updates, weights))["n"]) == 2**62


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16", "int32"])
def test_overflow_of_a_float64_sum_is_told(dtype: str) -> None:
    """If the weighted sum leaves float64's range, finish says that a mean is not finite."""
    spec = spec_of([dtype], 3)
    updates = [{dtype: np.array([100, 0, 1]).astype(np.uint16 if dtype == "bfloat16" else dtype)}] * 2
    if dtype == "bfloat16":
        updates = [{dtype: np.array([0x42C8, 0, 0x3F80], np.uint16)}] * 2
    state = fold(init(spec), updates, [1.7e308, 1.7e308])
    mean = np.zeros(spec.layout.mean_bytes, np.uint8)
    assert not finish_at(spec.layout, kernels.address_of(mean), [kernels.address_of(state.buffer)], (1.0, 0.0))


def rounded_by_the_kernel(dtype: str, values: Array) -> Array:
    """Values as finish stores them: a sum of weight 1."""
    count = len(values)
    layout = Layout((Segment(dtype, count, 0, 0, 0),), 2 * count, 8 * count, 2 * count)
    mean = np.zeros(count, np.uint16)
    assert finish_at(layout, kernels.address_of(mean), [kernels.address_of(values)], (1.0, 0.0))
    return mean


@pytest.mark.parametrize(("dtype", "infinity"), [("float16", 0x7C00), ("bfloat16", 0x7F80)])
def test_rounding_to_16_bits_is_to_nearest_even(dtype: str, infinity: int) -> None:
    """Every number of the format, every midpoint and the doubles beside them round as IEEE 754 says."""
    bits = np.arange(infinity + 1, dtype=np.uint16)
    if dtype == "float16":
        numbers = bits.view(np.float16).astype(np.float64)
        numbers[-1] = 65536.0  # what would come after the largest: halfway there begins infinity
    else:
        numbers = (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        numbers[-1] = 2.0**128
    middles = (numbers[:-1] + numbers[1:]) / 2
    even = np.where(bits[:-1] % 2 == 0, bits[:-1], bits[1:])
    for sign, mark in ((1.0, 0), (-1.0, 0x8000)):
        for values, expected in (
            (numbers[:-1], bits[:-1]),
            (middles, even),
            (np.nextafter(middles, 0), bits[:-1]),
            (np.nextafter(middles, np.inf), bits[1:]),
        ):
            got = rounded_by_the_kernel(dtype, sign * values)
            assert np.array_equal(got & 0x7FFF, expected)
            assert np.array_equal(got & 0x8000, np.where(values == 0, got & 0x8000, mark))


def test_fold_is_pure() -> None:
    """Folding leaves the state and the updates as they were, so a partial sum can be used twice."""
    updates = [{"w": np.arange(5, dtype=np.float32) + i} for i in range(3)]
    spec = TensorSpec.from_arrays(updates[0])
    first = fold(init(spec), updates[:1], [1.0])
    assert first.buffer is not None
    kept = first.buffer.copy()
    a, b = fold(first, updates[1:2], [1.0]), fold(first, updates[2:], [1.0])
    assert np.array_equal(first.buffer, kept)
    assert finish(a)["w"].tolist() == [0.5, 1.5, 2.5, 3.5, 4.5]
    assert finish(b)["w"].tolist() == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert updates[0]["w"].tolist() == [0, 1, 2, 3, 4]
    assert (a.weight, a.num_updates) == ((2.0, 0.0), 2)


def test_leaf_without_updates_adds_nothing() -> None:
    """An empty partial sum among others changes nothing."""
    updates = [{"w": np.ones(4)}]
    spec = TensorSpec.from_arrays(updates[0])
    full = fold(init(spec), updates, [2.0])
    assert merge(init(spec), full, init(spec))["w"].tolist() == [1.0] * 4


@pytest.mark.parametrize(
    ("updates", "weights"),
    [
        ([], []),
        ([{"w": np.zeros(2)}], [1.0, 2.0]),
        ([{"w": np.zeros(3)}], [1.0]),
        ([{"w": np.zeros(2, np.float32)}], [1.0]),
        ([{"v": np.zeros(2)}], [1.0]),
    ],
    ids=["nothing", "two weights", "shape", "dtype", "key"],
)
def test_fold_refuses_what_does_not_match(updates: list[Model], weights: list[float]) -> None:
    """Another shape, dtype, key or number of weights is a ValueError."""
    with pytest.raises(ValueError, match=r"weights|match"):
        fold(init(TensorSpec.from_arrays({"w": np.zeros(2)})), updates, weights)


def test_tolerance_is_tight() -> None:
    """The bound is about one unit in the last place: a result that is two units off is caught."""
    random = np.random.default_rng(5)
    for dtype in MANTISSA_BITS:
        if dtype == "bfloat16":
            continue
        updates = [{"w": random.uniform(1.0, 1.9, 100).astype(dtype)} for _ in range(8)]
        bound = tolerance(updates, [3.0] * 8, TensorSpec.from_arrays(updates[0]))["w"]
        ulp = 2.0 ** (1 - MANTISSA_BITS[dtype])
        assert (bound < (40 if dtype == "float64" else 2) * ulp).all()
        assert (bound >= SMALLEST[dtype]).all()
    counters = [{"n": np.array([5, 0])}] * 2
    assert tolerance(counters, [1.0, 1.0], TensorSpec.from_arrays(counters[0]))["n"].max() <= 1


# ---------------------------------------------------------------- Flower's mean


def flowers_own_mean(updates: Sequence[Model], weights: Sequence[float]) -> dict[str, Array]:
    """The mean as Flower computes it from the replies' records."""
    from flwr.app import Array as FlowerArray
    from flwr.app import ArrayRecord, MetricRecord, RecordDict
    from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

    records = [
        RecordDict(
            {
                "arrays": ArrayRecord({name: FlowerArray(np.asarray(array)) for name, array in update.items()}),
                "metrics": MetricRecord({"num-examples": weight}),
            }
        )
        for update, weight in zip(updates, weights, strict=True)
    ]
    mean = aggregate_arrayrecords(records, "num-examples")
    return {name: array.numpy() for name, array in mean.items()}


FLOWER_SPECS = SPECS.filter(lambda spec: all(t.dtype != "bfloat16" for t in spec.values()))


@settings(deadline=None)
@given(FLOWER_SPECS, st.integers(0, 2**32), st.lists(st.one_of(st.integers(1, 10**6), WEIGHTS), min_size=1, max_size=7))
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_flower_mean_is_flowers_bit_by_bit(spec: TensorSpec, seed: int, weights: list[float]) -> None:
    """`flower_mean` has the dtypes, shapes and bits of Flower's aggregate_arrayrecords, 0-d arrays too."""
    random = np.random.default_rng(seed)
    updates = [random_model(spec, random) for _ in weights]
    ours, theirs = flower_mean(spec, updates, weights), flowers_own_mean(updates, weights)
    assert list(ours) == list(theirs)
    for name in spec:
        assert ours[name].dtype == theirs[name].dtype
        assert ours[name].shape == theirs[name].shape
        assert ours[name].tobytes() == theirs[name].tobytes(), spec[name]


@pytest.mark.parametrize("count", [2047, 2048, 2049, 5000])
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_flower_mean_of_long_arrays(count: int) -> None:
    """The same beyond the kernels' chunks."""
    spec, random = spec_of([d for d in DTYPES if d != "bfloat16"], count), np.random.default_rng(count)
    updates, weights = [random_model(spec, random) for _ in range(5)], [10, 7, 1, 300, 2]
    ours, theirs = flower_mean(spec, updates, weights), flowers_own_mean(updates, weights)
    assert all(ours[name].tobytes() == theirs[name].tobytes() for name in spec)


def test_factors_are_flowers() -> None:
    """Each share is Python's quotient by Python's sum."""
    assert flower_factors([0.1, 0.2, 0.3]) == [w / (0.1 + 0.2 + 0.3) for w in (0.1, 0.2, 0.3)]
