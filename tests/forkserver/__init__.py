"""A process that has Flower imported and forks: Flower's programs start in 0.1 s instead of 1.7 s of CPU.

The tests' programs find a shim of that name before Flower's own on their ``PATH``. The shim asks the fork server for a
process with its arguments, environment, folder, limits and standard streams, and that process runs the program's own
entry point. The shim passes signals on and ends with the process's status, and its end is the process's end: so it
stands for the process wherever one is looked for, waited for or killed. A shim with other rights or namespaces than the
fork server's, or with variables that are read when a program starts, runs Flower's own program instead.

``tests/process/conftest.py`` starts one fork server for each process of pytest, with the first test of that folder.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

VARIABLE = "LIFL_TESTS_FORKSERVER"
"""The variable with the path of the fork server's socket."""

PROGRAMS = {
    "flwr": "flwr.cli.app:app",
    "flwr-clientapp": "flwr.supernode.cli:flwr_clientapp",
    "flwr-serverapp": "flwr.superlink.cli:flwr_serverapp",
    "flower-superexec": "flwr.supercore.cli:flower_superexec",
    "flower-supernode": "flwr.supernode.cli:flower_supernode",
    "killed-superlink": "killed_superlink:main",
    "resumable": "resumable:start",
}
"""Each program that is forked, and its entry point: module and function. The last two are in ``tests/process``."""

RUNNING: set[int] = set()
"""Process ids of the fork servers that this process has started: no test leaves them behind."""


class ForkServer:
    """The fork server of this process; it ends with it, and its processes with it."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="lifl-forks-"))
        self.path = self._folder / "socket"
        (self._folder / "bin").mkdir()
        text = Path(__file__).with_name("shim.py").read_text()
        for name in PROGRAMS:
            shim = self._folder / "bin" / name
            shim.write_text(f"#!{sys.executable} -IS\n{text}")
            shim.chmod(0o755)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(str(self.path))
            listener.listen(64)
            command = [sys.executable, str(Path(__file__).with_name("server.py")), str(listener.fileno())]
            self._process = subprocess.Popen(
                [*command, *(f"{name}={entry}" for name, entry in PROGRAMS.items())],
                stdin=subprocess.PIPE,
                pass_fds=[listener.fileno()],
                start_new_session=True,  # the terminal's Ctrl-C is for the tests
            )
        RUNNING.add(self._process.pid)

    def environment(self, environment: dict[str, str]) -> dict[str, str]:
        """An environment in which the shims are found first."""
        path = f"{self._folder / 'bin'}{os.pathsep}{environment.get('PATH', '')}"
        return environment | {VARIABLE: str(self.path), "PATH": path}

    def close(self) -> None:
        """Ends it, and every process that it has forked."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        RUNNING.remove(self._process.pid)
        shutil.rmtree(self._folder, ignore_errors=True)
