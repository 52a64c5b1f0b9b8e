"""The L2 clip against the base model: exact to one rounding, Flower's semantics, no copy of a model."""

from __future__ import annotations

import math
import tracemalloc
import warnings
from decimal import Decimal, localcontext
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from flwr.supercore.differential_privacy import compute_clip_model_update
from hypothesis import given, settings
from hypothesis import strategies as st
from offering import offer

import lifl
from lifl.errors import AdmissionError
from lifl.round.clip import CHUNK, FLOATS, Clip
from lifl.tensor import NUMPY_DTYPES, Tensor, TensorSpec

pytestmark = pytest.mark.transports

Model = dict[str, np.ndarray[Any, Any]]
EPSILON = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Half an ulp, relative: what one rounding to nearest may cost."""
TINY = {"float64": 5e-324, "float32": 2.0**-149, "float16": 2.0**-24, "bfloat16": 2.0**-133}
"""The smallest number above 0: an ulp where there are no smaller ones."""


def bits(values: Any, dtype: str) -> np.ndarray[Any, Any]:
    """Numbers as an array of `dtype`; bfloat16 as its bits, cut off."""
    if dtype == "bfloat16":
        return (np.asarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return np.asarray(values, dtype)


def numbers(array: np.ndarray[Any, Any], dtype: str) -> np.ndarray[Any, Any]:
    """The same as float64, which holds all of them exactly."""
    if dtype == "bfloat16":
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float64)


def spec_of(dtypes: dict[str, str], shapes: dict[str, tuple[int, ...]]) -> TensorSpec:
    """A spec of these tensors."""
    return TensorSpec(tuple(Tensor(name, dtype, shapes[name]) for name, dtype in dtypes.items()))


def exact(update: list[float], base: list[float], norm: float) -> tuple[Fraction, list[Fraction]]:
    """Slow and exact to fifty digits: the factor, and the clipped numbers."""
    changes = [Fraction(u) - Fraction(b) for u, b in zip(update, base, strict=True)]
    square = sum((c * c for c in changes), Fraction(0))
    if square <= Fraction(norm) ** 2:
        return Fraction(1), [Fraction(u) for u in update]
    with localcontext() as context:
        context.prec = 60
        distance = Fraction((Decimal(square.numerator) / Decimal(square.denominator)).sqrt())
    factor = Fraction(norm) / distance
    return factor, [Fraction(b) + c * factor for b, c in zip(base, changes, strict=True)]


VALUES = st.floats(-60000, 60000, width=16).map(lambda x: 0.0 if 0 < abs(x) < 2**-14 else x)
PAIRS = st.lists(st.tuples(st.sampled_from(FLOATS), VALUES, VALUES), min_size=1, max_size=12)


@settings(deadline=None, max_examples=300)
@given(PAIRS, st.floats(2.0**-20, 2.0**20))
def test_clip_is_exact_to_one_rounding(pairs: list[tuple[str, float, float]], norm: float) -> None:
    """Against a slow exact reference, for every float dtype: half an ulp, and the errors of float64 beside it."""
    dtypes = {f"t{i}": dtype for i, (dtype, _, _) in enumerate(pairs)}
    base = {f"t{i}": bits([b], dtype) for i, (dtype, _, b) in enumerate(pairs)}
    update = {f"t{i}": bits([u], dtype) for i, (dtype, u, _) in enumerate(pairs)}
    us = [float(numbers(update[name], dtype)[0]) for name, dtype in dtypes.items()]
    bs = [float(numbers(base[name], dtype)[0]) for name, dtype in dtypes.items()]
    before = {name: array.copy() for name, array in update.items()}
    got = Clip(spec_of(dtypes, dict.fromkeys(dtypes, (1,))), base, norm).apply(update)
    factor, wanted = exact(us, bs, norm)
    # The distance: a difference, a square, sums of at most 12 of them each, a root, a division: under 32 roundings.
    assert abs(Fraction(got) - factor) <= 32 * Fraction(EPSILON["float64"])
    if got == 1.0:
        assert all(update[name].tobytes() == before[name].tobytes() for name in dtypes)
    for (name, dtype), u, b, value in zip(dtypes.items(), us, bs, wanted, strict=True):
        result = Fraction(float(numbers(update[name], dtype)[0]))
        once = 1.01 if dtype == "bfloat16" else 1.0  # by way of float32: a little more than one rounding
        allowed = Fraction(EPSILON[dtype] * once) * abs(value) + Fraction(TINY[dtype])
        allowed += Fraction(40 * EPSILON["float64"]) * (abs(Fraction(u)) + abs(Fraction(b)))
        assert abs(result - value) <= allowed


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(["float32", "float64"]), st.integers(1, 200), st.floats(-6, 6), st.integers(0, 2**32 - 1))
def test_clip_is_flowers(dtype: str, count: int, magnitude: float, seed: int) -> None:
    """Flower's own function gives the same, up to the roundings that it makes in the arrays' dtype."""
    rng = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {"a": (count,), "b": (2, 3), "c": (1,)}
    base = {name: np.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}
    update = {name: np.asarray(b + 10**magnitude * rng.normal(size=b.shape), dtype) for name, b in base.items()}
    norm = 10 ** float(rng.uniform(-2, 2))
    theirs = [array.copy() for array in update.values()]
    compute_clip_model_update(theirs, [array.copy() for array in base.values()], norm)
    change = {name: abs(update[name].astype(np.float64) - base[name]) for name in shapes}
    factor = Clip(spec_of(dict.fromkeys(shapes, dtype), shapes), base, norm).apply(update)
    # Flower rounds the difference, each of its n squares and their sum (at most n + 8 in a norm), the factor, its
    # product and the sum with the base; lifl once at the end, and 40 times in float64.
    epsilon, n = EPSILON[dtype], count + 7
    for name, array in zip(shapes, theirs, strict=True):
        allowed = 1.1 * epsilon * ((n + 12) * change[name] * factor + 2 * abs(array.astype(np.float64)))
        allowed = allowed + 40 * EPSILON["float64"] * (change[name] + abs(base[name].astype(np.float64)))
        assert (abs(update[name].astype(np.float64) - array) <= allowed).all()


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(FLOATS), st.integers(1, 3 * CHUNK), st.floats(0.01, 100), st.integers(0, 2**32 - 1))
def test_clipped_update_is_near_enough(dtype: str, count: int, norm: float, seed: int) -> None:
    """However many chunks it has: not farther than the norm but for the roundings, on the line, the same bits again."""
    rng = np.random.default_rng(seed)
    spec = spec_of({"x": dtype}, {"x": (count,)})
    base = {"x": bits(rng.normal(size=count), dtype)}
    update = {"x": bits(rng.normal(size=count) * 10, dtype)}
    again = {"x": update["x"].copy()}
    clip = Clip(spec, base, norm)
    factor = clip.apply(update)
    assert clip.apply(again) == factor
    assert update["x"].tobytes() == again["x"].tobytes()
    far = numbers(update["x"], dtype) - numbers(base["x"], dtype)
    roundings = 1.01 * EPSILON[dtype] * abs(numbers(update["x"], dtype)) + TINY[dtype]
    slack = math.sqrt(math.fsum((roundings * roundings).tolist()))
    assert math.sqrt(math.fsum((far * far).tolist())) <= norm * (1 + 1e-12) + slack


def test_update_that_is_near_enough_stays_bit_by_bit() -> None:
    """Also one that is the base model itself, by which Flower's function divides by zero."""
    base = {"x": np.array([-0.0, 1, 2], np.float32)}
    clip = Clip(TensorSpec.from_arrays(base), base, 5.0)
    for values in ([0.0, -0.0, 1e-45], [-0.0, 1, 2], [3, 1, 6]):
        update = {"x": np.array(values, np.float32)}
        before = update["x"].tobytes()
        assert clip.apply(update) == 1.0
        assert update["x"].tobytes() == before
    with pytest.raises(ZeroDivisionError):
        compute_clip_model_update([base["x"].copy()], [base["x"]], 5.0)


