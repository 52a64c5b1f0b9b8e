"""A run that goes on from its checkpoint: the same end, in Flower's order bit by bit; clear words where it cannot."""

from __future__ import annotations

import json
import logging
import os
import random
import re
import stat
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from scripted import MODEL, Client, failing, metrics_of, nudge, plain, record, run

import lifl
from lifl.errors import CheckpointError
from lifl.strategy import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedProx, FedYogi
from lifl.strategy import checkpoint as checkpoints
from lifl.strategy.journal import convert

CLIENTS: Mapping[int, Client] = {1: nudge(1), 2: nudge(2), 3: nudge(3), 4: failing}
ROUNDS = 5


class Killed(BaseException):
    """Ends a run as nothing of it expects."""


def make(cls: Any, path: Path | None, node: lifl.Node, **more: Any) -> Any:
    """A strategy with something to remember, in the order whose bits are the same each time."""
    known: dict[Any, dict[str, Any]] = {FedProx: {"proximal_mu": 0.5}, FedAvgM: {"server_momentum": 0.9}}
    more.setdefault("order", "flower")
    if cls in (FedAdam, FedYogi):
        more |= {"beta_1": 0.9, "beta_2": 0.99}
    return cls(node=node, checkpoint=path, **known.get(cls, {}), **more)


def central(server_round: int, arrays: ArrayRecord) -> MetricRecord:
    """A central evaluation that uses both generators."""
    return MetricRecord(
        {"norm": float(np.abs(plain(arrays)["weight"]).sum()), "luck": random.random() + np.random.rand()}
    )


def dying(at: int, hook: str) -> Any:
    """The same central evaluation or client, until the round in which it dies."""
    if hook == "central":

        def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
            if server_round == at:
                raise Killed
            return central(server_round, arrays)

        return evaluate

    def client(message: Message) -> Any:
        config: Any = message.content["config"]
        if config["server-round"] == at and message.metadata.message_type.startswith(hook):
            raise Killed
        return nudge(1)(message)

    return client


def seeded() -> None:
    """The generators as a run finds them."""
    random.seed(11)
    np.random.seed(12)


def check_same(resumed: Any, whole: Any) -> None:
    """Two Results of the same run."""
    for a, b in zip(plain(resumed.arrays).items(), plain(whole.arrays).items(), strict=True):
        assert a[0] == b[0]
        assert a[1].dtype == b[1].dtype
        assert a[1].tobytes() == b[1].tobytes()
    assert metrics_of(resumed) == metrics_of(whole)
    assert resumed.reports.keys() == whole.reports.keys()
    for number, report in whole.reports.items():
        again = resumed.reports[number]
        assert [(c.client_id, c.weight) for c in again.accepted] == [(c.client_id, c.weight) for c in report.accepted]
        assert again.rejected == report.rejected


@pytest.mark.parametrize("cls", [FedAvg, FedProx, FedAvgM, FedAdagrad, FedAdam, FedYogi])
@pytest.mark.parametrize(("at", "hook"), [(1, "train"), (3, "train"), (3, "evaluate"), (4, "central"), (5, "central")])
@pytest.mark.usefixtures("clock")
def test_resumed_ends_as_the_whole(cls: Any, at: int, hook: str, node: lifl.Node, tmp_path: Path) -> None:
    """Died in any part of any round: the resumed run's model, metrics and reports are the undisturbed run's."""
    seeded()
    whole, _ = run(make(cls, None, node), CLIENTS, ROUNDS, evaluate_fn=central)
    path = tmp_path / "run"
    seeded()
    evaluate_fn = dying(at, hook) if hook == "central" else central
    clients = CLIENTS if hook == "central" else {**CLIENTS, 1: dying(at, hook)}
    with pytest.raises(Killed):
        run(make(cls, path, node), clients, ROUNDS, evaluate_fn=evaluate_fn)
    random.seed(99)
    np.random.seed(98)
    other = record({name: array + 1 for name, array in MODEL.items()})  # a new process makes another first model
    strategy = make(cls, path, node, resume=True)
    asked = set()

    def noting(message: Message) -> Any:
        asked.add(message.content["config"]["server-round"])
        return nudge(2)(message)

    resumed, _ = run(strategy, {**CLIENTS, 2: noting}, ROUNDS, evaluate_fn=central, initial_arrays=other)
    check_same(resumed, whole)
    assert asked == set(range(at, ROUNDS + 1))  # for what was over nobody is asked again


