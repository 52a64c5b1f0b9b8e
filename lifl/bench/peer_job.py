"""What NVFLARE's own processes load in a measured round: a controller, an executor, and who submits the job.

Owns what they write. Is imported by NVFLARE's server and clients, by name, and run as ``python -m`` to submit; by
nothing of lifl's. NVFLARE's FedAvg is not changed, only looked at.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import FLMetaKey
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
from nvflare.app_common.utils.fl_model_utils import FLModelUtils
from nvflare.app_common.workflows.fedavg import FedAvg

from lifl.bench import tree
from lifl.bench.shapes import random_update, spec_of
from lifl.bench.work import FIRST_MODEL, weight_of

SITE = "site-"
"""What NVFLARE calls the clients that it makes up, with a number from 1."""

WAIT_S = 120.0
FINISHED, COMPLETED = "FINISHED", "FINISHED:COMPLETED"


class LookedAt(FedAvg):  # type: ignore[misc]  # NVFLARE has no types
    """NVFLARE's FedAvg; writes when each model was there, and what the server's processes had taken until then.

    `order` is a file: "server", a process, "tensors", and the files "out" and "model".
    """

    def __init__(self, order: str, num_clients: int, num_rounds: int) -> None:
        # No persistor, and no file per round: its own save_model() would write the model to disk each time.
        super().__init__(num_clients=num_clients, num_rounds=num_rounds, persistor_id="", save_filename="")
        self.asked = json.loads(Path(order).read_text())
        self.models: list[dict[str, Any]] = []
        self.last_s = 0.0
        self.final: dict[str, Any] = {}

    def run(self) -> None:
        """Runs the rounds; NVFLARE calls it."""
        idle_bytes = tree.pss_bytes(self.asked["server"])
        spec = spec_of(self.asked["tensors"])
        self.model = FLModel(params=random_update(spec, FIRST_MODEL), params_type=ParamsType.FULL)
        self._look()
        super().run()
        np.savez(self.asked["model"], *(self.final[name] for name in spec))
        unfinished = Path(self.asked["out"] + ".unfinished")
        unfinished.write_text(json.dumps({"idle_bytes": idle_bytes, "models": self.models}))
        os.replace(unfinished, self.asked["out"])

    def save_model(self, model: FLModel) -> None:
        """NVFLARE calls it as soon as a round's model is there."""
        self.final = model.params
        self._look()

    def _look(self) -> None:
        spent = tree.cpu_s(self.asked["server"])
        self.models.append({"at_s": time.monotonic(), "last_s": self.last_s, "cpu_s": spent})

    def _aggregate_one_result(self, result: FLModel) -> Any:
        self.last_s = time.monotonic()  # of a round: when the last result has been handed over, its arrays included
        return super()._aggregate_one_result(result)


class Returning(Executor):  # type: ignore[misc]  # NVFLARE has no types
    """A client that trains nothing: it returns the arrays that it made before."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.spec = spec_of(json.loads(Path(order).read_text())["tensors"])
        self.update: dict[str, Any] | None = None

    def execute(self, task_name: str, shareable: Any, fl_ctx: Any, abort_signal: Any) -> Any:
        """Answers a task; NVFLARE calls it."""
        node = int(fl_ctx.get_identity_name().removeprefix(SITE)) - 1
        if self.update is None:
            self.update = random_update(self.spec, node)
        meta = {FLMetaKey.NUM_STEPS_CURRENT_ROUND: weight_of(node)}
        return FLModelUtils.to_shareable(FLModel(params=dict(self.update), params_type=ParamsType.FULL, meta=meta))


def submit(admin: str, job: str, clients: int) -> None:
    """Waits until all clients are there, submits the job and waits until it has ended; else ends the process."""
    from nvflare.fuel.flare_api.flare_api import new_secure_session

    deadline, number = time.monotonic() + WAIT_S, 0
    session = None
    while number < clients:
        time.sleep(0.5)
        try:
            session = session or new_secure_session("admin@nvidia.com", admin, timeout=5.0)
            number = len(session.get_system_info().client_info)
        except Exception as error:  # of many classes while the server starts
            print(f"not yet: {error!r}")
        if time.monotonic() > deadline:
            sys.exit(f"{number} of {clients} clients are there after {WAIT_S:g} s")
    assert session is not None
    job_id, status = session.submit_job(job), ""
    while not status.startswith(FINISHED):
        time.sleep(0.5)
        status = session.get_job_meta(job_id).get("status", "")
    session.close()
    if status != COMPLETED:
        sys.exit(f"the job ended as {status}")


if __name__ == "__main__":
    submit(sys.argv[1], sys.argv[2], int(sys.argv[3]))
