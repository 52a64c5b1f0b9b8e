"""Stand-ins between Flower's loop and a strategy: each passes every call on, and notes what goes through."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.serverapp.strategy import Result, Strategy


class StandIn:
    """A stand-in for `inner`, a strategy or another stand-in: it has every attribute and method of that one."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def start(self, *run: Any) -> Result:
        """Runs Flower's loop with the stand-in as its strategy."""
        return Strategy.start(self, *run)  # type: ignore[arg-type]

    # The loop logs `self.__class__.__name__` at its start; `self` is the stand-in, and the log must name the user's
    # strategy. So `__class__` is a property that gives the class of the strategy; type(stand_in) is still its own.
    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """The strategy's class, whose name Flower logs."""
        cls: type = self._inner.__class__
        return cls

    def __getattr__(self, name: str) -> Any:
        """Every other attribute of the strategy."""
        return getattr(self._inner, name)


class Outcome(StandIn):
    """Notes whether a round of the run had a result. Flower's Result has an empty record both for none and for {}."""

    has_result = False

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Calls the strategy."""
        arrays, metrics = self._inner.aggregate_train(server_round, replies)
        self.has_result |= arrays is not None
        return arrays, metrics
