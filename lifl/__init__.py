"""lifl: federated learning servers that aggregate in shared memory.

``lifl.Node`` works alone, ``lifl.strategy`` inside Flower. ``import lifl`` imports neither flwr nor torch: a public
name is imported when it is asked for. So a worker, which needs ``lifl.shm``, does not import a Node.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lifl import errors
    from lifl.node.node import Node
    from lifl.planner.shape import Shape
    from lifl.report.entries import Contribution, Rejection, Span
    from lifl.report.report import RoundReport
    from lifl.report.result import RoundResult
    from lifl.round.admission import Limits
    from lifl.round.loan import Loan
    from lifl.round.round import Round
    from lifl.tensor import TensorSpec

__version__ = "0.1.0"

__all__ = [
    "Contribution",
    "Limits",
    "Loan",
    "Node",
    "Rejection",
    "Round",
    "RoundReport",
    "RoundResult",
    "Shape",
    "Span",
    "TensorSpec",
    "__version__",
    "errors",
]

_HOMES = {
    "Contribution": "lifl.report.entries",
    "Limits": "lifl.round.admission",
    "Loan": "lifl.round.loan",
    "Node": "lifl.node.node",
    "Rejection": "lifl.report.entries",
    "Round": "lifl.round.round",
    "RoundReport": "lifl.report.report",
    "RoundResult": "lifl.report.result",
    "Shape": "lifl.planner.shape",
    "Span": "lifl.report.entries",
    "TensorSpec": "lifl.tensor",
}
"""Public name -> the module that it stands in."""

_PACKAGES = {"errors", "fold", "planner", "shm", "strategy"}
"""Public modules: ``lifl.fold`` works after ``import lifl``."""


if not TYPE_CHECKING:  # else a wrong name would be of type Any, and no error

    def __getattr__(name: str) -> Any:
        if name in _HOMES:
            value = globals()[name] = getattr(import_module(_HOMES[name]), name)
            return value
        if name in _PACKAGES:
            return import_module(f"lifl.{name}")
        raise AttributeError(f"module 'lifl' has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__, *_PACKAGES})
