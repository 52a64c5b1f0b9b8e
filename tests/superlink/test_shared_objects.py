"""Objects that replies share: whoever brings them, all replies that wait for them go on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord
from rig import Rig

from lifl.strategy import FedAvg
from lifl.superlink.fleet import Fleet
from lifl.superlink.prebuilt import Prebuilt


@pytest.mark.parametrize("is_durable", [False, True])
def test_an_object_comes_while_it_is_registered(
    is_durable: bool, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both replies have an equal array; another node's push of it ends between the registration and its note."""
    same = np.arange(30_000, dtype=np.float32)
    updates = [Prebuilt({"own": np.full(5, i, np.float32), "same": same}, 1) for i in range(2)]
    objects = {object_id: content for update in updates for object_id, content in update.objects.items()}
    shared = set(updates[0].objects) & set(updates[1].objects)
    assert shared
    with Rig(database=str(tmp_path / "state.db") if is_durable else None) as rig:
        run_id, token = rig.start_run()
        store, preregister = rig.store, rig.store.preregister

        def preregister_and_get(run_id: int, tree: Any) -> list[str]:
            missing: list[str] = preregister(run_id, tree)
            for object_id in shared & set(missing):
                store.put(object_id, objects[object_id])
            return missing

        monkeypatch.setattr(store, "preregister", preregister_and_get)
        with Fleet(rig.address, updates), rig.grid(run_id, token) as grid:
            strategy = FedAvg(fraction_evaluate=0.0, min_available_nodes=2, min_train_nodes=2, deadline=10.0)
            first = ArrayRecord({"own": Array(np.zeros(5, np.float32)), "same": Array(np.zeros_like(same))})
            result = strategy.start(grid, first, num_rounds=1)
        assert len(result.reports[1].accepted) == 2
        assert result.reports[1].late == ()