@pytest.mark.parametrize("cls", [FedAvg, FedAvgM])
@pytest.mark.usefixtures("clock")
def test_resumed_in_the_default_order(cls: Any, node: lifl.Node, tmp_path: Path) -> None:
    """There sums may be grouped in another way each time: the end is the same but for last bits."""
    seeded()
    whole, _ = run(make(cls, None, node, order="any"), CLIENTS, ROUNDS, evaluate_fn=central)
    seeded()
    with pytest.raises(Killed):
        run(
            make(cls, tmp_path / "run", node, order="any"),
            {**CLIENTS, 1: dying(3, "train")},
            ROUNDS,
            evaluate_fn=central,
        )
    strategy = make(cls, tmp_path / "run", node, order="any", resume=True)
    resumed, _ = run(strategy, CLIENTS, ROUNDS, evaluate_fn=central)
    for name, array in plain(whole.arrays).items():
        near = 100 * np.finfo(array.dtype).eps * (1 + np.abs(array).max()) if array.dtype.kind == "f" else 1
        np.testing.assert_allclose(plain(resumed.arrays)[name], array, rtol=0, atol=near)


@pytest.mark.usefixtures("clock")
def test_a_run_that_is_over_is_not_run_again(node: lifl.Node, tmp_path: Path) -> None:
    """Resumed after its end, a run gives its Result and asks nobody; with more rounds it goes on."""
    path = tmp_path / "run"
    first, _ = run(make(FedAvg, path, node), CLIENTS, 3)
    again, grid = run(make(FedAvg, path, node, resume=True), CLIENTS, 3)
    check_same(again, first)
    assert not grid.asked
    more, _ = run(make(FedAvg, path, node, resume=True), CLIENTS, 4)
    whole, _ = run(make(FedAvg, None, node), CLIENTS, 4)
    check_same(more, whole)


@pytest.mark.usefixtures("clock")
def test_rounds_without_a_result(node: lifl.Node, tmp_path: Path) -> None:
    """The first model is kept if no round had a model, not the one that a new process made."""
    path = tmp_path / "run"
    run(FedAvg(node=node, checkpoint=path), {1: failing, 2: failing}, 2)
    other = record({name: array + 1 for name, array in MODEL.items()})
    strategy = FedAvg(node=node, checkpoint=path, resume=True)
    result, _ = run(strategy, {1: failing, 2: failing}, 3, initial_arrays=other)
    assert plain(result.arrays)["weight"].tobytes() == MODEL["weight"].tobytes()
    assert set(result.reports) == {1, 2, 3}


class Best(FedAvg):
    """A user's strategy with something of its own to remember."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.best, self.history, self.sums = float("inf"), [0.0], np.zeros(2)
        self.lock = object()

    def aggregate_evaluate(self, server_round: int, replies: Any) -> MetricRecord | None:
        """Remembers."""
        metrics = super().aggregate_evaluate(server_round, replies)
        assert metrics is not None
        loss = metrics["loss"]
        assert isinstance(loss, float)
        self.best = min(self.best, loss / server_round)
        self.history.append(loss)
        self.sums += loss  # in place
        return metrics


@pytest.mark.usefixtures("clock")
def test_what_a_user_remembers(node: lifl.Node, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Attributes that changed come back, also those changed in place; what cannot be saved is named."""
    path = tmp_path / "run"
    whole = Best(node=node)
    run(whole, CLIENTS, 4)
    run(Best(node=node, checkpoint=path), CLIENTS, 2)
    assert "Best.lock cannot be saved (state/lock is a object)" in caplog.text
    again = Best(node=node, checkpoint=path, resume=True)
    run(again, CLIENTS, 4)
    assert (again.best, again.history) == (whole.best, whole.history)
    assert again.sums.tobytes() == whole.sums.tobytes()


@pytest.mark.usefixtures("clock")
def test_new_arguments_hold(node: lifl.Node, tmp_path: Path) -> None:
    """Arguments are not in the file: a resumed run may have another learning rate or quorum."""
    path = tmp_path / "run"
    run(FedAvgM(node=node, checkpoint=path, server_momentum=0.9), CLIENTS, 2)
    again = FedAvgM(node=node, checkpoint=path, resume=True, server_momentum=0.5, quorum=2, min_train_nodes=3)
    run(again, CLIENTS, 3)
    assert (again.server_momentum, again.quorum, again.min_train_nodes) == (0.5, 2, 3)


