"""The door: what an update must be to count."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lifl.errors import MAX_REASON, AdmissionError, LiflError
from lifl.round.admission import MAX_WEIGHT, MIN_WEIGHT, Limits, check_arrays, check_weight, refuse_quota, refuse_value
from lifl.tensor import DTYPES, NUMPY_DTYPES, Tensor, TensorSpec

MODEL = {"w": np.zeros((2, 3), np.float32), "b": np.zeros(3), "steps": np.array(0), "none": np.zeros((0, 2), np.int8)}
SPEC = TensorSpec.from_arrays(MODEL)


@pytest.mark.parametrize(
    "weight",
    [
        1,
        1.0,
        MIN_WEIGHT,
        MAX_WEIGHT,
        2**100,
        np.float32(2),
        np.float16(0.5),
        np.int64(3),
        np.uint8(1),
        Fraction(1, 3),
        Decimal(2),
    ],
)
def test_numbers_in_range_are_weights(weight: Any) -> None:
    """Any real number from the smallest to the largest is a weight, NumPy's too, and becomes a float."""
    got = check_weight("a", weight)
    assert type(got) is float
    assert got == float(weight)


@pytest.mark.parametrize(
    "weight",
    [
        *(5e-324, MIN_WEIGHT / 2, MAX_WEIGHT * 2, 10**300, 1.7e308),
        *(
            MIN_WEIGHT / 2,
            MAX_WEIGHT * 2,
            5e-324,
            1.7e308,
            0,
            0.0,
            -0.0,
            -1,
            -1e-300,
            math.nan,
            math.inf,
            -math.inf,
            10**400,
            -(10**400),
        ),
        *(np.float32("nan"), np.float64("inf"), np.int64(0), Decimal("nan"), Fraction(-1, 2), Fraction(1, 10**400)),
        *(np.True_, np.complex64(1), np.str_("5"), np.array([3.0])),
        *("1", b"1", "", None, True, False, 1 + 2j, complex(1), np.complex128(1), [1.0], (1,), {"n": 1}, object()),
    ],
    ids=lambda one: repr(one).partition(" at 0x")[0],
)
def test_other_weights_are_refused(weight: Any) -> None:
    """Zero, negative, not finite, out of range, and what is no real number: refused with the value sent."""
    with pytest.raises(AdmissionError, match="client 7") as caught:
        check_weight("7", weight)
    assert (caught.value.client_id, caught.value.rule) == ("7", "weight")
    assert caught.value.value is weight or caught.value.value == weight


@given(st.one_of(st.floats(), st.integers(), st.text(), st.none(), st.booleans(), st.complex_numbers()))
def test_any_weight_is_taken_or_refused(weight: Any) -> None:
    """Whatever is sent as a weight, the answer is a float in range or an AdmissionError."""
    try:
        value = check_weight("a", weight)
    except AdmissionError:
        return
    assert MIN_WEIGHT <= value <= MAX_WEIGHT


def test_matching_model_is_taken() -> None:
    """The round's own model passes, in any order of keys, strided and read-only arrays too."""
    check_arrays("a", SPEC, MODEL)
    check_arrays("a", SPEC, dict(reversed(MODEL.items())))
    frozen = np.asfortranarray(MODEL["w"])
    frozen.flags.writeable = False
    check_arrays("a", SPEC, MODEL | {"w": frozen, "b": np.zeros(6)[::2]})


@pytest.mark.parametrize(
    ("change", "rule", "value", "message"),
    [
        ({"w": None}, "dtype", "NoneType", "'w' is a NoneType"),
        ({"w": [[0.0] * 3] * 2}, "dtype", "list", "'w' is a list"),
        ({"w": "text"}, "dtype", "str", "'w' is a str"),
        ({"w": np.zeros((2, 3))}, "dtype", "float64", "'w' has dtype float64, the model has float32"),
        ({"w": np.zeros((2, 3), ">f4")}, "dtype", ">f4", "'w' has dtype >f4"),
        ({"w": np.zeros((2, 3), np.complex64)}, "dtype", "complex64", "complex64"),
        ({"w": np.full((2, 3), None)}, "dtype", "object", "object"),
        ({"steps": np.array(0, np.int32)}, "dtype", "int32", "int64"),
        ({"b": np.zeros(3, np.uint16)}, "dtype", "uint16", "uint16"),
        ({"w": np.zeros((3, 2), np.float32)}, "shape", (3, 2), r"\(3, 2\), the model has \(2, 3\)"),
        ({"w": np.zeros(6, np.float32)}, "shape", (6,), "shape"),
        ({"w": np.zeros((1, 2, 3), np.float32)}, "shape", (1, 2, 3), "shape"),
        ({"b": np.zeros(1)}, "shape", (1,), "shape"),
        ({"b": np.array(0.0)}, "shape", (), "shape"),
        ({"steps": np.zeros(1, np.int64)}, "shape", (1,), "shape"),
        ({"none": np.zeros((2, 0), np.int8)}, "shape", (2, 0), "shape"),
        ({"more": np.zeros(1)}, "keys", ("w", "b", "steps", "none", "more"), "not in the model: 'more'"),
        ({7: np.zeros(1)}, "keys", ("w", "b", "steps", "none", 7), "not in the model: '7'"),
    ],
)
def test_another_model_is_refused(change: Any, rule: str, value: Any, message: str) -> None:
    """Keys, dtypes and shapes must be exactly the round's; nothing is cast or broadcast."""
    with pytest.raises(AdmissionError, match=message) as caught:
        check_arrays("9", SPEC, MODEL | change)
    assert (caught.value.client_id, caught.value.rule, caught.value.value) == ("9", rule, value)


