"""Objects that the server can write itself, so that nobody has to push them. Pure.

An object's id is the hash of its content. What describes an array (its dtype, shape and the ids of its chunks) and a
record of arrays (their names and ids) follows from the model and the tree of a message; if the hash of what is written
here is the id that the tree names, it is that object.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from lifl.superlink.rounds.chunk_map import Form, Geometry

NUMPY = "numpy.ndarray"


def array_object(chunk_ids: Sequence[str], dtype: str, shape: Sequence[int]) -> bytes:
    """What Flower's Array says of itself if all of its chunks differ."""
    said = {"dtype": dtype, "shape": list(shape), "stype": NUMPY, "arraychunk_ids": list(range(len(chunk_ids)))}
    return _object("Array", chunk_ids, json.dumps(said).encode())


def record_object(arrays: Mapping[str, str]) -> bytes:
    """What Flower's ArrayRecord says of itself: the arrays' names and ids."""
    return _object("ArrayRecord", list(dict.fromkeys(arrays.values())), json.dumps(dict(arrays)).encode())


@attrs.frozen
class Recognised:
    """What a reply's tree tells a server that knows the model.

    Attributes
    ----------
    form : Form or None
        How the record's arrays belong to the model's tensors, confirmed by the hashes; None if they confirm none.
    objects : dict of str to bytes
        The objects of the tree that the server can write itself, by id.
    """

    form: Form | None
    objects: dict[str, bytes]


def recognise(geometry: Geometry, tree: Any, node_id: int) -> Recognised:
    """Compares the first record of arrays in a node's announced tree with what the model lets expect.

    A record's id is the hash of the arrays' names and ids, an array's that of its dtype, its shape and the ids of its
    chunks in order. So a form whose record has the announced id is no guess: each chunk's place follows from it, if the
    message turns out to contain that record.
    """
    record = next((r for content in tree.children for r in content.children if r.children), None)
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


def _object(kind: str, children: Sequence[str], body: bytes) -> bytes:
    return f"{kind} {','.join(children)} {len(body)}".encode() + b"\x00" + body
