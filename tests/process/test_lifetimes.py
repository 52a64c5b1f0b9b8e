"""The lifetimes of processes: Nodes in real programs, their signals, their forks and their deaths."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest

import lifl
from lifl.errors import LeaseError

pytestmark = pytest.mark.transports

WAIT_S = 60.0
EXIT_S = 10.0
"""A program that ends without closing its Node ends within this."""
ORPHAN_S = 1.0
"""Workers whose agent was killed end within this."""

MODEL = {"w": np.ones(3, np.float32)}
SPEC = lifl.TensorSpec.from_arrays(MODEL)

PROGRAM = """
import json, os, sys, time
import numpy as np
import lifl
model = {"w": np.ones(3, np.float32)}
spec = lifl.TensorSpec.from_arrays(model)
node = lifl.Node("4MiB", workers=2)

def tell(*what):
    print(json.dumps([node._supervisor.spawner.pid, *node.pids(), *what]), flush=True)

def mean(n=3):
    with node.open_round(spec, expected=n) as round_:
        for i in range(n):
            round_.submit({"w": np.full(3, i, np.float32)})
        return round_.result(30).arrays["w"].tolist()
"""


def is_alive(pid: int) -> bool:
    """False once a process ended, reaped or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


def wait_until_gone(pids: list[int], within_s: float) -> list[int]:
    """Those that are still alive after that time."""
    deadline = time.monotonic() + within_s
    while (left := [pid for pid in pids if is_alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.01)
    return left


class Program:
    """A Python program of the user's, in a process group of its own as a terminal would make it."""

    def __init__(self, code: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM + code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            process_group=0,
        )
        self.pid = self._process.pid

    def hear(self) -> Any:
        """The next line that it prints, as JSON."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, self.end(WAIT_S)
        return json.loads(line)

    def say(self) -> None:
        """Ends its wait for a line."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()

    def end(self, within_s: float) -> tuple[int, str]:
        """Its exit status and what it wrote to stderr; fails if it does not end in time."""
        stderr: IO[bytes] | None = self._process.stderr
        assert stderr is not None
        code = self._process.wait(within_s)
        return code, stderr.read().decode()

    def close(self) -> None:
        """Ends it if it has not."""
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def start() -> Iterator[Callable[[str], Program]]:
    """Starts programs that begin with PROGRAM and ends them after the test."""
    programs: list[Program] = []

    def make(code: str) -> Program:
        programs.append(Program(code))
        return programs[-1]

    yield make
    for program in programs:
        program.close()


def run_python(*arguments: str, stdin: str | None = None, cwd: Path | None = None) -> str:
    """The output of a Python program; the program must end well and silently."""
    done = subprocess.run(
        [sys.executable, *arguments], input=stdin, cwd=cwd, capture_output=True, text=True, timeout=WAIT_S, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


# ---------------------------------------------------------------- however Python is run


def test_script_without_main_guard(tmp_path: Path) -> None:
    """A script that makes a Node at its top level runs once: its workers do not import it again."""
    script = tmp_path / "script.py"
    script.write_text("print('begin')\n" + PROGRAM + "print(mean())\nnode.close()\n")
    assert run_python(str(script)).splitlines() == ["begin", "[1.0, 1.0, 1.0]"]


def test_command_line() -> None:
    """A Node works in ``python -c``."""
    assert run_python("-c", PROGRAM + "print(mean())") == "[1.0, 1.0, 1.0]\n"


def test_standard_input() -> None:
    """A Node works in a program that is read from standard input, and leaves the rest of it alone."""
    assert run_python("-", stdin=PROGRAM + "print(mean())\n") == "[1.0, 1.0, 1.0]\n"
    code = PROGRAM + "print(mean()); node.close(); print(sys.stdin.readline())"
    assert run_python("-c", code, stdin="rest\n") == "[1.0, 1.0, 1.0]\nrest\n\n"


def test_code_string_as_in_a_notebook() -> None:
    """A Node works in code that was compiled from a string in a namespace that is no module, cell by cell."""
    cells = [PROGRAM, "first = mean()", "second = mean(5)", "print(first, second)"]
    code = f"space = {{'__name__': '__main__'}}\nfor cell in {cells!r}: exec(compile(cell, '<cell>', 'exec'), space)"
    assert run_python("-c", code) == "[1.0, 1.0, 1.0] [2.0, 2.0, 2.0]\n"


def test_files_of_the_working_directory_are_not_imported(tmp_path: Path) -> None:
    """Workers import nothing from the working directory that the program itself would not."""
    (tmp_path / "here").mkdir()
    for name in ("json", "socket", "lifl", "numpy", "signal"):
        (tmp_path / "here" / f"{name}.py").write_text(f"raise SystemExit('{name} of the working directory')")
    script = tmp_path / "script.py"
    script.write_text(PROGRAM + "print(mean())")
    assert run_python(str(script), cwd=tmp_path / "here") == "[1.0, 1.0, 1.0]\n"


def test_path_objects_on_the_module_path() -> None:
    """A program that put a pathlib.Path on sys.path, which Python ignores, can make a Node."""
    begin = "import sys, pathlib; sys.path.append(pathlib.Path('/nowhere'))\n"
    assert run_python("-c", begin + PROGRAM + "print(mean())") == "[1.0, 1.0, 1.0]\n"


def test_workers_import_neither_flower_nor_torch(start: Callable[[str], Program]) -> None:
    """Workers of a program that uses Flower and torch have neither's libraries mapped."""
    libraries = "import flwr.serverapp\ntry: import torch\nexcept ImportError: pass\n"
    program = start(libraries + "mean(); tell(); node.open_round(spec, 1).result()")
    for pid in program.hear():
        maps = Path(f"/proc/{pid}/maps").read_text()
        assert "lifl" in maps
        assert not [word for word in ("torch", "flwr", "grpc", "cryptography") if word in maps]
    os.killpg(program.pid, signal.SIGINT)
    program.end(WAIT_S)


def test_what_workers_import_is_small() -> None:
    """The modules that a worker consists of import neither Flower, torch, Ray nor pandas."""
    code = "import lifl.workers.spawner, lifl.workers.aggregator, multiprocess, sys; print(*sys.modules)"
    modules = {name.partition(".")[0] for name in run_python("-c", code).split()}
    assert not modules & {"flwr", "torch", "ray", "pandas", "grpc", "typer", "rich", "IPython"}


# ---------------------------------------------------------------- importing


def test_import_is_light() -> None:
    """``import lifl`` imports neither Flower, torch nor multiprocess."""
    modules = run_python("-c", "import lifl, sys; print(*sys.modules)").split()
    assert not {"flwr", "torch", "multiprocess", "dill", "ray", "grpc", "bcc"} & {*modules}


@pytest.mark.parametrize(
    ("setup", "message"),
    [
        ("", "the extension lifl._shm_ffi is missing"),
        ("sys.platform = 'darwin'", "lifl's shared memory needs Linux (memfd, futex); this is darwin"),
        (
            "sys.platform = 'win32'; del os.register_at_fork, os.eventfd, os.sched_getaffinity, select.poll",
            "lifl's shared memory needs Linux (memfd, futex); this is win32",
        ),
    ],
    ids=["not built", "macOS", "Windows"],
)
def test_elsewhere_importing_works_and_a_node_says_why_not(setup: str, message: str) -> None:
    """Without the extension lifl and its specs can be imported; a Node is a ShmError with the remedy.

    So is the embedded Node that a strategy makes.
    """
    code = f"""
import os, select, sys
import attrs, cffi, ctypes, json, numpy, random, socket, subprocess, multiprocessing
sys.modules["lifl._shm_ffi"] = None
{setup}
import lifl
from lifl.node.embedded import embedded
spec = lifl.TensorSpec.from_arrays({{"w": numpy.zeros(3)}})
for call in (lifl.Node, lambda: embedded(spec, 1)):
    try:
        call()
    except lifl.errors.ShmError as error:
        print(error)
"""
    assert run_python("-c", code).count(message) == 2


# ---------------------------------------------------------------- signals


def test_ctrl_c_ends_a_wait_at_once(start: Callable[[str], Program]) -> None:
    """SIGINT to the terminal's whole group while result waits is a KeyboardInterrupt, and nothing is left."""
    program = start("round_ = node.open_round(spec, 2)\ntell()\nround_.result()\n")
    pids = program.hear()
    assert all(map(is_alive, pids))
    time.sleep(0.1)  # until it waits
    os.killpg(program.pid, signal.SIGINT)
    code, stderr = program.end(EXIT_S)
    assert code == -signal.SIGINT, stderr
    assert stderr.splitlines()[-1] == "KeyboardInterrupt"
    assert stderr.count("Traceback") == 1
    assert not wait_until_gone(pids, ORPHAN_S)


def test_wait_can_be_interrupted_and_taken_up_again() -> None:
    """After Ctrl-C the round is as it was: its missing update can still come."""
    with lifl.Node("4MiB", workers=1) as node, node.open_round(SPEC, expected=1) as round_:
        timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            round_.result()
        timer.join()
        round_.submit(MODEL)
        assert round_.result(WAIT_S).num_updates == 1


@pytest.mark.parametrize("delay_s", [0.15, 0.3, 0.45, 0.6])
def test_ctrl_c_during_the_start_leaves_nothing(start: Callable[[str], Program], delay_s: float) -> None:
    """Whenever SIGINT comes while a Node is made, the program ends and nothing is left."""
    program = start("node.close()\nfor _ in range(5): lifl.Node('4MiB', workers=2).close()\n")
    time.sleep(delay_s)
    os.killpg(program.pid, signal.SIGINT)
    program.end(WAIT_S)


# ---------------------------------------------------------------- deaths


@pytest.mark.parametrize(
    ("doing", "number"),
    [
        ("time.sleep(600)", signal.SIGKILL),
        ("node.open_round(spec, 2).result()", signal.SIGKILL),
        ("time.sleep(600)", signal.SIGTERM),
        ("os._exit(0)", 0),
    ],
    ids=["killed", "killed in result", "terminated", "exited"],
)
def test_workers_of_a_program_that_is_cut_off_end(start: Callable[[str], Program], doing: str, number: int) -> None:
    """The spawner and the workers are gone within a second after the owner is killed, or ends without cleaning up."""
    program = start(f"tell()\n{doing}")
    pids = program.hear()
    if number:
        os.kill(program.pid, number)
    assert not wait_until_gone([program.pid, *pids], ORPHAN_S)


def test_workers_of_a_killed_spawner_end(start: Callable[[str], Program]) -> None:
    """The workers of a SIGKILLed spawner end too; the owner's round goes on with others, and nothing is left."""
    code = """
round_ = node.open_round(spec, 2)
round_.submit(model)
tell()
sys.stdin.readline()
round_.submit(model)
mean = round_.result(30).num_updates
tell(mean)
node.close()
"""
    program = start(code)
    old = program.hear()
    os.kill(old[0], signal.SIGKILL)
    assert not wait_until_gone(old[1:], ORPHAN_S)
    program.say()
    *new, counted = program.hear()
    assert counted == 2
    assert not set(new) & set(old)
    assert program.end(WAIT_S)[0] == 0
    assert not wait_until_gone([*old, *new], ORPHAN_S)


@pytest.mark.parametrize(
    "last",
    [
        "",
        "round_ = node.open_round(spec, 2); round_.submit(model)",
        "round_ = node.open_round(spec, 2); loan = round_.loan(); view = loan.arrays['w']",
        "round_ = node.open_round(spec, 1); round_.submit(model); result = round_.result(30); w = result.arrays['w']",
        "nodes = [lifl.Node('1MiB', workers=1) for _ in range(2)]",
        "import threading; threading.Thread(target=mean).start()",
    ],
    ids=["idle", "open round", "loan", "result", "several", "thread"],
)
def test_program_that_never_closes_its_node_ends(start: Callable[[str], Program], last: str) -> None:
    """The interpreter ends normally, silently and soon, whatever is open, and takes the workers along."""
    program = start(f"mean()\n{last}\ntell()\n")
    pids = program.hear()
    assert program.end(EXIT_S) == (0, "")
    assert not wait_until_gone(pids, ORPHAN_S)


def test_program_that_fails_ends_as_it_would(start: Callable[[str], Program]) -> None:
    """An exception's status and traceback are the program's own, with a Node open or not."""
    program = start("round_ = node.open_round(spec, 2)\ntell()\nraise SystemExit(7)")
    pids = program.hear()
    assert program.end(EXIT_S) == (7, "")
    assert not wait_until_gone(pids, ORPHAN_S)


def test_node_of_a_thread_that_ended_goes_on() -> None:
    """A Node made in a thread works after that thread is gone, and can be closed by another one."""
    made: list[lifl.Node] = []
    thread = threading.Thread(target=lambda: made.append(lifl.Node("4MiB", workers=2)))
    thread.start()
    thread.join()
    (node,) = made
    time.sleep(0.1)  # the kernel would have told the workers by now
    with node.open_round(SPEC, expected=2) as round_:
        round_.submit(MODEL)
        round_.submit(MODEL)
        assert round_.result(WAIT_S).num_updates == 2
    thread = threading.Thread(target=node.close)
    thread.start()
    thread.join(WAIT_S)
    assert not node.is_open


def test_several_threads_close_at_once() -> None:
    """Closing from several threads at once is as harmless as closing twice."""
    # In a process of its own: closing a descriptor twice may close somebody else's.
    code = """
import threading
for _ in range(5):
    node, begin = lifl.Node("1MiB", workers=1), threading.Barrier(3)
    round_ = node.open_round(spec, 2)
    threads = [threading.Thread(target=lambda: (begin.wait(), node.close())) for _ in range(3)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
"""
    run_python("-c", PROGRAM + code)


# ---------------------------------------------------------------- forks of the user's process


def test_fork_cannot_use_the_parents_node(in_fork: Callable[[Callable[[], None]], int]) -> None:
    """In a forked child Node and Round raise LeaseError, close does nothing, and the parent goes on."""
    with lifl.Node("4MiB", workers=1) as node, node.open_round(SPEC, expected=2) as round_:
        round_.submit(MODEL)

        def child() -> None:
            for use in (
                lambda: node.open_round(SPEC, 1),
                lambda: round_.submit(MODEL),
                lambda: round_.loan(),
                lambda: round_.result(1),
            ):
                with pytest.raises(LeaseError):
                    use()
            node.close()

        assert in_fork(child) == 0
        round_.submit(MODEL)
        assert round_.result(WAIT_S).num_updates == 2


@pytest.mark.parametrize("end", ["sys.exit()", "os._exit(0)", "os.kill(os.getpid(), 9)", "node.close(); sys.exit()"])
def test_end_of_a_fork_does_not_harm_the_parent(start: Callable[[str], Program], end: str) -> None:
    """However a forked child ends, with its interpreter's whole clean-up too, the parent's Node goes on."""
    code = f"""
round_ = node.open_round(spec, 2)
round_.submit(model)
result = mean()
if os.fork() == 0:
    {end}
os.wait()
round_.submit(model)
tell(round_.result(30).arrays["w"].tolist(), mean())
"""
    program = start(code)
    assert program.hear()[3:] == [[1.0] * 3, [1.0] * 3]
    assert program.end(EXIT_S) == (0, "")


def test_fork_under_the_lock_raises_too(start: Callable[[str], Program]) -> None:
    """A fork taken while another thread holds the Node's lock raises LeaseError in the child, not a hang."""
    code = """
import threading, signal
round_ = node.open_round(spec, 2)
held, done = threading.Event(), threading.Event()
def hold():
    with node.changed:
        held.set(); done.wait()
threading.Thread(target=hold).start()
held.wait()
pid = os.fork()
if pid == 0:
    signal.alarm(3)
    try: round_.submit(model)
    except lifl.errors.LeaseError: os._exit(0)
    os._exit(1)
status = os.waitpid(pid, 0)[1]
done.set()
tell(status)
"""
    assert start(code).hear()[-1] == 0


def test_close_does_not_wait_for_forks_of_the_user() -> None:
    """With a forked child alive, close ends the spawner in order and does not have to kill it."""
    with lifl.Node("4MiB", workers=1) as node:
        pid = os.fork()
        if pid == 0:
            signal.pause()
        spawner = node._supervisor and node._supervisor.spawner
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert spawner is not None
    assert spawner._process.returncode == 0


def test_workers_end_with_the_agent_though_its_fork_lives(start: Callable[[str], Program]) -> None:
    """The workers of a killed owner end, also if a forked child of the owner lives on."""
    program = start("child = os.fork()\nif child == 0: time.sleep(600)\ntell(child)\ntime.sleep(600)")
    *pids, child = program.hear()
    os.kill(program.pid, signal.SIGKILL)
    left = wait_until_gone(pids, 5.0)
    os.kill(child, signal.SIGKILL)
    assert not left