def test_missing_keys_are_named() -> None:
    """The refusal names a few of the missing keys and counts the others."""
    with pytest.raises(AdmissionError, match="missing 'b', 'none', 'steps' and 1 more") as caught:
        check_arrays("9", SPEC, {})
    assert caught.value.rule == "keys"
    assert caught.value.value == ()


def test_bfloat16_may_come_as_its_bits() -> None:
    """A model's bfloat16 takes uint16, which is how NumPy holds it; no other dtype does."""
    for dtype in DTYPES:
        spec = TensorSpec((Tensor("x", dtype, (2,)),))
        check_arrays("a", spec, {"x": np.zeros(2, NUMPY_DTYPES[dtype])})
        if dtype != "bfloat16":
            with pytest.raises(AdmissionError):
                check_arrays("a", spec, {"x": np.zeros(2, np.uint16)})


def test_refused_value_is_named() -> None:
    """The refusal of a NaN says where it is."""
    error = refuse_value("9", "w", 5, math.inf)
    assert (error.client_id, error.rule, error.value) == ("9", "values", math.inf)
    assert "'w' holds inf at flat index 5" in str(error)


def test_refusal_is_a_value_error_of_lifl() -> None:
    """A handler of ValueError or of LiflError catches a refusal."""
    assert issubclass(AdmissionError, ValueError)
    assert issubclass(AdmissionError, LiflError)


# ---------------------------------------------------------------- a server's own bounds


@given(st.floats(MIN_WEIGHT, MAX_WEIGHT), st.floats(MIN_WEIGHT, MAX_WEIGHT))
def test_weight_above_the_servers_bound_is_refused(bound: float, weight: float) -> None:
    """Refused, not cut, by a message that names both; one at the bound is taken."""
    assert check_weight("a", bound, bound) == bound
    if weight <= bound:
        assert check_weight("a", weight, bound) == weight
        return
    with pytest.raises(AdmissionError, match="client a") as caught:
        check_weight("a", weight, bound)
    assert (caught.value.rule, caught.value.value) == ("weight", weight)
    assert str(weight) in caught.value.reason
    assert f"{bound:.3g}" in caught.value.reason


def test_limits_bound_nothing_by_default() -> None:
    """Limits without arguments have the rules that always hold, and are a value that can be compared."""
    assert Limits() == Limits(max_weight=MAX_WEIGHT, clipping_norm=None, client_bytes=None, total_bytes=None)
    with pytest.raises(AttributeError):
        Limits().max_weight = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("max_weight", v) for v in (0, -1, math.nan, math.inf, None, "9", True, 1j, MAX_WEIGHT * 2, MIN_WEIGHT / 2)),
        *(("clipping_norm", v) for v in (0, -1.0, math.nan, math.inf, "1", False, 1e-300)),
        *((name, v) for name in ("client_bytes", "total_bytes") for v in (0, -1, 1.5, "1GiB", True, math.inf)),
    ],
)
def test_limits_that_mean_nothing_are_errors(name: str, value: Any) -> None:
    """The message names the argument, the value and what to give."""
    with pytest.raises(ValueError, match=f"^{name}=.*: give a ") as caught:
        Limits(**{name: value})
    assert repr(value) in str(caught.value)
    assert not isinstance(caught.value, AdmissionError)


@given(st.integers(0, 2**50), st.integers(1, 2**50), st.integers(1, 2**51))
def test_quota_is_refused_exactly_when_it_does_not_fit(held: int, wanted: int, bound: int) -> None:
    """An update that fits exactly is taken; a refusal names the bytes that are held, wanted and allowed."""
    refusal = refuse_quota("7", "the client", held, wanted, bound)
    assert (refusal is None) == (held + wanted <= bound)
    if refusal is not None:
        assert (refusal.client_id, refusal.rule, refusal.value) == ("7", "quota", held + wanted)
        assert all(f"{n:,}" in refusal.reason for n in (held, wanted, bound))


def test_what_a_client_sends_cannot_make_a_refusal_long() -> None:
    """Names of arrays and reasons are quoted in part: they are logged, and kept in reports."""
    with pytest.raises(AdmissionError) as caught:
        check_arrays("9", SPEC, {"x" * 10**6: np.zeros(1), **{f"{'y' * 1000}{i}": np.zeros(1) for i in range(1000)}})
    assert len(caught.value.reason) <= MAX_REASON
    assert "and 998 more" in caught.value.reason
    long = AdmissionError("9", "error", "z" * 10**6)
    assert len(long.reason) == MAX_REASON
    assert len(str(long)) < MAX_REASON + 50
