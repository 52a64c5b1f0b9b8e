"""The terms of a round, checked before any memory is taken for it."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral
from typing import Any, Literal

import attrs

from lifl.planner.shape import Shape
from lifl.planner.timing import TIMINGS
from lifl.planner.timing import Timing as Timing
from lifl.round.admission import Limits
from lifl.round.clip import Clip
from lifl.round.loan import as_numpy
from lifl.shm.arena import lib
from lifl.shm.control_block import BATCH_SHIFT, FLOWER
from lifl.tensor import Layout, TensorSpec

Order = Literal["any", "flower"]


@attrs.frozen(eq=False)
class Terms:
    """A round's terms; ``Terms.of`` checks them."""

    spec: TensorSpec
    expected: int
    timing: Timing
    order: Order
    commit_every: int | None
    limits: Limits
    clip: Clip | None
    shape: Shape | None

    @classmethod
    def of(
        cls,
        spec: TensorSpec,
        expected: int,
        timing: Timing,
        order: Order,
        commit_every: int | None,
        limits: Limits | None,
        base: Mapping[str, Any] | None,
        shape: Shape | None,
    ) -> Terms:
        """Checks the arguments of ``Node.open_round``, which explains them; raises its errors."""
        for name, value, kind, example in (
            ("spec", spec, TensorSpec, "TensorSpec.from_arrays(model)"),
            ("limits", limits, Limits, "Limits(...)"),
            ("shape", shape, Shape, "Shape(leaves=..., shards=...)"),
        ):
            if not isinstance(value, kind) and (value is not None or kind is TensorSpec):
                raise TypeError(f"{name} is a {type(value).__name__}: give a lifl.{kind.__name__}, lifl.{example}")
        if timing not in TIMINGS:
            raise ValueError(f"timing={timing!r}: use {', '.join(map(repr, TIMINGS[:-1]))} or {TIMINGS[-1]!r}")
        if order not in ("any", "flower"):
            raise ValueError(f"order={order!r}: use 'any' or 'flower'")
        if not isinstance(expected, Integral) or expected < 1:
            raise ValueError(f"expected={expected!r}: a round needs a whole number of updates, at least 1")
        if order == "flower" and any(t.dtype == "bfloat16" for t in spec.values()):
            raise ValueError("order='flower' has no bfloat16: NumPy, which Flower uses, has none")
        if order == "flower" and shape is not None and (shape.leaves or not shape.shards):
            raise ValueError(f"shape={shape}: order='flower' folds nothing ahead, use Shape(leaves=0, shards=...)")
        batch_max = int(lib.lifl_batch_max())
        if commit_every is not None and not 1 <= commit_every <= batch_max:
            raise ValueError(f"commit_every={commit_every!r}: give 1 to {batch_max}")
        limits = limits or Limits()
        if (limits.clipping_norm is None) != (base is None):
            missing = "base, the model that updates are clipped against" if base is None else "clipping_norm"
            raise ValueError(f"limits={limits}: clipping_norm and base go together, and there is no {missing}")
        clip = None
        if limits.clipping_norm is not None and base is not None:
            clip = Clip(spec, {name: as_numpy(array) for name, array in base.items()}, limits.clipping_norm)
        return cls(spec, int(expected), timing, order, commit_every, limits, clip, shape)

    @property
    def is_flower(self) -> bool:
        """True if the mean is made in Flower's order and arithmetic."""
        return self.order == "flower"

    @property
    def layout(self) -> Layout:
        """The layout of the round's blocks."""
        return self.spec.flower_layout if self.is_flower else self.spec.layout

    @property
    def flags(self) -> int:
        """The terms that a worker needs, as bits of the control block."""
        return (FLOWER if self.is_flower else 0) | (self.commit_every or 0) << BATCH_SHIFT
