"""``lifl doctor``: it says what is really used, with a remedy for all that could be better, whatever is missing."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import deprived
import pytest

import lifl
from lifl.cli import doctor
from lifl.cli.doctor_view import TITLES
from lifl.ebpf import probe
from lifl.node import node as runtime
from lifl.shm import kernels, machine
from lifl.superlink import command, flower

DEPRIVED = (sys.executable, deprived.__file__)
DOCTOR = (sys.executable, "-c", "from lifl.cli.main import main; main(prog_name='lifl')", "doctor")
WAIT_S = 60.0
"""The time that anything may take: a bound on liveness, not a measurement."""

KEYS = {
    "lifl": {"version", "runs"},
    "machine": {
        *("kernel", "architecture", "cores", "cores_there", "cpu_quota", "vector_width", "available_bytes"),
        *("memory_limit_bytes", "open_files"),
    },
    "arena": {"node_bytes", "superlink_bytes", "memfd", "shmem_enabled", "madv_collapse"},
    "ebpf": {"available", "loader", "reason", "missing_capabilities", "kernel", "default", "auto", "bcc"},
    "flower": {"version", "is_tested", "parts", "signatures"},
    "packages": set(doctor.PACKAGES),
    "calibration": {"is_measured", "costs", "path"},
}

Examined = Callable[..., "tuple[int, dict[str, Any], str]"]


def give_up(reason: str) -> None:
    """It cannot be tested here. CI is root with all capabilities: there it must not go unnoticed."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture
def home() -> Iterator[Path]:
    """A home that every user can write, in which there is nothing."""
    folder = Path(tempfile.mkdtemp(prefix="lifl-doctor-"))
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def examined(home: Path) -> Examined:
    """Runs the command as a user does: its status, what it says as JSON, and its table."""

    def run(*prefix: str, **environment: str) -> tuple[int, dict[str, Any], str]:
        # COLUMNS: on a narrow terminal the table is the same, in more lines.
        known = {"HOME": str(home), "LIFL_CACHE": str(home / "cache"), "COLUMNS": "400", "TMPDIR": str(home)}
        env = os.environ | known | environment
        done = [
            subprocess.run(
                [*prefix, *DOCTOR, *more], env=env, capture_output=True, text=True, timeout=WAIT_S, check=False
            )
            for more in (["--json"], [])
        ]
        assert [one.stderr for one in done] == ["", ""]
        assert done[0].returncode == done[1].returncode
        return done[0].returncode, json.loads(done[0].stdout), done[1].stdout

    return run


def check_complete(said: dict[str, Any], table: str) -> None:
    """Every section and key is there, every remedy is of a line of its section, and people are told of all of them."""
    assert said.keys() == KEYS.keys() == TITLES.keys()
    for section, keys in KEYS.items():
        assert said[section].keys() == {*keys, "remedies"}
        assert said[section]["remedies"].keys() <= keys
        assert TITLES[section] in table
        for remedy in said[section]["remedies"].values():
            assert f"→ {remedy}" in table
    ebpf = said["ebpf"]
    assert type(ebpf["available"]) is bool
    assert type(ebpf["reason"]) is str
    assert (ebpf["loader"] is None) == (not ebpf["available"])
    assert ebpf["available"] or "available" in ebpf["remedies"]


NODE = """
import json
from lifl import Node
from lifl.node import calibration
with Node(workers=1, transport="auto") as node:
    loader = getattr(node.transport, "loader", None)
    print(json.dumps([node.transport.name, loader, node.arena.block_bytes, node.forecast.costs.to_dict()]))
"""


