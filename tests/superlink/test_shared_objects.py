"""Objects that replies share: whoever brings them, all replies that wait for them go on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flower_objects import array, update
from flwr.app import Array, ArrayRecord, Message
from rig import Rig
from scripted_clients import Client, check_mean, play, wait_until

from lifl.bench.fleet.canned_reply import Prebuilt
from lifl.bench.fleet.fleet import Fleet
from lifl.strategy import FedAvg


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


def test_a_reply_that_repeats_an_array_of_the_model() -> None:
    """A counter that is the model's need not be pushed: it is what it was when the model was made.

    It lies in the last mean, of which the server has two buffers: one for the result, which goes first, and one for
    what is sent. When a block came free with either of them, another client's update was written over the counter: a
    round had the floats right, and a counter as if it were another node's.
    """
    model = {"w": np.zeros((60, 500), np.float32), "count": np.array(0, np.int64)}
    first = {"w": np.full((60, 500), 1, np.float32), "count": np.array(6, np.int64)}
    second = {"w": np.full((60, 500), 5, np.float32), "count": np.array(7, np.int64)}
    others = 6  # enough to take what is free of the arena in its order
    theirs = [(first, 12.0), *[(second, 1.0)] * others]  # the mean of the counters is 6.3: the first node's 6
    came: list[int] = []

    def answer_first(client: Client, asked: Message) -> None:
        client.answer(asked, update(second, 1))
        came.append(1)

    def answer_then(client: Client, asked: Message) -> None:
        number = len(client.asked)
        wait_until(lambda: len(came) == number * others)
        made = client.announce(asked, update(first, 12))
        counter = array(first["count"]).children[0].id
        assert (counter in made.missing) == (number == 1), "from the second round on it is the model's"
        assert all(client.push(asked, made))

    with Rig("32MiB") as rig:
        round_, _ = play(rig, model, [], *[answer_first] * others, answer_then, num_rounds=4)
        check_mean(round_, theirs)
