"""A disk that is full, for real: a small file system of the test's own, in a mount namespace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.usefixtures("namespaces")

NAMESPACE = ("unshare", "--mount")

# One mebibyte holds two checkpoints of this model (the old one and the one being written), and not three.
BEGIN = f"""
import logging, pathlib, random, shutil, subprocess
sys.path[:0] = [{str(Path(__file__).parents[1] / "strategy")!r}, {str(Path(__file__).parents[1])!r}]
from flwr.supercore.task_identity import TaskIdentity
from scripted import nudge, plain, record, run
from lifl.errors import CheckpointError
from lifl.strategy import FedAvg
TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
CLIENTS = {{i: nudge(i) for i in (1, 2, 3)}}
FIRST = record({{"w": np.zeros(70_000, np.float32)}})

def mounted(folder, options):
    os.mkdir(folder)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], check=True)
    return os.path.join(folder, "run")

def fill(folder):
    with open(os.path.join(folder, "filler"), "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as error:
            assert error.errno == errno.ENOSPC

def a_run(node, path, rounds, resume=False, evaluate_fn=None):
    random.seed(1)  # Flower samples the nodes, which decides the order of the replies
    strategy = FedAvg(node=node, order="flower", checkpoint=path, resume=resume)
    result, _ = run(strategy, CLIENTS, rounds, initial_arrays=FIRST, evaluate_fn=evaluate_fn)
    return plain(result.arrays)["w"].tobytes()

logged = []

class Listener(logging.Handler):
    def emit(self, entry):
        if entry.levelno >= logging.ERROR:
            logged.append(entry.getMessage())

logging.getLogger("flwr").addHandler(Listener())
"""


def test_disk_is_full_at_the_start(program: Any, tmp_path: Path) -> None:
    """No room for the first checkpoint, or not even for its lock: an error that says so, and nothing is left."""
    code = """
said = []
with lifl.Node("16MiB", workers=1) as node:
    for name, options in (("blocks", "size=1m"), ("inodes", "size=1m,nr_inodes=2")):
        folder = os.path.join({folder!r}, name)
        path = mounted(folder, options)
        fill(folder)
        try:
            a_run(node, path, 1)
        except CheckpointError as error:
            said.append([path, str(error), os.listdir(folder)])
print(json.dumps(said))
"""
    said = program(BEGIN + code.format(folder=str(tmp_path)), prefix=NAMESPACE)
    assert len(said) == 2
    for (path, message, left), verb in zip(said, ("write", "lock"), strict=True):
        assert message.startswith(f"cannot {verb} the checkpoint {path}: ")
        assert "No space left on device" in message
        assert message.endswith("make room or choose another checkpoint=")
        assert left == ["filler"]


def test_disk_fills_up_during_a_run(program: Any, tmp_path: Path) -> None:
    """Each checkpoint that cannot be written is logged; the last one stays whole, and the run goes on to its end."""
    code = """
folder = os.path.join({folder!r}, "disk")
path = mounted(folder, "size=1m")
kept, listed = [], []

def meanwhile(server_round, arrays):
    if server_round == 2:
        fill(folder)
    if server_round in (2, 3, 4):
        with open(path, "rb") as file:
            kept.append(file.read())
        listed.append(sorted(os.listdir(folder)))
    if server_round == 4:
        os.unlink(os.path.join(folder, "filler"))

with lifl.Node("16MiB", workers=2) as node:
    whole = a_run(node, None, 5)
    ends = [a_run(node, path, 5, evaluate_fn=meanwhile)]
    assert sorted(os.listdir(folder)) == ["run", "run.history"]
    ends.append(a_run(node, path, 5, resume=True))  # written again when there was room
    with open(os.path.join({folder!r}, "kept"), "wb") as file:
        file.write(kept[-1])
    shutil.copy(path + ".history", file.name + ".history")  # it has the lines of that checkpoint, and later ones
    ends.append(a_run(node, file.name, 5, resume=True))  # from what stayed while there was none
print(json.dumps([logged, [one == kept[0] for one in kept], listed, [end == whole for end in ends]]))
"""
    logged, kept, listed, ends = program(BEGIN + code.format(folder=str(tmp_path)), prefix=NAMESPACE)
    assert len(logged) == 2  # after rounds 2 and 3
    for message in logged:
        assert "No space left on device" in message
        assert "the one after round 1 is still there" in message
    assert kept == [True] * 3
    assert listed == [["filler", "run", "run.history", "run.lock"]] * 3
    assert ends == [True] * 3


def test_disk_fills_up_for_scalars(program: Any, tmp_path: Path) -> None:
    """Scalars that cannot be written are logged, and the run goes on; with room again the rounds are written."""
    code = """
from scalar_files import scalars
folder = os.path.join({folder!r}, "board")
mounted(folder, "size=64k")
def meanwhile(server_round, arrays):
    if server_round == 1:
        fill(folder)
    if server_round == 3:
        os.unlink(os.path.join(folder, "filler"))
    return MetricRecord({{name: 1.0 for name in NAMES}})

# Each event is larger than a page, so that none finds room in one that the file has already.
NAMES = [f"{{number}}-{{'x' * 500}}" for number in range(20)]
from flwr.app import MetricRecord

with lifl.Node("16MiB", workers=2) as node:
    strategy = FedAvg(node=node, tensorboard=folder)
    result, _ = run(strategy, CLIENTS, 4, initial_arrays=FIRST, evaluate_fn=meanwhile)
drawn = scalars(pathlib.Path(folder) / "run-1")["evaluate_serverapp/" + NAMES[0]]
print(json.dumps([logged, sorted(drawn), sorted(result.reports), sorted(result.evaluate_metrics_serverapp)]))
"""
    logged, drawn, reports, metrics = program(BEGIN + code.format(folder=str(tmp_path)), prefix=NAMESPACE)
    assert reports == [1, 2, 3, 4]
    assert metrics == [0, 1, 2, 3, 4]
    assert 0 in drawn
    assert {1, 2}.isdisjoint(drawn)
    assert {3, 4} <= set(drawn)
    assert logged
    assert all("No space left on device" in message for message in logged)
    assert any(message.startswith("Scalars of round 2 cannot be written to ") for message in logged)
