"""A model that has just been made, as objects in the store: who sends it on need not push it, it is not copied."""

from __future__ import annotations

import hashlib
from typing import Any

from lifl.superlink.rounds.chunk_map import Geometry
from lifl.superlink.rounds.model_objects import array_object, id_of, record_object
from lifl.superlink.store.content import PartContent
from lifl.superlink.store.store import ArenaStore, DurableStore


def offer_model(store: ArenaStore | DurableStore, geometry: Geometry, mean: Any) -> set[str]:
    """Has a mean's objects in the store; the ids of those that are held, until they are withdrawn.

    `mean` is the block's memory. It stays in the arena as long as one of them does.
    """
    held = set[str]()
    ids: dict[str, str] = {}
    for tensor, pieces in zip(geometry.spec.tensors, geometry.pieces, strict=True):
        chunks: dict[str, PartContent] = {}
        for piece in pieces:
            numbers = mean[piece.offset : piece.offset + piece.nbytes]
            digest = hashlib.sha256(piece.head)
            digest.update(numbers)
            chunks[digest.hexdigest()] = PartContent(piece.head, numbers)
        if len(chunks) < len(pieces):
            return held  # equal chunks in one array are described in another way
        held |= store.offer(chunks)
        described = array_object(list(chunks), tensor.dtype, tensor.shape)
        ids[tensor.name] = id_of(described)
        held |= store.offer({ids[tensor.name]: described})
    record = record_object(ids)
    return held | store.offer({id_of(record): record})
