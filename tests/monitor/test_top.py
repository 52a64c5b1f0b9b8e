"""`lifl top`: Nodes of other processes are found and asked, whatever becomes of them; what it draws fits."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import attrs
import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

import lifl
from lifl.cli import main as cli
from lifl.cli.console import terminal_svg
from lifl.errors import LiflError, PeerGoneError
from lifl.monitor import top, top_view
from lifl.monitor.beacon import name_of
from lifl.monitor.stats import MemoryStats, NodeStats, RoundStats, SuperlinkStats, Totals, WorkerStats
from lifl.monitor.top import Place, Sight, Watcher, ask, find_places, rates_of
from lifl.node import telemetry as watch

WAIT_S = 60.0
MODEL = {"w": np.ones(1000, np.float32)}
SPEC = lifl.TensorSpec.from_arrays(MODEL)
RUN = [sys.executable, "-c", "from lifl.cli.main import main; main(prog_name='lifl')"]
NOBODY = 65534

PROGRAM = """
import sys
import numpy as np
import lifl

model = {"w": np.ones(1000, np.float32)}
with lifl.Node("8MiB", workers=2) as node, node.open_round(lifl.TensorSpec.from_arrays(model), 5) as round_:
    round_.submit(model, client_id="a")
    round_.submit(model, client_id="b")
    print("ready", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def program() -> Iterator[subprocess.Popen[str]]:
    """Another process with a Node and an open round, until its standard input ends."""
    command = [sys.executable, "-c", PROGRAM]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def places_of(pid: int) -> list[Place]:
    """The Nodes of a process."""
    return [place for place in find_places() if place.pid == pid]


def wait_until_gone(pid: int) -> None:
    """Until nothing is found of it."""
    end = time.monotonic() + WAIT_S
    while places_of(pid):
        assert time.monotonic() < end, "its Node is still found"
        time.sleep(0.01)


def wait_until_stopped(pid: int) -> None:
    """Until every thread of it is."""
    stats = Path(f"/proc/{pid}/task").glob("*/stat")
    end = time.monotonic() + WAIT_S
    for stat in stats:
        while stat.read_text().rpartition(") ")[2][0] != "T":
            assert time.monotonic() < end
            time.sleep(0.001)


def links() -> set[str]:
    """The targets of this process's descriptors."""
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            found.add(os.readlink(f"/proc/self/fd/{fd}"))
    return found


def connect(place: Place) -> socket.socket:
    """A connection to a Node's beacon."""
    asking = socket.socket(socket.AF_UNIX)
    asking.settimeout(WAIT_S)
    top._connect(asking, f"\0{name_of(place.pid, place.number)}", WAIT_S)
    return asking


# ---------------------------------------------------------------- finding and asking


def test_a_command_is_named_without_its_folders(tmp_path: Path) -> None:
    """The panel is 80 characters wide: the name of a program in a deep folder has to be in it."""
    folder = tmp_path / "deep" / "er"
    folder.mkdir(parents=True)
    script = folder / "lifl-superlink"
    script.write_text("input()\n")
    for command in ([sys.executable, str(script), "--insecure"], [sys.executable, "-c", "input()"]):
        with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
            said = top.command_of(process.pid)
            process.communicate(b"\n", timeout=WAIT_S)
        name = os.path.basename(sys.executable)
        assert said == ("lifl-superlink --insecure" if "--insecure" in command else f"{name} -c input()")
    assert top.command_of(2**22 + 1) == ""


def test_node_of_another_process(program: subprocess.Popen[str]) -> None:
    """It is found and says what it is doing; nothing of it is in the file system; closed, it is gone."""
    (place,) = places_of(program.pid)
    stats = ask(place)
    assert (stats.pid, stats.number) == (program.pid, 1)
    assert (stats.rounds[0].accepted, stats.rounds[0].expected) == (2, 5)
    assert len(stats.workers) == 2
    assert "import lifl" in top.command_of(program.pid)
    program.communicate("\n", timeout=WAIT_S)
    assert places_of(program.pid) == []
    with pytest.raises(PeerGoneError, match=f"process {program.pid} is gone"):
        ask(place)


def test_process_that_is_killed(program: subprocess.Popen[str]) -> None:
    """Its Node is found no more as soon as it is dead."""
    (place,) = places_of(program.pid)
    program.kill()
    program.wait(WAIT_S)
    wait_until_gone(program.pid)
    with pytest.raises(PeerGoneError):
        ask(place)


def test_process_that_is_stopped(program: subprocess.Popen[str]) -> None:
    """It is said not to answer, and is asked again with success when it goes on."""
    (place,) = places_of(program.pid)
    program.send_signal(signal.SIGSTOP)
    wait_until_stopped(program.pid)
    with pytest.raises(LiflError, match="does not answer") as caught:
        ask(place, 0.2)
    assert not isinstance(caught.value, PeerGoneError)
    program.send_signal(signal.SIGCONT)
    assert ask(place).pid == program.pid


def test_several_nodes_of_one_process() -> None:
    """Each is asked by its number; one without workers cannot be asked."""
    with lifl.Node("1MiB", workers=1) as one, lifl.Node("1MiB", workers=2) as two, lifl.Node("1MiB", workers=0):
        places = places_of(os.getpid())
        assert [place.number for place in places] == [one.stats().number, two.stats().number]
        assert [len(ask(place).workers) for place in places] == [1, 2]
    assert places_of(os.getpid()) == []


def test_fork_neither_keeps_nor_serves_it() -> None:
    """A fork of the process has no copy of the socket: when the Node is closed it is gone."""
    reading, writing = os.pipe()
    node = lifl.Node("1MiB", workers=1)
    assert node.watch._beacon is not None
    link = os.readlink(f"/proc/self/fd/{node.watch._beacon.fd}")
    assert link in links()
    pid = os.fork()
    if pid == 0:
        os.close(writing)
        has_copy = link in links()
        os.read(reading, 1)
        os._exit(has_copy)
    try:
        os.close(reading)
        (place,) = places_of(os.getpid())
        assert ask(place).pid == os.getpid()
        node.close()
        assert places_of(os.getpid()) == []
        assert places_of(pid) == []
    finally:
        os.close(writing)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_many_ask_at_once() -> None:
    """More than its queue has room for: all are answered."""
    with lifl.Node("1MiB", workers=1):
        (place,) = places_of(os.getpid())
        with ThreadPoolExecutor(40) as threads:
            assert {stats.pid for stats in threads.map(ask, [place] * 400)} == {os.getpid()}


def test_largest_snapshot() -> None:
    """The snapshot of 255 workers and a hundred rounds fits into a socket: rounds beyond the limit are only counted."""
    with lifl.Node("16MiB", workers=255, warm=0) as node, contextlib.ExitStack() as stack:
        spec = lifl.TensorSpec.from_arrays({"w": np.ones(10, np.float32)})
        for _ in range(100):
            stack.enter_context(node.open_round(spec, 10**9, "lazy", order="flower"))
        stats = ask(places_of(os.getpid())[0])
        assert len(stats.workers) == 255
        assert (stats.open_rounds, len(stats.rounds)) == (100, watch.MAX_ROUNDS_SHOWN)
        assert len(node.stats().rounds) == 100


def test_name_that_is_taken_leaves_a_node_that_works() -> None:
    """Without its socket a Node cannot be found; that is all."""
    with lifl.Node("1MiB", workers=1) as node:
        number = node.stats().number + 1
    with socket.socket(socket.AF_UNIX) as taken:
        taken.bind(f"\0{name_of(os.getpid(), number)}")
        with lifl.Node("4MiB", workers=1) as node:
            assert node.stats().number == number
            assert places_of(os.getpid()) == []  # who has the name does not listen
            with node.open_round(SPEC, 1) as round_:
                round_.submit(MODEL)
                assert (round_.result(WAIT_S).arrays["w"] == 1).all()


def test_nonsense_at_the_socket() -> None:
    """Those who say something, do not read, or leave at once, hurt nobody."""
    with lifl.Node("4MiB", workers=1) as node, node.open_round(SPEC, 3) as round_:
        (place,) = places_of(os.getpid())
        before = len(os.listdir("/proc/self/fd"))
        for k in range(50):
            with connect(place) as rude:
                if k % 2:
                    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it may have been answered
                        rude.sendall(b"GET / HTTP/1.1\r\n\r\n" * 1000)
        silent = [connect(place) for _ in range(5)]
        for k in range(3):
            round_.submit(MODEL, client_id=k)
        assert (round_.result(WAIT_S).arrays["w"] == 1).all()
        assert ask(place).rounds[0].phase == "done"
        for one in silent:
            one.close()
        end = time.monotonic() + WAIT_S
        while len(os.listdir("/proc/self/fd")) > before:
            assert time.monotonic() < end
            time.sleep(0.01)


def test_a_thousand_askers_leak_nothing(program: subprocess.Popen[str]) -> None:
    """The process that is asked has as many descriptors as before."""
    (place,) = places_of(program.pid)
    ask(place)
    before = len(os.listdir(f"/proc/{program.pid}/fd"))
    for _ in range(1000):
        ask(place)
    end = time.monotonic() + WAIT_S
    while len(os.listdir(f"/proc/{program.pid}/fd")) > before:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_no_descriptor_is_left_for_an_asker(program: subprocess.Popen[str]) -> None:
    """It is not answered, the process goes on, and the next one who asks is."""
    import resource

    (place,) = places_of(program.pid)
    used = max(map(int, os.listdir(f"/proc/{program.pid}/fd"))) + 1
    limits = resource.prlimit(program.pid, resource.RLIMIT_NOFILE, (used, used + 100))
    with pytest.raises(LiflError, match="does not answer"):
        ask(place, 0.2)
    resource.prlimit(program.pid, resource.RLIMIT_NOFILE, (used + 100, used + 100))
    assert ask(place).pid == program.pid
    assert limits


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to be another user")
def test_another_user_is_told_nothing(program: subprocess.Popen[str]) -> None:
    """A caller of another user gets end-of-file, and does no harm."""
    (place,) = places_of(program.pid)
    code = (
        f"import os, socket; os.setuid({NOBODY}); s = socket.socket(socket.AF_UNIX)\n"
        f"s.connect('\\0{name_of(place.pid, place.number)}'); print(s.recv(10))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True, timeout=WAIT_S
    )
    assert done.stdout == "b''\n"
    assert ask(place).pid == program.pid


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to be another user")
def test_name_that_another_user_has_taken() -> None:
    """A listener of another user under this name is not believed."""
    place = Place(os.getpid(), 10**9)
    code = (
        f"import os, socket; os.setuid({NOBODY}); s = socket.socket(socket.AF_UNIX)\n"
        f"s.bind('\\0{name_of(place.pid, place.number)}'); s.listen(); print('ready', flush=True); input()"
    )
    command = [sys.executable, "-I", "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        assert place in find_places()
        with pytest.raises(LiflError, match=f"user {NOBODY} has taken its name"):
            ask(place)
        other.communicate("\n", timeout=WAIT_S)


@pytest.mark.parametrize("said", [b"hello", b"{}", b"[" * 10**5, b'{"error": "no"}', b"\xff\xfe", b'{"pid": 1}'])
def test_answers_that_make_no_sense_are_told(said: bytes) -> None:
    """Each is an error that names the process."""
    place = Place(os.getpid(), 10**9)
    with socket.socket(socket.AF_UNIX) as listening, ThreadPoolExecutor(1) as threads:
        listening.bind(f"\0{name_of(place.pid, place.number)}")
        listening.listen()

        def answer() -> None:
            with listening.accept()[0] as peer:
                peer.sendall(said)

        threads.submit(answer)
        with pytest.raises(LiflError, match=f"process {os.getpid()} (gave an answer|has no figures)"):
            ask(place)


# ---------------------------------------------------------------- two looks


WORKER = WorkerStats(1, 11, ("leaf",), (3,), 100, 2, 40, 1.0, 0)
LINK = SuperlinkStats(2**30, 2**31, 2**20, 3, 120, 4, 50, 48)
NOW = NodeStats(
    *(7, 1, "ebpf", "prebuilt", 100.0, MemoryStats(2**32, 2**30)),
    (RoundStats(3, "open", "eager", 50, 20, {"values": 1}, 80 * 2**20, 61.5),),
    1,
    Totals(12, 1, 900, 2**35, {"values": 1, "weight": 2}),
    (WORKER, attrs.evolve(WORKER, id=2, pid=None, roles=("off",), rounds=())),
    LINK,
)


def test_rates_are_differences() -> None:
    """The rates of arrivals and of execution time are over the time between two looks; a new worker has none."""
    later = attrs.evolve(
        NOW, uptime_s=102.0, workers=(attrs.evolve(WORKER, arrivals=150, busy_s=2.5), attrs.evolve(WORKER, id=3))
    )
    assert rates_of(NOW, later) == {1: top.Rates(arrivals=25.0, busy=0.75)}
    assert rates_of(NOW, NOW) == {}


def test_watcher_sees_nodes_come_and_go(program: subprocess.Popen[str]) -> None:
    """It has rates from the second look on; a Node that has gone stays in sight, with the command that it was."""
    watcher = Watcher(program.pid)
    (first,), (second,) = watcher.look(), watcher.look()
    assert first.now is not None
    assert (first.rates, first.trouble) == ({}, "")
    assert set(second.rates) == {1, 2}
    program.kill()
    program.wait(WAIT_S)
    wait_until_gone(program.pid)
    for _ in range(2):
        (gone,) = watcher.look()
        assert (gone.is_gone, gone.trouble) == (True, "gone")
        assert "import lifl" in gone.command
    with pytest.raises(LiflError, match=f"process {program.pid} has no Node"):
        Watcher(program.pid)


# ---------------------------------------------------------------- drawing


def drawn(sights: list[Sight], width: int) -> str:
    """As plain text."""
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(top_view.nodes_view(sights))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


SIGHT = Sight(Place(7, 1), "python server.py", NOW, rates={1: top.Rates(25.0, 0.75)}, received=2.0**20, sent=2.0**21)


def test_all_of_it_is_shown() -> None:
    """The view has command, memory, progress, roles, queue, rates, refusals, and the lifl-superlink's own figures."""
    text = drawn([SIGHT], 110)
    for words in (
        *("process 7", "python server.py", "transport ebpf (prebuilt)", "1.0 GiB of 4.0 GiB", "1 of 2 workers"),
        *("12 done, 1 failed", "900 accepted (32.0 GiB)", "refused: values 1, weight 2", "20/50", "1 min 01 s"),
        *("leaf", "75%", " 25 ", "1 worker off", "in 1.0 MiB/s (1.0 GiB)", "out 2.0 MiB/s", "objects 120", "held 4"),
    ):
        assert words in text
    durable = attrs.evolve(NOW, superlink=attrs.evolve(LINK, objects=None))
    assert "objects in the database" in drawn([attrs.evolve(SIGHT, now=durable)], 110)


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_it_fits_any_terminal(width: int) -> None:
    """No line is wider than the terminal, whatever there is to show."""
    many = attrs.evolve(
        NOW,
        workers=tuple(attrs.evolve(WORKER, id=k, rounds=tuple(range(9))) for k in range(1, 256)),
        rounds=tuple(attrs.evolve(NOW.rounds[0], number=k, accepted=10**9) for k in range(64)),
        open_rounds=1000,
    )
    sights = [SIGHT, attrs.evolve(SIGHT, now=many), attrs.evolve(SIGHT, now=None, trouble="does not answer " * 20)]
    text = drawn(sights, width)
    assert max(map(len, text.splitlines())) <= width
    if width > 30:
        assert "and 992 more rounds" in text
        assert "and 223 more workers" in text


def test_what_others_say_is_text() -> None:
    """A command line with escapes, markup and line breaks moves no cursor and has no colour of its own."""
    text = drawn([attrs.evolve(SIGHT, command="\x1b[2J[red]a\nb\x9b1m")], 100)
    assert "?[2J[red]a?b?1m" in text
    assert "\x1b" not in text


def test_picture_is_whole() -> None:
    """It is well-formed and loads nothing from elsewhere."""
    svg = terminal_svg(top_view.nodes_view([SIGHT]), "lifl top", 100)
    root = ElementTree.fromstring(svg)
    assert root.tag.endswith("svg")
    assert "url(http" not in svg
    assert 'url("http' not in svg
    assert "@font-face" not in svg
    assert "75%" in "".join(root.itertext())


@pytest.mark.parametrize(
    ("nbytes", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**30, "1.0 GiB"), (2**50, "1024 TiB")]
)
def test_sizes_in_words(nbytes: int, text: str) -> None:
    """In binary units."""
    assert top_view.size_text(nbytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.9, "60 s"), (61, "1 min 01 s"), (3 * 3600 + 60, "3 h 01 min")]
)
def test_times_in_words(seconds: float, text: str) -> None:
    """As long as they are worth it."""
    assert top_view.time_text(seconds) == text


