"""A round as a user sees it: submit or loan, result, close."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from lifl.report.report import RoundReport
from lifl.report.result import RoundResult
from lifl.round.core import RoundCore
from lifl.round.loan import Loan
from lifl.tensor import TensorSpec


class Round:
    """An open round. Made by :meth:`lifl.Node.open_round`; a context manager that closes it.

    Safe to use from several threads.
    """

    def __init__(self, core: RoundCore) -> None:
        self._core = core

    @property
    def spec(self) -> TensorSpec:
        """The form of every update."""
        return self._core.spec

    @property
    def expected(self) -> int:
        """The number of updates that make the round complete."""
        return self._core.terms.expected

    @property
    def number(self) -> int:
        """The round's number, unique in its Node."""
        return self._core.number

    def submit(
        self,
        arrays: Mapping[str, Any],
        weight: float = 1.0,
        client_id: object = None,
        *,
        timeout: float | None = None,
    ) -> None:
        """Copies one update into the arena, looking for NaN and Inf on the way, and hands it on.

        Parameters
        ----------
        arrays : mapping of str to array
            NumPy arrays or torch tensors with exactly the spec's names, shapes and dtypes.
        weight : float
            Finite, above 0; usually the client's number of examples.
        client_id : object
            Named in refusals and in the report by its ``str``; one update of each client counts. Without
            one, the update is numbered.
        timeout : float or None
            Seconds to wait for room in the arena; ``None`` waits as long as room can still come free.

        Raises
        ------
        AdmissionError
            If it is refused; the round goes on.
        ShmError
            If the arena stays full.
        """
        self._core.submit(arrays, weight, client_id, timeout)

    def loan(self, client_id: object = None, *, timeout: float | None = None) -> Loan:
        """Room for one update, to be written in place: see :class:`Loan`.

        Waits while the arena is full and room can come free; `timeout` in seconds bounds that.

        Raises
        ------
        AdmissionError
            If the client has an update in the round, a quota is used up, or the round is complete.
        ShmError
            ENOSPC if the arena stays full.
        """
        return self._core.loan(client_id, timeout)

    def close_early(self) -> None:
        """Takes no more updates: the result is made of those that are in. Harmless when complete."""
        self._core.close_early()

    def result(self, timeout: float | None = None) -> RoundResult:
        """Waits until `expected` updates are in and folded, or the round was closed early.

        Parameters
        ----------
        timeout : float or None
            Seconds; ``None`` waits for ever. Ctrl-C ends the wait.

        Raises
        ------
        RoundError
            At the time-out (the round stays open), if no update was accepted, if a mean overflowed,
            or if the round was closed.
        ValueError
            For a `timeout` of nan.
        PeerGoneError
            If a worker died and could not be replaced.
        """
        return self._core.result(timeout)

    def report(self) -> RoundReport:
        """The report as it stands now; final once there is a result."""
        return self._core.report()

    def close(self) -> None:
        """Ends the round, with or without a result, and gives every block back. Harmless when closed.

        Loans that are still out end at their ``send`` or ``release``. The result stays valid.
        """
        self._core.close()

    def __enter__(self) -> Round:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return repr(self._core)


def core_of(round_: Round) -> RoundCore:
    """The part of a round that its Node and the server use; the one way to it for code outside of this package."""
    return round_._core
