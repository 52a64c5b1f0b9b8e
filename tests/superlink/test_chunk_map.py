"""The place of each chunk is where Flower's own Array puts its bytes, for every dtype and shape."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from flwr.app import Array
from flwr.app.message import array as flowers_array
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as stn

from lifl.superlink.rounds import chunk_map as geometry_module
from lifl.superlink.rounds.chunk_map import Geometry, npy_header
from lifl.tensor import DTYPES, NUMPY_DTYPES, Tensor, TensorSpec

MODEL = {
    "of three chunks": np.arange(200, dtype=np.float32).reshape(8, 25),
    "bn1.count": np.array(5, np.int64),
    "0-d": np.array(1.5, np.float32),
    "empty": np.zeros((0, 4), np.float32),
    "half": np.linspace(0, 1, 60).astype(np.float16).reshape(3, 20),
    "bn2.count": np.array(5, np.int64),
    "one": np.ones((1, 1, 1), np.float64),
    "yes": np.array([True, False]),
}


def chunks_of(array: Any, chunk_bytes: int) -> list[tuple[str, bytes]]:
    """Flower's chunks of an array: their ids and contents."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flowers_array, "FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE", chunk_bytes)
        return [(object_id, chunk.deflate()) for object_id, chunk in Array(array).slice_array()]


def check(arrays: dict[str, Any], chunk_bytes: int) -> None:
    """Heads, lengths and offsets: put together, the pieces are Flower's chunks and lifl's update."""
    spec = TensorSpec.from_arrays(arrays)
    geometry = Geometry(spec, chunk_bytes)
    block = bytearray(spec.layout.update_bytes)
    for pieces, array in zip(geometry.pieces, arrays.values(), strict=True):
        chunks = chunks_of(array, chunk_bytes)
        assert len(pieces) == len(chunks)
        for piece, (_, content) in zip(pieces, chunks, strict=True):
            assert content[: len(piece.head)] == piece.head
            assert len(content) == piece.object_bytes
            block[piece.offset : piece.offset + piece.nbytes] = content[len(piece.head) :]
    for name, view in spec.views(block).items():
        np.testing.assert_array_equal(view, arrays[name])


@pytest.mark.parametrize("chunk_bytes", [64, 128, 130, 1000, 5_242_880])
def test_pieces_are_flowers_chunks(chunk_bytes: int) -> None:
    """Also where a chunk ends in the middle of the header or of a number."""
    check(MODEL, chunk_bytes)


@given(
    array=stn.arrays(
        st.sampled_from([NUMPY_DTYPES[name] for name in DTYPES if name != "bfloat16"]),
        stn.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5),
        elements={"allow_nan": False},
    ),
    chunk_bytes=st.integers(60, 700),
)
def test_any_array_is_cut_as_flower_cuts_it(array: Any, chunk_bytes: int) -> None:
    """Whatever its dtype and shape."""
    check({"w": array, "v": array}, chunk_bytes)


@pytest.mark.parametrize("shape", [(), (0,), (3,), (3, 4), (1, 0, 2)])
@pytest.mark.parametrize("dtype", [name for name in DTYPES if name != "bfloat16"])
def test_headers_are_numpys(dtype: str, shape: tuple[int, ...]) -> None:
    """As ``np.save`` writes them before an array in C's order."""
    saved = Array(np.zeros(shape, dtype)).data
    header = npy_header(Tensor("w", dtype, shape))
    assert saved[: len(header)] == header
    assert len(saved) == len(header) + np.zeros(shape, dtype).nbytes


# ---------------------------------------------------------------- which array of a message is which tensor

COUNTS = [8, 2, 2, 1, 2, 2, 2, 2]  # of chunks of 128 bytes
GEOMETRY = Geometry(TensorSpec.from_arrays(MODEL), 128)


def test_a_message_that_names_every_array_is_in_the_models_order() -> None:
    """As many chunks as the model's tensors have."""
    assert [len(pieces) for pieces in GEOMETRY.pieces] == COUNTS
    assert [form.arrays for form in GEOMETRY.forms(1, COUNTS)] == [list(range(8))]


def test_equal_counters_are_named_once() -> None:
    """Two counters of one dtype and shape are probably equal, the others probably are not."""
    (form,) = GEOMETRY.forms(1, [*COUNTS[:5], *COUNTS[6:]])
    assert form.sources == (0, 1, 2, 3, 4, 1, 6, 7)
    assert form.arrays == [0, 1, 2, 3, 4, 6, 7]


def test_another_form_is_learned_from_a_reply_that_was_read() -> None:
    """Nobody knows it before; then its node's next one is known, and so is that of a node that is like it."""
    geometry = Geometry(TensorSpec.from_arrays(MODEL), 128)
    turned = list(reversed(MODEL))
    counts = list(reversed(COUNTS))
    assert geometry.forms(1, counts) == []
    geometry.learn(1, {name: name for name in turned})
    assert [form.arrays for form in geometry.forms(1, counts)] == [list(reversed(range(8)))]
    assert geometry.forms(2, counts) == geometry.forms(1, counts)


def test_a_nodes_own_form_is_not_displaced_by_others() -> None:
    """Whatever others teach."""
    geometry = Geometry(TensorSpec.from_arrays(MODEL), 128)
    geometry.learn(1, {name: name for name in reversed(MODEL)})
    mine = geometry.forms(1, list(reversed(COUNTS)))
    names = list(MODEL)
    for n in range(100):
        geometry.learn(2 + n, {name: name for name in names[n % 8 :] + names[: n % 8]})
    assert mine[0] in geometry.forms(1, list(reversed(COUNTS)))


def test_several_threads_teach_it_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """When it forgets old forms too: none of them fails."""
    monkeypatch.setattr(geometry_module, "MAX_LEARNED", 4)
    geometry = Geometry(TensorSpec.from_arrays(MODEL), 128)
    arrays = {name: name for name in reversed(MODEL)}

    def teach(thread: int) -> None:
        for n in range(10_000):
            geometry.learn(n * 4 + thread, arrays)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(teach, range(4)))
    finally:
        sys.setswitchinterval(before)
    assert len(geometry._learned) == 4


def test_clients_cannot_teach_it_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The forms of a bounded number of nodes are kept, those that replied last."""
    monkeypatch.setattr(geometry_module, "MAX_LEARNED", 64)
    geometry = Geometry(TensorSpec.from_arrays(MODEL), 128)
    for n in range(1000):
        geometry.learn(n, {name: name for name in reversed(MODEL)})
    assert list(geometry._learned) == list(range(936, 1000))
    assert len({id(form) for form in geometry._learned.values()}) == 1, "of those alike one copy"
