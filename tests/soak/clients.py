"""The updates of the soak's clients, good and bad, and the mean that they must have."""

from __future__ import annotations

import random
from fractions import Fraction
from typing import Any

import numpy as np

import lifl
from lifl.fold import flower_mean

SHAPES: dict[str, dict[str, tuple[tuple[int, ...], str]]] = {
    "tiny": {"w": ((16,), "float32"), "n": ((), "int64")},
    "odd": {"a": ((0, 3), "float32"), "b": ((), "float64"), "c": ((7, 11), "float16"), "d": ((5,), "int8")},
    "many": {f"t{i}": ((3,), "float32") for i in range(300)},
    "large": {"w": ((512, 1024), "float32"), "b": ((4096,), "float64")},
}
MOST = {"tiny": 40, "odd": 6, "many": 12, "large": 12}
"""Clients in a round: int8 and float16 hold few powers of two."""
BAD_WEIGHTS = (0.0, -1.0, float("nan"), float("inf"), 1e300, "ten")


class Model:
    """A spec and its updates: client i's arrays are full of 2**i, so that a sum tells who is in it."""

    def __init__(self, name: str) -> None:
        self.name, self.most, self.tensors = name, MOST[name], SHAPES[name]
        self.spec = lifl.TensorSpec.from_arrays(self.update(0))
        self.floats = [k for k, (shape, dtype) in self.tensors.items() if 0 not in shape and dtype[0] == "f"]

    def update(self, i: int) -> dict[str, Any]:
        """Client i's."""
        return {key: np.full(shape, 2**i, dtype) for key, (shape, dtype) in self.tensors.items()}

    def bad(self, choose: random.Random) -> tuple[dict[str, Any], Any]:
        """An update and its weight, one of which must be refused."""
        update, key = self.update(0), choose.choice(self.floats)
        how = choose.randrange(6)
        if how == 0:
            update[key].flat[-1] = choose.choice([np.nan, np.inf, -np.inf])
        elif how == 1:
            del update[key]
        elif how == 2:
            update["more"] = update[key]
        elif how == 3:
            update[key] = update[key][None]
        elif how == 4:
            update[key] = update[key].astype("complex64")
        return update, choose.choice(BAD_WEIGHTS) if how == 5 else 1.0

    def check(self, arrays: Any, weights: dict[int, int], order: str) -> None:
        """The mean is exactly that of the clients in `weights`: Flower's in their order, or rounded once."""
        if order == "flower":
            updates = [self.update(i) for i in weights]
            wanted = flower_mean(self.spec, updates, [float(w) for w in weights.values()])
        else:
            mean = Fraction(sum(w * 2**i for i, w in weights.items()), sum(weights.values()))
            wanted = {
                key: np.full(shape, round(mean) if np.dtype(dtype).kind == "i" else float(mean)).astype(dtype)
                for key, (shape, dtype) in self.tensors.items()
            }
        if list(arrays) != list(wanted):
            raise AssertionError(f"{self.name}: the mean's tensors are {list(arrays)}")
        for key, array in wanted.items():
            if arrays[key].dtype != array.dtype or not np.array_equal(arrays[key], array):
                raise AssertionError(
                    f"{self.name}, order {order}: {key} is {arrays[key].ravel()[:3]} ({arrays[key].dtype}), "
                    f"the mean of {weights} is {array.ravel()[:3]} ({array.dtype})"
                )