def test_it_says_what_is_used(examined: Examined, home: Path) -> None:
    """Transport, loader, arena and costs are those of a Node that is made afterwards; the rest is this machine's."""
    before = machine.available_bytes()
    status, said, table = examined()
    assert status == 0
    check_complete(said, table)
    env = os.environ | {"HOME": str(home), "LIFL_CACHE": str(home / "cache")}
    done = subprocess.run([sys.executable, "-c", NODE], env=env, capture_output=True, text=True, check=True)
    name, loader, nbytes, costs = json.loads(done.stdout)
    assert said["ebpf"]["auto"] == name
    assert said["ebpf"]["loader"] == loader
    assert said["calibration"]["costs"] == costs
    assert said["calibration"]["is_measured"] is False
    if before > 5 * runtime.DEFAULT_MEMORY:
        assert said["arena"]["node_bytes"] == runtime.DEFAULT_MEMORY <= nbytes
    assert said["machine"]["cores"] == len(os.sched_getaffinity(0))
    assert said["machine"]["vector_width"] == kernels.vector_width()
    assert said["machine"]["kernel"] == os.uname().release
    assert said["lifl"] == {"version": lifl.__version__, "runs": True, "remedies": {}}
    assert said["flower"]["version"] == metadata.version("flwr")
    assert said["flower"]["parts"] == dict.fromkeys(flower.NAMES)
    assert list(home.iterdir()) == []  # nothing is written, not even a cache


@pytest.mark.ladder
def test_measured_costs(examined: Examined, home: Path) -> None:
    """As soon as this machine has been measured it says so, and where that is kept."""
    code = "from lifl.node import calibration; calibration.calibrate(); print(calibration.path())"
    env = os.environ | {"LIFL_CACHE": str(home / "cache")}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    _, said, table = examined()
    assert said["calibration"]["is_measured"] is True
    assert said["calibration"]["path"] == done.stdout.strip()
    assert said["calibration"]["costs"] == json.loads(Path(done.stdout.strip()).read_text())["costs"]
    assert said["calibration"]["remedies"] == {}
    assert done.stdout.strip() in table


@pytest.mark.ladder
def test_ebpf_as_root_with_everything(examined: Examined) -> None:
    """Loaded with the bytecode, or by bcc if that is asked for."""
    if os.geteuid() != 0 or not deprived.BCC.is_dir():
        give_up("eBPF with both loaders needs root and the distribution's bcc: apt-get install python3-bpfcc")
    for loader in ("prebuilt", "bcc"):
        _, said, table = examined(LIFL_EBPF_LOADER=loader)
        ebpf = said["ebpf"]
        assert (ebpf["available"], ebpf["loader"], ebpf["auto"]) == (True, loader, "ebpf")
        assert ebpf["remedies"] == {}
        assert ebpf["missing_capabilities"] == []
        assert ebpf["bcc"] == {"found": True, "path": str(deprived.BCC), "reason": ""}
        assert f"loaded ({loader}) and attached" in table