def test_arrays_without_dimensions_are_clipped_too() -> None:
    """Flower's function counts a 0-d array in the norm and then does not scale it: NumPy gives it a copy."""
    base = {"w": np.zeros(3), "scale": np.array(0.0)}
    update = {"w": np.array([0.0, 0, 30]), "scale": np.array(40.0)}
    theirs = [array.copy() for array in update.values()]
    assert Clip(TensorSpec.from_arrays(base), base, 5.0).apply(update) == 0.1
    assert (update["w"].tolist(), update["scale"]) == ([0, 0, 3.0], 4.0)
    compute_clip_model_update(theirs, list(base.values()), 5.0)
    assert (theirs[0].tolist(), theirs[1]) == ([0, 0, 3.0], 40.0)


def test_integers_and_booleans_are_neither_counted_nor_changed() -> None:
    """Counters such as num_batches_tracked do not use up the norm; Flower's function cannot scale them at all."""
    base = {"w": np.zeros(4), "steps": np.array(3), "small": np.array([1], np.int8), "mask": np.array([True, False])}
    update = {
        "w": np.full(4, 50.0),
        "steps": np.array(10**9),
        "small": np.array([-9], np.int8),
        "mask": np.array([False, True]),
    }
    theirs = [array.copy() for array in update.values()]
    assert Clip(TensorSpec.from_arrays(base), base, 10.0).apply(update) == 0.1
    assert update["w"].tolist() == [5.0] * 4
    assert (update["steps"], update["small"].tolist(), update["mask"].tolist()) == (10**9, [-9], [False, True])
    del theirs[3], base["mask"]  # NumPy does not subtract booleans either
    with pytest.raises(TypeError):
        compute_clip_model_update(theirs, list(base.values()), 10.0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_squares_that_overflow_the_dtype_are_clipped(dtype: str) -> None:
    """The largest finite numbers of the smaller dtypes have a distance in float64, and end near the base."""
    largest = {"float32": float(np.finfo(np.float32).max), "float16": 65504.0, "bfloat16": 3.3895313892515355e38}[dtype]
    base = {"x": bits([-largest, largest, 0.0], dtype)}
    update = {"x": bits([largest, -largest, largest], dtype)}
    assert numbers(update["x"], dtype)[0] == largest
    factor = Clip(spec_of({"x": dtype}, {"x": (3,)}), base, 1.0).apply(update)
    assert factor == pytest.approx(1 / (3 * largest), rel=1e-12)
    assert np.allclose(numbers(update["x"], dtype), numbers(base["x"], dtype) + np.array([2, -2, 1]) / 3, rtol=1e-2)


@pytest.mark.parametrize(
    "update", [[1e200, 0.0], [1.7e308, 1.7e308], [-1.7e308, 0.0], [1.3e154, 1.3e154]], ids="{0[0]:g},{0[1]:g}".format
)
def test_distance_beyond_float64_has_no_factor(update: list[float]) -> None:
    """It has no factor, nothing is written, and NumPy warns of nothing."""
    base = {"x": np.array([1.7e308 if update[0] < 0 else 0.0, 0.0])}
    sent = {"x": np.array(update)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Clip(TensorSpec.from_arrays(base), base, 1.0).apply(sent) == 0.0
    assert sent["x"].tolist() == update


def test_largest_distances_of_many_chunks_have_no_factor() -> None:
    """Nor if the chunks' squares are finite one by one, and not together."""
    base = {"x": np.zeros(2 * CHUNK)}
    sent = {"x": np.zeros(2 * CHUNK)}
    sent["x"][::CHUNK] = 1.2e154
    assert Clip(TensorSpec.from_arrays(base), base, 1.0).apply(sent) == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": np.zeros(4, np.float32)}, "shape"),
        ({"w": np.zeros(3)}, "dtype float64"),
        ({"more": np.zeros(1)}, "not in the model: 'more'"),
        ({"w": np.array([0, np.nan, 0], np.float32)}, "'w' holds a NaN or Inf"),
        ({"h": np.array([0x7F80], np.uint16)}, "'h' holds a NaN or Inf"),
    ],
)
def test_base_of_another_form_is_an_error(change: Any, message: str) -> None:
    """The base is the server's own: what is wrong with it is a ValueError, and no refusal."""
    spec = spec_of({"w": "float32", "h": "bfloat16"}, {"w": (3,), "h": (1,)})
    good = {"w": np.zeros(3, np.float32), "h": np.zeros(1, np.uint16)}
    Clip(spec, good, 1.0)
    with pytest.raises(ValueError, match=message) as caught:
        Clip(spec, {**good, **change}, 1.0)
    assert not isinstance(caught.value, AdmissionError)