class Decaying(FedAvg):
    """Halves the learning rate in each round, and takes a value away in the second."""

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Any) -> Any:
        """Changes the configuration in place, as Flower's own hook does."""
        config["lr"] *= 0.5  # type: ignore[operator]
        if server_round == 2:
            del config["warm-up"]
        return super().configure_train(server_round, arrays, config, grid)

    def configure_evaluate(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Any) -> Any:
        """Adds a value."""
        config["seen"] = server_round
        return super().configure_evaluate(server_round, arrays, config, grid)


@pytest.mark.usefixtures("clock")
def test_configurations_as_they_stood(node: lifl.Node, tmp_path: Path) -> None:
    """Resumed twice: each client gets the values that hooks have changed, and the new ones of those that none has."""
    path, seen = tmp_path / "run", []

    def client(message: Message) -> Any:
        seen.append(dict(message.content["config"]))
        return nudge(1)(message)

    for rounds in (3, 4, 5):
        train = ConfigRecord({"lr": 1.0, "warm-up": True, "batch": rounds})
        strategy = Decaying(node=node, checkpoint=path, resume=True, min_available_nodes=1, min_train_nodes=1)
        run(strategy, {1: client, 2: failing}, rounds, train_config=train, evaluate_config=ConfigRecord({"e": 1}))
    trained, evaluated = [c for c in seen if "lr" in c], [c for c in seen if "e" in c]
    assert [(c["lr"], c["batch"], "warm-up" in c) for c in trained] == [
        *((0.5, 3, True), (0.25, 3, False), (0.125, 3, False)),
        *((0.0625, 4, False), (0.03125, 5, False)),
    ]
    assert [c["seen"] for c in evaluated] == [1, 2, 3, 4, 5]


@pytest.mark.usefixtures("clock")
def test_a_checkpoint_of_another_model(node: lifl.Node, tmp_path: Path) -> None:
    """It is refused with the first difference, and stays as it was."""
    path = tmp_path / "run"
    run(FedAvg(node=node, checkpoint=path), CLIENTS, 1)
    before = path.read_bytes()
    (name, array), *rest = MODEL.items()
    shape = re.escape(str(array.shape))
    for other, said in (
        (
            {name: array[:-1], **dict(rest)},
            rf"'{name}' is {array.dtype} {shape} in the checkpoint and {array.dtype} \(",
        ),
        (
            {name: array.astype(np.float16), **dict(rest)},
            rf"'{name}' is {array.dtype} .* and float16 {shape} in initial",
        ),
        (dict(rest), rf"'{name}' is {array.dtype} {shape} in the checkpoint and not there in initial_arrays"),
        ({**MODEL, "head": array}, "'head' is not there in the checkpoint and .* in initial_arrays"),
    ):
        with pytest.raises(CheckpointError, match=said):
            run(FedAvg(node=node, checkpoint=path, resume=True), CLIENTS, 2, initial_arrays=record(other))
    assert path.read_bytes() == before


