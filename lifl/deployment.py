"""A real Flower deployment on this machine: one SuperLink, some SuperNodes, `flwr run`.

Owns: a temporary folder, the programs started in it and their logs; when it is closed none of them is left
(`_janitor.py` says how). Never imports flwr (it runs Flower's programs as a user would, found beside this
Python), never listens on anything but loopback, and never touches `~/.flwr`.
"""

from __future__ import annotations

import contextlib
import json
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
from functools import partial
from pathlib import Path
from typing import IO, Self

from lifl import _janitor

_HOST = "127.0.0.1"
# Below the range from which Linux takes the ports of outgoing connections (32768 and up): in there, a port
# that is free now may be gone before the program listens on it.
_PORTS = range(20_000, 32_000)
# What flower-supernode logs once the SuperLink has registered it (flwr 1.41).
_REGISTERED = "SuperNode ID:"
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_POLL_S = 0.05
_TAIL_LINES = 15


class Deployment:
    """`with Deployment(supernodes=4) as deployment: deployment.run(app_dir, {...})`.

    `server_command` is the server to run, with its own first arguments: `flower-superlink` or anything that
    takes the same flags. With `supernodes=0` it is alone, and what plays them is started with :meth:`launch`.
    `env` is added to every program's environment. Logs go to `log_dir` and stay; without
    it they go with the temporary `folder`. `on_progress` hears what is up; `start_timeout` is in seconds.

    Entering raises FileNotFoundError when a program is not installed, RuntimeError when one ends during
    start-up and TimeoutError when they are not ready in time; both show the log that tells why. However
    the owner ends, by Ctrl-C or SIGKILL too, the programs end.
    """

    def __init__(
        self,
        supernodes: int = 4,
        server_command: Sequence[str] = ("flower-superlink",),
        *,
        env: Mapping[str, str] | None = None,
        log_dir: Path | str | None = None,
        on_progress: Callable[[str], None] | None = None,
        start_timeout: float = 60.0,
    ) -> None:
        if supernodes < 0:
            raise ValueError(f"a deployment has 0 SuperNodes or more, not {supernodes}")
        self.folder = Path(tempfile.gettempdir()).resolve() / f"lifl-{secrets.token_hex(8)}"
        self.log_dir = self.folder / "logs" if log_dir is None else Path(log_dir).resolve()
        self.address = ""
        self._supernodes = supernodes
        self._server_command = tuple(server_command)
        self._extra_env = dict(env or {})
        self._on_progress = on_progress or (lambda _: None)
        self._start_timeout = start_timeout
        self._janitor: subprocess.Popen[bytes] | None = None
        self._programs: dict[str, subprocess.Popen[bytes]] = {}
        self._num_runs = 0

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:  # Ctrl-C too
            self.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def run(
        self,
        app_dir: Path | str,
        run_config: Mapping[str, str | int | float | bool] | None = None,
        on_line: Callable[[str], None] | None = None,
        timeout: float = 600.0,
    ) -> None:
        """Run the Flower app in `app_dir` to its end, as `flwr run APP --stream` does.

        Every line of the ServerApp goes to `on_line` as it comes, without line end and colours. Raises
        RuntimeError when the app cannot start or fails or a program of the deployment ends meanwhile, and
        TimeoutError after `timeout` seconds; both show the last lines of the log. The app is then stopped.
        """
        if self._janitor is None:
            raise RuntimeError("this deployment is not open: use it in a `with` statement")
        self._num_runs += 1
        name = f"flwr-run-{self._num_runs}"
        # A file, because on the command line flwr splits the overrides with a pattern of its own. JSON's
        # strings, numbers and booleans are TOML's too.
        config = self.folder / f"{name}.toml"
        pairs = [f"{json.dumps(key)} = {json.dumps(value)}\n" for key, value in (run_config or {}).items()]
        config.write_text("".join(pairs))
        command = ["flwr", "run", str(app_dir), "--stream", "--run-config", str(config)]
        deadline = time.monotonic() + timeout
        stream = self.launch(name, command, home="cli")
        try:
            with open(self.log_dir / f"{name}.log", errors="replace") as log:
                for line in _lines_while(log, lambda: stream.poll() is None):
                    if line is None:
                        self._check(deadline, f"the run did not end in {timeout:g} s", name)
                    elif on_line is not None:
                        on_line(line)
            self._check(deadline, f"the run did not end in {timeout:g} s", name)
        except Exception:
            with contextlib.suppress(RuntimeError):  # nobody to ask, if it is the SuperLink that ended
                for run in self._runs():
                    if not run["status"].startswith("finished"):
                        self._flwr("stop", run["run-id"])
            raise
        finally:
            stream.terminate()
            del self._programs[name]
            stream.wait()
        if stream.returncode != 0:
            raise RuntimeError(f"`flwr run {app_dir}` failed.\n{self._tail(name)}")
        # The stream ends with 0 whether the ServerApp succeeded or not (flwr 1.41).
        run = self._runs()[0]
        if run["status"] != "finished:completed":
            what = f"{run['status']}: {run['status-details']}"
            raise RuntimeError(f"the run of {app_dir} ended as {what}\n{self._tail(name)}")

    def launch(self, name: str, command: Sequence[str], home: str = "") -> subprocess.Popen[bytes]:
        """Start a program that belongs to the deployment: it ends with it, and while it runs nothing else may end.

        It gets an FLWR_HOME of its own, or shares that of the name `home`; its output goes to `name`.log.
        """
        environment = self._environment(home or name)
        with open(self.log_dir / f"{name}.log", "wb") as log:
            self._programs[name] = subprocess.Popen(
                [_program(command[0], environment), *command[1:]],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=environment,
            )
        return self._programs[name]

    def wait_until(self, is_ready: Callable[[], bool], complaint: str, name: str) -> None:
        """Return when it is so. Raises as entering does, with `complaint` and the log of the program `name`."""
        deadline = time.monotonic() + self._start_timeout
        while not is_ready():
            self._check(deadline, complaint, name)

    @property
    def server_pid(self) -> int:
        """The process of the SuperLink; all that works for it is below."""
        return self._programs["superlink"].pid

    def close(self) -> None:
        """End every program and remove the folder; takes up to about 3 s.

        May be called twice. Interrupted by a second Ctrl-C, it leaves the rest to the janitor, which
        finishes without us. Raises RuntimeError when a process would not go.
        """
        if self._janitor is not None:
            assert self._janitor.stdin is not None
            self._janitor.stdin.close()
            self._janitor.wait()
        # The check that nothing is left, and the work itself if somebody killed the janitor.
        if not _janitor.end_all(str(self.folder)):
            left = _janitor.marked_processes(str(self.folder))
            raise RuntimeError(f"processes {left} of {self.folder} did not end, even by SIGKILL")
        for program in self._programs.values():
            program.wait()  # dead already, not yet reaped
        self._programs.clear()
        self._janitor = None
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self) -> None:
        self.folder.mkdir(mode=0o700)
        self.log_dir.mkdir(parents=True, exist_ok=True)
        # First of all: from here on, whatever we start is ended. In a session of its own, as everything
        # here, so that the terminal's Ctrl-C reaches us alone and we decide.
        self._janitor = subprocess.Popen(
            [sys.executable, "-I", "-S", _janitor.__file__, str(self.folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
        )
        server_port, *node_ports = _free_ports(1 + self._supernodes)
        self.address = f"{_HOST}:{server_port}"
        (self.folder / "cli").mkdir()
        (self.folder / "cli" / "config.toml").write_text(
            f'[superlink]\ndefault = "lifl"\n[superlink.lifl]\naddress = "{self.address}"\ninsecure = true\n'
        )
        server = [*self._server_command, "--insecure", "--disable-runtime-dependency-installation"]
        self.launch("superlink", [*server, "--port", str(server_port)])
        self.wait_until(lambda: _is_listening(server_port), "the SuperLink did not start to listen", "superlink")
        self._on_progress(f"SuperLink listens on {self.address}")
        for i, port in enumerate(node_ports):
            node = ["flower-supernode", "--insecure", "--superlink", self.address]
            config = f"partition-id={i} num-partitions={self._supernodes}"
            self.launch(f"supernode-{i}", [*node, "--port", str(port), "--node-config", config])
        for i in range(self._supernodes):
            name = f"supernode-{i}"
            self.wait_until(partial(self._has_registered, name), f"SuperNode {i} did not register", name)
            self._on_progress(f"SuperNode {i} is registered")

    def _environment(self, home: str) -> dict[str, str]:
        inherited = {**os.environ, **self._extra_env}
        no_proxy = ",".join(filter(None, [inherited.get("NO_PROXY"), _HOST]))
        return inherited | {
            _janitor.MARK: str(self.folder),
            "FLWR_HOME": str(self.folder / home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_LOG_LEVEL": "INFO",  # _REGISTERED is of that level
            # Flower starts its own programs by name: they must be this Python's.
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{inherited.get('PATH', '')}",
            # Or a proxy of the user's would be asked to fetch 127.0.0.1.
            "NO_PROXY": no_proxy,
            "no_proxy": no_proxy,
            "PYTHONUNBUFFERED": "1",  # or lines reach the log 8 KiB late
        }

    def _check(self, deadline: float, complaint: str, name: str) -> None:
        """Sleep a moment; raise when a program has ended or the deadline has passed."""
        time.sleep(_POLL_S)
        for other, program in self._programs.items():
            has_ended = program.poll() is not None
            if has_ended and not other.startswith("flwr-run"):  # that one is meant to end
                raise RuntimeError(f"{other} ended with status {program.returncode}.\n{self._tail(other)}")
        if time.monotonic() > deadline:
            raise TimeoutError(f"{complaint}.\n{self._tail(name)}")

    def _has_registered(self, name: str) -> bool:
        return _REGISTERED in self._log(name)

    def _log(self, name: str) -> str:
        return _COLOURS.sub("", (self.log_dir / f"{name}.log").read_text(errors="replace"))

    def _tail(self, name: str) -> str:
        lines = [f"  {line}" for line in self._log(name).splitlines() if line.strip()]
        return "\n".join([f"The last lines of {name}.log:", *lines[-_TAIL_LINES:]])

    def _flwr(self, *arguments: str) -> str:
        """What a short `flwr` command prints; raises RuntimeError when it fails or takes a minute."""
        environment = self._environment("cli")
        try:
            done = subprocess.run(
                [_program("flwr", environment), *arguments],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                start_new_session=True,
                env=environment,
                timeout=60,
                check=True,
            )
        except subprocess.SubprocessError as error:
            said = f"{getattr(error, 'stdout', '')}{getattr(error, 'stderr', '')}"
            raise RuntimeError(f"`flwr {' '.join(arguments)}` failed.\n{error}\n{said}") from None
        return done.stdout

    def _runs(self) -> list[dict[str, str]]:
        """The SuperLink's runs, the newest first. Flower's exit status is 0 even if nobody answered."""
        listing = self._flwr("list", "--format", "json")
        runs: list[dict[str, str]] | None = json.loads(listing).get("runs")
        if runs is None:
            raise RuntimeError(f"`flwr list` failed: {listing}")
        return runs


def _program(name: str, environment: Mapping[str, str]) -> str:
    path = shutil.which(name, path=environment["PATH"])
    if path is None:
        raise FileNotFoundError(f"{name} is neither beside {sys.executable} nor on the PATH: install it there")
    return path


def _free_ports(count: int) -> list[int]:
    ports: set[int] = set()
    while len(ports) < count:
        port = random.SystemRandom().choice(_PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((_HOST, port))
            ports.add(port)
    return list(ports)


def _is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((_HOST, port)) == 0


def _lines_while(log: IO[str], is_alive: Callable[[], bool]) -> Iterator[str | None]:
    """The lines of a growing file until its writer is gone; None when there is none yet."""
    rest = ""
    while True:
        # Asked before reading: what the writer wrote last is read after it has ended.
        was_alive = is_alive()
        *lines, rest = (rest + log.read()).split("\n")
        yield from (_COLOURS.sub("", line) for line in lines)
        if not was_alive:
            break
        yield None
    if rest:
        yield _COLOURS.sub("", rest)
