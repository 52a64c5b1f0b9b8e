"""The contents of a reply: conversions without loss are made, others are left for admission to refuse."""

from __future__ import annotations

import numpy as np
import pytest

from lifl.strategy.reply import widened
from lifl.tensor import Tensor, TensorSpec

BIG = 2**53


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        (np.array([1.5, -2], np.float32), "float64"),
        (np.array([2**31 - 1, -(2**31)], np.int32), "float64"),
        (np.array([2**15 - 1], np.int16), "float32"),
        (np.array([BIG, -BIG], np.int64), "float64"),
        (np.zeros((0, 3), np.int64), "float64"),
        (np.array(7, np.int64), "float64"),
        (np.array([7], np.uint8), "int64"),
    ],
    ids=lambda one: one if isinstance(one, str) else f"{one.dtype}{one.shape}",
)
def test_what_loses_nothing_is_converted(values: np.ndarray, wanted: str) -> None:
    """To the model's dtype, and each value is what it was."""
    wide = widened({"w": values}, TensorSpec((Tensor("w", wanted, values.shape),)))["w"]
    assert wide.dtype == wanted
    assert wide.shape == values.shape
    assert wide.tolist() == values.tolist()


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        (np.array([BIG + 1], np.int64), "float64"),
        (np.array([-BIG - 1, 0], np.int64), "float64"),
        (np.array([2**64 - 1], np.uint64), "float64"),
        (np.array([1.5]), "float32"),
        (np.array([1.5], np.float32), "int64"),
        (np.array([1j]), "float64"),
        (np.array([1.5], np.float32), "bfloat16"),
    ],
    ids=lambda one: one if isinstance(one, str) else f"{one.dtype}{one.shape}",
)
def test_what_would_lose_something_is_left(values: np.ndarray, wanted: str) -> None:
    """As it came, so that admission refuses it."""
    assert widened({"w": values}, TensorSpec((Tensor("w", wanted, values.shape),)))["w"] is values


def test_what_the_model_does_not_have_is_left() -> None:
    """It is refused by its key."""
    values = np.zeros(3)
    assert widened({"x": values}, TensorSpec((Tensor("w", "float32", (3,)),)))["x"] is values
