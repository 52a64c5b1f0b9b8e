"""The result of a round: the mean as views of the arena, and the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import attrs

from lifl.report.entries import Rejection
from lifl.report.report import RoundReport
from lifl.tensor import Array, TensorSpec, torch_views

if TYPE_CHECKING:
    import torch


@attrs.frozen
class RoundResult:
    """A round's mean and the report of how it was made.

    Attributes
    ----------
    arrays : mapping of str to numpy.ndarray
        The weighted mean: the spec's names, shapes and dtypes (with ``order="flower"``, Flower's dtypes).
        They are views of the arena, not copies. They stay valid after the round and the Node are closed; the
        memory is freed when the last view is dropped. A bfloat16 array is its bits as uint16.
    weight : float
        The sum of the weights in the mean.
    num_updates : int
        Updates in the mean.
    rejected : tuple of Rejection
        Updates that were refused, and why.
    report : RoundReport
        The whole round, with times.
    """

    spec: TensorSpec
    arrays: Mapping[str, Array]
    weight: float
    num_updates: int
    rejected: tuple[Rejection, ...]
    report: RoundReport

    def tensors(self) -> dict[str, torch.Tensor]:
        """The arrays as torch tensors in the same memory (imports torch)."""
        return torch_views(self.spec, self.arrays)
