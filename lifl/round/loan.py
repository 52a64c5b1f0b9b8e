"""Room for one update in the arena, lent to whoever writes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from lifl.shm import kernels
from lifl.shm.arena import Lease
from lifl.tensor import Array, TensorSpec, torch_views

if TYPE_CHECKING:
    import torch


class Lender(Protocol):
    """The round that a loan is of."""

    @property
    def spec(self) -> TensorSpec:
        """What an update looks like."""

    def take_back(self, loan: Loan, weight: float) -> None:
        """The loan has been written: check it and count it, or refuse it and end it."""

    def returned(self, loan: Loan) -> None:
        """The loan ended unsent."""

    def dropped(self, client_id: str) -> None:
        """The loan was collected unsent. Called by the garbage collector: takes no lock."""


class Loan:
    """Room for one update in the arena, to be written in place and sent without a copy.

    A context manager: leaving it without :meth:`send` gives the room back.
    """

    def __init__(self, lender: Lender, client_id: str, lease: Lease) -> None:
        self._lender, self.client_id, self.lease = lender, client_id, lease
        self._arrays: dict[str, Array] | None = None

    @property
    def arrays(self) -> Mapping[str, Array]:
        """Writable NumPy views of the block by name. What they hold before they are written is undefined.

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
        """Where the block begins in this process, for those who write it through another library."""
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
        # Dropped unsent and unreleased. No lock may be taken here, so others finish it.
        if self.lease.is_live:
            self.lease.forget()
            self._lender.dropped(self.client_id)

    def __enter__(self) -> Loan:
        return self

    def __exit__(self, *_: object) -> None:
        if self.lease.is_live:
            self.abandon()
