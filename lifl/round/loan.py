"""Room for one update in the arena, lent to its writer; and the one copy of a client's arrays into it.

NaN and Inf are looked for on the way.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from lifl.round import admission
from lifl.shm import kernels
from lifl.shm.arena import Lease
from lifl.tensor import CODES, Array, TensorSpec, torch_views

if TYPE_CHECKING:
    import torch


class Lender(Protocol):
    """The round that lends."""

    @property
    def spec(self) -> TensorSpec:
        """The form of an update."""

    def take_back(self, loan: Loan, weight: float) -> None:
        """Checks a loan that has been written and counts it, or refuses it and ends it."""

    def returned(self, loan: Loan) -> None:
        """Takes note of a loan that ended unsent."""

    def dropped(self, client_id: str) -> None:
        """Takes note of a loan that was collected unsent. The garbage collector calls this: no lock is taken."""


class Loan:
    """Room for one update in the arena, to be written in place and sent without a copy.

    A context manager: leaving it without :meth:`send` gives the room back.
    """

    def __init__(self, lender: Lender, client_id: str, lease: Lease) -> None:
        self._lender, self.client_id, self.lease = lender, client_id, lease
        self._arrays: dict[str, Array] | None = None

    @property
    def arrays(self) -> Mapping[str, Array]:
        """Writable NumPy views of the block by name. Their values are undefined until they are written.

        Raises :class:`LeaseError` after ``send`` or ``release``.
        """
        buffer = self.lease.buffer
        if self._arrays is None:
            self._arrays = self._lender.spec.views(buffer)
        return self._arrays

    def tensors(self) -> dict[str, torch.Tensor]:
        """The same memory as torch tensors (imports torch)."""
        return torch_views(self._lender.spec, self.arrays)

    @property
    def address(self) -> int:
        """Address of the block in this process, for a writer that uses another library."""
        return kernels.address_of(self.lease.buffer)

    def send(self, weight: float) -> None:
        """Submits what was written. The memory is the round's from here on; arrays become read-only.

        Raises
        ------
        AdmissionError
            If the update is refused: weight, NaN or Inf, the round is complete. The room is given back.
        LeaseError
            If it was sent or released before.
        """
        self._lender.take_back(self, weight)

    def release(self) -> None:
        """Gives the room back unsent; :class:`LeaseError` while a view of it is held elsewhere."""
        kept, self._arrays = self._arrays, None
        if kept is not None:
            kept.clear()
        self.lease.release()
        self._lender.returned(self)

    def abandon(self) -> None:
        """Ends the loan unsent; views that are still held become read-only, and the room waits for them."""
        self._seal()
        self.lease.abandon()
        self._lender.returned(self)

    def hand_over(self) -> None:
        """Ends the loan as sent; views that are still held become read-only, and the room waits for them."""
        self._seal()
        self.lease.hand_over()

    def _seal(self) -> None:
        for view in (self._arrays or {}).values():
            view.flags.writeable = False
        self._arrays = None

    def __del__(self) -> None:
        # Dropped unsent and unreleased. The garbage collector may run while any lock is held, so no lock is taken
        # here: the round ends the loan the next time that it is used.
        if self.lease.is_live:
            self.lease.forget()
            self._lender.dropped(self.client_id)

    def __enter__(self) -> Loan:
        return self

    def __exit__(self, *_: object) -> None:
        if self.lease.is_live:
            self.abandon()


def copy_in(spec: TensorSpec, arrays: Mapping[str, Any], loan: Loan) -> None:
    """Copies `arrays`, which have the spec's names, shapes and dtypes, to their places in the loan's block.

    Raises :class:`~lifl.errors.AdmissionError` at the first NaN or Inf.
    """
    base = loan.address
    for name, code, offset, count in spec.offsets:
        if count == 0:
            continue
        array, target = as_numpy(arrays[name]), base + offset
        if array.flags.c_contiguous:
            bad = kernels.copy_finite(code, target, array.ctypes.data, count)
        else:
            loan.arrays[name][...] = array.view(np.uint16) if array.dtype.name == "bfloat16" else array
            bad = kernels.copy_finite(code, target, target, count)
        if bad >= 0:
            raise admission.refuse_value(loan.client_id, name, bad, _value(array, code, bad))


def look_for_nonfinite(spec: TensorSpec, loan: Loan) -> None:
    """Raises :class:`~lifl.errors.AdmissionError` if what was written in place holds a NaN or Inf."""
    base = loan.address
    for name, code, offset, count in spec.offsets:
        bad = kernels.copy_finite(code, base + offset, base + offset, count)
        if bad >= 0:
            raise admission.refuse_value(loan.client_id, name, bad, _value(loan.arrays[name], code, bad))


def as_numpy(array: Any) -> Array:
    """The same memory as a NumPy array; of a torch tensor too if it is on the CPU."""
    if not hasattr(array, "detach"):
        return np.asarray(array)
    tensor = array.detach().cpu()
    if str(tensor.dtype) == "torch.bfloat16":
        tensor = tensor.view(sys.modules["torch"].uint16)
    return np.asarray(tensor.numpy())


def _value(array: Array, code: int, index: int) -> float:
    if code == CODES["bfloat16"]:
        array = (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return float(array.flat[index])
