"""The place of each chunk of an update in the update's block, and the forms in which nodes reply.

Owns the memory of those forms. Sees no bytes of an update, only names and hashes.

A client sends an array as a ``.npy`` stream cut into chunks, each an object of its own whose content is a head
(``ArrayChunk  <bytes>`` and a zero byte) and the piece. If the model's spec is known, the heads, the ``.npy`` headers
and all lengths are known before anything comes.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from io import BytesIO

import attrs
import numpy as np

from lifl.tensor import ITEM_BYTES, NUMPY_DTYPES, Tensor, TensorSpec

MAX_LEARNED = 4096
"""Nodes whose forms are remembered."""


@attrs.frozen
class Piece:
    """A chunk of a tensor: its object is ``head`` and ``nbytes`` of numbers, whose place is ``offset`` in the block."""

    head: bytes
    offset: int
    nbytes: int

    @property
    def object_bytes(self) -> int:
        """Length of the whole object."""
        return len(self.head) + self.nbytes


def npy_header(tensor: Tensor) -> bytes:
    """The bytes that NumPy writes before an array in C's order."""
    header = BytesIO()
    described = np.lib.format.dtype_to_descr(NUMPY_DTYPES[tensor.dtype])
    np.lib.format.write_array_header_1_0(header, {"descr": described, "fortran_order": False, "shape": tensor.shape})
    return header.getvalue()


@attrs.frozen
class Form:
    """The order in which a record names a model's tensors, and which of them share one array.

    A message has equal arrays once: all of BatchNorm's counters, which are equal, are one array.

    Attributes
    ----------
    keys : tuple of int
        The tensors' indices in the record's order.
    sources : tuple of int
        For each tensor of the model the index of the one whose array it shares; its own if it shares none.
    """

    keys: tuple[int, ...]
    sources: tuple[int, ...]

    @property
    def arrays(self) -> list[int]:
        """The tensor's index for each array of the record, in the order in which a message has them."""
        return list(dict.fromkeys(self.sources[j] for j in self.keys))


class Geometry:
    """The cut of one spec into chunks of one size; ``pieces[j][k]`` is chunk *k* of tensor *j*. Any thread."""

    def __init__(self, spec: TensorSpec, chunk_bytes: int) -> None:
        self.spec, self.chunk_bytes = spec, chunk_bytes
        self.pieces = [
            self._cut(tensor, offset) for tensor, (_, _, offset, _) in zip(spec.tensors, spec.offsets, strict=True)
        ]
        self._indices = {tensor.name: j for j, tensor in enumerate(spec.tensors)}
        order = tuple(range(len(self.pieces)))
        # The model's own order, with all arrays different or with equal single numbers: most clients send that.
        self._usual = [Form(order, order), Form(order, tuple(self._first_equals()))]
        # Guards the two below: assemblers learn, and look-ups come from threads of the server's loop.
        self._lock = threading.Lock()
        self._learned: dict[int, Form] = {}  # node -> the form of its last reply that was of no usual form
        self._newest: Form | None = None

    @property
    def max_objects(self) -> int:
        """The most objects of a reply: four times the model's own, 4,096 more, and one for each 64 KiB of it."""
        own = len(self.pieces) + sum(map(len, self.pieces))
        return 4 * own + 4096 + self.spec.layout.update_bytes // 2**16

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

    def _first_equals(self) -> list[int]:
        """For each tensor the first that it probably equals: itself, or the first single number of its dtype."""
        firsts: dict[Tensor, int] = {}
        return [
            j if tensor.size > 1 else firsts.setdefault(attrs.evolve(tensor, name=""), j)
            for j, tensor in enumerate(self.spec.tensors)
        ]

    def forms(self, node_id: int, chunk_counts: Sequence[int]) -> list[Form]:
        """The forms that a node's record may have whose arrays have so many chunks each, the most likely first.

        The usual ones come first and a node's own next, so that no node can take a form from another one. A form is a
        guess until the hashes of a record confirm it, see ``lifl.superlink.rounds.model_objects``.
        """
        counts = list(chunk_counts)
        with self._lock:
            known = [*self._usual, self._learned.get(node_id), self._newest]
        likely = [one for one in known if one and [len(self.pieces[j]) for j in one.arrays] == counts]
        return list(dict.fromkeys(likely))

    def learn(self, node_id: int, arrays: Mapping[str, object]) -> None:
        """Remembers the form of a node's reply: its arrays by name, in its record's order.

        Arrays that are one compare equal. The names must be exactly the spec's.
        """
        firsts: dict[object, int] = {}
        sources = list(range(len(self.pieces)))
        for name, array in arrays.items():
            j = self._indices[name]
            sources[j] = firsts.setdefault(array, j)
        form = Form(tuple(self._indices[name] for name in arrays), tuple(sources))
        if form in self._usual:
            return
        with self._lock:
            if self._newest is not None and form == self._newest:
                form = self._newest  # one copy, for nodes that are alike
            self._learned.pop(node_id, None)
            while len(self._learned) >= MAX_LEARNED:
                del self._learned[next(iter(self._learned))]
            self._learned[node_id] = self._newest = form
