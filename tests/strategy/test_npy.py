"""The bytes in which arrays come from the network: NumPy's, and nothing but ValueError for what is not."""

from __future__ import annotations

import io
import tracemalloc
import zipfile
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lifl.strategy import npy
from lifl.tensor import DTYPES

NUMPY_NAMES = [name for name in DTYPES if name != "bfloat16"]
SHAPES = hnp.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=6)


def saved(array: Any, *, allow_pickle: bool = False) -> bytes:
    """The bytes that np.save writes."""
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=allow_pickle)
    return stream.getvalue()


def loaded(data: bytes) -> np.ndarray[Any, Any]:
    """The array that np.load reads."""
    return np.load(io.BytesIO(data), allow_pickle=False)


def stream(header: bytes, payload: bytes = b"", version: bytes = b"\x01\x00", length: int | None = None) -> bytes:
    """A stream with any header, of any declared length."""
    length = len(header) if length is None else length
    return npy.MAGIC + version + length.to_bytes(2 if version[:1] == b"\x01" else 4, "little") + header + payload


def header(descr: object = "<f4", is_fortran: object = False, shape: object = (3,)) -> bytes:
    """A header as NumPy would write it for these."""
    return f"{{'descr': {descr!r}, 'fortran_order': {is_fortran!r}, 'shape': {shape!r}, }}\n".encode()


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray[Any, Any]:
    """Arrays of every dtype that lifl reads, with any bits, in any memory order."""
    dtype = np.dtype(draw(st.sampled_from(NUMPY_NAMES)))
    shape = draw(SHAPES)
    nbytes = int(np.prod(shape)) * dtype.itemsize
    bits = np.frombuffer(draw(st.binary(min_size=nbytes, max_size=nbytes)), np.uint8)
    if dtype == np.bool_:
        bits = bits & 1
    array = bits.view(dtype).reshape(shape)
    how = draw(st.sampled_from(["C", "F", "transposed", "strided", "reversed"]))
    if how == "F":
        return np.asfortranarray(array)
    if how == "transposed":
        return array.T
    if how == "strided" and array.ndim:
        return np.repeat(array, 2, axis=0)[::2]
    if how == "reversed" and array.ndim:
        return array[::-1]
    return array


@settings(deadline=None)
@given(arrays())
def test_encode_is_what_numpy_saves(array: np.ndarray[Any, Any]) -> None:
    """Whatever the dtype, shape and memory order, encode gives the bytes of np.save."""
    assert npy.encode(array) == saved(array)


@settings(deadline=None)
@given(arrays())
def test_view_is_what_numpy_loads(array: np.ndarray[Any, Any]) -> None:
    """A view has the dtype, shape and bits that np.load gives, Fortran order included."""
    data = saved(array)
    view, expected = npy.view(data), loaded(data)
    assert (view.dtype, view.shape) == (expected.dtype, expected.shape)
    assert view.tobytes() == expected.tobytes() == array.tobytes()


def test_view_copies_nothing_and_keeps_the_bytes_alive() -> None:
    """A view lies in the stream's own memory, read-only, and outlives the name of the stream."""
    data = saved(np.arange(1000.0))
    start, view = np.frombuffer(data, np.uint8).ctypes.data, npy.view(data)
    assert start < view.ctypes.data < start + len(data)
    assert view.base is data
    assert not view.flags.writeable
    del data
    assert view.sum() == 499500


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_view_reads_every_version_of_the_format(version: tuple[int, int]) -> None:
    """Versions 1, 2 and 3 differ in their header's length only."""
    out = io.BytesIO()
    np.lib.format.write_array(out, np.arange(6, dtype=np.int16).reshape(2, 3), version=version)
    assert npy.view(out.getvalue()).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_view_reads_a_memoryview() -> None:
    """A stream may be part of a larger buffer."""
    data = b"xx" + saved(np.float32([1, 2])) + b"yy"
    assert npy.view(memoryview(data)[2:-2]).tolist() == [1, 2]


def test_view_reads_unaligned_numbers() -> None:
    """A header of odd length puts the numbers at an odd address, which changes nothing."""
    numbers = np.arange(9, dtype=np.float64)
    text = header("<f8", shape=(9,))
    for pad in range(8):
        data = stream(text[:-1] + b" " * pad + b"\n", numbers.tobytes())
        assert npy.view(data).tolist() == loaded(data).tolist() == numbers.tolist()


