"""A run with a checkpoint that kills its own process, for real, at a moment that is named on the command line.

python resumable.py CHECKPOINT OUT [MOMENT [TENSORBOARD]], or ``resumable ...`` by the fork server
"""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "strategy"))

from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.supercore.task_identity import TaskIdentity
from safetensors.numpy import save_file
from scripted import ScriptedGrid, failing, nudge, plain, record

import lifl
from lifl.round.round import Round
from lifl.strategy import FedAdam, checkpoint

ROUNDS = 5
MOMENTS = {
    "in round 1, when the clients are asked": "train 1",
    "in round 2, at the first reply": "submit 2",
    "in round 2, when all replies are being folded": "result 2",
    "in round 3, with the mean made and the optimizer's step not": "mean 3",
    "in round 3, when the clients evaluate": "evaluate 3",
    "in round 3, in the central evaluation": "central 3",
    "after round 3, before the file is synced": "fsync 3",
    "after round 3, before the rename": "replace 3",
    "after round 3, after the rename": "replaced 3",
    "after round 4, when nodes are sampled for round 5": "nodes 5",
    "after round 5, in the last checkpoint": "replace 5",
    "after the last checkpoint": "end 5",
}


def model() -> dict[str, Any]:
    """As each new process makes it: another one each time."""
    rng = np.random.default_rng()
    return {"w": rng.normal(size=(300, 70)).astype(np.float32), "b": np.zeros(70), "n": np.array(3)}


class Grid(ScriptedGrid):
    """Nodes 1 to 8, one of which always fails."""

    def get_node_ids(self) -> list[int]:
        """All of them."""
        reached("nodes")
        return list(self.clients)


class Server:
    """The events so far, and the moment at which the run is to end."""

    moment = ""
    round = 1


def reached(what: str) -> None:
    """Ends this process, if this is the moment."""
    if Server.moment == f"{what} {Server.round}":
        os.kill(os.getpid(), signal.SIGKILL)


def before(owner: Any, name: str, what: str) -> None:
    """A function that may be the last that is called."""
    real: Callable[..., Any] = getattr(owner, name)

    def called(*args: Any, **kwargs: Any) -> Any:
        reached(what)
        result = real(*args, **kwargs)
        reached(what + "d")
        return result

    setattr(owner, name, called)


def client(seed: int) -> Callable[[Message], Any]:
    """The same replies in each run: made of the model, the round and the node."""
    honest = nudge(seed)

    def answer(message: Message) -> Any:
        config: Any = message.content["config"]
        Server.round = int(config["server-round"])
        reached(message.metadata.message_type.split(".")[0])
        return honest(message)

    return answer


class Strategy(FedAdam):
    """Has a moment between the mean and the step."""

    def _compute_deltat_and_mt(self, arrays: ArrayRecord) -> Any:
        reached("mean")
        return super()._compute_deltat_and_mt(arrays)

    def configure_train(self, server_round: int, *args: Any) -> Any:
        """Nodes are sampled here: two of them are not asked."""
        Server.round = server_round
        return super().configure_train(server_round, *args)


def central(server_round: int, arrays: ArrayRecord) -> MetricRecord:
    """Uses the generators, so that these matter."""
    reached("central")
    return MetricRecord({"luck": random.random() + float(np.random.rand())})


def start() -> None:
    """Runs what the command line says."""
    part(*sys.argv[1:])


def part(path: str, out: str, moment: str = "", board: str | None = None) -> None:
    """A process's part of the run; writes the final model, with the measurements in its metadata."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    if not os.path.exists(path):
        random.seed(5), np.random.seed(6)
        first = {k: np.asarray(a * 0 + 1, a.dtype) for k, a in model().items()}
    else:
        first = model()
    Server.moment = moment
    before(Round, "submit", "submit")
    before(Round, "result", "result")
    before(checkpoint.os, "fsync", "fsync")
    before(checkpoint.os, "replace", "replace")
    clients = {i: client(i) for i in range(1, 8)} | {8: failing}
    with lifl.Node("64MiB", workers=2) as node:
        strategy = Strategy(
            node=node,
            checkpoint=path,
            resume=True,
            tensorboard=board,
            fraction_train=0.75,
            beta_1=0.9,
            beta_2=0.99,
            order="flower",
        )
        result = strategy.start(Grid(clients), record(first), ROUNDS, evaluate_fn=central)
    reached("end")
    accepted = [sorted(int(c.client_id) for c in report.accepted) for _, report in sorted(result.reports.items())]
    luck = [result.evaluate_metrics_serverapp[i]["luck"] for i in range(ROUNDS + 1)]
    save_file(plain(result.arrays), out, {"accepted": repr(accepted), "luck": repr(luck)})


if __name__ == "__main__":
    start()
