"""A real Flower deployment on this machine: one SuperLink, some SuperNodes, `flwr run`.

Owns the list of programs and the order of their start. Never imports flwr (Flower's programs run as a user would run
them, found beside this Python), never listens on anything but loopback, and never touches `~/.flwr`.
:class:`lifl.deploy.programs.Programs` makes sure that no process is left.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from lifl.deploy.programs import HOST, Programs, find_program, free_ports, is_listening

# The line that flower-supernode logs once the SuperLink has registered it (flwr 1.41).
_REGISTERED = "SuperNode ID:"


class Deployment(Programs):
    """`with Deployment(supernodes=4) as deployment: deployment.run(app_dir, {...})`.

    `server_command` is the server's command with its first arguments: `flower-superlink` or a program that
    takes the same flags. With `supernodes=0` no SuperNode is started; :meth:`launch` may start virtual ones.
    `on_progress` is called with a line for each program that is ready; `start_timeout` is in seconds, for each
    program; the other arguments are those of :class:`~lifl.deploy.programs.Programs`.

    Entering raises FileNotFoundError if a program is not installed, RuntimeError if one ends during
    start-up and TimeoutError if they are not ready in time; the last two show the program's log. However
    the owner ends, also by Ctrl-C or SIGKILL, the programs end.
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
        super().__init__(env=env, log_dir=log_dir, start_timeout=start_timeout)
        if supernodes < 0:
            raise ValueError(f"a deployment has 0 SuperNodes or more, not {supernodes}")
        self.address = ""
        self._supernodes = supernodes
        self._server_command = tuple(server_command)
        self._on_progress = on_progress or (lambda _: None)
        self._num_runs = 0

    def run(
        self,
        app_dir: Path | str,
        run_config: Mapping[str, str | int | float | bool] | None = None,
        on_line: Callable[[str], None] | None = None,
        timeout: float = 600.0,
    ) -> None:
        """Runs the Flower app in `app_dir` to its end, as `flwr run APP --stream` does.

        Every line of the ServerApp goes to `on_line` as it comes, without line end and colours. Raises
        RuntimeError if the app cannot start or fails or a program of the deployment ends meanwhile, and
        TimeoutError after `timeout` seconds; both show the last lines of the log. The app is then stopped.
        """
        if self._janitor is None:
            raise RuntimeError("this deployment is not open: use it in a `with` statement")
        self._num_runs += 1
        name = f"flwr-run-{self._num_runs}"
        # The overrides are in a file, because flwr splits those on its command line with a pattern of its own.
        # Strings, numbers and booleans are the same in JSON and TOML.
        config = self.folder / f"{name}.toml"
        pairs = [f"{json.dumps(key)} = {json.dumps(value)}\n" for key, value in (run_config or {}).items()]
        config.write_text("".join(pairs))
        command = ["flwr", "run", str(app_dir), "--stream", "--run-config", str(config)]
        self.launch(name, command, self._home("cli"), may_end=True)
        try:
            status = self.finish(name, timeout, on_line, "the run")
        except Exception:
            with contextlib.suppress(RuntimeError):  # if the SuperLink has ended, it cannot be asked to stop the run
                for run in self._runs():
                    if not run["status"].startswith("finished"):
                        self._flwr("stop", run["run-id"])
            raise
        if status != 0:
            raise RuntimeError(f"`flwr run {app_dir}` failed.\n{self.tail(name)}")
        # The stream ends with 0 whether the ServerApp succeeded or not (flwr 1.41).
        run = self._runs()[0]
        if run["status"] != "finished:completed":
            status_text = f"{run['status']}: {run['status-details']}"
            raise RuntimeError(f"the run of {app_dir} ended as {status_text}\n{self.tail(name)}")

    def _start(self) -> None:
        super()._start()
        server_port, *node_ports = free_ports(1 + self._supernodes)
        self.address = f"{HOST}:{server_port}"
        (self.folder / "cli").mkdir()
        (self.folder / "cli" / "config.toml").write_text(
            f'[superlink]\ndefault = "lifl"\n[superlink.lifl]\naddress = "{self.address}"\ninsecure = true\n'
        )
        server = [*self._server_command, "--insecure", "--disable-runtime-dependency-installation"]
        self.launch("superlink", [*server, "--port", str(server_port)], self._home("superlink"))
        self.wait_until(lambda: is_listening(server_port), "the SuperLink did not start to listen", "superlink")
        self._on_progress(f"SuperLink listens on {self.address}")
        for i, port in enumerate(node_ports):
            name = f"supernode-{i}"
            node = ["flower-supernode", "--insecure", "--superlink", self.address]
            config = f"partition-id={i} num-partitions={self._supernodes}"
            self.launch(name, [*node, "--port", str(port), "--node-config", config], self._home(name))
        for i in range(self._supernodes):
            name = f"supernode-{i}"
            self.wait_until(partial(self._has_registered, name), f"SuperNode {i} did not register", name)
            self._on_progress(f"SuperNode {i} is registered")

    def _home(self, name: str) -> dict[str, str]:
        """The environment with a program's own FLWR_HOME, so that programs do not share their files in it."""
        return {"FLWR_HOME": str(self.folder / name)}

    def _environment(self) -> dict[str, str]:
        return super()._environment() | {
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_LOG_LEVEL": "INFO",  # the level of the line with _REGISTERED
        }

    def _has_registered(self, name: str) -> bool:
        return _REGISTERED in self.log(name)

    def _flwr(self, *arguments: str, cwd: Path | None = None) -> str:
        """The output of a short `flwr` command; raises RuntimeError if the command fails or takes a minute."""
        environment = self._environment() | self._home("cli")
        try:
            done = subprocess.run(
                [find_program("flwr", environment), *arguments],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                start_new_session=True,
                env=environment,
                cwd=cwd,
                timeout=60,
                check=True,
            )
        except subprocess.SubprocessError as error:
            output = f"{getattr(error, 'stdout', '')}{getattr(error, 'stderr', '')}"
            raise RuntimeError(f"`flwr {' '.join(arguments)}` failed.\n{error}\n{output}") from None
        return done.stdout

    def _runs(self) -> list[dict[str, str]]:
        """The SuperLink's runs, the newest first; raises RuntimeError if the SuperLink does not answer."""
        # The exit status of `flwr list` is 0 even without an answer; then its JSON has no "runs".
        listing = self._flwr("list", "--format", "json")
        runs: list[dict[str, str]] | None = json.loads(listing).get("runs")
        if runs is None:
            raise RuntimeError(f"`flwr list` failed: {listing}")
        return runs