# ---------------------------------------------------------------- the command


def test_once_as_json_and_as_a_picture(program: subprocess.Popen[str], tmp_path: os.PathLike[str]) -> None:
    """The output is of the process that was asked for."""
    runner, pid = CliRunner(), str(program.pid)
    result = runner.invoke(cli.main, ["top", "--pid", pid, "--once", "--interval", "0.05"])
    assert result.exit_code == 0, result.output
    assert f"process {pid}" in result.output
    assert "2/5" in result.output
    result = runner.invoke(cli.main, ["top", "--pid", pid, "--json"])
    (said,) = json.loads(result.stdout)["nodes"]
    assert NodeStats.from_dict(said).pid == program.pid
    path = os.path.join(tmp_path, "top.svg")
    result = runner.invoke(cli.main, ["top", "--pid", pid, "--interval", "0.05", "--svg", path])
    assert (result.exit_code, result.output) == (0, "")
    assert ElementTree.parse(path).getroot().tag.endswith("svg")


@pytest.mark.parametrize("arguments", [["--once"], ["--json"], []])
def test_without_a_node(arguments: list[str]) -> None:
    """It says so and how to start one, with status 1. In a network of its own, where no other test's Node is seen."""
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-n", "true"], capture_output=True, check=False).returncode:
        assert not os.environ.get("CI"), "CI can make network namespaces"
        pytest.skip("needs unshare -n, and the privilege for it")
    done = subprocess.run([unshare, "-n", *RUN, "top", *arguments], capture_output=True, text=True, timeout=WAIT_S)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("lifl: no Node of this user is running on this machine: start a lifl-superlink")
    assert len(done.stderr.splitlines()) == 1


