"""Scalars for TensorBoard: what is read back is what the run's Result and reports say."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, MetricRecord
from scalar_files import Scalars, scalars, untimed
from scripted import MODEL, Client, after, content, failing, metrics_of, nudge, plain, run, says

import lifl
from lifl.strategy import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedProx, FedYogi
from lifl.strategy.tensorboard import MAX_LIST

WRONG: Client = says(content({"weight": np.zeros(3, np.float32)}))
CLIENTS: Mapping[int, Client] = {1: nudge(1), 2: nudge(2), 3: failing, 4: after(90, nudge(4)), 5: WRONG}
ROUNDS = 4
UPDATE_BYTES = sum(array.nbytes for array in MODEL.values())


class Killed(BaseException):
    """Ends a run as nothing of it expects."""


def central(server_round: int, arrays: ArrayRecord) -> MetricRecord:
    """A central evaluation; its second metric is a list."""
    norm = float(np.abs(plain(arrays)["weight"]).sum())
    return MetricRecord({"norm": norm, "halves": [norm / 2, float(server_round)]})


def expected(result: Any) -> Scalars:
    """All scalars that a run must have written, made of what it returned."""
    found: Scalars = {}

    def note(tag: str, step: int, value: float) -> None:
        found.setdefault(tag, {})[step] = float(np.float32(value))

    for number, report in result.reports.items():
        note("round/accepted", number, len(report.accepted))
        note("round/refused", number, len(report.rejected))
        note("round/late", number, len(report.late))
        note("round/weight", number, sum(c.weight for c in report.accepted))
        note("round/bytes", number, len(report.accepted) * UPDATE_BYTES)
        for stage, seconds in report.stages.items():
            note(f"round_seconds/{stage}", number, seconds)
    places = ("train_clientapp", "evaluate_clientapp", "evaluate_serverapp")
    for place, part in zip(places, metrics_of(result), strict=True):
        for number, metrics in part.items():
            for name, value in metrics.items():
                if isinstance(value, list):
                    for at, element in enumerate(value):
                        note(f"{place}/{name}/{at}", number, element)
                else:
                    note(f"{place}/{name}", number, value)
    return found


@pytest.mark.parametrize("cls", [FedAvg, FedProx, FedAvgM, FedAdagrad, FedAdam, FedYogi])
@pytest.mark.usefixtures("clock")
def test_scalars_are_the_reports_and_the_metrics(cls: Any, node: lifl.Node, tmp_path: Path) -> None:
    """Every count, stage and metric of every round is read back as the Result has it, and nothing else."""
    known: dict[Any, dict[str, Any]] = {FedProx: {"proximal_mu": 0.5}}
    strategy = cls(node=node, deadline=60.0, tensorboard=tmp_path / "board", **known.get(cls, {}))
    result, _ = run(strategy, CLIENTS, ROUNDS, evaluate_fn=central)
    (folder,) = (tmp_path / "board").iterdir()
    found = scalars(folder)
    assert found == expected(result)
    assert [found[f"round/{what}"][1] for what in ("accepted", "refused", "late")] == [2, 2, 1]
    assert {"train_clientapp/loss", "evaluate_clientapp/loss", "evaluate_serverapp/halves/1"} < found.keys()
    assert found["evaluate_serverapp/norm"].keys() == {0, 1, 2, 3, 4}


class Hooked(FedAvg):
    """A user's strategy, which returns metrics of its own."""

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        """Adds one."""
        arrays, metrics = super().aggregate_train(server_round, replies)
        return arrays, MetricRecord({**(metrics or {}), "of_hook": server_round * 1.5})