def test_clip_takes_no_memory_of_a_models_size() -> None:
    """Clipping 32 MiB allocates less than 2 MiB at any time."""
    base = {"x": np.zeros(2**23, np.float32)}
    update = {"x": np.ones(2**23, np.float32)}
    clip = Clip(TensorSpec.from_arrays(base), base, 1.0)
    tracemalloc.start()
    try:
        factor = clip.apply(update)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert factor == pytest.approx(2**-11.5)
    assert peak < 2**21


# ---------------------------------------------------------------- in a round

SPEC = TensorSpec.from_arrays({"w": np.zeros((2, 3), np.float32), "n": np.array(0)})
WAIT_S = 60.0


def model(value: float, count: int = 0) -> Model:
    """A model whose floats are all `value`."""
    return {"w": np.full((2, 3), value, np.float32), "n": np.array(count)}


@pytest.mark.parametrize("how", ["submit", "strided", "loan"])
@pytest.mark.parametrize("order", ["any", "flower"])
def test_round_clips_at_each_entrance(node: lifl.Node, how: str, order: Any) -> None:
    """A hundredfold update counts with the allowed distance, what was sent stays, and the report says who."""
    norm = math.sqrt(6.0)  # 1.0 in each of six numbers
    limits = lifl.Limits(clipping_norm=norm)
    with node.open_round(SPEC, 3, order=order, limits=limits, base=model(1)) as round_:
        round_.submit(model(1.5, 4), client_id="a")
        sent = model(101, 7)
        if how == "strided":
            sent["w"] = np.asfortranarray(sent["w"])
        offer(round_, how, sent, 2, "evil")
        round_.submit(model(0.5, 2), client_id="b")
        result = round_.result(WAIT_S)
    assert sent["w"].min() == sent["w"].max() == 101
    assert np.allclose(result.arrays["w"], (1.5 + 2 * 2 + 0.5) / 4, rtol=1e-6)
    assert result.arrays["n"] == pytest.approx((4 + 14 + 2) / 4)
    clipped = {c.client_id: c.clipped for c in result.report.accepted}
    assert clipped == {"a": 1.0, "evil": pytest.approx(0.01, rel=1e-6), "b": 1.0}
    assert "; clipped: evil (to 0.01)" in str(result.report)
    assert result.report.to_dict()["accepted"][1]["clipped"] == clipped["evil"]


