"""`lifl demo`: one Flower app three ways, side by side: Flower, lifl's strategy on Flower's server, lifl's server.

Owns the runs of the demo and their presentation. Everything in the demo is real: the SuperLinks, the
SuperNodes and the training of examples/quickstart-digits. Never aggregates anything itself
and never imports flwr.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from lifl.deploy.deployment import Deployment

NAMES = {"flower": "Flower", "lifl": "lifl's strategy", "server": "lifl-superlink"}
STRATEGIES = {"flower": "flower", "lifl": "lifl", "server": "lifl"}
SERVERS = {"flower-superlink": ("flower", "lifl"), "lifl-superlink": ("server",)}
"""The runs on each server, one after another."""
# All average the same updates; only the order of float32 additions may differ, which changes the result for
# at most one or two of the 359 test images.
MAX_DIFFERENCE = 0.01
MIN_ACCURACY = 0.9
# A link to examples/quickstart-digits in a checkout, a copy of it in a wheel.
_APP = Path(__file__).parents[1] / "_demo_app"
# The line that the demo's app prints after each round.
_ROUND_ENDED = re.compile(r"Round (\d+) of \d+: accuracy ([\d.]+)")


def run_demo(console: Console, rounds: int = 3, supernodes: int = 4, keep_logs: bool = False) -> dict[str, Any]:
    """Runs the app in all three ways, each server with its own SuperNodes; shows and returns the results.

    Returns the runs under "flower", "lifl" and "server" (each: "strategy", "rounds" with round,
    accuracy, seconds and report, and the total "seconds", all on the ServerApp's clock),
    "accuracy_difference" of the last round, and "logs" (the folder, or None).

    Every failure is printed on `console` and then raised as SystemExit: 1 if a program
    fails or if the accuracies differ by more than MAX_DIFFERENCE or are below
    MIN_ACCURACY, 130 on Ctrl-C. No process is left in any case.
    """
    if rounds < 1:
        raise ValueError(f"the demo needs at least 1 round, not {rounds}")
    if importlib.util.find_spec("sklearn") is None:
        console.print("[red]The demo needs scikit-learn:[/] pip install scikit-learn")
        raise SystemExit(1)
    logs = Path(tempfile.mkdtemp(prefix="lifl-demo-logs-")) if keep_logs else None
    try:
        results = _run_all(console, rounds, supernodes, logs)
    except KeyboardInterrupt:
        console.print("Stopped by Ctrl-C; nothing is left running.")
        raise SystemExit(130) from None
    except (OSError, RuntimeError) as error:  # TimeoutError is an OSError
        # markup=False, because rich would take the square brackets of a log for styles.
        console.print(str(error), style="red", markup=False, highlight=False)
        raise SystemExit(1) from None
    finally:
        if logs is not None:
            console.print(f"The logs are in {logs}", highlight=False)

    console.print(_comparison(results))
    if any(_report(entry) for entry in results["server"]["rounds"]):
        console.print(_contributions(results["server"]))
    for side in ("lifl", "server"):
        if any(_report(entry) for entry in results[side]["rounds"]):
            console.print(_times(results[side], NAMES[side]))
        for note in _exceptions(results[side]):
            console.print(f"{NAMES[side]}: {note}", highlight=False, markup=False)
    last = {name: result["rounds"][-1]["accuracy"] for name, result in results.items()}
    difference = max(last.values()) - min(last.values())
    totals = ", ".join(f"{NAMES[name]} {result['seconds']:.1f} s" for name, result in results.items())
    console.print(
        f"In all: {totals}. Most of this time is the SuperNodes': they start a process for each task, and on Flower's "
        "server they ask for work every 3 s.",
        highlight=False,
    )
    ends = ", ".join(f"{NAMES[name]} {accuracy:.4f}" for name, accuracy in last.items())
    if difference > MAX_DIFFERENCE or min(last.values()) < MIN_ACCURACY:
        console.print(
            f"[red]This is wrong:[/] the accuracies at the end are {ends}. All should reach {MIN_ACCURACY} and "
            f"differ by no more than {MAX_DIFFERENCE}.",
            highlight=False,
        )
        raise SystemExit(1)
    verdict = "exactly the same" if difference == 0 else f"the same within {difference:.4f}"
    console.print(
        f"[green]All three end with {verdict} accuracy: {ends}.[/]",
        highlight=False,
    )
    return {**results, "accuracy_difference": difference, "logs": str(logs) if logs else None}


def _run_all(console: Console, rounds: int, supernodes: int, logs: Path | None) -> dict[str, dict[str, Any]]:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TimeElapsedColumn(),
    )
    results = {}
    # A file or a CI log cannot be animated; there the lines printed below are the progress.
    is_still = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=is_still) as progress:
        for server, sides in SERVERS.items():
            folder = None if logs is None else logs / server
            with _deployment(progress, server, supernodes, folder) as deployment:
                for side in sides:
                    results[side] = _run_one(deployment, side, rounds, supernodes, progress)
    return results


@contextlib.contextmanager
def _deployment(progress: Progress, server: str, supernodes: int, logs: Path | None) -> Iterator[Deployment]:
    starting = progress.add_task(f"Starting {server} and {supernodes} SuperNodes", total=1 + supernodes)

    def on_progress(news: str) -> None:
        progress.update(starting, advance=1, description=f"Starting: {news}")

    started = time.monotonic()
    with Deployment(supernodes, (server,), log_dir=logs, on_progress=on_progress) as deployment:
        progress.remove_task(starting)
        seconds = time.monotonic() - started
        progress.console.print(f"{server} and {supernodes} SuperNodes are up after {seconds:.1f} s", highlight=False)
        yield deployment


def _run_one(deployment: Deployment, side: str, rounds: int, supernodes: int, progress: Progress) -> dict[str, Any]:
    name = NAMES[side]
    running = progress.add_task(f"{name}: starting the ServerApp", total=rounds)
    started = time.monotonic()

    def on_line(line: str) -> None:
        if "[ROUND 1/" in line:
            progress.update(running, description=f"{name}: round 1 of {rounds}")
        if match := _ROUND_ENDED.search(line):
            round_, accuracy = int(match[1]), match[2]
            seconds = time.monotonic() - started
            progress.console.print(
                f"{name}: round {round_} of {rounds} done after {seconds:.1f} s, accuracy {accuracy}",
                highlight=False,
            )
            step = f"round {round_ + 1} of {rounds}" if round_ < rounds else "ending the ServerApp"
            progress.update(running, advance=1, description=f"{name}: {step}")

    file = deployment.folder / f"{side}.json"
    config: dict[str, str | int | float | bool] = {
        "strategy": STRATEGIES[side],
        "num-server-rounds": rounds,
        "num-nodes": supernodes,
        "results": str(file),
    }
    # A round takes about 15 s on two cores; a run that takes 10 times as long has failed.
    deployment.run(_APP, config, on_line, timeout=60 + 150 * rounds)
    progress.remove_task(running)
    result: dict[str, Any] = json.loads(file.read_text())
    return result


def _comparison(results: dict[str, dict[str, Any]]) -> Table:
    table = Table(title="The same rounds, three ways", title_justify="left")
    table.add_column("round", justify="right")
    for figure in ("accuracy", "seconds"):
        for name in NAMES.values():
            # Three short lines: seven columns fit into the 80 of a pipe.
            title = name.replace("-", "-\n").replace(" ", "\n")
            table.add_column(f"{title}\n{figure}", justify="right", no_wrap=True)
    for entries in zip(*(results[side]["rounds"] for side in NAMES), strict=True):
        table.add_row(
            str(entries[0]["round"]),
            *(f"{entry['accuracy']:.4f}" for entry in entries),
            *(f"{entry['seconds']:.1f}" for entry in entries),
        )
    totals = (f"{results[side]['seconds']:.1f}" for side in NAMES)
    table.add_section()
    table.add_row("total", *("" for _ in NAMES), *totals)
    return table


def _contributions(result: dict[str, Any]) -> Table:
    """The nodes whose updates are in lifl's model of each round, with their weights."""
    table = Table(title="Contributions to lifl's rounds", title_justify="left")
    table.add_column("node\n(weight: its examples)")
    weights: dict[str, dict[int, str]] = {}
    for entry in result["rounds"]:
        table.add_column(f"round {entry['round']}", justify="right")
        for update in _report(entry).get("accepted", []):
            node = weights.setdefault(str(update["client_id"]), {})
            node[entry["round"]] = f"{update['weight']:g}"
    for node_id, of_round in sorted(weights.items()):
        table.add_row(node_id, *(of_round.get(e["round"], "-") for e in result["rounds"]))
    return table


def _times(result: dict[str, Any], name: str) -> Table:
    """The times of lifl's rounds, by the stages in their reports."""
    stages = list(dict.fromkeys(s for e in result["rounds"] for s in _report(e).get("stages", {})))
    table = Table(title=f"Times of the rounds' stages, in ms: {name}", title_justify="left")
    for heading in ("round", "updates", *(stage.replace("_", " ") for stage in stages)):
        table.add_column(heading, justify="right")
    for entry in result["rounds"]:
        report = _report(entry)
        seconds = report.get("stages", {})
        table.add_row(
            str(entry["round"]),
            f"{len(report.get('accepted', []))} of {report.get('expected', '?')}",
            *(f"{seconds[s] * 1000:,.1f}" if s in seconds else "-" for s in stages),
        )
    return table


def _exceptions(result: dict[str, Any]) -> list[str]:
    """Lines about updates that did not count and rounds that failed."""
    notes = []
    for entry in result["rounds"]:
        report, start = _report(entry), f"Round {entry['round']}:"
        for refused in report.get("rejected", []):
            notes.append(f"{start} node {refused['client_id']} refused, {refused['reason']}")
        notes += [f"{start} node {node} was late" for node in report.get("late", [])]
        if report.get("error"):
            notes.append(f"{start} {report['error']}")
    return notes


def _report(entry: dict[str, Any]) -> dict[str, Any]:
    """The report of a round; empty if there is none."""
    return entry["report"] or {}
