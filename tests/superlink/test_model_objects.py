"""Objects that the server writes itself are those that Flower's classes would have written: their ids say so."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.app.message import array as flowers_array
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from hypothesis import given
from hypothesis import strategies as st
from test_chunk_map import MODEL

from lifl.superlink.rounds.chunk_map import Form, Geometry
from lifl.superlink.rounds.model_objects import Recognised, array_object, id_of, recognise, record_object
from lifl.tensor import TensorSpec

CHUNK_BYTES = 200


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower's clients cut arrays into small pieces."""
    monkeypatch.setattr(flowers_array, "FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE", CHUNK_BYTES)


def reply(arrays: dict[str, Any], **more: Any) -> RecordDict:
    """A client's reply."""
    record = ArrayRecord({name: Array(array) for name, array in arrays.items()})
    return RecordDict({"arrays": record, "metrics": MetricRecord({"num-examples": 3}), **more})


def tree_of(content: RecordDict) -> Any:
    """The tree of a message with that content."""
    return ObjectTree(object_id="e" * 64, children=[get_object_tree(content)])


def derived(content: RecordDict, model: dict[str, Any] | None = None) -> dict[str, bytes]:
    """The objects of a reply that a server writes which knows the model."""
    return recognise(Geometry(TensorSpec.from_arrays(model or MODEL), CHUNK_BYTES), tree_of(content), 1).objects


def test_an_array_is_described_as_flower_describes_it() -> None:
    """With the ids of its chunks, all of them different."""
    array = Array(MODEL["of three chunks"])
    ids = [object_id for object_id, _ in array.slice_array()]
    assert len(ids) > 2
    assert array_object(ids, array.dtype, array.shape) == array.deflate()
    assert id_of(array.deflate()) == array.object_id


def test_a_record_names_its_arrays_as_flowers_does() -> None:
    """Equal arrays are among its children once."""
    record = reply(MODEL).array_records["arrays"]
    said = record_object({name: array.object_id for name, array in record.items()})
    assert said == record.deflate()
    assert said.partition(b"\0")[0].count(b",") == len(MODEL) - 2


def test_arrays_and_record_of_a_reply_need_not_be_pushed() -> None:
    """All of them are written here, also those of several chunks, without numbers, 0-d, and equal ones."""
    content = reply(MODEL)
    objects = {object_id: one.deflate() for object_id, one in get_all_nested_objects(content).items()}
    record = content.array_records["arrays"]
    expected = {one.object_id: one.deflate() for one in (record, *record.values())}
    assert derived(content) == expected
    assert len(expected) == len(MODEL)  # two counters are one, and the record
    assert expected.items() <= objects.items()


def test_counters_that_differ_are_written_too() -> None:
    """Then a message names all of them."""
    arrays = {**MODEL, "bn2.count": np.array(6, np.int64)}
    assert len(derived(reply(arrays))) == len(MODEL) + 1


@pytest.mark.parametrize(
    ("change", "written"),
    [
        ({"one": np.ones((1, 1), np.float64)}, len(MODEL) - 1),  # all but what is of another shape
        ({"one": np.array([[[2]]], np.int64)}, len(MODEL) - 1),
        ({"half": np.zeros((3, 20), np.float16)}, len(MODEL)),  # other numbers are other chunks
        ({"more": np.ones(50)}, 0),  # nobody knows which is which
    ],
)
def test_what_is_not_as_expected_is_not_written(change: dict[str, Any], written: int) -> None:
    """An object that its hash does not confirm has to be pushed."""
    content = reply({**MODEL, **change})
    objects = {object_id: one.deflate() for object_id, one in get_all_nested_objects(content).items()}
    found = derived(content)
    assert found.items() <= objects.items()
    assert len(found) == written


def test_another_order_of_keys_is_not_guessed() -> None:
    """Only arrays that happen to be alike are written, each as what it is."""
    content = reply(dict(reversed(MODEL.items())))
    objects = {object_id: one.deflate() for object_id, one in get_all_nested_objects(content).items()}
    assert derived(content).items() <= objects.items()


def test_equal_chunks_within_an_array_are_left_to_the_client() -> None:
    """Flower describes them in another way."""
    content = reply({"zeros": np.zeros(1000, np.float32)})
    assert derived(content, {"zeros": np.zeros(1000, np.float32)}) == {}


@pytest.mark.parametrize(
    "tree",
    [
        ObjectTree(object_id="a" * 64),
        ObjectTree(object_id="a" * 64, children=[ObjectTree(object_id="b" * 64)] * 3),
        ObjectTree(object_id="", children=[ObjectTree(children=[ObjectTree(children=[ObjectTree(object_id="?")])])]),
        get_object_tree(RecordDict({"c": ConfigRecord({"x": 1})})),
    ],
    ids=["bare", "wide", "no ids", "a record for a message"],
)
def test_other_trees_give_nothing(tree: Any) -> None:
    """Whatever a client announces."""
    assert recognise(Geometry(TensorSpec.from_arrays(MODEL), CHUNK_BYTES), tree, 1) == Recognised(None, {})


