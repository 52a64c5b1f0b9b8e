"""TensorSpec, its layout and its views."""

from __future__ import annotations

import gc
import struct
import weakref
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lifl.tensor import (
    ALIGNMENT_BYTES,
    CODES,
    DTYPES,
    ITEM_BYTES,
    NUMPY_DTYPES,
    Layout,
    Tensor,
    TensorSpec,
    dtype_name,
    sum_item_bytes,
    torch_views,
)

SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)
SPECS = st.lists(st.tuples(st.sampled_from(DTYPES), SHAPES), max_size=8).map(
    lambda rows: TensorSpec(tuple(Tensor(f"t{i}", dtype, shape) for i, (dtype, shape) in enumerate(rows)))
)


def test_spec_is_a_mapping_of_what_the_arrays_are() -> None:
    """A spec has the arrays' names in their order, their dtypes and their shapes."""
    arrays = {"w": np.zeros((2, 3), np.float32), "steps": np.array(7), "none": np.zeros((0, 4), np.float16)}
    spec = TensorSpec.from_arrays(arrays)
    assert list(spec) == ["w", "steps", "none"]
    assert len(spec) == 3
    assert spec["steps"] == Tensor("steps", "int64", ())
    assert [t.size for t in spec.values()] == [6, 1, 0]
    assert spec.nbytes == 6 * 4 + 8


def test_equal_models_have_equal_specs() -> None:
    """Two models of one form give specs that are equal and hash alike; another order of keys does not."""
    a, b = np.zeros(3), np.zeros(4, np.int8)
    spec = TensorSpec.from_arrays({"a": a, "b": b})
    assert spec == TensorSpec.from_arrays({"a": a + 1, "b": b + 1})
    assert hash(spec) == hash(TensorSpec.from_arrays({"a": a, "b": b}))
    assert spec != TensorSpec.from_arrays({"b": b, "a": a})


@pytest.mark.parametrize(
    "value",
    [
        [1.0, 2.0],
        3.0,
        "text",
        None,
        np.zeros(2, np.complex64),
        np.zeros(2, np.uint16),
        np.zeros(2, np.uint64),
        np.zeros(2, np.longdouble),
        np.array(["a"]),
        np.array([object()]),
        np.zeros(2, "datetime64[s]"),
        np.zeros(2, [("x", "f4")]),
        np.zeros(2, ">f4"),
    ],
    ids=lambda value: str(getattr(value, "dtype", type(value).__name__)),
)
def test_other_than_the_closed_list_of_dtypes_is_refused(value: Any) -> None:
    """An object that is no array of one of the ten dtypes is a TypeError that names the array."""
    with pytest.raises(TypeError, match="'w'"):
        TensorSpec.from_arrays({"w": value})


def test_two_tensors_of_one_name_are_refused() -> None:
    """Keys that are the same as strings cannot both be in a spec."""
    spec = TensorSpec.from_arrays({1: np.zeros(1), "1": np.zeros(2)})
    with pytest.raises(ValueError, match="same name"):
        spec["1"]


def test_byte_order_is_part_of_the_dtype() -> None:
    """A byte-swapped dtype is not taken for the native one."""
    assert dtype_name(np.zeros(1, "<f4")) == "float32"
    assert dtype_name(np.zeros(1, ">f4")) != "float32"


@given(SPECS)
def test_layout_is_disjoint_aligned_and_one_run_per_dtype(spec: TensorSpec) -> None:
    """Every dtype is one aligned run, and no two runs overlap, in updates, sums and means."""
    for layout in (spec.layout, spec.flower_layout):
        assert len({s.dtype for s in layout.segments}) == len(layout.segments)
        runs: list[list[tuple[int, int]]] = [[], [], []]
        for s in layout.segments:
            mean_item = ITEM_BYTES[s.dtype]
            if layout is spec.flower_layout and s.dtype not in ("float16", "float32"):
                mean_item = 8
            offsets = (s.update_offset, s.sum_offset, s.mean_offset)
            items = (ITEM_BYTES[s.dtype], sum_item_bytes(s.dtype), mean_item)
            for run, offset, item in zip(runs, offsets, items, strict=True):
                assert offset % ALIGNMENT_BYTES == 0
                run.append((offset, offset + s.count * item))
        for run, room in zip(runs, (layout.update_bytes, layout.sum_bytes, layout.mean_bytes), strict=True):
            ends = [0, *(end for _, end in run)]
            assert all(begin >= end for (begin, _), end in zip(run, ends, strict=False))
            assert ends[-1] <= room


@given(SPECS, st.randoms(use_true_random=False))
def test_views_hold_what_is_written_to_them(spec: TensorSpec, random: Any) -> None:
    """Every tensor has bytes of its own, at the offset that `offsets` tells, and no view is a copy."""
    buffer = np.zeros(spec.layout.update_bytes, np.uint8)
    views = spec.views(buffer)
    written = {}
    for name, view in views.items():
        bits = np.frombuffer(random.randbytes(view.nbytes), np.uint8)
        written[name] = bits % 2 if spec[name].dtype == "bool" else bits
        if view.size:
            view.reshape(-1).view(np.uint8)[...] = written[name]
    for (name, code, offset, count), (key, view) in zip(spec.offsets, views.items(), strict=True):
        assert name == key
        assert code == CODES[spec[name].dtype]
        assert view.shape == spec[name].shape
        assert view.dtype == NUMPY_DTYPES[spec[name].dtype]
        assert count == view.size
        assert bytes(buffer[offset : offset + view.nbytes]) == bytes(written[name])


