"""Machines without eBPF, for real: "auto" works and logs once what it uses, "ebpf" gives the reason and the remedy."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import deprived
import pytest

from lifl.deploy.programs import Programs, free_ports

pytestmark = pytest.mark.ladder

DEPRIVED = (sys.executable, deprived.__file__)
WAIT_S = 60.0
"""The time that anything may take: a bound on liveness, not a measurement."""

CAPABILITIES = (
    r"this process has no CAP_NET_ADMIN and CAP_BPF \(Operation not permitted\)",
    r"run as root, or .* sudo setcap cap_net_admin,cap_bpf\+ep /.*python3[\d.]*; in a container: --cap-add BPF .*",
)
ALTHOUGH = r"the kernel refuses bpf\(2\) although the capabilities are there \(Operation not permitted\): "
NO_BCC = r"bcc, the BPF Compiler Collection, is not installed"
APT = r"apt-get install --no-install-recommends python3-bpfcc"
NO_BCC_HERE = "the distribution's bcc is not installed: apt-get install python3-bpfcc"
AFTER_BCC = "another user, and bcc is asked for"
BY_BCC = {"LIFL_EBPF_LOADER": "bcc"}

# Means that are taken away -> the environment, the reason and the remedy, as regular expressions.
CASES: dict[str, tuple[str, Mapping[str, str], str, str]] = {
    "another user": ("nobody", {}, *CAPABILITIES),
    "root without capabilities": ("powerless", {}, *CAPABILITIES),
    "seccomp says EPERM": ("eperm", {}, f"{ALTHOUGH}a seccomp filter is on this process", r".*seccomp=unconfined.*"),
    "seccomp says ENOSYS": (
        "enosys",
        {},
        r"a seccomp filter hides bpf\(2\) from this process \(Function not implemented\)",
        r".*seccomp=unconfined.*",
    ),
    "root of a user namespace": (
        "user_namespace",
        {},
        f"{ALTHOUGH}they are those of a user namespace, which do not count for it",
        r"run it as root of the machine; .*",
    ),
    "no loopback device is up": (
        "no_loopback",
        {},
        r"no TCP sockets over the loopback device \(Network is unreachable\)",
        r"ip link set lo up",
    ),
    "bcc is not installed": ("no_bcc", BY_BCC, NO_BCC, APT),
    "another package is named bcc": (
        "no_bcc",
        {**BY_BCC, "PYTHONPATH": "{wrong}"},
        rf"{NO_BCC}; the package bcc at /.*/bcc/__init__\.py is another project of that name",
        APT,
    ),
    "a package named bcc is broken": (
        "no_bcc",
        {**BY_BCC, "PYTHONPATH": "{broken}"},
        rf"{NO_BCC}; the package bcc that is there cannot be imported \(no lattice\)",
        APT,
    ),
    AFTER_BCC: ("nobody", BY_BCC, *CAPABILITIES),
}


def give_up(reason: str) -> None:
    """It cannot be tested here. CI is root with all capabilities: there it must not go unnoticed."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


class Case:
    """A machine that lacks something; runs commands there."""

    def __init__(self, name: str, folder: Path) -> None:
        way, environment, self.reason, self.remedy = CASES[name]
        wrong, broken = folder / "wrong", folder / "broken"
        for path, text in ((wrong, "class Lattice: ...\n"), (broken, "raise RuntimeError('no lattice')\n")):
            (path / "bcc").mkdir(parents=True)
            (path / "bcc" / "__init__.py").write_text(text)
        for one in (folder, *folder.rglob("*")):
            one.chmod(0o777)
        self.folder = folder
        self.prefix = (*DEPRIVED, way)
        self.environment = {key: value.format(wrong=wrong, broken=broken) for key, value in environment.items()}
        # Another user cannot write to this one's home.
        self.environment |= {"HOME": str(folder), "LIFL_CACHE": str(folder), "XDG_RUNTIME_DIR": str(folder)}

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """A command's end."""
        env = os.environ | self.environment | environment
        command = (*self.prefix, sys.executable, *command)
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=WAIT_S, check=False)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    """A case, in a folder that every user can write."""
    if os.geteuid() != 0:
        give_up("only root can take capabilities away and make namespaces: run it as root")
    if request.param == AFTER_BCC and not deprived.BCC.is_dir():
        give_up(NO_BCC_HERE)
    folder = Path(tempfile.mkdtemp(prefix="lifl-unavailable-"))
    try:
        case = Case(request.param, folder)
        done = case.run("-c", "")
        if done.returncode:
            give_up(f"{request.param}: {done.stderr.strip().splitlines()[-1]}")
        yield case
    finally:
        shutil.rmtree(folder)


