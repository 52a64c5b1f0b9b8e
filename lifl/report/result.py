"""What a round gives: the mean as views of the arena, and how it came about."""

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
    """A round's mean and how it came about.

    Attributes
    ----------
    arrays : mapping of str to numpy.ndarray
        The weighted mean: the spec's names, shapes and dtypes (with ``order="flower"``, Flower's dtypes).
        Views of the arena, no copies; they stay valid after the round and the Node are closed, and the
        memory goes back when the last one is dropped. bfloat16 arrays are their bits as uint16.
    weight : float
        The sum of the weights in the mean.
    num_updates : int
        How many updates are in it.
    rejected : tuple of Rejection
        Who is not, and why.
    report : RoundReport
        All of it, with times.
    """

    spec: TensorSpec
    arrays: Mapping[str, Array]
    weight: float
    num_updates: int
    rejected: tuple[Rejection, ...]
    report: RoundReport

    def tensors(self) -> dict[str, torch.Tensor]:
        """The same memory as torch tensors (imports torch)."""
        return torch_views(self.spec, self.arrays)
