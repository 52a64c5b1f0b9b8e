"""The replies of bad clients, row by row, with the rule by which each must be refused."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict

Update = dict[str, np.ndarray]
PROOF = "unpickled"
"""A file of this name in the folder of the run shows that somebody unpickled what came."""


@dataclass
class Row:
    """A row of the table of bad clients."""

    rule: str
    make: Callable[[Update, str], RecordDict]


def sends(update: Update, weight: object = 10, **raw: Array) -> RecordDict:
    """An update as Flower sends it; `raw` arrays take the place of, or come beside, the update's."""
    arrays = {name: Array(array) for name, array in update.items()} | raw
    return RecordDict({"arrays": ArrayRecord(arrays), "metrics": MetricRecord({"num-examples": weight})})


def npy(array: np.ndarray) -> bytes:
    """The array as .npy bytes."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def raw(data: bytes, dtype: str = "float32", shape: tuple[int, ...] = (3,)) -> Array:
    """An Array that says one thing and holds another."""
    return Array(dtype, shape, "numpy.ndarray", data)


def header(dtype: str, shape: str) -> bytes:
    """A .npy header alone."""
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def npz(array: np.ndarray) -> bytes:
    """An archive, which np.load would open as well."""
    file = io.BytesIO()
    np.savez(file, w=array)
    return file.getvalue()


class Trap:
    """An object that writes a file when it is unpickled."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (os.path.join(self.folder, PROOF),)


def without(update: Update, name: str) -> Update:
    """The update without an array."""
    return {key: array for key, array in update.items() if key != name}


def changed(update: Update, value: float) -> Update:
    """The update with another number."""
    return update | {"bias": np.array([0.0, value, 0.0])}


def raises(update: Update, folder: str) -> RecordDict:
    """A client whose code fails."""
    raise RuntimeError("told to fail")


W3 = np.ones(3, np.float32)
ROWS: dict[str, Row] = {
    "a NaN": Row("values", lambda u, _: sends(changed(u, math.nan))),
    "an Inf": Row("values", lambda u, _: sends(changed(u, -math.inf))),
    "weight NaN": Row("weight", lambda u, _: sends(u, math.nan)),
    "weight 1e300": Row("weight", lambda u, _: sends(u, 1e300)),
    "weight 2**62": Row("weight", lambda u, _: sends(u, 2**62)),
    "weight -5": Row("weight", lambda u, _: sends(u, -5)),
    "weight 0": Row("weight", lambda u, _: sends(u, 0)),
    "a list of weights": Row("weight", lambda u, _: sends(u, [1, 2])),
    "no weight": Row("weight", lambda u, _: RecordDict({"a": sends(u)["arrays"], "m": MetricRecord({"loss": 1.0})})),
    "shape (1,)": Row("shape", lambda u, _: sends(u | {"w": W3[:1]})),
    "shape ()": Row("shape", lambda u, _: sends(u | {"w": np.array(1, np.float32)})),
    "forty megabytes": Row("shape", lambda u, _: sends(u | {"w": np.ones(10_000_000, np.float32)})),
    "one array too many": Row("keys", lambda u, _: sends(u | {"more": W3})),
    "one array too few": Row("keys", lambda u, _: sends(without(u, "w"))),
    "float64": Row("dtype", lambda u, _: sends(u | {"w": W3.astype(np.float64)})),
    "complex": Row("format", lambda u, _: sends(u | {"w": W3.astype(np.complex64)})),
    "strings": Row("format", lambda u, _: sends(u, w=raw(npy(np.array(["a", "b", "c"]))))),
    "an archive": Row("format", lambda u, _: sends(u, w=raw(npz(W3)))),
    "a truncated array": Row("format", lambda u, _: sends(u, w=raw(npy(W3)[:-1]))),
    "more than it says": Row("format", lambda u, _: sends(u, w=raw(npy(W3) + b"\0"))),
    "another shape than it says": Row("shape", lambda u, _: sends(u, w=raw(npy(np.ones(4, np.float32))))),
    "256 GiB": Row("format", lambda u, _: sends(u, w=raw(header("<f4", "(68719476736,)") + b"\0" * 12))),
    "a pickle": Row("format", lambda u, out: sends(u, w=raw(npy(np.array([Trap(out)] * 3, object))))),
    "nothing at all": Row("format", lambda u, _: RecordDict({})),
    "two models": Row("format", lambda u, _: RecordDict({**sends(u), "more": sends(u)["arrays"]})),
    "an exception": Row("error", raises),
}

EVALUATIONS: dict[str, Callable[[], RecordDict]] = {
    "weight 0": lambda: RecordDict({"m": MetricRecord({"num-examples": 0, "norm": 1.0})}),
    "weight NaN": lambda: RecordDict({"m": MetricRecord({"num-examples": math.nan, "norm": 1.0})}),
    "other metrics": lambda: RecordDict({"m": MetricRecord({"num-examples": 5, "mood": 1.0})}),
    "no metrics": lambda: RecordDict({}),
}

FAR = 1e200
"""So far that its square is no float64."""


HOSTILE = range(3, 8)
"""These nodes send nonsense: more than there are honest ones, so that the table takes few rounds."""


def rounds(rows: dict) -> int:
    """The number of rounds in which each row is sent."""
    return math.ceil(len(rows) / len(HOSTILE))


def row_of(rows: dict, server_round: int, me: int) -> str:
    """The row of a hostile node in a round: each node takes the next one, and begins again when all were sent."""
    number = len(HOSTILE) * (server_round - 1) + HOSTILE.index(me)
    return list(rows)[number % len(rows)]