NODES = """
import json, logging, os
import numpy as np
import lifl
from lifl.errors import EbpfUnavailableError

said, used, means = [], [], []

class Listener(logging.Handler):
    def emit(self, entry):
        said.append([entry.name, entry.levelname, entry.getMessage()])

logging.getLogger("lifl").addHandler(Listener())
logging.getLogger("lifl").setLevel(logging.INFO)
spec = lifl.TensorSpec.from_arrays({"w": np.zeros(1000)})

def a_round(node):
    with node.open_round(spec, 4) as round_:
        for value in range(4):
            round_.submit({"w": np.full(1000, float(value))}, client_id=value, timeout=30)
        return float(round_.result(30).arrays["w"][0])

for workers in (1, 2, 0):
    with lifl.Node("4MiB", workers=workers, transport="auto") as node:
        used.append(node.transport.name)
        means.append(a_round(node))
before = sorted(os.listdir("/proc/self/fd"))
try:
    lifl.Node("4MiB", workers=1, transport="ebpf")
except EbpfUnavailableError as error:
    raised = [error.reason, error.remedy, str(error)]
left = sorted(set(os.listdir("/proc/self/fd")) - set(before))
print(json.dumps({"said": said, "used": used, "means": means, "raised": raised, "left": left}))
"""


def test_nodes(case: Case) -> None:
    """With "auto" every Node has rings, which is logged once; "ebpf" raises, says what to do, leaves nothing."""
    done = case.run("-c", NODES)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    told: dict[str, Any] = json.loads(done.stdout)
    reason, remedy, message = told["raised"]
    assert re.fullmatch(case.reason, reason), reason
    assert re.fullmatch(case.remedy, remedy), remedy
    assert message == f"eBPF cannot be used: {reason}; {remedy}"
    assert told["used"] == ["rings"] * 3
    assert told["means"] == [1.5] * 3
    assert told["said"] == [["lifl.workers.transport", "INFO", f"transport auto: rings are used; {message}"]]
    assert told["left"] == []


class Server:
    """A lifl-superlink on such a machine."""

    def __init__(self, case: Case, programs: Programs) -> None:
        self._case, self._programs = case, programs

    def start(self, *flags: str, **environment: str) -> None:
        """Starts it."""
        flags = ("--lifl-memory", "64MiB", "--lifl-workers", "1", *flags)
        port = ("--port", str(free_ports(1)[0]), "--host", "0.0.0.0")
        command = [*self._case.prefix, sys.executable, "-m", "lifl.superlink", "--insecure", *port, *flags]
        environment |= {"FLWR_DISABLE_UPDATE_CHECK": "1", "FLWR_TELEMETRY_ENABLED": "0"}
        environment |= {**self._case.environment, "FLWR_HOME": str(self._case.folder)}
        self._programs.launch("server", command, environment, may_end=True)

    def end(self) -> tuple[int, str]:
        """Its status, once it has ended by itself, and what it said."""
        return self._programs.finish("server", WAIT_S), self._programs.log("server")

    def wait_for(self, words: str) -> str:
        """The server's log, when it has these words in it."""
        self._programs.wait_until(lambda: words in self._programs.log("server"), f"it did not say {words!r}", "server")
        return self._programs.log("server")


@pytest.fixture
def server(case: Case) -> Iterator[Server]:
    """A server that is ended with the test."""
    with Programs() as programs:
        yield Server(case, programs)