@pytest.mark.ladder
@pytest.mark.parametrize(
    ("way", "reason", "remedy"),
    [
        ("nobody", "this process has no CAP_NET_ADMIN and CAP_BPF", "setcap cap_net_admin,cap_bpf+ep"),
        ("powerless", "this process has no CAP_NET_ADMIN and CAP_BPF", "run as root"),
        ("eperm", "a seccomp filter is on this process", "seccomp=unconfined"),
        ("enosys", "a seccomp filter hides bpf(2)", "seccomp=unconfined"),
        ("user_namespace", "those of a user namespace", "run it as root of the machine"),
        ("no_loopback", "no TCP sockets over the loopback device", "ip link set lo up"),
    ],
)
def test_ebpf_where_it_cannot_be_had(way: str, reason: str, remedy: str, examined: Examined) -> None:
    """The reason, the remedy and what "auto" uses are those of a Node; everything else goes on, with status 0."""
    if os.geteuid() != 0:
        give_up("only root can take capabilities away: run it as root")
    tried = subprocess.run([*DEPRIVED, way, "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        give_up(f"{way}: {tried.stderr.strip()}")
    status, said, table = examined(*DEPRIVED, way)
    assert status == 0
    check_complete(said, table)
    ebpf = said["ebpf"]
    assert (ebpf["available"], ebpf["loader"], ebpf["auto"]) == (False, None, "rings")
    assert reason in ebpf["reason"]
    assert remedy in ebpf["remedies"]["available"]
    assert (ebpf["missing_capabilities"] == []) == (way not in ("nobody", "powerless"))
    assert said["lifl"]["runs"] is True


@pytest.mark.ladder
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "not installed"),
        ("class Lattice: ...\n", "is another project of that name"),
        ("raise ImportError('no lattice')\n", "cannot be imported (no lattice)"),
    ],
)
def test_bcc(text: str | None, reason: str, examined: Examined, home: Path) -> None:
    """Missing or another package: said, with where to get it from; eBPF does without it."""
    if os.geteuid() != 0:
        give_up("only root can make namespaces: run it as root")
    environment = {}
    with tempfile.TemporaryDirectory() as folder:
        if text is not None:
            (Path(folder) / "bcc").mkdir()
            (Path(folder) / "bcc" / "__init__.py").write_text(text)
            environment["PYTHONPATH"] = folder
        _, said, table = examined(*DEPRIVED, "no_bcc", **environment)
    check_complete(said, table)
    assert said["ebpf"]["bcc"]["found"] is False
    assert said["ebpf"]["bcc"]["reason"].startswith("bcc, the BPF Compiler Collection, is not installed")
    assert reason in said["ebpf"]["bcc"]["reason"]
    assert "apt-get install --no-install-recommends python3-bpfcc" in said["ebpf"]["remedies"]["bcc"]
    assert said["ebpf"]["available"] is True


@pytest.mark.ladder
@pytest.mark.parametrize(
    ("variable", "value", "line"),
    [("LIFL_EBPF_LOADER", "gcc", "available"), ("LIFL_TRANSPORT", "pigeon", "default")],
)
def test_nonsense_in_the_environment(variable: str, value: str, line: str, examined: Examined) -> None:
    """Is told, and which variable it is; a Node refuses it too."""
    status, said, table = examined(**{variable: value})
    assert status == 0
    check_complete(said, table)
    assert variable in said["ebpf"]["remedies"][line]
    assert said["ebpf"]["auto"] == (None if line == "available" else said["ebpf"]["auto"])


WITHOUT = "import sys; sys.modules.update(dict.fromkeys(sys.argv.pop(1).split(','))); "
"""None in sys.modules: that is how Python notes that there is no such module."""


