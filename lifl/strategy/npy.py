"""The ``.npy`` bytes in which Flower sends arrays: a bounded parser and writer of their header.

Pure. Never calls ``np.load`` on bytes from the network, never unpickles, and allocates nothing before the
declared lengths add up to the bytes that came. The format: NumPy's ``numpy.lib.format``, versions 1 to 3.
"""

from __future__ import annotations

import re
from io import BytesIO
from typing import Literal

import attrs
import numpy as np

from lifl.tensor import ITEM_BYTES, NUMPY_DTYPES, Array

MAGIC = b"\x93NUMPY"
MAX_HEADER_BYTES = 10_000
MAX_DIMENSIONS = 64  # NumPy's own limit
MAX_BYTES = 12 + MAX_HEADER_BYTES
"""Most bytes before the numbers of a stream: magic, version, length and header."""

_DESCRIPTIONS = {NUMPY_DTYPES[name].str: name for name in ITEM_BYTES if name != "bfloat16"}
_LENGTH = rb"(?:0|[1-9][0-9]{0,18})"
# Only tuples of Python: "(3)", "(3 4)" and "(03,)" are none, and NumPy refuses them too.
_SHAPE = rb"(?:%b,|%b(?:, ?%b)+,?)?" % (_LENGTH, _LENGTH, _LENGTH)
_HEADER = re.compile(rb"\{'descr': '([^']{1,32})', 'fortran_order': (True|False), 'shape': \((%b)\), ?\} *\n?" % _SHAPE)


@attrs.frozen
class Header:
    """The declarations of a ``.npy`` stream, and the byte offset of its numbers."""

    dtype: str
    shape: tuple[int, ...]
    is_fortran: bool
    offset: int


def parse_header(data: bytes | memoryview, nbytes: int | None = None) -> Header:
    """Reads a stream's header and checks it against the length of all its bytes.

    `nbytes` is the length of the whole stream if `data` is only its beginning; ``MAX_BYTES`` of it are enough.

    Raises
    ------
    ValueError
        If `data` is no ``.npy`` stream, its dtype is not one of lifl's, or its lengths do not add up. The
        message names the fault.
    """
    whole = len(data) if nbytes is None else nbytes
    head = bytes(data[:MAX_BYTES])
    if head[:6] != MAGIC or len(head) < 10:
        raise ValueError(f"not a .npy stream: it begins with {head[:6]!r}")
    wide = head[6] in (2, 3)
    if head[6] not in (1, 2, 3) or head[7] != 0:
        raise ValueError(f".npy version {head[6]}.{head[7]} is not known")
    begin = 12 if wide else 10
    length = int.from_bytes(head[8:begin], "little")
    if length > MAX_HEADER_BYTES or begin + length > len(head):
        raise ValueError(f"the .npy header claims {length} bytes, {whole - begin} follow")
    match = _HEADER.fullmatch(head[begin : begin + length])
    if match is None:
        raise ValueError(f"unreadable .npy header {head[begin : begin + min(length, 80)]!r}")
    description = match[1].decode("ascii", "replace")
    dtype = _DESCRIPTIONS.get(description)
    if dtype is None:
        raise ValueError(f"dtype {description!r} is not one of {', '.join(sorted(_DESCRIPTIONS))}")
    lengths = [n for n in match[3].replace(b" ", b"").split(b",") if n]
    if len(lengths) > MAX_DIMENSIONS:
        raise ValueError(f"the shape ({match[3][:80].decode()}) is beyond any array")
    shape = tuple(int(n) for n in lengths)
    count = 1
    for n in shape:
        count *= n
    declared, present = count * ITEM_BYTES[dtype], whole - begin - length
    if declared != present:
        raise ValueError(f"shape {shape} of {dtype} is {declared} bytes, {present} came")
    return Header(dtype, shape, match[2] == b"True", begin + length)


def view(data: bytes | memoryview) -> Array:
    """The array in a stream, without a copy; it is read-only and keeps `data` alive."""
    header = parse_header(data)
    order: Literal["C", "F"] = "F" if header.is_fortran else "C"
    return np.ndarray(header.shape, NUMPY_DTYPES[header.dtype], data, header.offset, order=order)


def encode(array: Array) -> bytes:
    """The same bytes as ``np.save`` writes, with one copy of the numbers instead of two."""
    array = np.asarray(array)
    if not array.flags.forc:
        array = np.array(array, order="C")
    header = BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    # NumPy writes the numbers of an array in Fortran's order as they lie in memory.
    numbers = array if array.flags.c_contiguous else array.T
    return b"".join((header.getvalue(), numbers.data))
