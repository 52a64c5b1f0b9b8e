"""The load generator of a benchmark, one process for all SuperNodes: ``python -m lifl.bench.load ORDER``.

Owns its output: a line of JSON when its nodes are registered, and one for each message that is answered.
Ends when it is killed, or with status 1 when a node fails.
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
    """Runs the nodes that the file `order` describes.

    `order` is JSON with "address" (of the server), "nodes" (their number), "tensors" (of the updates), "patient"
    (see :class:`lifl.bench.fleet.fleet.Fleet`), and "out" (path of the output).
    """
    from lifl.bench.fleet.canned_reply import Prebuilt
    from lifl.bench.fleet.fleet import Fleet
    from lifl.bench.fleet.virtual_node import Answered

    config = json.loads(order.read_text())
    spec = spec_of(config["tensors"])
    replies = [Prebuilt(random_update(spec, k), weight_of(k)) for k in range(config["nodes"])]
    with open(config["out"], "w", buffering=1) as out:

        def write(line: Any) -> None:
            out.write(json.dumps(line) + "\n")

        def write_answered(answered: Answered) -> None:
            write(attrs.asdict(answered))

        with Fleet(config["address"], replies, is_patient=config["patient"], on_answered=write_answered) as fleet:
            write(READY)
            fleet.wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
