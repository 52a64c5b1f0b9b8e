"""`lifl demo`: one Flower app, aggregated by lifl and then by Flower, side by side.

Owns: what the demo runs and how it is shown. Everything in it is real: a SuperLink, the
SuperNodes and the training of examples/quickstart-digits. Never aggregates anything itself
and never imports flwr.
"""

from __future__ import annotations

import importlib.util
import json
import re
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from lifl.deployment import Deployment

NAMES = {"lifl": "lifl", "flower": "Flower"}
# Both average the same updates; only the order of float32 additions may differ, which moves
# one or two of the 359 test images at most.
MAX_DIFFERENCE = 0.01
MIN_ACCURACY = 0.9
# A link to examples/quickstart-digits in a checkout, a copy of it in a wheel.
_APP = Path(__file__).with_name("_demo_app")
# What the demo's app prints after each round.
_ROUND_ENDED = re.compile(r"Round (\d+) of \d+: accuracy ([\d.]+)")


def run_demo(console: Console, rounds: int = 3, supernodes: int = 4, keep_logs: bool = False) -> dict[str, Any]:
    """Run the app with both strategies on one deployment, show and return what came out.

    Returns the two runs under "lifl" and "flower" (each: "strategy", "rounds" with round,
    accuracy, seconds and report, and the total "seconds", all on the ServerApp's clock),
    "accuracy_difference" of the last round, and "logs" (the folder, or None).

    Every failure is told on `console` and then raised as SystemExit: 1 when a program
    fails or when the accuracies differ by more than MAX_DIFFERENCE or are below
    MIN_ACCURACY, 130 on Ctrl-C. Nothing is left running in any case.
    """
    if rounds < 1:
        raise ValueError(f"the demo needs at least 1 round, not {rounds}")
    if importlib.util.find_spec("sklearn") is None:
        console.print("[red]The demo needs scikit-learn:[/] pip install scikit-learn")
        raise SystemExit(1)
    logs = Path(tempfile.mkdtemp(prefix="lifl-demo-logs-")) if keep_logs else None
    try:
        results = _run_both(console, rounds, supernodes, logs)
    except KeyboardInterrupt:
        console.print("Stopped by Ctrl-C; nothing is left running.")
        raise SystemExit(130) from None
    except (OSError, RuntimeError) as error:  # TimeoutError is an OSError
        # Not as markup: logs are full of square brackets.
        console.print(str(error), style="red", markup=False, highlight=False)
        raise SystemExit(1) from None
    finally:
        if logs is not None:
            console.print(f"The logs are in {logs}", highlight=False)

    console.print(_comparison(results))
    if any(_report(entry) for entry in results["lifl"]["rounds"]):
        console.print(_contributions(results["lifl"]))
        console.print(_times(results["lifl"]))
    for note in _exceptions(results["lifl"]):
        console.print(note, highlight=False, markup=False)
    last = {name: result["rounds"][-1]["accuracy"] for name, result in results.items()}
    difference = abs(last["lifl"] - last["flower"])
    seconds = {name: result["seconds"] for name, result in results.items()}
    console.print(
        f"In all lifl needed {seconds['lifl']:.1f} s, Flower {seconds['flower']:.1f} s. Most of "
        "that is the SuperNodes' own: they ask for work every 3 s and start a process for it.",
        highlight=False,
    )
    if difference > MAX_DIFFERENCE or min(last.values()) < MIN_ACCURACY:
        console.print(
            f"[red]This is wrong:[/] lifl ends at accuracy {last['lifl']:.4f}, Flower at "
            f"{last['flower']:.4f}. Both should reach {MIN_ACCURACY} and differ by no more than "
            f"{MAX_DIFFERENCE}.",
            highlight=False,
        )
        raise SystemExit(1)
    verdict = "exactly the same" if difference == 0 else f"the same within {difference:.4f}"
    console.print(
        f"[green]lifl and Flower end with {verdict} accuracy: {last['lifl']:.4f} and {last['flower']:.4f}.[/]",
        highlight=False,
    )
    return {**results, "accuracy_difference": difference, "logs": str(logs) if logs else None}


def _run_both(console: Console, rounds: int, supernodes: int, logs: Path | None) -> dict[str, dict[str, Any]]:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TimeElapsedColumn(),
    )
    results = {}
    # In a file or a CI log there is nothing to animate: the lines printed below are enough.
    still = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=still) as progress:
        what = f"Starting a SuperLink and {supernodes} SuperNodes"
        starting = progress.add_task(what, total=1 + supernodes)

        def on_progress(news: str) -> None:
            progress.update(starting, advance=1, description=f"Starting: {news}")

        started = time.monotonic()
        with Deployment(supernodes, log_dir=logs, on_progress=on_progress) as deployment:
            progress.remove_task(starting)
            seconds = time.monotonic() - started
            progress.console.print(
                f"1 SuperLink and {supernodes} SuperNodes are up after {seconds:.1f} s",
                highlight=False,
            )
            for strategy in NAMES:
                results[strategy] = _run_one(deployment, strategy, rounds, supernodes, progress)
    return results


def _run_one(deployment: Deployment, strategy: str, rounds: int, supernodes: int, progress: Progress) -> dict[str, Any]:
    name = NAMES[strategy]
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
            what = f"round {round_ + 1} of {rounds}" if round_ < rounds else "ending the ServerApp"
            progress.update(running, advance=1, description=f"{name}: {what}")

    file = deployment.folder / f"{strategy}.json"
    config: dict[str, str | int | float | bool] = {
        "strategy": strategy,
        "num-server-rounds": rounds,
        "num-nodes": supernodes,
        "results": str(file),
    }
    # A round takes about 15 s on two cores; a run that needs 10 times that has gone wrong.
    deployment.run(_APP, config, on_line, timeout=60 + 150 * rounds)
    progress.remove_task(running)
    result: dict[str, Any] = json.loads(file.read_text())
    return result


def _comparison(results: dict[str, dict[str, Any]]) -> Table:
    table = Table(title="The same rounds, both ways", title_justify="left")
    table.add_column("round", justify="right")
    for what in ("accuracy", "seconds"):
        for name in NAMES.values():
            table.add_column(f"{name}\n{what}", justify="right")
    for one, other in zip(results["lifl"]["rounds"], results["flower"]["rounds"], strict=True):
        table.add_row(
            str(one["round"]),
            *(f"{entry['accuracy']:.4f}" for entry in (one, other)),
            *(f"{entry['seconds']:.1f}" for entry in (one, other)),
        )
    totals = (f"{results[strategy]['seconds']:.1f}" for strategy in NAMES)
    table.add_section()
    table.add_row("total", "", "", *totals)
    return table


def _contributions(result: dict[str, Any]) -> Table:
    """Whose updates are in lifl's model of each round, and with which weight."""
    table = Table(title="Who contributed to lifl's rounds", title_justify="left")
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


def _times(result: dict[str, Any]) -> Table:
    """Where the time of lifl's rounds went, by the stages that its reports name."""
    stages = list(dict.fromkeys(s for e in result["rounds"] for s in _report(e).get("stages", {})))
    table = Table(title="Where the time of lifl's rounds went, in ms", title_justify="left")
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
    """One line for each update that did not count, and for each round that failed."""
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
    """The report of a round; empty where there is none."""
    return entry["report"] or {}