@pytest.mark.leaves("Flower's programs reap the processes of their tasks late")
def test_server_that_is_to_use_it(server: Server, case: Case) -> None:
    """It ends with status 1; its last line, and no other, says why and what to do."""
    server.start("--lifl-transport", "ebpf")
    check_ended(server, case)


@pytest.mark.leaves("Flower's programs reap the processes of their tasks late")
@pytest.mark.parametrize("case", ["seccomp says EPERM"], indirect=True)
def test_server_that_is_told_by_the_environment(server: Server, case: Case) -> None:
    """LIFL_TRANSPORT=ebpf is no less than the flag."""
    server.start(LIFL_TRANSPORT="ebpf")
    check_ended(server, case)


def check_ended(server: Server, case: Case) -> None:
    """It has given up, and said why."""
    status, said = server.end()
    assert status == 1, said
    lines = said.strip().splitlines()
    pattern = f"lifl-superlink: eBPF cannot be used: {case.reason}; {case.remedy}"
    assert re.fullmatch(pattern, lines[-1]), said
    assert sum("eBPF" in line for line in lines) == 1
    assert "Traceback" not in said


@pytest.mark.leaves("Flower's programs reap the processes of their tasks late")
def test_server_that_may_use_it(server: Server, case: Case) -> None:
    """It starts with rings, and says that once."""
    server.start("--lifl-transport", "auto")
    said = server.wait_for("Uvicorn running on")
    assert "transport rings" in said
    assert len(re.findall(f"transport auto: rings are used; eBPF cannot be used: {case.reason}", said)) == 1, said


@pytest.mark.parametrize(("variable", "value"), [("LIFL_TRANSPORT", "pigeon"), ("LIFL_EBPF_LOADER", "gcc")])
def test_nonsense_in_the_environment(variable: str, value: str, tmp_path: Path) -> None:
    """A server says in one line what it was told, and ends with status 1."""
    told = {"LIFL_TRANSPORT": "auto", variable: value, "FLWR_HOME": str(tmp_path), "FLWR_DISABLE_UPDATE_CHECK": "1"}
    command = [sys.executable, "-m", "lifl.superlink", "--insecure", "--port", str(free_ports(1)[0])]
    env = os.environ | told
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert done.returncode == 1
    assert re.fullmatch(rf"lifl-superlink: .*'{value}': give one of .*", done.stderr.strip().splitlines()[-1])
    assert "Traceback" not in done.stderr


LOADED = """
import json, sys
from lifl import Node
with Node("4MiB", workers=1, transport="auto") as node:
    print(json.dumps([node.transport.name, getattr(node.transport, "loader", None)]))
"""


def loaded_by(python: list[str], environment: dict[str, str]) -> Any:
    """The transport and the loader of a Node of a Python that is started so; the Python must not fail."""
    done = subprocess.run(
        [*python, "-c", LOADED],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_remedy_for_capabilities_is_enough(tmp_path: Path) -> None:
    """A user with the two capabilities that the remedy names, and no others of that kind, has eBPF."""
    if os.geteuid() != 0:
        give_up("only root can become another user: run it as root")
    assert loaded_by([*DEPRIVED, "just_enough", sys.executable], {"LIFL_CACHE": str(tmp_path)}) == ["ebpf", "prebuilt"]


def test_a_wrong_package_is_in_nobodys_way(tmp_path: Path) -> None:
    """With the distribution's bcc installed, another package of that name hides nothing."""
    if not deprived.BCC.is_dir():
        give_up(NO_BCC_HERE)
    (tmp_path / "bcc").mkdir()
    (tmp_path / "bcc" / "__init__.py").write_text("import bcc.table\nclass Lattice: ...\n")
    (tmp_path / "bcc" / "table.py").write_text("")
    environment = {"PYTHONPATH": str(tmp_path), "LIFL_EBPF_LOADER": "bcc"}
    assert loaded_by([sys.executable], environment) == ["ebpf", "bcc"]
