"""lifl: federated learning servers that aggregate in shared memory.

``lifl.Node`` works alone, ``lifl.strategy`` inside Flower. This package imports neither flwr nor torch.
"""

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
