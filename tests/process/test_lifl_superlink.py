"""lifl-superlink as people run it: real SuperNodes, `flwr run`, certificates, a database, and what is killed."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fedavg_runs
import numpy as np
import pytest
from fedavg_runs import Runs
from servers import WAIT_S, Servers, make_key

from lifl import ipc
from lifl.deploy import _janitor
from lifl.deploy.programs import Programs, free_ports
from lifl.ebpf.probe import support
from lifl.superlink import command, flower

HERE = Path(__file__).parent
HAS_EBPF = support().available or os.environ.get("CI") == "true"
WATCHED = (sys.executable, str(HERE / "watched_superlink.py"))
leaves_children = pytest.mark.leaves("Flower's programs reap the processes of their tasks late")


def wait_until(is_so: Callable[[], Any], what: str) -> None:
    """Returns when it is so; fails after WAIT_S."""
    end = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < end, what
        time.sleep(0.05)


def config_of(out: Path, **more: int | str) -> dict[str, str | int | float | bool]:
    """The configuration of a run of lifl's FedAvg; makes the folder for its output."""
    out.mkdir()
    return {"out": str(out), "strategy": "lifl", **more}


def check_single(out: Path, rounds: int, *, is_served: bool | None = None) -> Runs:
    """Each round's model is the mean of what both nodes sent, within a rounding."""
    runs = Runs(out, 2)
    model = runs.first()
    for number in range(1, rounds + 1):
        expected, model = runs.mean(number, [0, 1], model), runs.model("single", number)
        np.testing.assert_allclose(model["weight"], expected["weight"], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(model["bias"], expected["bias"], rtol=1e-12)
    if is_served is not None:
        assert runs.said["single"]["embedded"] == (not is_served)
    return runs


# ---------------------------------------------------------------- in memory


class Shared:
    """A deployment that several tests use, one after another."""

    def __init__(self, servers: Servers, folder: Path) -> None:
        self.servers, self.folder = servers, folder
        self.lines: list[str] = []
        self.fab = Path()

    def held(self) -> dict[str, int]:
        """The objects and blocks that the server holds now."""
        told = self.folder / "watched"
        told.unlink(missing_ok=True)
        os.kill(self.servers.pid(self.servers.server), signal.SIGUSR1)
        wait_until(told.exists, "the server does not tell what it holds")
        said: dict[str, int] = json.loads(told.read_text())
        return said

    def check_nothing_held(self) -> int:
        """Neither memory nor objects are in use any more; the number of rounds that were folded so far."""
        end = time.monotonic() + WAIT_S
        while True:
            held = self.held()
            folded = held.pop("folded")
            if not any(held.values()):
                return folded
            assert time.monotonic() < end, held
            time.sleep(0.1)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    """A server with its state in memory, and two SuperNodes, of which the second can be halted in an upload."""
    folder = tmp_path_factory.mktemp("shared")
    with Servers(WATCHED, env={"LIFL_WATCHED": str(folder / "watched")}) as servers:
        servers.start_node(0)
        servers.start_node(1, halting(folder / "halt"))
        yield Shared(servers, folder)


def halting(told: Path) -> dict[str, str]:
    """The environment of a SuperNode that stops in the middle of an upload when `told` exists."""
    path = os.pathsep.join(filter(None, [str(HERE / "halting"), os.environ.get("PYTHONPATH")]))
    return {"PYTHONPATH": path, "LIFL_HALT": str(told)}


@pytest.fixture(scope="module")
def runs(shared: Shared) -> Runs:
    """Runs of lifl's strategies, of Flower's and of a user's subclass, by an app that `flwr build` has built."""
    servers, folder, out = shared.servers, shared.folder, shared.folder / "runs"
    # Flower wants no underscore in the folder's name.
    source = shutil.copytree(fedavg_runs.APP, folder / "fedavg-app", ignore=shutil.ignore_patterns("__pycache__"))
    servers._flwr("build", "--app", str(source), cwd=folder)
    (shared.fab,) = folder.glob("*.fab")
    servers._flwr("install", str(shared.fab))
    (app,) = (servers.folder / "cli" / "apps").glob("lifl.fedavg-app.*")
    out.mkdir()
    config: dict[str, str | int | float | bool] = {"out": str(out), "num-nodes": 2, "short": True}
    servers.run(app, config, shared.lines.append, timeout=200)
    return Runs(out, 2)


@pytest.mark.ladder
@leaves_children
def test_rounds_that_the_server_folds(runs: Runs, shared: Shared) -> None:
    """With lifl's FedAvg the server makes the mean: the log says so, the ServerApp has no Node, the model is right."""
    fedavg_runs.check_mean(runs)
    fedavg_runs.check_refusal(runs)
    assert [name for name in ("any", "lenient", "flower", "both") if runs.said[name]["embedded"]] == ["both"]
    assert sum("rounds are folded by the lifl-superlink" in line for line in shared.lines) == 2
    assert shared.check_nothing_held() == 2


@pytest.mark.ladder
def test_strategies_that_fold_themselves(runs: Runs) -> None:
    """Flower's FedAvg, and a subclass that compares each mean with Flower's of the same replies, work as ever."""
    fedavg_runs.check_bits(runs, rounds=1)
    assert runs.said["both"]["id"] == runs.said["flower"]["id"]
    fedavg_runs.check_workers_are_gone(runs)


@pytest.mark.ladder
@pytest.mark.usefixtures("runs")
def test_it_was_the_app_that_was_built(shared: Shared) -> None:
    """The app that ran is the FAB, byte by byte."""
    (run,) = shared.servers._runs()
    assert run["fab-id"] == "lifl/fedavg-app"
    assert run["fab-hash"] == hashlib.sha256(shared.fab.read_bytes()).hexdigest()


@pytest.mark.ladder
@leaves_children
def test_a_supernode_is_killed_in_an_upload(shared: Shared) -> None:
    """The round ends at its deadline without it and keeps nothing of the half; started again it is in the next one."""
    servers, out = shared.servers, shared.folder / "halted"
    (shared.folder / "halt").touch()
    servers.submit(fedavg_runs.APP, config_of(out, rounds=2, quorum=1, deadline=15, pause=1))
    wait_until((shared.folder / "halt.half").exists, "SuperNode 1 did not come to its upload")
    wait_until(lambda: shared.held()["uploads"] == 1, "the server knows nothing of the half")
    servers.end(servers.node(1), signal.SIGKILL)
    wait_until(lambda: shared.held()["uploads"] == 0, "the half is still there")
    servers.start_node(1)
    (out / "on").touch()
    servers.wait_for_run()
    runs = Runs(out, 2)
    first, second = runs.report("single", 1), runs.report("single", 2)
    assert [len(report["accepted"]) for report in (first, second)] == [1, 2]
    # For a minute Flower takes the SuperNode that is gone for there, and asks it.
    assert first["late"] == second["late"]
    assert len(first["late"]) == 1
    one = runs.mean(1, [0], runs.first())
    np.testing.assert_allclose(runs.model("single", 1)["bias"], one["bias"], rtol=1e-12)
    both = runs.mean(2, [0, 1], runs.model("single", 1))
    np.testing.assert_allclose(runs.model("single", 2)["bias"], both["bias"], rtol=1e-12)
    shared.check_nothing_held()


# ---------------------------------------------------------------- certificates, keys, a database; killed and back


@pytest.fixture(scope="module")
def secure() -> Iterator[Servers]:
    """A server with TLS, SuperNode authentication and a database, and two SuperNodes with registered keys.

    Its workers are told through the kernel, if that is possible here.
    """
    arguments = ("--database", "{database}", "--lifl-transport", "ebpf" if HAS_EBPF else "rings")
    with Servers(arguments=arguments, is_secure=True) as servers:
        for index in range(2):
            servers.start_node(index)
        yield servers


def begin_and_hold(servers: Servers, out: Path) -> None:
    """Begins a run of two rounds; returns in the first, when SuperNode 0 has sent its update and 1 waits for a file."""
    sent = servers.log(servers.node(0)).count("Sent successfully")
    servers.submit(fedavg_runs.APP, config_of(out, rounds=2, sleep=1))
    wait_until(lambda: servers.log(servers.node(0)).count("Sent successfully") == sent + 1, "no first update")


@pytest.mark.ladder
@leaves_children
def test_certificates_keys_and_a_database(secure: Servers, tmp_path: Path) -> None:
    """The server folds rounds of registered SuperNodes over TLS, and keeps everything in the database."""
    secure.run(fedavg_runs.APP, config_of(tmp_path / "out"), timeout=120)
    check_single(tmp_path / "out", 1, is_served=True)
    assert "objects in the database" in secure.log(secure.server)
    assert ("transport ebpf" in secure.log(secure.server)) == HAS_EBPF
    assert secure.database.read_bytes()[:15] == b"SQLite format 3"


@pytest.mark.ladder
@leaves_children
def test_a_stranger_is_not_let_in(secure: Servers) -> None:
    """A SuperNode whose key nobody registered ends with Flower's error."""
    make_key(secure.folder / "stranger")
    command = ["flower-supernode", "--superlink", secure.address, "--port", str(free_ports(1)[0])]
    command += ["--root-certificates", str(secure.folder / "ca.pem"), "--auth-supernode-private-key"]
    secure.launch("stranger", [*command, str(secure.folder / "stranger")], secure._home("stranger"), may_end=True)
    assert secure.finish("stranger", WAIT_S) != 0
    assert "Failed to initialize the connection to the SuperLink" in secure.log("stranger")


@pytest.mark.ladder
@leaves_children
@pytest.mark.timeout(600)
def test_the_server_is_killed_in_a_round(secure: Servers, tmp_path: Path) -> None:
    """Nothing of it stays; started again it goes on as flower-superlink does (flwr 1.42, tried).

    A ServerApp that the server had started ends with it: its run is said to be running until its heartbeat has been
    missed for a minute, and then to have failed. One that was started by somebody else goes on, and its run ends well.
    SuperNodes wait, stay registered, send what they had, and take part in new runs.
    """
    nodes = [secure.node(index) for index in range(2)]
    begin_and_hold(secure, tmp_path / "lost")
    workers = lifl_processes(secure)
    assert workers
    (executor,) = processes(secure, f"{secure.address} --parent-pid")
    assert secure.end(secure.server, signal.SIGKILL) == -signal.SIGKILL
    wait_until(lambda: not [p for p in (*workers, executor) if Path(f"/proc/{p}").exists()], "something lives on")
    # The ServerApp ends too, in five to ten seconds, as on flower-superlink.
    for pid in processes(secure, "flwr-serverapp"):
        os.kill(pid, signal.SIGKILL)

    secure.start_server("--isolation", "process")
    secure.start_superexec()
    (tmp_path / "lost" / "go").touch()
    assert secure.run_status() == "running: N/A"
    # These are the effects of a minute.
    secure.execute("UPDATE task SET active_until = '2020-01-01 00:00:00' WHERE active_until IS NOT NULL")
    wait_until(lambda: secure.run_status() == "finished:failed: No heartbeat received from the task", "no end")
    for node in nodes:
        assert secure.log(node).count("SuperNode ID:") == 1

    begin_and_hold(secure, tmp_path / "kept")
    secure.end(secure.server, signal.SIGKILL)
    secure.start_server("--isolation", "process")
    assert secure.run_status() == "running: N/A"
    (tmp_path / "kept" / "go").touch()
    secure.wait_for_run()
    runs = check_single(tmp_path / "kept", 2)
    assert [len(runs.report("single", number)["accepted"]) for number in (1, 2)] == [2, 2]
    for node in nodes:
        assert secure.log(node).count("SuperNode ID:") == 1


def processes(servers: Servers, *words: str) -> list[int]:
    """Those of a deployment with one of the words on their command line."""
    found = []
    for pid in _janitor.marked_processes(str(servers.folder)):
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if any(word in command for word in words):
                found.append(pid)
    return found


def lifl_processes(servers: Servers) -> list[int]:
    """The workers of the server, and who starts them; not those of ServerApps."""
    return processes(servers, "lifl.workers.spawner")


# ---------------------------------------------------------------- how it starts and ends


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_as_flowers_does(how: signal.Signals) -> None:
    """Asked to end, it leaves no process and no socket, and has Flower's exit status; in simulation mode too."""
    arguments = ("--simulation",) if how == signal.SIGINT else ()
    with Servers(arguments=arguments) as servers:
        wait_until(lambda: processes(servers, "flower-superexec"), "no SuperExec")
        path = ipc.path_for(int(servers.address.split(":")[1]))
        assert path.is_socket()
        assert lifl_processes(servers)
        assert servers.end(servers.server, how) == (-signal.SIGTERM if how == signal.SIGTERM else 0)
        wait_until(lambda: not _janitor.marked_processes(str(servers.folder)), "something lives on")
        assert not path.exists()
        assert "Traceback" not in servers.log(servers.server)


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., tuple[int, str]]:
    """Starts a server that ends by itself; its exit status, and what it said."""

    def run(*arguments: str) -> tuple[int, str]:
        with Programs() as programs:
            command = [sys.executable, "-m", "lifl.superlink", "--insecure", *arguments]
            environment = {"FLWR_HOME": str(tmp_path), "FLWR_DISABLE_UPDATE_CHECK": "1", "FLWR_TELEMETRY_ENABLED": "0"}
            programs.launch("server", command, environment, may_end=True)
            return programs.finish("server", WAIT_S), programs.log("server")

    return run


