"""The figures of a server beside those of its Node."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord
from rig import Rig

from lifl.bench.fleet.canned_reply import Prebuilt
from lifl.bench.fleet.fleet import Fleet
from lifl.monitor.stats import SuperlinkStats
from lifl.strategy import FedAvg

MODEL = {"w": np.ones((300, 1000), np.float32)}


SOMETHING = hashlib.sha256(b"something").hexdigest()


def told(rig: Rig) -> SuperlinkStats:
    """By its Node."""
    stats = rig.plane.node.stats().superlink
    assert stats is not None
    return stats


def test_server_tells_what_has_passed() -> None:
    """Nothing at first; then what the gateway moved, messages and replies, and an object that waits to be fetched."""
    with Rig(hold_s=4.0) as rig:
        assert told(rig) == SuperlinkStats(0, 0, 0, 0, 0, 0, 0, 0)
        run_id, token = rig.start_run()
        replies = [Prebuilt({"w": MODEL["w"] * k}, k) for k in (2, 3)]  # of the same bytes one might be sent for both
        with Fleet(rig.address, replies), rig.grid(run_id, token) as grid:
            strategy = FedAvg(fraction_evaluate=0.0, min_available_nodes=2, min_train_nodes=2)
            result = strategy.start(grid, ArrayRecord({"w": Array(MODEL["w"])}), num_rounds=2)
            assert [len(report.accepted) for report in result.reports.values()] == [2, 2]
            stats = told(rig)
        assert (stats.messages, stats.replies, stats.uploads) == (4, 4, 0)
        # In the second round the nodes push the same again, of which the server may have all.
        assert stats.received_bytes > 2 * MODEL["w"].nbytes
        assert stats.sent_bytes > 4 * MODEL["w"].nbytes
        counts = rig.plane.count_bytes()
        assert told(rig).received_bytes == counts["received"]
        assert told(rig).sent_bytes == counts["sent"]
        assert told(rig).copied_bytes == counts["copied"]
        rig.store.offer({SOMETHING: b"something"})
        assert told(rig).objects == len(rig.store) == 1
        rig.store.withdraw([SOMETHING])


def test_database_is_not_asked(tmp_path: Path) -> None:
    """A look at a server waits for no database: its objects are not counted."""
    with Rig(database=str(tmp_path / "state.db")) as rig:
        assert told(rig).objects is None
