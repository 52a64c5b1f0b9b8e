"""Objects that the server can write itself, so that nobody has to push them: of a reply, and of a new model. Pure.

An object's id is the hash of its content. The description of an array (its dtype, shape and the ids of its chunks) and
that of a record of arrays (their names and ids) follow from the model and the tree of a message. If the hash of a
description that is written here is an id in the tree, the description is that object.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs

from lifl.superlink.rounds.chunk_map import Form, Geometry

NUMPY = "numpy.ndarray"


def array_object(chunk_ids: Sequence[str], dtype: str, shape: Sequence[int]) -> bytes:
    """The object of a Flower Array whose chunks all differ."""
    description = {"dtype": dtype, "shape": list(shape), "stype": NUMPY, "arraychunk_ids": list(range(len(chunk_ids)))}
    return _object("Array", chunk_ids, json.dumps(description).encode())


def record_object(arrays: Mapping[str, str]) -> bytes:
    """The object of a Flower ArrayRecord: the arrays' names and ids."""
    return _object("ArrayRecord", list(dict.fromkeys(arrays.values())), json.dumps(dict(arrays)).encode())


@attrs.frozen
class Recognised:
    """A reply's tree, read by a server that knows the model.

    Attributes
    ----------
    form : Form or None
        How the record's arrays belong to the model's tensors, confirmed by the hashes; None if they confirm none.
    objects : dict of str to bytes
        The objects of the tree that the server can write itself, by id.
    """

    form: Form | None
    objects: dict[str, bytes]


def record_of(tree: Any) -> Any:
    """A tree's first record that has arrays, or None: message > RecordDict > record > array > chunk."""
    return next((record for content in tree.children for record in content.children if record.children), None)


def recognise(geometry: Geometry, tree: Any, node_id: int) -> Recognised:
    """Compares the first record of arrays in a node's announced tree with the forms that the model lets expect.

    A record's id is the hash of the arrays' names and ids, an array's that of its dtype, its shape and the ids of its
    chunks in order. So a form whose record has the announced id is no guess: each chunk's place follows from the form,
    if the message turns out to contain that record.
    """
    record = record_of(tree)
    if record is None:
        return Recognised(None, {})
    arrays = [(array.object_id, [chunk.object_id for chunk in array.children]) for array in record.children]
    tensors, found = geometry.spec.tensors, dict[str, bytes]()
    for form in geometry.forms(node_id, [len(chunk_ids) for _, chunk_ids in arrays]):
        ids, is_confirmed = dict[int, str](), True
        for j, (object_id, chunk_ids) in zip(form.arrays, arrays, strict=True):
            described = array_object(chunk_ids, tensors[j].dtype, tensors[j].shape)
            ids[j] = object_id
            if id_of(described) == object_id:
                found[object_id] = described
            else:
                is_confirmed = False
        described = record_object({tensors[j].name: ids[form.sources[j]] for j in form.keys})
        if id_of(described) == record.object_id:
            found[record.object_id] = described
            if is_confirmed:
                return Recognised(form, found)
    return Recognised(None, found)


def id_of(content: bytes) -> str:
    """An object's id."""
    return hashlib.sha256(content).hexdigest()


def objects_of_model(geometry: Geometry, mean: Any) -> Iterator[tuple[str, bytes, Any]]:
    """A new model's objects, each with its id, its bytes, and the numbers that follow these: a part of `mean`, or None.

    `mean` is the memory of the model's block; nothing is copied. Ends before the first array in which two chunks are
    equal: such an array is described in another way.
    """
    ids: dict[str, str] = {}
    for tensor, pieces in zip(geometry.spec.tensors, geometry.pieces, strict=True):
        chunks: dict[str, tuple[bytes, Any]] = {}
        for piece in pieces:
            numbers = mean[piece.offset : piece.offset + piece.nbytes]
            digest = hashlib.sha256(piece.head)
            digest.update(numbers)
            chunks[digest.hexdigest()] = piece.head, numbers
        if len(chunks) < len(pieces):
            return
        for object_id, (head, numbers) in chunks.items():
            yield object_id, head, numbers
        described = array_object(list(chunks), tensor.dtype, tensor.shape)
        ids[tensor.name] = id_of(described)
        yield ids[tensor.name], described, None
    record = record_object(ids)
    yield id_of(record), record, None


def _object(kind: str, children: Sequence[str], body: bytes) -> bytes:
    return f"{kind} {','.join(children)} {len(body)}".encode() + b"\x00" + body