def test_help_has_flowers_flags_and_lifls(start: Callable[..., tuple[int, str]]) -> None:
    """Every flag of flower-superlink is there, and lifl's with their defaults."""
    status, said = start("--help")
    assert status == 0
    shown = [action for action in flower.part("server").parser()._actions if action.help != argparse.SUPPRESS]
    flags = {flag for action in shown for flag in action.option_strings}
    own = {f"--lifl-{name}" for name in ("memory", "workers", "transport", "max-object", "hold")}
    assert set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", said)) >= flags | own
    assert said.startswith("usage: lifl-superlink")
    assert said.count("Default: ") >= len(own)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--lifl-memry", "1GiB"), "unrecognized arguments: --lifl-memry"),
        (("--lifl-memory", "much"), "argument --lifl-memory: memory='much' is not a size"),
        (("--lifl-workers", "-1"), "argument --lifl-workers: -1 is not 0 to 255"),
        (("--lifl-transport", "pigeon"), "argument --lifl-transport: invalid choice: 'pigeon'"),
        (("--lifl-max-object", "0"), "argument --lifl-max-object: "),
        (("--lifl-hold", "7"), "argument --lifl-hold: 7.0 is not from 0 to below 5"),
        (("--lifl-hold", "nan"), "argument --lifl-hold: nan is not from 0 to below 5"),
    ],
)
def test_nonsense_is_refused(
    arguments: tuple[str, ...], complaint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An impossible setting is refused in one line, with exit status 2."""
    monkeypatch.setattr(sys, "argv", ["lifl-superlink", "--insecure", *arguments])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 2
    assert complaint in capsys.readouterr().err


def test_memory_that_cannot_be_had(start: Callable[..., tuple[int, str]]) -> None:
    """More than the machine has is refused with how much it has."""
    status, said = start("--port", str(free_ports(1)[0]), "--lifl-memory", "4096TiB")
    assert status == 1
    assert re.search(r"lifl-superlink: .*an arena of 4,503,599,627,370,496 bytes was asked for, [\d,]+ are", said)
    assert "Traceback" not in said


def test_a_port_that_is_taken(start: Callable[..., tuple[int, str]]) -> None:
    """It ends as flower-superlink does, says why, and leaves nothing."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", free_ports(1)[0]))
        taken.listen()
        port = taken.getsockname()[1]
        status, said = start("--port", str(port))
    assert status == 1
    assert f"error while attempting to bind on address ('127.0.0.1', {port})" in said
    assert not ipc.path_for(port).exists()


WITHOUT = """
import sys
from lifl.superlink import command, flower
flower.NAMES[sys.argv.pop(1)]["gone"] = "flwr.supercore.gone"
command.main()
"""


@pytest.mark.ladder
@leaves_children
@pytest.mark.parametrize("part", ["store"])
def test_without_a_name_of_flowers(part: str, tmp_path: Path) -> None:
    """A part that needs a name which is gone is left to Flower, that is said once, and runs go on as with Flower."""
    with Servers((sys.executable, "-c", WITHOUT, part), ("--lifl-memory", "256MiB")) as servers:
        for index in range(2):
            servers.start_node(index)
        servers.run(fedavg_runs.APP, config_of(tmp_path / "out"), timeout=120)
        said = servers.log(servers.server)
    assert said.count("flwr.supercore.gone is not there") == 1
    assert said.count("Flower's own") == 1
    check_single(tmp_path / "out", 1, is_served=False)
