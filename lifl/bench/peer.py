"""The rounds of ``lifl bench round`` on NVFLARE: a real server and real clients, a process or two each, over loopback.

Owns the provisioning and the start of NVFLARE: its own ``nvflare poc prepare``, changed to a free port, its TCP driver
and no TLS (Flower is measured with ``--insecure``), and its own start scripts. Its processes load ``peer_job``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lifl.bench.shapes import tensors_of
from lifl.bench.tree import MemoryLog
from lifl.bench.work import Run, Work, make_run
from lifl.deploy.programs import Programs, free_ports

TITLE = "NVFLARE (TCP, no TLS)"
SITE = "site-"
JOB = "lifl.bench.peer_job"
PREPARE_TIMEOUT_S, RUN_TIMEOUT_S, ROUND_TIMEOUT_S = 120.0, 240.0, 300.0


def run_nvflare(work: Work) -> Run:
    """Runs the rounds as :func:`lifl.bench.round.measure_round` describes, and raises the same errors.

    A round's ``last_to_model_s`` begins when the server's controller receives the last result.
    """
    with Programs() as programs:
        kits = _provision(programs, work)
        sites = ["server", *(f"{SITE}{k + 1}" for k in range(work.nodes))]
        for name in sites:
            # start.sh runs this script too; with --once there is no shell that would start the process again.
            programs.launch(name, ["bash", str(kits / name / "startup" / "sub_start.sh"), "--once"])
        server = programs.pid("server")
        job, out, model = _write_job(programs.folder, server, work)
        command = [sys.executable, "-m", JOB, str(kits / "admin@nvidia.com"), str(job), str(work.nodes)]
        programs.launch("submit", command, may_end=True)
        with MemoryLog(server) as memory:
            status = programs.finish("submit", RUN_TIMEOUT_S + work.rounds * ROUND_TIMEOUT_S, title="NVFLARE's job")
        if status or not out.exists():
            raise RuntimeError(f"NVFLARE's job failed.\n{programs.tail('submit')}\n{programs.tail('server')}")
        figures = json.loads(out.read_text())
        with np.load(model) as archive:
            arrays = {name: archive[f"arr_{k}"] for k, name in enumerate(work.spec)}
    pairs = zip(figures["models"], figures["models"][1:], strict=False)
    rounds = [
        {
            "round": number,
            "wall_s": after["at_s"] - before["at_s"],
            "last_to_model_s": after["at_s"] - after["last_s"],
        }
        for number, (before, after) in enumerate(pairs, 1)
    ]
    return make_run(work, TITLE, rounds, figures, memory, arrays, is_exact=False)


def _provision(programs: Programs, work: Work) -> Path:
    """Makes the start folders of the server, the clients and the administrator; returns the folder that holds them."""
    home = {"HOME": str(programs.folder), "NVFLARE_POC_WORKSPACE": str(programs.folder / "poc")}
    command = ["nvflare", "poc", "prepare", "-n", str(work.nodes)]
    programs.launch("prepare", command, home, may_end=True)
    kits = programs.folder / "poc" / "example_project" / "prod_00"
    if programs.finish("prepare", PREPARE_TIMEOUT_S) or not kits.is_dir():
        raise RuntimeError(f"`{' '.join(command)}` failed.\n{programs.tail('prepare')}")
    (port,) = free_ports(1)
    service = {"target": f"localhost:{port}", "scheme": "tcp"}
    insecure = {"connection_security": "clear"}

    def server(config: Any) -> None:
        config["servers"][0] |= {"service": service, "admin_server": "localhost", "admin_port": port} | insecure

    def client(config: Any) -> None:
        config["servers"][0]["service"] = service
        config["client"] |= insecure

    def admin(config: Any) -> None:
        config["admin"] |= {"host": "localhost", "port": port, "scheme": "tcp"} | insecure

    def allow(config: Any) -> None:
        config["class_allow_list"] += [f"{JOB}.ObservedFedAvg", f"{JOB}.CannedExecutor"]

    _change(kits / "server" / "startup" / "fed_server.json", server)
    _change(kits / "admin@nvidia.com" / "startup" / "fed_admin.json", admin)
    sites = [f"{SITE}{k + 1}" for k in range(work.nodes)]
    for site in sites:
        _change(kits / site / "startup" / "fed_client.json", client)
    for site in ("server", *sites):
        own = kits / site / "local" / "resources.json"
        _change(own if own.exists() else own.with_name("resources.json.default"), allow)
    return kits


def _change(path: Path, change: Callable[[Any], None]) -> None:
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def _write_job(folder: Path, server: int, work: Work) -> tuple[Path, Path, Path]:
    """Writes the job; returns its folder, and the paths where its controller will write figures and the last model."""
    job, order, out, model = (folder / name for name in ("job", "order.json", "out.json", "model.npz"))
    settings = {"server": server, "tensors": tensors_of(work.spec), "out": str(out), "model": str(model)}
    order.write_text(json.dumps(settings))
    config = job / "app" / "config"
    config.mkdir(parents=True)
    common = {"format_version": 2, "task_data_filters": [], "task_result_filters": [], "components": []}
    controller = {"order": str(order), "num_clients": work.nodes, "num_rounds": work.rounds}
    workflow = {"id": "controller", "path": f"{JOB}.ObservedFedAvg", "args": controller}
    executor = {"path": f"{JOB}.CannedExecutor", "args": {"order": str(order)}}
    files = {
        job / "meta.json": {
            "name": "round",
            "resource_spec": {},
            "min_clients": work.nodes,
            "deploy_map": {"app": ["@ALL"]},
        },
        config / "config_fed_server.json": common | {"workflows": [workflow]},
        config / "config_fed_client.json": common | {"executors": [{"tasks": ["train"], "executor": executor}]},
    }
    for path, content in files.items():
        path.write_text(json.dumps(content))
    return job, out, model
