"""The process that plays all SuperNodes of a benchmark: ``python -m lifl.bench.load ORDER``.

Owns what it writes: one line of JSON when its nodes are registered, and one for each message that is answered.
It ends when it is killed, or with status 1 when a node fails.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import attrs

from lifl.bench.shapes import random_update, spec_of
from lifl.bench.work import weight_of

READY = "ready"


def main(order: Path) -> None:
    """Plays the nodes as the file `order` says: "address", "nodes", "tensors", "patient", and "out", where lines go."""
    from lifl.bench.fleet.canned_reply import Prebuilt
    from lifl.bench.fleet.fleet import Fleet
    from lifl.bench.fleet.virtual_node import Answered

    asked = json.loads(order.read_text())
    spec = spec_of(asked["tensors"])
    replies = [Prebuilt(random_update(spec, k), weight_of(k)) for k in range(asked["nodes"])]
    with open(asked["out"], "w", buffering=1) as out:

        def say(line: Any) -> None:
            out.write(json.dumps(line) + "\n")

        def told(answered: Answered) -> None:
            say(attrs.asdict(answered))

        with Fleet(asked["address"], replies, is_patient=asked["patient"], on_answered=told) as fleet:
            say(READY)
            fleet.wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
