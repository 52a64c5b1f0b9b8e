"""The form of an update: names, shapes and dtypes of its tensors, and the place of each in a block.

Pure: touches no arena, process or clock. The layout groups tensors by dtype. An update is then at most ten runs of
numbers, however many tensors it has, and a fold needs ten calls, not ten thousand.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

DTYPES = (
    "float32",
    "float64",
    "float16",
    "bfloat16",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "bool",
)
"""The closed list of element types, in the order of ``enum lifl_dtype``."""

CODES = {name: code for code, name in enumerate(DTYPES)}
ITEM_BYTES = {
    "float32": 4,
    "float64": 8,
    "float16": 2,
    "bfloat16": 2,
    "int8": 1,
    "int16": 2,
    "int32": 4,
    "int64": 8,
    "uint8": 1,
    "bool": 1,
}
NUMPY_DTYPES = {name: np.dtype("uint16" if name == "bfloat16" else name) for name in DTYPES}
"""The NumPy dtype of each element type. NumPy has no bfloat16: views show raw bits as uint16; torch views have it."""

ALIGNMENT_BYTES = 64
_HEAD = struct.Struct("<IIQQQ")
_SEGMENT = struct.Struct("<IIQQQQ")

Array = npt.NDArray[Any]


def dtype_name(array: Any) -> str:
    """The name of the element type of an array or a tensor, ``"float32"`` for ``torch.float32`` too.

    Byte-swapped dtypes keep their mark (``">f4"``), so that they compare unequal to the native one.
    """
    dtype = array.dtype
    if isinstance(dtype, np.dtype):
        return dtype.name if dtype.isnative else dtype.str
    return str(dtype).removeprefix("torch.")


@attrs.frozen
class Tensor:
    """A named tensor of a model.

    Attributes
    ----------
    name : str
        The key in the model's mapping.
    dtype : str
        An element of ``DTYPES``.
    shape : tuple of int
        ``()`` for a 0-d array; any length may be 0.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        n = 1
        for length in self.shape:
            n *= length
        return n


@attrs.frozen
class Segment:
    """All the elements of a dtype, one after another: the input of a single kernel call.

    Offsets are bytes from the start of an update, of a sum (after its manifest), and of a mean.
    """

    dtype: str
    count: int
    update_offset: int
    sum_offset: int
    mean_offset: int


@attrs.frozen
class Layout:
    """The places of all segments in a block; computed from a TensorSpec, or read from a round's control block."""

    segments: tuple[Segment, ...]
    update_bytes: int
    sum_bytes: int
    mean_bytes: int

    def encode(self, flags: int) -> bytes:
        """The bytes of the layout at the start of a round's control block; `flags` only pass through."""
        head = _HEAD.pack(len(self.segments), flags, self.update_bytes, self.sum_bytes, self.mean_bytes)
        rows = (
            _SEGMENT.pack(CODES[s.dtype], 0, s.count, s.update_offset, s.sum_offset, s.mean_offset)
            for s in self.segments
        )
        return head + b"".join(rows)

    @classmethod
    def decode(cls, data: bytes) -> tuple[Layout, int]:
        """The inverse of ``encode``; raises ``ValueError`` if a segment leaves its block."""
        if len(data) < _HEAD.size:
            raise ValueError(f"control block of {len(data)} bytes: its head alone has {_HEAD.size}")
        count, flags, update_bytes, sum_bytes, mean_bytes = _HEAD.unpack_from(data)
        if count > len(DTYPES) or len(data) < _HEAD.size + count * _SEGMENT.size:
            raise ValueError(f"control block claims {count} segments in {len(data)} bytes")
        segments = []
        for i in range(count):
            code, _, n, update, total, mean = _SEGMENT.unpack_from(data, _HEAD.size + i * _SEGMENT.size)
            if code >= len(DTYPES):
                raise ValueError(f"control block names dtype {code}, known are 0 to {len(DTYPES) - 1}")
            dtype = DTYPES[code]
            ends = (
                (update + n * ITEM_BYTES[dtype], update_bytes),
                (total + n * sum_item_bytes(dtype), sum_bytes),
                (mean + n * ITEM_BYTES[dtype], mean_bytes),
            )
            if any(end > room for end, room in ends):
                raise ValueError(f"segment {i} of {n} x {dtype} leaves its block: {ends}")
            segments.append(Segment(dtype, n, update, total, mean))
        return cls(tuple(segments), update_bytes, sum_bytes, mean_bytes), flags


def sum_item_bytes(dtype: str) -> int:
    """Bytes of an element's sum: a float64, or a pair of them for int64."""
    return 16 if dtype == "int64" else 8


def flower_dtype(dtype: str) -> str:
    """The dtype of Flower's mean of a dtype: NumPy promotes integers and booleans times a float to float64."""
    return dtype if dtype in ("float16", "float32", "float64") else "float64"