def test_parse_header_says_what_is_declared() -> None:
    """The header's dtype, shape and order, and the offset of the numbers."""
    data = saved(np.asfortranarray(np.zeros((2, 3), np.int64)))
    assert npy.parse_header(data) == npy.Header("int64", (2, 3), True, len(data) - 48)


@pytest.mark.parametrize(
    "array",
    [
        np.array([1 + 2j]),
        np.array(["text"]),
        np.array([b"bytes"]),
        np.zeros(2, [("x", "<f4"), ("y", "<i4")]),
        np.zeros(2, ">f4"),
        np.zeros(2, np.uint16),
        np.zeros(2, np.uint64),
        np.zeros(2, np.longdouble),
        np.zeros(2, "datetime64[s]"),
        np.zeros(2, "V8"),
    ],
    ids=lambda array: str(array.dtype),
)
def test_other_dtypes_are_refused_by_name(array: np.ndarray[Any, Any]) -> None:
    """Complex, text, bytes, structured, byte-swapped and other dtypes raise ValueError."""
    with pytest.raises(ValueError, match=r"dtype|unreadable"):
        npy.view(saved(array))


class Bomb:
    """Says so if it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("it was unpickled",)


def test_pickles_are_refused_without_a_look() -> None:
    """An object array, a bare pickle and an archive raise ValueError, and nothing is unpickled."""
    data = saved(np.array([Bomb()], object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"dtype '\|O'"):
        npy.view(data)
    with pytest.raises(ValueError, match=r"not a \.npy stream"):
        npy.view(data[data.index(b"\n") + 1 :])
    archive = io.BytesIO()
    np.savez(archive, x=np.zeros(3))
    assert zipfile.is_zipfile(archive)
    with pytest.raises(ValueError, match=r"not a \.npy stream"):
        npy.view(archive.getvalue())


@pytest.mark.parametrize("shape", [(2**36,), (2**18, 2**18), (2**62, 4), (10**19 - 1,) * 64, (2**64,)], ids=str)
@pytest.mark.parametrize("is_fortran", [True, False])
def test_nothing_is_allocated_for_what_did_not_come(shape: tuple[int, ...], is_fortran: bool) -> None:
    """A header that claims 256 GiB or more is refused for its payload of 12 bytes, at no cost."""
    data = stream(header("<f4", is_fortran, shape), bytes(12))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"12 came|unreadable"):
            npy.view(data)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("shape", [(0, 2**40), (0, 10**19 - 1), (2**62, 0, 2**62)], ids=str)
def test_empty_shapes_beyond_any_array_are_refused(shape: tuple[int, ...]) -> None:
    """No bytes are declared and none came, and yet lengths that no array can have raise ValueError."""
    data = stream(header(shape=shape))
    try:
        expected = np.empty(shape, np.float32).shape
    except ValueError:
        with pytest.raises(ValueError, match=r"too big|dimension"):
            npy.view(data)
    else:
        assert npy.view(data).shape == expected


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a .npy"),
        (b"\x93NUMPY", "not a .npy"),
        (b"\x93NUMPY\x01\x00", "not a .npy"),
        (stream(b""), "unreadable"),
        (stream(header(), bytes(12), version=b"\x00\x00"), "version 0"),
        (stream(header(), bytes(12), version=b"\x04\x00"), "version 4"),
        (stream(header(), bytes(12), version=b"\x01\x01"), "version 1.1"),
        (stream(header(), bytes(12), length=0xFFFF), "claims 65535 bytes"),
        (stream(header(), bytes(12), version=b"\x02\x00", length=2**32 - 1), "claims 4294967295 bytes"),
        (stream(header() + b" " * 20_000, bytes(12)), "claims 20"),
        (stream(header(), bytes(11)), "is 12 bytes, 11 came"),
        (stream(header(), bytes(13)), "is 12 bytes, 13 came"),
        (stream(header(shape=()), b""), "is 4 bytes, 0 came"),
        (stream(header(shape=(1,) * 65), bytes(4)), "beyond any array"),
        (stream(header(shape=3), bytes(12)), "unreadable"),
        (stream(header(shape=[3]), bytes(12)), "unreadable"),
        (stream(header(shape=(-3,)), bytes(12)), "unreadable"),
        (stream(header(shape=(3.0,)), bytes(12)), "unreadable"),
        (stream(header(is_fortran=1), bytes(12)), "unreadable"),
        (stream(header().replace(b"(3,)", b"(3)"), bytes(12)), "unreadable"),
        (stream(header().replace(b"(3,)", b"(1 2,)"), bytes(48)), "unreadable"),
        (stream(header().replace(b"(3,)", b"(3,,)"), bytes(12)), "unreadable"),
        (stream(header().replace(b"(3,)", b"(03,)"), bytes(12)), "unreadable"),
        (stream(header().replace(b"(3,)", b"(,)"), bytes(12)), "unreadable"),
        (stream(header().replace(b"(3,)", b"(1+2,)"), bytes(12)), "unreadable"),
        (stream(header().replace(b"'<f4'", b"__import__('os')"), bytes(12)), "unreadable"),
        (stream(header().replace(b"<f4", b"\xff\xfe"), bytes(12)), "dtype"),
        (stream(header().replace(b"'descr'", b"'extra': 1, 'descr'"), bytes(12)), "unreadable"),
        (stream(header().replace(b"\n", b"\n\n"), bytes(12)), "unreadable"),
    ],
)
def test_a_malformed_stream_is_refused_with_the_reason(data: bytes, message: str) -> None:
    """Each way in which a stream can be wrong raises ValueError that says which."""
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        npy.view(data)


def agrees_with_numpy(data: bytes) -> None:
    """View either raises ValueError or gives what NumPy gives."""
    try:
        view = npy.view(data)
    except ValueError:
        return
    expected = loaded(data)
    assert (view.dtype, view.shape, view.tobytes()) == (expected.dtype, expected.shape, expected.tobytes())


@settings(deadline=None)
@given(st.binary(max_size=300))
@example(b"\x93NUMPY\x02\x00\x00\x00")
def test_any_bytes_are_read_as_numpy_does_or_refused(data: bytes) -> None:
    """Random bytes raise ValueError and nothing else."""
    agrees_with_numpy(data)


@settings(max_examples=300, deadline=None)
@given(arrays(), st.data())
def test_a_damaged_stream_is_read_as_numpy_does_or_refused(array: np.ndarray[Any, Any], data: st.DataObject) -> None:
    """Flipped, removed, repeated and foreign bytes anywhere raise ValueError, or NumPy reads the same."""
    stream = bytearray(saved(array))
    for _ in range(data.draw(st.integers(1, 4), "damages")):
        at = data.draw(st.integers(0, min(len(stream) - 1, 140)), "at")
        kind = data.draw(st.sampled_from(["set", "cut", "insert", "swap", "end"]), "kind")
        if kind == "set":
            stream[at] = data.draw(st.one_of(st.integers(0, 255), st.sampled_from(b"'(){},: 0123456789<>|=OfiubSVcM")))
        elif kind == "cut":
            del stream[at : at + data.draw(st.integers(1, 8))]
        elif kind == "insert":
            stream[at:at] = data.draw(st.binary(min_size=1, max_size=4))
        elif kind == "swap":
            other = data.draw(st.integers(0, len(stream) - 1))
            stream[at], stream[other] = stream[other], stream[at]
        else:
            del stream[at:]
        assume(stream)
    agrees_with_numpy(bytes(stream))


@settings(deadline=None)
@given(
    st.sampled_from(NUMPY_NAMES),
    st.lists(st.integers(0, 2**65), max_size=70),
    st.integers(0, 64),
    st.booleans(),
)
def test_any_declared_shape_is_read_as_numpy_does_or_refused(
    name: str, shape: list[int], nbytes: int, is_fortran: bool
) -> None:
    """Whatever lengths a header declares, only a payload of just that size is read."""
    data = stream(header(np.dtype(name).str, is_fortran, tuple(shape)), bytes(nbytes))
    try:
        assert npy.view(data).nbytes == nbytes
    except ValueError:
        return
    agrees_with_numpy(data)
