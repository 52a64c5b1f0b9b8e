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

from lifl.superlink.geometry import Geometry

NUMPY = "numpy.ndarray"


def array_object(chunk_ids: Sequence[str], dtype: str, shape: Sequence[int]) -> bytes:
    """What Flower's Array says of itself if all of its chunks differ."""
    said = {"dtype": dtype, "shape": list(shape), "stype": NUMPY, "arraychunk_ids": list(range(len(chunk_ids)))}
    return _object("Array", chunk_ids, json.dumps(said).encode())


def record_object(arrays: Mapping[str, str]) -> bytes:
    """What Flower's ArrayRecord says of itself: the arrays' names and ids."""
    return _object("ArrayRecord", list(dict.fromkeys(arrays.values())), json.dumps(dict(arrays)).encode())


def derive(geometry: Geometry, tree: Any) -> dict[str, bytes]:
    """Of a reply's tree, the objects that describe its arrays, where they are what the model lets expect."""
    found: dict[str, bytes] = {}
    for record in (record for content in tree.children for record in content.children if record.children):
        alignment = geometry.align([len(array.children) for array in record.children])
        if alignment is None:
            return {}
        ids: dict[int, str] = {}
        for j, array in zip(alignment, record.children, strict=True):
            tensor = geometry.spec.tensors[j]
            described = array_object([chunk.object_id for chunk in array.children], tensor.dtype, tensor.shape)
            ids[j] = array.object_id
            if id_of(described) == array.object_id:
                found[array.object_id] = described
        names = {t.name: ids.get(j, ids.get(geometry.first_equals[j], "")) for j, t in enumerate(geometry.spec.tensors)}
        described = record_object(names)
        if id_of(described) == record.object_id:
            found[record.object_id] = described
    return found


def id_of(content: bytes) -> str:
    """An object's id."""
    return hashlib.sha256(content).hexdigest()


def _object(kind: str, children: Sequence[str], body: bytes) -> bytes:
    return f"{kind} {','.join(children)} {len(body)}".encode() + b"\x00" + body