@pytest.mark.usefixtures("clock")
def test_a_checkpoint_does_not_grow(node: lifl.Node, tmp_path: Path) -> None:
    """Its size after 30 rounds is that after three, but for the digits of the times in the last round's report."""
    path, sizes = tmp_path / "run", []

    def measure(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        sizes.append(path.stat().st_size if path.exists() else 0)
        return central(server_round, arrays)

    result, _ = run(FedAvg(node=node, checkpoint=path), CLIENTS, 30, evaluate_fn=measure)
    assert max(sizes[3:]) - min(sizes[3:]) < 1000
    assert len(path.with_name("run.history").read_text().splitlines()) == 30  # the 31st is in the checkpoint
    again, _ = run(FedAvg(node=node, checkpoint=path, resume=True), CLIENTS, 30, evaluate_fn=measure)
    check_same(again, result)


@pytest.mark.usefixtures("clock")
def test_a_checkpoint_that_fails_between_its_files(
    node: lifl.Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines of a checkpoint that was not written are written again, once."""
    path, real = tmp_path / "run", checkpoints.save
    whole, _ = run(make(FedAvg, None, node), CLIENTS, 5)

    def save(path: Any, packed: Any, tensors: Any) -> None:
        if packed["round"] in (2, 3):
            raise CheckpointError("no room")
        real(path, packed, tensors)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, "save", save)
        result, _ = run(make(FedAvg, path, node), CLIENTS, 4)
    check_same(run(make(FedAvg, path, node, resume=True), CLIENTS, 5)[0], whole)
    numbers = [json.loads(line)["dict"][0][1] for line in path.with_name("run.history").read_text().splitlines()]
    assert numbers == [1, 2, 3, 4]
    assert len(result.reports) == 4


@pytest.mark.usefixtures("clock")
def test_a_history_that_is_not_its_own(node: lifl.Node, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Damaged: an error. Gone: a warning, and the run goes on. Left alone: not written over."""
    path, history = tmp_path / "run", tmp_path / "run.history"
    run(FedAvg(node=node, checkpoint=path), CLIENTS, 3)
    whole = history.read_bytes()
    history.write_bytes(whole[:-2] + b"  ")
    with pytest.raises(CheckpointError, match="move it away to go on without the metrics and reports"):
        run(FedAvg(node=node, checkpoint=path, resume=True), CLIENTS, 4)
    history.unlink()
    result, _ = run(FedAvg(node=node, checkpoint=path, resume=True), CLIENTS, 4)
    assert f"There is no history {history}: metrics and reports of the rounds up to 3 are missing" in caplog.text
    assert sorted(result.reports) == [3, 4]
    again, _ = run(FedAvg(node=node, checkpoint=path, resume=True), CLIENTS, 5)
    assert sorted(again.reports) == [3, 4, 5]
    path.unlink()
    with pytest.raises(CheckpointError, match="move it to where the checkpoint is, or remove it"):
        run(FedAvg(node=node, checkpoint=path, resume=True), CLIENTS, 1)


@pytest.mark.usefixtures("clock")
def test_a_checkpoint_with_all_its_rounds(node: lifl.Node, tmp_path: Path) -> None:
    """Files of before the history go on too, and have one then."""
    path = tmp_path / "run"
    seeded()
    whole, _ = run(make(FedAvg, None, node), CLIENTS, ROUNDS, evaluate_fn=central)
    seeded()
    half, _ = run(make(FedAvg, path, node), CLIENTS, 3, evaluate_fn=central)
    packed, tensors = checkpoints.load(path)
    for name in ("history", "recent", "configs", "is_of"):
        del packed[name]
    packed["reports"] = checkpoints.pack({n: r.to_dict() for n, r in half.reports.items()}, "reports", tensors)
    metrics = (half.train_metrics_clientapp, half.evaluate_metrics_clientapp, half.evaluate_metrics_serverapp)
    packed["metrics"] = [
        checkpoints.pack(dict(part), f"metrics/{i}", tensors, convert) for i, part in enumerate(metrics)
    ]
    checkpoints.save(path, packed, tensors)
    path.with_name("run.history").unlink()
    check_same(run(make(FedAvg, path, node, resume=True), CLIENTS, ROUNDS, evaluate_fn=central)[0], whole)
    check_same(run(make(FedAvg, path, node, resume=True), CLIENTS, ROUNDS, evaluate_fn=central)[0], whole)


def test_resume_needs_a_file() -> None:
    """Without a path there is nothing to resume from."""
    with pytest.raises(ValueError, match="with checkpoint="):
        FedAvg(resume=True)


@pytest.mark.usefixtures("clock")
def test_what_is_there_is_not_overwritten(node: lifl.Node, tmp_path: Path) -> None:
    """A checkpoint is only gone on from, or moved away: a forgotten resume=True does not cost a run."""
    path = tmp_path / "run"
    run(FedAvg(node=node, checkpoint=path), CLIENTS, 1)
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match="set resume=True"):
        run(FedAvg(node=node, checkpoint=path), CLIENTS, 1)
    with pytest.raises(CheckpointError, match="is of a run of FedAvg, this is FedAdam"):
        run(FedAdam(node=node, checkpoint=path, resume=True), CLIENTS, 1)
    with pytest.raises(CheckpointError, match="num_rounds=0"):
        run(FedAvg(node=node, checkpoint=path, resume=True), CLIENTS, 0)
    path.write_bytes(before[:-1])
    with pytest.raises(CheckpointError, match="cannot read"):
        run(FedAvg(node=node, checkpoint=path, resume=True), CLIENTS, 1)


PROGRAM = Path(__file__).parents[1] / "process" / "resumable.py"
"""A run of another strategy in a process of its own."""


@pytest.mark.usefixtures("clock")
def test_two_runs_of_one_checkpoint(node: lifl.Node, tmp_path: Path) -> None:
    """While a run goes on another process cannot have its file: an error says why, and the run ends as it would."""
    path, said = tmp_path / "run", []

    def meanwhile(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        if server_round in (0, 2):
            command = [sys.executable, str(PROGRAM), str(path), str(tmp_path / "out")]
            said.append(subprocess.run(command, capture_output=True, text=True, timeout=60, check=False))
            with pytest.raises(CheckpointError, match="another run uses"):  # nor can one in this process
                run(FedAvg(node=node, checkpoint=path, resume=True), CLIENTS, 3)
        return central(server_round, arrays)

    seeded()
    whole, _ = run(make(FedAvg, None, node), CLIENTS, 3, evaluate_fn=central)
    seeded()
    result, _ = run(make(FedAvg, path, node), CLIENTS, 3, evaluate_fn=meanwhile)
    check_same(result, whole)
    for done in said:
        assert done.returncode == 1
        assert f"CheckpointError: another run uses the checkpoint {path} (it holds {path}.lock)" in done.stderr
        assert "wait until that one ends, or choose another checkpoint=" in done.stderr
    assert len(said) == 2
    assert sorted(file.name for file in tmp_path.iterdir()) == ["run", "run.history"]
    again, _ = run(make(FedAvg, path, node, resume=True), CLIENTS, 3, evaluate_fn=central)
    check_same(again, whole)


@pytest.mark.usefixtures("clock")
def test_disk_full(
    node: lifl.Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """At the start it is an error; later it is logged, and the run goes on with the last one kept."""

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr("lifl.strategy.checkpoint.os.fsync", full)
        with pytest.raises(CheckpointError, match="No space left"):
            run(make(FedAvg, path, node), CLIENTS, 1)
    with monkeypatch.context() as patched, caplog.at_level(logging.ERROR):

        def evaluate(server_round: int, arrays: ArrayRecord) -> None:
            if server_round == 2:
                patched.setattr("lifl.strategy.checkpoint.os.fsync", full)

        result, _ = run(make(FedAvg, path, node), CLIENTS, 3, evaluate_fn=evaluate)
    assert "the one after round 1 is still there" in caplog.text
    whole, _ = run(make(FedAvg, None, node), CLIENTS, 3)
    check_same(result, whole)
    again, _ = run(make(FedAvg, path, node, resume=True), CLIENTS, 3)
    check_same(again, whole)


@pytest.mark.usefixtures("clock")
def test_a_file_system_with_less(
    node: lifl.Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No locks, no sync of folders: each is said once, and the run can be resumed."""
    path, real = tmp_path / "run", os.fsync

    def fsync(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(22, "Invalid argument")
        real(fd)

    def flock(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("lifl.strategy.checkpoint.fcntl.flock", flock)
    monkeypatch.setattr(os, "fsync", fsync)
    whole, _ = run(make(FedAvg, None, node), CLIENTS, 4)
    run(make(FedAvg, path, node), CLIENTS, 3)
    assert caplog.text.count("has no locks (flock): a second run on it is not kept away") == 1
    assert caplog.text.count("cannot sync a folder: after a power cut an older one may be back") == 1
    check_same(run(make(FedAvg, path, node, resume=True), CLIENTS, 4)[0], whole)


@pytest.mark.usefixtures("clock")
def test_files_tensors_are_open_to_all(node: lifl.Node, tmp_path: Path) -> None:
    """The file is plain safetensors: the model's arrays are in it under their names."""
    from safetensors.numpy import load_file

    path = tmp_path / "run.safetensors"
    result, _ = run(FedAvg(node=node, checkpoint=path), CLIENTS, 1)
    tensors = load_file(path)
    for name, array in plain(result.arrays).items():
        assert tensors[f"model/{name}"].tobytes() == array.tobytes()


@pytest.mark.usefixtures("clock")
def test_log_shows_the_users_class(node: lifl.Node, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Flower's own log names the strategy, not what stands before it; lifl's says where it goes on."""
    path = tmp_path / "run"
    with caplog.at_level(logging.INFO):
        run(FedAvg(node=node, checkpoint=path, resume=True), CLIENTS, 1)
        assert "begins with round 1" in caplog.text
        run(FedAvg(node=node, checkpoint=path, resume=True), CLIENTS, 2)
    assert "Starting FedAvg strategy" in caplog.text
    assert f"Resumed from {path}, written after round 1" in caplog.text