def test_many_tensors_are_few_segments() -> None:
    """Ten thousand tensors of two dtypes are two runs of numbers."""
    arrays = {f"t{i}": np.zeros(i % 3, np.float32 if i % 2 else np.int64) for i in range(10_000)}
    spec = TensorSpec.from_arrays(arrays)
    assert len(spec.layout.segments) == 2
    assert len(spec.offsets) == 10_000


def test_views_keep_the_buffer_and_its_protection() -> None:
    """A view keeps its buffer alive and is writable exactly if the buffer is."""
    spec = TensorSpec.from_arrays({"w": np.zeros(4, np.float32)})
    buffer = np.zeros(spec.layout.update_bytes, np.uint8)
    seen = weakref.ref(buffer)
    view = spec.views(buffer)["w"]
    assert view.flags.writeable
    del buffer
    gc.collect()
    assert seen() is not None
    assert not spec.views(bytes(64))["w"].flags.writeable


@pytest.mark.parametrize("tail", [(), (0,), (3, 0)])
def test_empty_and_scalar_tensors_have_views(tail: tuple[int, ...]) -> None:
    """An empty tensor at the very end of a buffer and a 0-d tensor have views of their shape."""
    spec = TensorSpec((Tensor("a", "float32", (16,)), Tensor("b", "int8", tail)))
    assert spec.views(np.zeros(spec.layout.update_bytes, np.uint8))["b"].shape == tail


def test_model_without_tensors_has_a_layout() -> None:
    """A model of no tensors takes no bytes."""
    spec = TensorSpec.from_arrays({})
    assert (spec.nbytes, spec.layout.segments, spec.views(b"")) == (0, (), {})


def test_flower_means_of_integers_are_float64() -> None:
    """With Flower's dtypes the mean of integers and booleans is float64, that of floats keeps its dtype."""
    names = [d for d in DTYPES if d != "bfloat16"]
    spec = TensorSpec.from_arrays({d: np.zeros(3, d) for d in names})
    views = spec.flower_views(np.zeros(spec.flower_layout.mean_bytes, np.uint8))
    floats = ("float16", "float32", "float64")
    assert {d: v.dtype.name for d, v in views.items()} == {d: d if d in floats else "float64" for d in names}


@given(SPECS, st.integers(0, 3))
def test_control_block_says_the_layout_again(spec: TensorSpec, flags: int) -> None:
    """The encoded form of a layout decodes to the same layout and flags."""
    assert Layout.decode(spec.layout.encode(flags)) == (spec.layout, flags)


@given(st.binary(max_size=400))
def test_any_bytes_as_control_block_are_refused_or_stay_inside(data: bytes) -> None:
    """A damaged control block is a ValueError, or a layout whose segments lie inside their blocks."""
    try:
        layout, _ = Layout.decode(data)
    except (ValueError, struct.error):
        return
    for s in layout.segments:
        assert s.update_offset + s.count * ITEM_BYTES[s.dtype] <= layout.update_bytes


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, 11, "claims 11"),
        (0, 2, "claims 2"),
        (32, 10, "names dtype 10"),
        (40, 2**40, "leaves"),
        (56, 2**50, "leaves"),
    ],
    ids=["too many segments", "truncated", "unknown dtype", "count", "offset"],
)
def test_damaged_control_block_names_its_damage(at: int, value: int, message: str) -> None:
    """A control block with a number out of bounds is refused with a message that says which."""
    data = bytearray(TensorSpec.from_arrays({"w": np.zeros(4, np.float32)}).layout.encode(0))
    struct.pack_into("<I" if at in (0, 32) else "<Q", data, at, value)
    with pytest.raises(ValueError, match=message):
        Layout.decode(bytes(data))


def test_torch_tensors_are_the_same_memory() -> None:
    """Torch tensors over views share their bytes, bfloat16 ones with torch's own dtype."""
    torch = pytest.importorskip("torch")
    model = {"w": torch.ones(2, 3), "h": torch.ones(4, dtype=torch.bfloat16), "n": torch.tensor(3)}
    spec = TensorSpec.from_arrays(model)
    assert [t.dtype for t in spec.values()] == ["float32", "bfloat16", "int64"]
    views = spec.views(np.zeros(spec.layout.update_bytes, np.uint8))
    tensors = torch_views(spec, views)
    for name, tensor in tensors.items():
        assert (tensor.dtype, tensor.shape) == (model[name].dtype, model[name].shape)
        tensor.copy_(model[name])
        assert tensor.data_ptr() == views[name].ctypes.data
    assert views["h"].tolist() == [0x3F80] * 4
