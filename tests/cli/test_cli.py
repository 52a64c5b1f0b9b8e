"""The ``lifl`` command as a user meets it: help, versions, figures, errors in one line, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import lifl
from lifl.bench import shapes
from lifl.cli import bench as commands
from lifl.cli import main as cli
from lifl.errors import ShmError

RUN = [sys.executable, "-c", "from lifl.cli.main import main; main(prog_name='lifl')"]
runner = CliRunner()


def test_help_names_every_command() -> None:
    """`lifl --help` lists demo, plan and bench, `lifl bench --help` what can be measured."""
    result = runner.invoke(cli.main, ["--help"])
    assert result.exit_code == 0
    assert all(word in result.output for word in ("demo", "plan", "bench", "--version"))
    result = runner.invoke(cli.main, ["bench", "--help"])
    assert all(word in result.output for word in ("limits", "fold", "handoff", "recovery", "planning"))


def test_help_imports_nothing_heavy() -> None:
    """Neither flwr nor a benchmark nor the demo is imported to print a help text."""
    code = (
        "import sys; from typer.testing import CliRunner; from lifl.cli import main as cli;"
        "assert CliRunner().invoke(cli.main, ['bench', 'fold', '--help']).exit_code == 0;"
        "print(*(m for m in sys.modules if m.partition('.')[0] in ('flwr', 'grpc', 'torch', 'sklearn')"
        " or m.startswith(('lifl.bench.', 'lifl.deploy.demo', 'lifl.strategy')) and m != 'lifl.cli.bench'))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


def test_version() -> None:
    """`lifl --version` is one line."""
    result = runner.invoke(cli.main, ["--version"])
    assert (result.exit_code, result.output) == (0, f"lifl {lifl.__version__}\n")


def test_model_choices_are_the_models_there_are() -> None:
    """The names that the command accepts are those that the benchmark knows."""
    assert [model.value for model in commands.Model] == list(shapes.MODELS)


@pytest.mark.parametrize(
    "arguments",
    [
        ["bench", "fold", "--model", "vgg"],
        ["bench", "fold", "--updates", "0"],
        ["demo", "--rounds", "0"],
        ["plan", "--rule", "guess"],
        ["plan", "--clients", "0"],
        ["nonsense"],
    ],
)
def test_wrong_arguments_end_with_status_2(arguments: list[str]) -> None:
    """And with a hint instead of a traceback."""
    result = runner.invoke(cli.main, arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_bench_handoff_prints_only_json_on_stdout() -> None:
    """`--json` can be piped into a program."""
    done = subprocess.run(
        [*RUN, "bench", "handoff", "--messages", "20", "--json"], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["rows"][0]["way"] == "ring_spinning"
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "module", "function", "called_with"),
    [
        (["bench", "limits"], "lifl.bench.limits", "measure_limits", ((), {"repetitions": 5})),
        (["bench", "fold"], "lifl.bench.fold", "measure_fold", (("resnet18", 16, None, 5), {})),
        (
            ["bench", "fold", "--model", "resnet34", "--updates", "3", "--workers", "0", "--repetitions", "2"],
            "lifl.bench.fold",
            "measure_fold",
            (("resnet34", 3, 0, 2), {}),
        ),
        (["bench", "handoff"], "lifl.bench.handoff", "measure_handoff", ((20_000,), {})),
        (["bench", "planning"], "lifl.bench.planning", "measure_planning", ((5,), {})),
        (
            ["bench", "ablation"],
            "lifl.bench.ablation",
            "measure_ablation",
            (((20, 60, 100), (20, 30, 40), 3), {"is_simulated_only": False}),
        ),
        (
            ["bench", "ablation", "--updates", "5", "--real-updates", "6,7", "--repetitions", "1", "--simulate-only"],
            "lifl.bench.ablation",
            "measure_ablation",
            (((5,), (6, 7), 1), {"is_simulated_only": True}),
        ),
    ],
)
def test_bench_passes_its_options_on(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], module: str, function: str, called_with: tuple[Any, Any]
) -> None:
    """The command calls its benchmark with what it was given, and prints what it gets."""
    calls = []

    def measure(*args: Any, on_progress: Callable[[str], None], **options: Any) -> dict[str, Any]:
        on_progress("something")
        calls.append((args, options))
        return {"figure_us": 1.5}

    monkeypatch.setattr(f"{module}.{function}", measure)
    result = runner.invoke(cli.main, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {"figure_us": 1.5}
    assert calls == [called_with]


def test_plan_draws_the_tree_and_its_totals() -> None:
    """Nodes that are alike are counted; the last line has the totals and the time."""
    result = runner.invoke(cli.main, ["plan", "--clients", "10000", "--nodes", "100"])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == "top on node-0: 10,000 updates from 80 nodes"
    assert lines[-2] == "└── 76 more nodes like it: 9,500 updates, 125 each"
    totals = "10,000 updates, 80 of 100 nodes, 3 levels, 640 leaves, 640 processes (640 to start), eager, planned in "
    assert lines[-1].startswith(totals)
    assert lines[-1].endswith(" ms")
    assert len(lines) < 20


def test_plan_prints_only_json_on_stdout() -> None:
    """With the time, the totals, and the topology; every option has its effect."""
    arguments = "--clients 30 --nodes 4 --capacity 12 --cores 3 --rate 40 --execution 0.1 --fan-in 5 --arity 2"
    result = runner.invoke(cli.main, ["plan", *arguments.split(), "--rule", "round-robin", "--json"])
    assert result.exit_code == 0, result.output
    graph = json.loads(result.stdout)
    assert graph["planning_ms"] > 0
    assert (graph["nodes_used"], graph["updates"], graph["leaves"], graph["rule"]) == (4, 30, 8, "round-robin")
    assert [node["room"] for node in graph["nodes"]] == [11] * 4
    assert max(len(task["inputs"]) for task in graph["tasks"]) == 2
    assert graph["levels"] == 4
    assert result.stderr == ""


def test_plan_writes_its_picture(tmp_path: Path) -> None:
    """The file has the picture that a notebook shows."""
    path = tmp_path / "plan.svg"
    result = runner.invoke(cli.main, ["plan", "--svg", str(path)])
    assert result.exit_code == 0, result.output
    assert path.read_text().startswith("<svg ")
    missing = runner.invoke(cli.main, ["plan", "--svg", str(tmp_path / "none" / "plan.svg")])
    assert missing.exit_code == 1
    assert "Traceback" not in missing.output


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--arity", "1"], "lifl: fan_in=2, arity=1: give a fan_in of 1 at least and an arity of 2 at least\n"),
        (["--rate", "nan"], "lifl: rate=nan: give a finite number from 0 up\n"),
        (["--rate", "-1"], "lifl: rate=-1.0: give a finite number from 0 up\n"),
        (
            ["--nodes", "2", "--capacity", "3", "--rate", "1000"],
            "lifl: none of the 2 nodes has room for an update: they can aggregate 6 at once and have 10 in work;"
            " add nodes, or wait\n",
        ),
    ],
)
def test_no_plan_is_one_line_and_status_1(arguments: list[str], line: str) -> None:
    """It names what does not fit."""
    result = runner.invoke(cli.main, ["plan", *arguments])
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", line)


def test_demo_passes_its_options_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """With `--json` the demo's own lines go to stderr."""

    def run_demo(console: Any, rounds: int, supernodes: int, keep_logs: bool) -> dict[str, Any]:
        console.print("told on the way")
        return {"rounds": rounds, "supernodes": supernodes, "keep_logs": keep_logs}

    monkeypatch.setattr("lifl.deploy.demo.run_demo", run_demo)
    result = runner.invoke(cli.main, ["demo", "--rounds", "2", "--supernodes", "3", "--keep-logs", "--json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout) == {"rounds": 2, "supernodes": 3, "keep_logs": True}
    assert "told on the way" in result.stderr
    assert runner.invoke(cli.main, ["demo"]).stdout == "told on the way\n"


@pytest.mark.parametrize(
    ("error", "line", "status"),
    [
        (ShmError(12, "an arena of 9 bytes was asked for"), "lifl: an arena of 9 bytes was asked for\n", 1),
        (ModuleNotFoundError("No module", name="grpc"), "lifl: grpc is not installed: pip install 'lifl[bench]'\n", 1),
        (ModuleNotFoundError("", name="flwr.app"), "lifl: flwr is not installed: pip install flwr\n", 1),
        (KeyboardInterrupt(), "lifl: stopped by Ctrl-C; nothing is left running\n", 130),
    ],
)
def test_an_error_is_one_line_and_a_status(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, line: str, status: int
) -> None:
    """An error that the user can mend needs no traceback."""

    def measure(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("lifl.bench.handoff.measure_handoff", measure)
    result = runner.invoke(cli.main, ["bench", "handoff"])
    assert (result.exit_code, result.stdout, result.stderr) == (status, "", line)


def test_ctrl_c_is_one_line_and_status_130_and_leaves_nothing() -> None:
    """As a terminal sends it: to the command and all its processes at once (the fixture looks for them)."""
    command = [*RUN, "bench", "handoff", "--messages", "100000000"]
    with subprocess.Popen(command, stdout=-1, stderr=-1, text=True, start_new_session=True) as process:
        deadline = time.monotonic() + 60
        while not _has_child(process.pid):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)
        out, errors = process.communicate(timeout=60)
    assert (process.returncode, out, errors) == (130, "", "lifl: stopped by Ctrl-C; nothing is left running\n")


def _has_child(pid: int) -> bool:
    with open(f"/proc/{pid}/task/{pid}/children") as children:
        return bool(children.read())
