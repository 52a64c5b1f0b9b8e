"""The two entrances of a round, for tests that go through both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lifl


def offer(round_: lifl.Round, how: str, arrays: Mapping[str, Any], weight: Any, client: str) -> None:
    """Sends an update into a round: written in place if `how` is "loan", else submitted."""
    if how != "loan":
        round_.submit(arrays, weight, client)
        return
    with round_.loan(client) as loan:
        for name, array in arrays.items():
            loan.arrays[name][...] = array
        loan.send(weight)