def _align(n: int) -> int:
    return -(-n // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


@attrs.frozen
class TensorSpec(Mapping[str, Tensor]):
    """The names, shapes and dtypes of a model. Every update of a round must have exactly these.

    A mapping from name to :class:`Tensor`, in the model's order. :meth:`from_arrays` makes it.
    """

    tensors: tuple[Tensor, ...]

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Any]) -> TensorSpec:
        """The spec of a mapping from name to NumPy array or torch tensor.

        Raises
        ------
        TypeError
            If a value has no dtype and shape, or a dtype outside ``DTYPES``.
        """
        tensors = []
        for name, array in arrays.items():
            if not hasattr(array, "dtype") or not hasattr(array, "shape"):
                raise TypeError(f"array {name!r} is a {type(array).__name__}: use a NumPy array or torch tensor")
            dtype = dtype_name(array)
            if dtype not in CODES:
                raise TypeError(f"array {name!r} has dtype {dtype}: lifl folds {', '.join(DTYPES)}")
            tensors.append(Tensor(str(name), dtype, tuple(int(n) for n in array.shape)))
        return cls(tuple(tensors))

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[self._positions[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._positions)

    def __len__(self) -> int:
        return len(self.tensors)

    @cached_property
    def _positions(self) -> dict[str, int]:
        positions = {tensor.name: i for i, tensor in enumerate(self.tensors)}
        if len(positions) != len(self.tensors):
            raise ValueError("two tensors of a TensorSpec have the same name")
        return positions

    @cached_property
    def _groups(self) -> dict[str, int]:
        """The number of elements of each dtype, in order of first appearance."""
        groups: dict[str, int] = {}
        for tensor in self.tensors:
            groups[tensor.dtype] = groups.get(tensor.dtype, 0) + tensor.size
        return groups

    @property
    def nbytes(self) -> int:
        """Bytes of the numbers of an update, without padding."""
        return sum(n * ITEM_BYTES[dtype] for dtype, n in self._groups.items())

    @cached_property
    def layout(self) -> Layout:
        """The layout of an update, its sum and the mean (same dtypes)."""
        return self._layout(lambda dtype: dtype)

    @cached_property
    def flower_layout(self) -> Layout:
        """The layout for ``order="flower"``, in which means of integers are float64."""
        return self._layout(flower_dtype)

    def _layout(self, mean_dtype: Any) -> Layout:
        segments, update, total, mean = [], 0, 0, 0
        for dtype, count in self._groups.items():
            segments.append(Segment(dtype, count, update, total, mean))
            update = _align(update + count * ITEM_BYTES[dtype])
            total = _align(total + count * sum_item_bytes(dtype))
            mean = _align(mean + count * ITEM_BYTES[mean_dtype(dtype)])
        return Layout(tuple(segments), update, total, mean)

    @cached_property
    def offsets(self) -> tuple[tuple[str, int, int, int], ...]:
        """For each tensor, in order: name, dtype code, byte offset in an update, element count."""
        start = {s.dtype: s.update_offset for s in self.layout.segments}
        done = dict.fromkeys(self._groups, 0)
        rows = []
        for tensor in self.tensors:
            at = start[tensor.dtype] + done[tensor.dtype] * ITEM_BYTES[tensor.dtype]
            rows.append((tensor.name, CODES[tensor.dtype], at, tensor.size))
            done[tensor.dtype] += tensor.size
        return tuple(rows)

    def views(self, buffer: Any) -> dict[str, Array]:
        """NumPy views of an update in `buffer` (at least ``layout.update_bytes``), without a copy.

        The views keep `buffer` alive and are writable if it is.
        """
        return self._views(buffer, self.layout, lambda dtype: dtype)

    def flower_views(self, buffer: Any) -> dict[str, Array]:
        """NumPy views of a mean made with ``order="flower"``, without a copy, as :meth:`views`."""
        return self._views(buffer, self.flower_layout, flower_dtype)

    def _views(self, buffer: Any, layout: Layout, mean_dtype: Any) -> dict[str, Array]:
        runs: dict[str, Array] = {}
        for s in layout.segments:
            dtype = NUMPY_DTYPES[mean_dtype(s.dtype)]
            # frombuffer refuses to make an empty array at the very end of a buffer.
            empty = s.count == 0
            runs[s.dtype] = np.empty(0, dtype) if empty else np.frombuffer(buffer, dtype, s.count, s.mean_offset)
        done = dict.fromkeys(runs, 0)
        views = {}
        for tensor in self.tensors:
            at = done[tensor.dtype]
            views[tensor.name] = runs[tensor.dtype][at : at + tensor.size].reshape(tensor.shape)
            done[tensor.dtype] = at + tensor.size
        return views


def torch_views(spec: TensorSpec, views: Mapping[str, Array]) -> dict[str, torch.Tensor]:
    """The memory of `views` as torch tensors; those of bfloat16 are ``torch.bfloat16``. Imports torch."""
    import torch

    tensors = {}
    for name, view in views.items():
        tensor = torch.from_numpy(view)
        bits = spec[name].dtype == "bfloat16" and view.dtype == np.uint16
        tensors[name] = tensor.view(torch.bfloat16) if bits else tensor
    return tensors
