"""The form in which one Node aggregates one round: the leaves that fold ahead, and the makers of the mean."""

from __future__ import annotations

import attrs

from lifl.errors import PlanError


def _not_negative(instance: object, attribute: attrs.Attribute[int], value: int) -> None:
    if value < 0:
        raise PlanError(f"{attribute.name}={value}: give a number from 0 up")


@attrs.frozen
class Shape:
    """The form in which one Node aggregates one round.

    ``Shape(leaves=L, shards=0)`` is LIFL's tree: L leaves fold what arrives, the first that is done becomes the top and
    adds up their sums. ``Shape(leaves=0, shards=S)`` folds nothing ahead: when the last update is in, S workers make
    the mean, each in a range of the coordinates; each byte of an update is read once and no partial sum is written.
    ``Shape(L, S)`` does both: leaves fold what has arrived, and the S ranges of the mean are made of their sums and of
    the updates that no leaf has begun with.

    Attributes
    ----------
    leaves : int
        The most workers that fold ahead of the last update.
    shards : int
        Ranges of coordinates in which the mean is made; 0: the top makes it from the leaves' sums.

    Raises ``PlanError`` if both are 0 or one is negative.
    """

    leaves: int = attrs.field(validator=_not_negative)
    shards: int = attrs.field(validator=_not_negative)

    def __attrs_post_init__(self) -> None:
        if not self.leaves and not self.shards:
            raise PlanError("leaves=0, shards=0: nobody would make the mean; give one of them at least 1")

    def __str__(self) -> str:
        """``tree of 2``, ``2 shards``, or ``2 leaves, 2 shards``."""
        if not self.shards:
            return f"tree of {self.leaves}"
        shards = f"{self.shards} shard{'s' * (self.shards > 1)}"
        return f"{self.leaves} lea{'ves' if self.leaves > 1 else 'f'}, {shards}" if self.leaves else shards
