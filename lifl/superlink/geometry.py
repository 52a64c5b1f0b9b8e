"""Where each chunk of an update belongs in the update's block. Pure.

A client sends an array as a ``.npy`` stream cut into chunks, each an object of its own whose content is a head
(``ArrayChunk  <bytes>`` and a zero byte) and the piece. Of a model whose spec is known, the heads, the ``.npy``
headers and all lengths are known before anything comes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from io import BytesIO

import attrs
import numpy as np

from lifl.tensor import ITEM_BYTES, NUMPY_DTYPES, Tensor, TensorSpec


@attrs.frozen
class Piece:
    """One chunk of a tensor: its object begins with ``head``, ``nbytes`` of numbers follow, for ``offset``."""

    head: bytes
    offset: int
    nbytes: int

    @property
    def object_bytes(self) -> int:
        """Of the whole object."""
        return len(self.head) + self.nbytes


def npy_header(tensor: Tensor) -> bytes:
    """What NumPy writes before an array in C's order."""
    header = BytesIO()
    described = np.lib.format.dtype_to_descr(NUMPY_DTYPES[tensor.dtype])
    np.lib.format.write_array_header_1_0(header, {"descr": described, "fortran_order": False, "shape": tensor.shape})
    return header.getvalue()


class Geometry:
    """Of one spec and one chunk size; ``pieces[j][k]`` is chunk *k* of tensor *j*."""

    def __init__(self, spec: TensorSpec, chunk_bytes: int) -> None:
        self.spec, self.chunk_bytes = spec, chunk_bytes
        self.pieces = [
            self._cut(tensor, offset) for tensor, (_, _, offset, _) in zip(spec.tensors, spec.offsets, strict=True)
        ]
        self._learned: dict[tuple[int, ...], list[int]] = {}

    def _cut(self, tensor: Tensor, offset: int) -> list[Piece]:
        header = npy_header(tensor)
        nbytes = tensor.size * ITEM_BYTES[tensor.dtype]
        pieces = []
        for begin in range(0, len(header) + nbytes, self.chunk_bytes):
            end = min(begin + self.chunk_bytes, len(header) + nbytes)
            start = max(begin, len(header))
            head = b"ArrayChunk  %d\x00" % (end - begin) + header[begin:end]
            pieces.append(Piece(head, offset + start - len(header), max(end - start, 0)))
        return pieces

    def align(self, chunk_counts: Sequence[int]) -> list[int] | None:
        """Which tensor each array of a message probably is, told by how many chunks each has; None if nobody knows.

        A message names equal arrays once: of BatchNorm's counters, all equal, there is one. What is told here decides
        only where bytes are put; what they are is read from the message when it is complete.
        """
        counts = tuple(chunk_counts)
        if counts in self._learned:
            return self._learned[counts]
        for chosen in (range(len(self.pieces)), self._without_equal_scalars()):
            if [len(self.pieces[j]) for j in chosen] == list(counts):
                return list(chosen)
        return None

    def _without_equal_scalars(self) -> list[int]:
        return list(dict.fromkeys(self.first_equals))

    @cached_property
    def first_equals(self) -> list[int]:
        """Per tensor the first that it probably equals: itself, or of single numbers the first of their kind."""
        firsts: dict[Tensor, int] = {}
        return [
            j if tensor.size > 1 else firsts.setdefault(attrs.evolve(tensor, name=""), j)
            for j, tensor in enumerate(self.spec.tensors)
        ]

    def learn(self, chunk_counts: Sequence[int], alignment: list[int]) -> None:
        """A message of this form turned out to be aligned like this."""
        if len(self._learned) < 64:
            self._learned[tuple(chunk_counts)] = alignment
