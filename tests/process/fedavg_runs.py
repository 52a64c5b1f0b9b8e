"""The results that the runs of app_fedavg must have, on a SuperLink or in a simulation alike."""

from __future__ import annotations

import importlib.util
import json
import os
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

APP = Path(__file__).parent / "app_fedavg"


def module(name: str) -> ModuleType:
    """A module of the app, which is no package of these tests."""
    spec = importlib.util.spec_from_file_location(f"app_fedavg_{name}", APP / "fedavg_app" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


class Runs:
    """The files that the ServerApp wrote."""

    def __init__(self, out: Path, num_nodes: int) -> None:
        self.out, self.num_nodes = out, num_nodes

    @cached_property
    def said(self) -> dict[str, Any]:
        """Everything but the models; there when the ServerApp has ended."""
        said: dict[str, Any] = json.loads((self.out / "results.json").read_text())
        return said

    def model(self, run: str, server_round: int) -> dict[str, Any]:
        """The model after a round."""
        with np.load(self.out / f"{run}-{server_round}.npz") as arrays:
            return dict(arrays)

    def report(self, run: str, server_round: int) -> dict[str, Any]:
        """A round's report."""
        report: dict[str, Any] = self.said[run]["reports"][str(server_round)]
        return report

    def mean(self, server_round: int, nodes: list[int], before: dict[str, Any]) -> dict[str, Any]:
        """The mean of what these nodes send in a round, in float64."""
        from flwr.app import Array, ArrayRecord

        arrays = ArrayRecord({name: Array(array) for name, array in before.items()})
        update = module("client_app").update
        updates = [(3 + 2 * node, update(arrays, node, server_round)) for node in nodes]
        total = sum(weight for weight, _ in updates)
        return {k: sum(np.float64(w) * u[k] for w, u in updates) / total for k in before}

    def first(self) -> dict[str, Any]:
        """The model before round 1."""
        return {name: array.numpy() for name, array in module("server_app").first_model().items()}


def check_bits(runs: Runs, rounds: int = 2) -> None:
    """With order="flower" each round is Flower's own mean of the same replies, bit by bit."""
    assert runs.said["equal"] == [True] * rounds
    numbers = range(1, rounds + 1)
    assert runs.said["both"]["reports"].keys() == set(map(str, numbers))
    for number in numbers:
        assert len(runs.report("both", number)["accepted"]) == runs.num_nodes


def check_mean(runs: Runs) -> None:
    """In the default order, too, the model is the mean of what the nodes sent, in the model's dtypes."""
    expected = runs.mean(1, list(range(runs.num_nodes)), runs.first())
    flower = runs.model("flower", 1)
    model = runs.model("any", 1)
    assert {k: a.dtype for k, a in model.items()} == {k: a.dtype for k, a in runs.first().items()}
    # One unit in the last place for float32, the nearest whole number for the counter.
    np.testing.assert_allclose(model["weight"], expected["weight"], rtol=2**-23, atol=2**-149)
    np.testing.assert_allclose(model["bias"], expected["bias"], rtol=2**-50)
    assert model["num_batches_tracked"] == np.rint(expected["num_batches_tracked"])
    assert model["empty"].shape == (0, 4)
    np.testing.assert_allclose(model["weight"], flower["weight"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(model["bias"], flower["bias"], rtol=1e-12)
    losses = [runs.said[run]["metrics"]["1"]["loss"] for run in ("any", "flower")]
    np.testing.assert_allclose(*losses)
    (norm,) = runs.said["any"]["evaluated"]["1"].values()
    np.testing.assert_allclose(norm, abs(model["bias"]).sum())


def check_refusal(runs: Runs) -> None:
    """An update with a NaN is refused by name, and the round is the mean of the others."""
    report = runs.report("lenient", 1)
    (refused,) = report["rejected"]
    assert refused["rule"] == "values"
    assert refused["reason"] == "'bias' holds nan at flat index 1"
    assert refused["client_id"] not in {c["client_id"] for c in report["accepted"]}
    assert report["error"] is None
    others = [node for node in range(runs.num_nodes) if node != 1]
    np.testing.assert_allclose(runs.model("lenient", 1)["bias"], runs.mean(1, others, runs.first())["bias"])


def check_strictness(runs: Runs) -> None:
    """A failure and a reply after the deadline leave too few; the model stays; the late reply never counts."""
    failed, late, whole = (runs.report("strict", number) for number in (1, 2, 3))
    needed = f"{runs.num_nodes - 1} of {runs.num_nodes} updates were accepted, the quorum is {runs.num_nodes}"
    assert failed["error"] == late["error"] == needed
    (refused,) = failed["rejected"]
    assert refused["rule"] == "error"
    assert "told to fail" in refused["reason"]
    assert late["rejected"] == []
    assert late["late"] == [refused["client_id"]]
    for number in (1, 2):
        for name, array in runs.model("strict", number).items():
            np.testing.assert_array_equal(array, runs.first()[name])
    assert whole["error"] is None
    assert len(whole["accepted"]) == runs.num_nodes
    assert whole["late"] == whole["rejected"] == []
    expected = runs.mean(3, list(range(runs.num_nodes)), runs.first())
    np.testing.assert_allclose(runs.model("strict", 3)["weight"], expected["weight"], rtol=2**-23)


def check_workers_are_gone(runs: Runs) -> None:
    """The embedded Node's workers ended with the process in which the ServerApp ran."""
    assert runs.said["workers"]
    assert not [pid for pid in runs.said["workers"] if os.path.exists(f"/proc/{pid}")]