def test_process_without_a_node() -> None:
    """It says which, with status 1."""
    result = CliRunner().invoke(cli.main, ["top", "--pid", "1", "--once"])
    assert result.exit_code == 1
    assert "process 1 has no Node with workers" in result.output


class Terminal:
    """A program on a terminal of its own."""

    def __init__(self, command: list[str], rows: int, columns: int) -> None:
        self.master, slave = pty.openpty()
        env = os.environ | {"LINES": str(rows), "COLUMNS": str(columns), "TERM": "xterm-256color"}
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env=env, start_new_session=True
        )
        os.close(slave)
        self.text = ""

    def wait_for(self, words: str) -> None:
        """Until it has shown them since the last time."""
        end = time.monotonic() + WAIT_S
        while words not in self.text:
            assert time.monotonic() < end, self.text
            if select.select([self.master], [], [], 0.1)[0]:
                self.text += os.read(self.master, 2**16).decode(errors="replace")
        self.text = ""

    def end(self) -> tuple[int, str]:
        """Its status after Ctrl-C, and the last that it has written."""
        self.process.send_signal(signal.SIGINT)
        text = ""
        with contextlib.suppress(OSError):  # a terminal without a program
            while data := os.read(self.master, 2**16):
                text += data.decode(errors="replace")
        os.close(self.master)
        return self.process.wait(WAIT_S), text


@pytest.mark.parametrize(("rows", "columns"), [(40, 120), (8, 30)])
def test_live_until_ctrl_c(program: subprocess.Popen[str], rows: int, columns: int) -> None:
    """It shows the Node, then that it has gone, and leaves the terminal as it was."""
    terminal = Terminal([*RUN, "top", "--pid", str(program.pid), "--interval", "0.1"], rows, columns)
    try:
        terminal.wait_for(f"process {program.pid}")
        terminal.wait_for("up ")
        program.kill()
        program.wait(WAIT_S)
        terminal.wait_for("gone")
    finally:
        status, text = terminal.end()
    assert status == 0
    assert "\x1b[?1049l" in text  # back from the alternate screen
    assert "Traceback" not in text


def test_nodes_are_found_by_everybody_in_the_process(in_fork: Callable[[Callable[[], None]], int]) -> None:
    """A fork can look at its parent's Node as any other process of the user can."""

    def look() -> None:
        (place,) = places_of(os.getppid())
        assert ask(place).pid == os.getppid()

    with lifl.Node("1MiB", workers=1):
        assert in_fork(look) == 0
