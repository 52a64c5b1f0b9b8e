"""Programs that run on this machine as long as they are needed, and are ended afterwards.

Owns a temporary folder, the programs started in it and their logs; after `close` no program is left
(see `_janitor.py`). Knows nothing of the programs' work.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Self

from lifl.deploy import _janitor

HOST = "127.0.0.1"
# Below the range from which Linux takes the ports of outgoing connections (32768 and up): a free port of that
# range may be taken before the program listens on it.
_PORTS = range(20_000, 32_000)
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_POLL_S = 0.05
_TAIL_LINES = 15


class Programs:
    """`with Programs() as programs: programs.launch("name", ["command", ...])`.

    `env` is added to every program's environment. Logs are written to `log_dir` and stay there; without `log_dir` they
    are in the temporary `folder` and removed with it. However the owner ends, also by Ctrl-C or SIGKILL, the programs
    end.
    """

    def __init__(
        self,
        *,
        env: Mapping[str, str] | None = None,
        log_dir: Path | str | None = None,
        start_timeout: float = 60.0,
    ) -> None:
        self.folder = Path(tempfile.gettempdir()).resolve() / f"lifl-{secrets.token_hex(8)}"
        self.log_dir = self.folder / "logs" if log_dir is None else Path(log_dir).resolve()
        self._extra_env = dict(env or {})
        self._start_timeout = start_timeout
        self._janitor: subprocess.Popen[bytes] | None = None
        self._programs: dict[str, subprocess.Popen[bytes]] = {}
        self._passing: set[str] = set()

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:  # Ctrl-C too
            self.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def launch(
        self, name: str, command: Sequence[str], env: Mapping[str, str] | None = None, *, may_end: bool = False
    ) -> subprocess.Popen[bytes]:
        """Starts a program; its output goes to `name`.log.

        Its end before the close is an error, unless `may_end`.
        """
        environment = self._environment() | dict(env or {})
        with open(self.log_dir / f"{name}.log", "wb") as log:
            self._programs[name] = subprocess.Popen(
                [find_program(command[0], environment), *command[1:]],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=environment,
            )
        if may_end:
            self._passing.add(name)
        return self._programs[name]

    def pid(self, name: str) -> int:
        """The process id of the program `name`; its helpers are descendants of this process."""
        return self._programs[name].pid

    def wait_until(self, is_ready: Callable[[], bool], complaint: str, name: str) -> None:
        """Waits until `is_ready()` is true.

        Raises RuntimeError if a program ends meanwhile, and TimeoutError with `complaint` if the program `name`
        was not ready in `start_timeout` seconds; both show the last lines of the program's log.
        """
        deadline = time.monotonic() + self._start_timeout
        while not is_ready():
            self._check(deadline, complaint, name)

    def finish(self, name: str, timeout: float, on_line: Callable[[str], None] | None = None, title: str = "it") -> int:
        """Waits for the end of the passing program `name` and returns its exit status.

        Every line of its output goes to `on_line` as it comes, without line end and colours. Raises the errors of
        :meth:`wait_until`, with `timeout` seconds and `title` as the subject of the complaint; the program is then
        ended.
        """
        program, deadline = self._programs[name], time.monotonic() + timeout
        complaint = f"{title} did not end in {timeout:g} s"
        try:
            with open(self.log_dir / f"{name}.log", errors="replace") as log:
                for line in _lines_while(log, lambda: program.poll() is None):
                    if line is None:
                        self._check(deadline, complaint, name)
                    elif on_line is not None:
                        on_line(line)
            self._check(deadline, complaint, name)
        finally:
            program.terminate()
            del self._programs[name]
            program.wait()
        return program.returncode

    def close(self) -> None:
        """Ends every program and removes the folder; takes up to about 3 s.

        May be called twice. If a second Ctrl-C interrupts the call, the janitor does the rest
        alone. Raises RuntimeError if a process does not end.
        """
        if self._janitor is not None:
            assert self._janitor.stdin is not None
            self._janitor.stdin.close()
            self._janitor.wait()
        # Checks that no process is left, and ends the processes if somebody killed the janitor.
        if not _janitor.end_all(str(self.folder)):
            left = _janitor.marked_processes(str(self.folder))
            raise RuntimeError(f"processes {left} of {self.folder} did not end, even by SIGKILL")
        for program in self._programs.values():
            program.wait()  # the program is dead; this reaps it
        self._programs.clear()
        self._janitor = None
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self) -> None:
        self.folder.mkdir(mode=0o700)
        self.log_dir.mkdir(parents=True, exist_ok=True)
        # The janitor is started first, so that it ends every later program. Janitor and programs have sessions of
        # their own: the terminal's Ctrl-C reaches only this process, which then ends them in order.
        self._janitor = subprocess.Popen(
            [sys.executable, "-I", "-S", _janitor.__file__, str(self.folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
        )

    def _environment(self) -> dict[str, str]:
        inherited = {**os.environ, **self._extra_env}
        no_proxy = ",".join(filter(None, [inherited.get("NO_PROXY"), HOST]))
        return inherited | {
            _janitor.MARK: str(self.folder),
            # Programs start others by name (flower-superlink starts flower-superexec), which must be this Python's.
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{inherited.get('PATH', '')}",
            # Otherwise requests to 127.0.0.1 would go to the user's proxy.
            "NO_PROXY": no_proxy,
            "no_proxy": no_proxy,
            "PYTHONUNBUFFERED": "1",  # otherwise lines reach the log only in pieces of 8 KiB
        }

    def _check(self, deadline: float, complaint: str, name: str) -> None:
        """Sleeps a moment; raises if a program has ended or the deadline has passed."""
        time.sleep(_POLL_S)
        for other, program in self._programs.items():
            if program.poll() is not None and other not in self._passing:
                raise RuntimeError(f"{other} ended with status {program.returncode}.\n{self.tail(other)}")
        if time.monotonic() > deadline:
            raise TimeoutError(f"{complaint}.\n{self.tail(name)}")

    def log(self, name: str) -> str:
        """The output of the program `name` so far, without colours."""
        return _COLOURS.sub("", (self.log_dir / f"{name}.log").read_text(errors="replace"))

    def tail(self, name: str) -> str:
        """The last lines of the log of the program `name`, below a title."""
        lines = [f"  {line}" for line in self.log(name).splitlines() if line.strip()]
        return "\n".join([f"The last lines of {name}.log:", *lines[-_TAIL_LINES:]])


def find_program(name: str, environment: Mapping[str, str]) -> str:
    """The path of a program; raises FileNotFoundError if there is no program of that name."""
    path = shutil.which(name, path=environment["PATH"])
    if path is None:
        raise FileNotFoundError(f"{name} is neither beside {sys.executable} nor on the PATH: install it there")
    return path


def free_ports(count: int) -> list[int]:
    """Ports of loopback on which no program listens."""
    ports: set[int] = set()
    while len(ports) < count:
        port = random.SystemRandom().choice(_PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((HOST, port))
            ports.add(port)
    return list(ports)


def is_listening(port: int) -> bool:
    """True if a program listens on this port of loopback."""
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0


def _lines_while(log: IO[str], is_alive: Callable[[], bool]) -> Iterator[str | None]:
    """The lines of a growing file until its writer has ended; None when there is no new line."""
    rest = ""
    while True:
        # The writer's state is read before the file, so that the last read is after the writer's end and gets all.
        was_alive = is_alive()
        *lines, rest = (rest + log.read()).split("\n")
        yield from (_COLOURS.sub("", line) for line in lines)
        if not was_alive:
            break
        yield None
    if rest:
        yield _COLOURS.sub("", rest)
