"""The classes that NVFLARE's processes load in a measured round, a controller and an executor; and the job's submitter.

Owns the files that they write. NVFLARE's server and clients import this module by name, and ``python -m`` with it
submits the job; no module of lifl imports it. NVFLARE's FedAvg is not changed, only observed.
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
"""Prefix of the names that NVFLARE gives to clients; a number from 1 follows."""

WAIT_S = 120.0
FINISHED, COMPLETED = "FINISHED", "FINISHED:COMPLETED"


class ObservedFedAvg(FedAvg):  # type: ignore[misc]  # NVFLARE has no types
    """NVFLARE's FedAvg; writes the time of each model, and the CPU time of the server's processes at that time.

    `order` is the path of a JSON file with "server" (a process id), "tensors" (of the model), and the paths "out" and
    "model" of the files to write.
    """

    def __init__(self, order: str, num_clients: int, num_rounds: int) -> None:
        # No persistor and no file name: with them FedAvg would write the model to disk in each round.
        super().__init__(num_clients=num_clients, num_rounds=num_rounds, persistor_id="", save_filename="")
        self.settings = json.loads(Path(order).read_text())
        self.models: list[dict[str, Any]] = []
        self.last_s = 0.0
        self.final: dict[str, Any] = {}

    def run(self) -> None:
        """Runs the rounds; NVFLARE calls it."""
        idle_bytes = tree.pss_bytes(self.settings["server"])
        spec = spec_of(self.settings["tensors"])
        self.model = FLModel(params=random_update(spec, FIRST_MODEL), params_type=ParamsType.FULL)
        self._note_model()
        super().run()
        np.savez(self.settings["model"], *(self.final[name] for name in spec))
        unfinished = Path(self.settings["out"] + ".unfinished")
        unfinished.write_text(json.dumps({"idle_bytes": idle_bytes, "models": self.models}))
        os.replace(unfinished, self.settings["out"])

    def save_model(self, model: FLModel) -> None:
        """Notes the model of a round; NVFLARE calls it as soon as the model is ready."""
        self.final = model.params
        self._note_model()

    def _note_model(self) -> None:
        spent = tree.cpu_s(self.settings["server"])
        self.models.append({"at_s": time.monotonic(), "last_s": self.last_s, "cpu_s": spent})

    def _aggregate_one_result(self, result: FLModel) -> Any:
        self.last_s = time.monotonic()  # after a round, the time at which the last result arrived with its arrays
        return super()._aggregate_one_result(result)


class CannedExecutor(Executor):  # type: ignore[misc]  # NVFLARE has no types
    """A client that trains nothing and returns the same arrays to each task."""

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
    """Waits until all clients are connected, submits the job and waits for its end; exits with an error if it fails."""
    from nvflare.fuel.flare_api.flare_api import new_secure_session

    deadline, number = time.monotonic() + WAIT_S, 0
    session = None
    while number < clients:
        time.sleep(0.5)
        try:
            session = session or new_secure_session("admin@nvidia.com", admin, timeout=5.0)
            number = len(session.get_system_info().client_info)
        except Exception as error:  # while the server starts, NVFLARE raises errors of many classes
            print(f"not yet: {error!r}")
        if time.monotonic() > deadline:
            sys.exit(f"{number} of {clients} clients are connected after {WAIT_S:g} s")
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