@pytest.mark.parametrize("how", ["submit", "loan"])
def test_round_refuses_what_cannot_be_clipped(node: lifl.Node, how: str) -> None:
    """A distance beyond float64 is refused by name; the room is free, and the round goes on."""
    base = {"x": np.zeros(2)}
    limits = lifl.Limits(clipping_norm=1.0)
    with node.open_round(TensorSpec.from_arrays(base), 1, limits=limits, base=base) as round_:
        free = node.arena.free_bytes
        with pytest.raises(AdmissionError) as caught:
            offer(round_, how, {"x": np.array([1e200, 0])}, 1, "evil")
        assert (caught.value.client_id, caught.value.rule) == ("evil", "norm")
        assert caught.value.value == math.inf
        assert node.arena.free_bytes == free
        round_.submit({"x": np.array([3.0, 4.0])}, client_id="good")
        result = round_.result(WAIT_S)
    assert [(r.client_id, r.rule) for r in result.rejected] == [("evil", "norm")]
    assert result.arrays["x"].tolist() == pytest.approx([0.6, 0.8])


def test_torch_base(node: lifl.Node) -> None:
    """The base may be torch tensors, bfloat16 too."""
    torch = pytest.importorskip("torch")
    base = {"h": torch.ones(4, dtype=torch.bfloat16)}
    limits = lifl.Limits(clipping_norm=1.0)
    with node.open_round(TensorSpec.from_arrays(base), 1, limits=limits, base=base) as round_:
        round_.submit({"h": torch.full((4,), 3.0, dtype=torch.bfloat16)})
        assert torch.equal(round_.result(WAIT_S).tensors()["h"], torch.full((4,), 1.5, dtype=torch.bfloat16))


def test_norm_and_base_go_together(node: lifl.Node) -> None:
    """A norm without a base, or a base without a norm, is an error before anything is taken."""
    free = node.arena.free_bytes
    with pytest.raises(ValueError, match="there is no base, the model"):
        node.open_round(SPEC, 1, limits=lifl.Limits(clipping_norm=1.0))
    with pytest.raises(ValueError, match="there is no clipping_norm"):
        node.open_round(SPEC, 1, base=model(0))
    with pytest.raises(ValueError, match="the base model has another form"):
        node.open_round(SPEC, 1, limits=lifl.Limits(clipping_norm=1.0), base={"w": np.zeros(2)})
    assert node.arena.free_bytes == free
    assert not node.has_rounds


def test_dtypes_of_the_table_are_all_floats() -> None:
    """The dtypes that are clipped are those that NumPy and torch call floating-point."""
    kinds = {name for name, dtype in NUMPY_DTYPES.items() if dtype.kind == "f"} | {"bfloat16"}
    assert kinds == set(FLOATS)
