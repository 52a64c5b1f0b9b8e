"""Updates that a round refuses: by which rule, with what message, and that the round goes on."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from offering import offer

import lifl
from lifl.errors import AdmissionError, RoundError
from lifl.tensor import Tensor

pytestmark = pytest.mark.transports

WAIT_S = 60.0
SPEC = lifl.TensorSpec.from_arrays({"w": np.zeros((2, 3), np.float32), "steps": np.array(0)})
FLOATS = ("float16", "bfloat16", "float32", "float64")


def update(value: float = 1.0) -> dict[str, Any]:
    """An update of SPEC whose every number is `value`."""
    return {"w": np.full((2, 3), value, np.float32), "steps": np.array(int(value))}


def means(result: lifl.RoundResult) -> set[float]:
    """The different numbers in a result."""
    return {float(x) for array in result.arrays.values() for x in array.flat}


@pytest.mark.parametrize(
    ("change", "weight", "rule"),
    [
        ({"w": None}, 1, "dtype"),
        ({"w": np.zeros((2, 3))}, 1, "dtype"),
        ({"steps": np.array(0.0)}, 1, "dtype"),
        ({"w": np.zeros((3, 2), np.float32)}, 1, "shape"),
        ({"w": np.zeros((1,), np.float32)}, 1, "shape"),
        ({"w": np.array(0, np.float32)}, 1, "shape"),
        ({"more": np.zeros(1)}, 1, "keys"),
        *(({}, weight, "weight") for weight in (0, -1, math.nan, math.inf, -math.inf, "1", True, None, 10**400)),
        ({"w": np.array([[0, 0, 0], [0, np.nan, 0]], np.float32)}, 1, "values"),
        ({"w": np.array([[0, 0, 0], [0, 0, -np.inf]], np.float32)}, 1, "values"),
    ],
)
def test_bad_update_is_refused_and_the_round_goes_on(node: lifl.Node, change: Any, weight: Any, rule: str) -> None:
    """A refusal names client, rule and value, takes no memory, does not count, and the client may try again."""
    with node.open_round(SPEC, expected=2) as round_:
        round_.submit(update(1), client_id="good")
        free = node.arena.free_bytes
        with pytest.raises(AdmissionError, match="client bad") as caught:
            round_.submit(update(5) | change, weight=weight, client_id="bad")
        assert (caught.value.client_id, caught.value.rule) == ("bad", rule)
        assert node.arena.free_bytes >= free
        assert [(r.client_id, r.rule, r.reason) for r in round_.report().rejected] == [
            ("bad", rule, caught.value.reason)
        ]
        round_.submit(update(3), client_id="bad")
        result = round_.result(WAIT_S)
    assert means(result) == {2.0}
    assert [r.rule for r in result.rejected] == [rule]


def test_missing_key_is_refused(node: lifl.Node) -> None:
    """An update without one of the model's arrays is refused by its name."""
    with node.open_round(SPEC, expected=1) as round_, pytest.raises(AdmissionError, match="missing 'steps'"):
        round_.submit({"w": np.zeros((2, 3), np.float32)}, client_id="a")


def with_bad_bits(dtype: str, count: int, at: int, kind: str) -> tuple[np.ndarray, float]:
    """An array of ones (bfloat16 as bits) with one NaN or Inf, and that value."""
    value = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}[kind]
    if dtype == "bfloat16":
        array = np.full(count, 0x3F80, np.uint16)
        array[at] = {"nan": 0x7F81, "inf": 0x7F80, "-inf": 0xFF80}[kind]
    else:
        array = np.ones(count, dtype)
        array[at] = value
    return array, value


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(FLOATS), st.integers(1, 40_000), st.floats(0, 1), st.sampled_from(["nan", "inf", "-inf"]), st.data()
)
def test_nan_and_inf_are_found_anywhere(
    warm_node: lifl.Node, dtype: str, count: int, where: float, kind: str, data: st.DataObject
) -> None:
    """A NaN or Inf at any index of any float dtype is refused with its place, copied, strided or lent."""
    at = min(int(where * count), count - 1)
    array, value = with_bad_bits(dtype, count, at, kind)
    spec = lifl.TensorSpec((Tensor("first", dtype, (3,)), Tensor("x", dtype, (count,))))
    good = np.full(3, 0x3F80, np.uint16) if dtype == "bfloat16" else np.ones(3, dtype)
    how = data.draw(st.sampled_from(["copied", "strided", "lent"]))
    free = warm_node.arena.free_bytes
    with warm_node.open_round(spec, expected=1) as round_:
        if how == "lent":
            loan = round_.loan("c")
            loan.arrays["first"][...], loan.arrays["x"][...] = good, array
            with pytest.raises(AdmissionError) as caught:
                loan.send(1)
        else:
            wide = np.repeat(array, 2)[::2] if how == "strided" else array
            with pytest.raises(AdmissionError) as caught:
                round_.submit({"first": good, "x": wide}, client_id="c")
        assert (caught.value.client_id, caught.value.rule) == ("c", "values")
        assert f"'x' holds {value} at flat index {at}" in str(caught.value)
        assert np.array_equal(caught.value.value, value, equal_nan=True)
    assert warm_node.arena.free_bytes == free


