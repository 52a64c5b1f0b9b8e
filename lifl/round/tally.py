"""What a Node has counted since its start: rounds, updates, bytes, and what each worker did.

The books of its rounds add to it, and nothing is ever taken off, so that the difference of two looks is a rate. Called
with the Node's lock held.
"""

from __future__ import annotations

from collections import Counter

import attrs


@attrs.define(eq=False)
class Tally:
    """One Node's.

    ``accepted`` and ``accepted_bytes`` are of updates as they came in at the door: one that workers died of later stays
    in them, and is in ``refused``, by rule, too. ``folded``, ``busy_ns`` and ``deaths`` are by worker.
    """

    done: int = 0
    failed: int = 0
    accepted: int = 0
    accepted_bytes: int = 0
    refused: Counter[str] = attrs.field(factory=Counter)
    folded: Counter[int] = attrs.field(factory=Counter)
    busy_ns: Counter[int] = attrs.field(factory=Counter)
    deaths: Counter[int] = attrs.field(factory=Counter)