def examined_without(home: Path, modules: str) -> tuple[int, dict[str, Any]]:
    """The same where some modules are not installed."""
    env = os.environ | {"HOME": str(home), "LIFL_CACHE": str(home)}
    code = WITHOUT + DOCTOR[2]
    done = subprocess.run(
        [sys.executable, "-c", code, modules, "doctor", "--json"], env=env, capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    return done.returncode, json.loads(done.stdout)


def test_without_the_sidecar(home: Path) -> None:
    """The section of eBPF is whole if its modules cannot be imported, and says so."""
    assert probe.VARIABLE == doctor.EBPF_LOADER
    status, said = examined_without(home, "lifl.ebpf.probe")
    assert status == 0
    ebpf = said["ebpf"]
    assert (ebpf["available"], ebpf["loader"], ebpf["auto"]) == (False, None, None)
    assert "lifl.ebpf.probe" in ebpf["reason"]
    assert ebpf["remedies"]["available"]


def test_without_the_extension(home: Path) -> None:
    """Not built: status 1, the reason, what to do; and what else can be told is told."""
    status, said = examined_without(home, "lifl._shm_ffi")
    assert status == 1
    assert said["lifl"]["runs"] is False
    assert said.keys() == KEYS.keys()
    assert said["machine"]["kernel"] == os.uname().release
    assert said["machine"]["vector_width"] is None
    assert said["ebpf"].keys() >= {"available", "loader", "reason"}


@pytest.mark.parametrize("part", list(flower.NAMES))
def test_a_part_that_is_left_to_flower(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is named, with the name of Flower's that is gone."""
    monkeypatch.setitem(flower.NAMES[part], "gone", "flwr.supercore.gone")
    said = doctor.examine().to_dict()["flower"]
    missing = {name: reason for name, reason in said["parts"].items() if reason is not None}
    assert missing.keys() == {part}
    assert "flwr.supercore.gone is not there" in missing[part]
    assert said["remedies"]["parts"] == f"pip install 'flwr=={command.TESTED[-1]}.*'"


def test_versions_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """An untested flwr and packages that are not installed: said, each with what to install."""
    real = metadata.version

    def version(name: str) -> str:
        if name == "flwr":
            return "1.3.0"
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    said = doctor.examine().to_dict()
    assert said["flower"]["version"] == "1.3.0"
    assert said["flower"]["is_tested"] is False
    assert said["flower"]["remedies"].keys() == {"version", "signatures"}
    assert said["packages"] | {"remedies": None} == dict.fromkeys([*doctor.PACKAGES, "remedies"])
    assert said["packages"]["remedies"].keys() == set(doctor.PACKAGES)
    assert real("lifl") == lifl.__version__


def test_extras_exist() -> None:
    """Every extra that a remedy names is one of lifl's."""
    extras = set(metadata.metadata("lifl").get_all("Provides-Extra") or [])
    assert {extra for extra, _ in doctor.PACKAGES.values()} | {"signatures"} <= extras


def test_a_part_that_fails_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever goes wrong in one part, the others are told, and the part says what went wrong."""

    def fails() -> Iterator[doctor.Line]:
        raise ZeroDivisionError("what nobody thought of")
        yield

    monkeypatch.setitem(doctor.SECTIONS, "arena", (fails, *doctor.SECTIONS["arena"]))
    findings = doctor.examine()
    first = findings.sections["arena"][0]
    assert (first.name, first.text) == ("fails", "cannot be found out: what nobody thought of")
    assert first.remedy
    assert findings.to_dict()["arena"]["memfd"] is True
    assert findings.can_run


def test_limits_of_this_process(home: Path) -> None:
    """Fewer descriptors, one core, no room for the default arena: each is seen, with what to do."""
    code = (
        "import os, resource; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))});"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256)); " + DOCTOR[2]
    )
    env = os.environ | {"HOME": str(home), "LIFL_CACHE": str(home)}
    done = subprocess.run(
        [sys.executable, "-c", code, "doctor", "--json"], env=env, capture_output=True, text=True, check=True
    )
    machine = json.loads(done.stdout)["machine"]
    assert (machine["cores"], machine["open_files"]) == (1, 256)
    assert "LimitNOFILE" in machine["remedies"]["open_files"]
    assert ("cores" in machine["remedies"]) == ((os.cpu_count() or 1) > 1)


def test_arena_smaller_than_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with little memory a quarter of it is taken, and it says so."""
    monkeypatch.setattr(machine, "available_bytes", lambda: 2**30)
    said = doctor.examine().to_dict()["arena"]
    assert said["node_bytes"] == said["superlink_bytes"] == 2**28
    assert said["remedies"]["node_bytes"] == "free memory, or say how much: memory="
    assert said["remedies"]["superlink_bytes"] == "free memory, or say how much: --lifl-memory"


def test_picture(home: Path) -> None:
    """The SVG has every line that the table has, and refers to no other host."""
    path = home / "doctor.svg"
    env = os.environ | {"HOME": str(home), "LIFL_CACHE": str(home), "COLUMNS": "400"}
    done = subprocess.run([*DOCTOR, "--svg", str(path)], env=env, capture_output=True, text=True, check=True)
    svg = path.read_text()
    assert svg.startswith("<svg ")
    assert not re.findall(r"(?:url\(|href=)[\"']?(?:https?:)?//", svg)
    for title in TITLES.values():
        assert title in done.stdout
        assert title.replace(" ", "&#160;") in svg