# ---------------------------------------------------------------- where chunks belong


def names_of(geometry: Geometry, form: Form) -> list[str]:
    """The tensors that the arrays of a record of this form are."""
    return [geometry.spec.tensors[j].name for j in form.arrays]


def test_the_hashes_confirm_where_chunks_belong() -> None:
    """In the model's order, with two counters that are one."""
    geometry = Geometry(TensorSpec.from_arrays(MODEL), CHUNK_BYTES)
    form = recognise(geometry, tree_of(reply(MODEL)), 1).form
    assert form is not None
    assert names_of(geometry, form) == [name for name in MODEL if name != "bn2.count"]


@pytest.mark.parametrize(
    "change",
    [
        {"one": np.array([[[2]]], np.int64)},
        {"of three chunks": MODEL["of three chunks"].reshape(25, 8)},
        {"half": MODEL["half"].astype(np.float32)[:, :10]},
    ],
    ids=["dtype", "shape", "both"],
)
def test_what_the_hashes_do_not_confirm_has_no_place(change: dict[str, Any]) -> None:
    """As many chunks of as many bytes are not enough."""
    geometry = Geometry(TensorSpec.from_arrays(MODEL), CHUNK_BYTES)
    assert recognise(geometry, tree_of(reply({**MODEL, **change})), 1).form is None


def test_arrays_that_change_places_have_none() -> None:
    """Two arrays of one dtype and shape, each under the other's name, are not in the model's order."""
    model = {"a": np.arange(300, dtype=np.float32), "b": np.arange(300, dtype=np.float32) + 1}
    geometry = Geometry(TensorSpec.from_arrays(model), CHUNK_BYTES)
    right, turned = recognise(geometry, tree_of(reply(model)), 1), dict(reversed(model.items()))
    assert right.form is not None
    found = recognise(geometry, tree_of(reply(turned)), 1)
    assert found.form is None
    assert len(found.objects) == 2  # the arrays are described right; the record is not


def test_chunks_that_change_places_have_none() -> None:
    """An Array that names its chunks in another order than its tree is no array of the model's."""
    model = {"a": np.arange(300, dtype=np.float32)}
    geometry = Geometry(TensorSpec.from_arrays(model), CHUNK_BYTES)
    content = reply(model)
    array = content.array_records["arrays"]["a"]
    ids = [object_id for object_id, _ in array.slice_array()]
    said = array_object(ids, array.dtype, array.shape).replace(b"[0, 1, 2", b"[0, 2, 1")
    record = record_object({"a": id_of(said)})
    chunks = [ObjectTree(object_id=object_id) for object_id in ids]
    tree = ObjectTree(object_id=id_of(record), children=[ObjectTree(object_id=id_of(said), children=chunks)])
    message = ObjectTree(object_id="e" * 64, children=[ObjectTree(object_id="d" * 64, children=[tree])])
    assert recognise(geometry, message, 1).form is None


@given(order=st.permutations(list(MODEL)), later=st.permutations(list(MODEL)), node_id=st.integers(1, 3))
def test_any_order_is_known_when_it_comes_again(order: list[str], later: list[str], node_id: int) -> None:
    """A node's own order is confirmed the second time, whatever other nodes have taught meanwhile."""
    geometry = Geometry(TensorSpec.from_arrays(MODEL), CHUNK_BYTES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flowers_array, "FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE", CHUNK_BYTES)
        said = reply({name: MODEL[name] for name in order})
        arrays = {name: one.object_id for name, one in said.array_records["arrays"].items()}
        geometry.learn(node_id, arrays)
        for other in range(4, 10):
            geometry.learn(other, {name: arrays[name] for name in later})
        form = recognise(geometry, tree_of(said), node_id).form
    assert form is not None
    # The two counters are one array, and either name may stand for it.
    named = ["bn" if name.startswith("bn") else name for name in names_of(geometry, form)]
    assert named == list(dict.fromkeys("bn" if name.startswith("bn") else name for name in order))


@given(order=st.permutations(list(MODEL)))
def test_nobody_can_unteach_the_models_own_order(order: list[str]) -> None:
    """Whatever nodes have taught, a reply in the model's order is recognised as before."""
    geometry = Geometry(TensorSpec.from_arrays(MODEL), CHUNK_BYTES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flowers_array, "FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE", CHUNK_BYTES)
        before = recognise(geometry, tree_of(reply(MODEL)), 1)
        for node_id in (1, 2, 3):
            geometry.learn(node_id, {name: name for name in order})
        assert recognise(geometry, tree_of(reply(MODEL)), 1) == before