def test_second_update_of_a_client_is_refused(node: lifl.Node) -> None:
    """The first update of a client counts; another one, by any way and any time, is a duplicate."""
    with node.open_round(SPEC, expected=2) as round_:
        round_.submit(update(1), client_id=7)
        for again in (lambda: round_.submit(update(9), client_id="7"), lambda: round_.loan(7)):
            with pytest.raises(AdmissionError) as caught:
                again()
            assert (caught.value.client_id, caught.value.rule) == ("7", "duplicate")
        lent = round_.loan("8")
        with pytest.raises(AdmissionError, match="duplicate"):
            round_.submit(update(9), client_id="8")
        lent.release()
        round_.submit(update(3), client_id="8")
        assert means(round_.result(WAIT_S)) == {2.0}
        with pytest.raises(AdmissionError, match="duplicate"):
            round_.submit(update(9), client_id="8")


@pytest.mark.parametrize("end", ["complete", "early", "closed"])
def test_nothing_is_taken_after_the_end(node: lifl.Node, end: str) -> None:
    """After completion, early closing or close, submit and loan are refused and loans that are out end."""
    round_ = node.open_round(SPEC, expected=1 if end == "complete" else 5)
    out = round_.loan("slow")
    out.arrays["w"][...] = out.arrays["steps"][...] = 9
    round_.submit(update(1), client_id="a")
    if end == "early":
        round_.close_early()
    elif end == "closed":
        round_.close()
    for late in (lambda: round_.submit(update(9), client_id="b"), lambda: round_.loan("b"), lambda: out.send(1)):
        with pytest.raises(AdmissionError) as caught:
            late()
        assert caught.value.rule == "closed"
    if end != "closed":
        assert means(round_.result(WAIT_S)) == {1.0}
    round_.close()


@pytest.mark.parametrize("weight", [math.nan, math.inf, 0, -1, 1e300, 2**62, "1", None], ids=repr)
@pytest.mark.parametrize("how", ["submit", "loan"])
def test_weight_is_refused_at_each_entrance(node: lifl.Node, weight: Any, how: str) -> None:
    """Also one that only the server's own bound forbids; the attacker's model is no part of the mean."""
    with node.open_round(SPEC, expected=2, limits=lifl.Limits(max_weight=1e6)) as round_:
        round_.submit(update(1), client_id="good")
        with pytest.raises(AdmissionError) as caught:
            offer(round_, how, update(1000), weight, "evil")
        assert (caught.value.client_id, caught.value.rule, caught.value.value) == ("evil", "weight", weight) or (
            math.isnan(weight) and math.isnan(caught.value.value)  # type: ignore[arg-type]
        )
        round_.submit(update(3), 1e6, client_id="large")
        result = round_.result(WAIT_S)
    assert [(r.client_id, r.rule) for r in result.rejected] == [("evil", "weight")]
    assert means(result) <= {3.0, float(np.float32((1 + 3e6) / (1 + 1e6)))}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("how", ["submit", "loan"])
def test_values_are_refused_at_each_entrance(node: lifl.Node, value: float, how: str) -> None:
    """NaN and Inf, copied in or written in place; the round ends with the others."""
    with node.open_round(SPEC, expected=1) as round_:
        bad = update(1)
        bad["w"][1, 2] = value
        with pytest.raises(AdmissionError) as caught:
            offer(round_, how, bad, 1, "evil")
        assert (caught.value.client_id, caught.value.rule) == ("evil", "values")
        round_.submit(update(2), client_id="good")
        result = round_.result(WAIT_S)
    assert means(result) == {2.0}
    assert [(r.client_id, r.rule) for r in result.rejected] == [("evil", "values")]


@pytest.mark.parametrize(
    "array",
    [np.zeros((2, 3), complex), np.full((2, 3), "x"), np.full((2, 3), None), np.zeros((2, 3), ">f4"), b"npz", object()],
    ids=["complex", "text", "objects", "big-endian", "bytes", "object"],
)
def test_arrays_of_no_known_dtype_are_refused(node: lifl.Node, array: Any) -> None:
    """Whatever else is sent for an array is refused as a dtype, without being looked into."""
    with node.open_round(SPEC, expected=1) as round_:
        with pytest.raises(AdmissionError) as caught:
            round_.submit(update(1) | {"w": array}, client_id="evil")
        assert (caught.value.client_id, caught.value.rule) == ("evil", "dtype")


def test_nobody_good_is_a_loud_end_with_the_reasons(node: lifl.Node) -> None:
    """A round without a good update has no result, and says who was refused and why."""
    with node.open_round(SPEC, expected=2) as round_:
        for client in ("x", "y"):
            with pytest.raises(AdmissionError):
                round_.submit(update(1), weight=-5, client_id=client)
        round_.close_early()
        with pytest.raises(RoundError, match=r"x \(weight: the weight is -5\.0.*; y \(weight"):
            round_.result(WAIT_S)