@pytest.mark.usefixtures("clock")
def test_metrics_are_what_the_hooks_return(node: lifl.Node, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A subclass's own metrics are drawn; the log names its class."""
    with caplog.at_level(logging.INFO):
        result, _ = run(Hooked(node=node, tensorboard=str(tmp_path)), {1: nudge(1), 2: nudge(2)}, 2)
    found = scalars(tmp_path / "run-1")
    assert found == expected(result)
    assert found["train_clientapp/of_hook"] == {1: 1.5, 2: 3.0}
    assert "Starting Hooked strategy" in caplog.text
    assert f"TensorBoard: {tmp_path / 'run-1'}" in caplog.text


@pytest.mark.usefixtures("clock")
def test_rounds_without_a_result(node: lifl.Node, tmp_path: Path) -> None:
    """They have their counts too; and a list of metrics that is too long to draw is left out."""
    result, _ = run(FedAvg(node=node, quorum=2, tensorboard=tmp_path), {1: nudge(1), 2: failing}, 2)
    assert result.reports[2].error is not None
    found = scalars(tmp_path / "run-1")
    assert found == expected(result)
    assert found["round/refused"] == {1: 1, 2: 1}

    def long(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        return MetricRecord({"fits": [0.5] * MAX_LIST, "long": [0.5] * (MAX_LIST + 1)})

    run(FedAvg(node=node, tensorboard=tmp_path), {1: nudge(1), 2: nudge(2)}, 1, evaluate_fn=long)
    names = {tag.split("/")[1] for tag in scalars(tmp_path / "run-2") if tag.startswith("evaluate_serverapp/")}
    assert names == {"fits"}


@pytest.mark.parametrize(("at", "hook"), [(1, "train"), (2, "train"), (2, "evaluate"), (3, "central"), (4, "central")])
@pytest.mark.usefixtures("clock")
def test_resumed_run_goes_on_in_its_folder(at: int, hook: str, node: lifl.Node, tmp_path: Path) -> None:
    """The scalars of a run that died and was resumed are those of the whole run: none twice, none missing."""
    clients = {1: nudge(1), 2: nudge(2), 3: failing}

    def dying(message: Any) -> Any:
        is_now = message.content["config"]["server-round"] == at and message.metadata.message_type.startswith(hook)
        if is_now:
            raise Killed
        return nudge(1)(message)

    def dying_centrally(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        if server_round == at:
            raise Killed
        return central(server_round, arrays)

    def make(name: str, resume: bool = False) -> FedAvg:
        paths: dict[str, Any] = {"checkpoint": tmp_path / name, "tensorboard": tmp_path / f"board-{name}"}
        return FedAvg(node=node, order="flower", resume=resume, **paths)

    whole, _ = run(make("whole"), clients, ROUNDS, evaluate_fn=central)
    with pytest.raises(Killed):
        run(
            make("cut"),
            clients if hook == "central" else {**clients, 1: dying},
            ROUNDS,
            evaluate_fn=dying_centrally if hook == "central" else central,
        )
    before = {path: path.read_bytes() for path in (tmp_path / "board-cut" / "run-1").iterdir()}
    resumed, _ = run(make("cut", resume=True), clients, ROUNDS, evaluate_fn=central)
    (folder,) = (tmp_path / "board-cut").iterdir()
    assert all(path.read_bytes() == data for path, data in before.items())
    found = scalars(folder)
    assert found == expected(resumed)
    assert untimed(found) == untimed(scalars(tmp_path / "board-whole" / "run-1"))
    files = set(folder.iterdir())
    run(make("cut", resume=True), clients, ROUNDS, evaluate_fn=central)  # it is over: there is nothing to draw
    assert set(folder.iterdir()) == files
    del whole


@pytest.mark.usefixtures("clock")
def test_runs_do_not_mix(node: lifl.Node, tmp_path: Path) -> None:
    """Each run in one folder has its own, also two at a time, and one that is resumed with another folder."""
    clients = {1: nudge(1), 2: nudge(2)}
    inner: list[Any] = []

    def meanwhile(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        if server_round == 1:
            inner.append(run(FedAvg(node=node, tensorboard=tmp_path / "board"), clients, 3)[0])
        return central(server_round, arrays)

    strategy = FedAvg(node=node, checkpoint=tmp_path / "run", tensorboard=tmp_path / "board")
    outer, _ = run(strategy, clients, 2, evaluate_fn=meanwhile)
    assert scalars(tmp_path / "board" / "run-1") == expected(outer)
    assert scalars(tmp_path / "board" / "run-2") == expected(inner[0])
    run(FedAvg(node=node, tensorboard=tmp_path / "other"), clients, 1)
    first = scalars(tmp_path / "other" / "run-1")
    again = FedAvg(node=node, checkpoint=tmp_path / "run", resume=True, tensorboard=tmp_path / "other")
    run(again, clients, 3)
    assert scalars(tmp_path / "other" / "run-1") == first
    assert scalars(tmp_path / "other" / "run-2")["round/accepted"].keys() == {3}


@pytest.mark.usefixtures("clock")
def test_a_folder_that_cannot_be_had(node: lifl.Node, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Logged, with the reason, and the run's result is that of one without scalars."""
    clients = {1: nudge(1), 2: nudge(2)}
    (tmp_path / "file").write_text("not a folder")
    with caplog.at_level(logging.ERROR):
        result, _ = run(FedAvg(node=node, tensorboard=tmp_path / "file"), clients, 2)
    assert "There will be no scalars for TensorBoard: [Errno 20] Not a directory" in caplog.text
    without, _ = run(FedAvg(node=node), clients, 2)
    assert metrics_of(result) == metrics_of(without)


@pytest.mark.usefixtures("clock")
def test_a_folder_that_is_gone_for_a_while(node: lifl.Node, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Scalars that cannot be written are logged round by round; when the folder is back, the rounds are written."""
    folder = tmp_path / "run-1"

    def meanwhile(server_round: int, arrays: ArrayRecord) -> None:
        if server_round == 0:
            folder.rmdir()
            folder.write_text("not a folder")
        if server_round == 2:
            folder.unlink()

    with caplog.at_level(logging.ERROR):
        result, _ = run(FedAvg(node=node, tensorboard=tmp_path), {1: nudge(1), 2: nudge(2)}, 3, evaluate_fn=meanwhile)
    failed = [entry.getMessage() for entry in caplog.records if "cannot be written" in entry.getMessage()]
    assert len(failed) == 4  # training and evaluation of two rounds
    assert failed[0].startswith(f"Scalars of round 1 cannot be written to {folder}: ")
    assert scalars(folder)["round/accepted"] == {3: 2}
    assert result.reports.keys() == {1, 2, 3}


def test_without_tensorboardx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is an error where the strategy is made, and says what to install; nobody else needs the package."""
    monkeypatch.setitem(sys.modules, "tensorboardX", None)  # as if it were not installed
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lifl\[tensorboard\]'") as caught:
        FedAvg(tensorboard=tmp_path)
    assert caught.value.name == "tensorboardX"
    FedAvg()


def test_it_is_imported_late() -> None:
    """A strategy without scalars does not import tensorboardX."""
    code = "import sys, lifl.strategy; lifl.strategy.FedAvg(); print('tensorboardX' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
