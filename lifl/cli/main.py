"""The ``lifl`` commands: their names, their arguments, and their output.

Owns arguments. Measures and runs nothing itself: the modules that do are imported only inside their commands.
``lifl.cli.console`` prints errors and figures, and ``lifl.cli.bench`` has the commands of the benchmarks.
"""

from __future__ import annotations

import json
import time
from typing import Annotated

import typer
from rich.console import Console

from lifl.cli.bench import bench
from lifl.cli.console import AsJson, reporting_errors, show, terminal_svg
from lifl.planner.hierarchy import FAN_IN
from lifl.planner.load import EXECUTION_S
from lifl.planner.placement import Rule

SVG_WIDTH = 100
"""Characters in a line of a picture."""

main = typer.Typer(
    name="lifl",
    help="Aggregate Flower's model updates in shared memory.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
main.add_typer(bench, name="bench")


def _version(is_asked: bool) -> None:
    if is_asked:
        from lifl import __version__

        typer.echo(f"lifl {__version__}")
        raise typer.Exit


@main.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print lifl's version and exit.")
    ] = False,
) -> None:
    """Aggregate Flower's model updates in shared memory."""


@main.command()
@reporting_errors
def demo(
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of training in each way.")] = 3,
    supernodes: Annotated[int, typer.Option(min=2, help="Clients: processes that train on this machine.")] = 4,
    keep_logs: Annotated[bool, typer.Option("--keep-logs", help="Keep the logs and print their folder.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train a small model here three ways: with Flower, lifl's strategy, lifl's server.

    Starts a real flower-superlink and then a lifl-superlink, each with SuperNodes, runs the same rounds in all three
    ways, compares them and ends all processes. Takes about three minutes. Needs scikit-learn.
    """
    from lifl.deploy.demo import run_demo

    results = run_demo(Console(stderr=as_json), rounds, supernodes, keep_logs)
    if as_json:
        typer.echo(json.dumps(results, indent=2))


@main.command()
@reporting_errors
def plan(
    clients: Annotated[int, typer.Option(min=1, help="Clients of the round, each with one update.")] = 120,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes that can aggregate, all equal.")] = 5,
    capacity: Annotated[
        float | None,
        typer.Option(help="Updates that a node can aggregate at once.", show_default="so that a fifth stays free"),
    ] = None,
    cores: Annotated[int, typer.Option(min=1, help="Cores of each node, and the most leaves that it gets.")] = 8,
    rate: Annotated[float, typer.Option(help="Present load: updates per second over all nodes.")] = 0.0,
    execution: Annotated[float, typer.Option(help="Seconds for one update of the present load.")] = EXECUTION_S,
    fan_in: Annotated[int, typer.Option(help="Updates of one leaf, if there are enough cores.")] = FAN_IN,
    arity: Annotated[
        int | None, typer.Option(help="The most sums that a middle or the top adds up.", show_default="no bound")
    ] = None,
    rule: Annotated[Rule, typer.Option(help="The rule that assigns updates to nodes.")] = Rule.BEST_FIT,
    svg: Annotated[typer.FileTextWrite | None, typer.Option(help="Write the picture of the tree here.")] = None,
    as_json: AsJson = False,
) -> None:
    """The plan of one round: its nodes, their updates, and the tree.

    Nothing is started, the nodes are imaginary. The time is the median of five
    plannings. With --json the plan is printed as a graph: tasks, channels,
    and the routing table of each node.
    """
    from lifl.bench.planning import cluster_of, timed_plan
    from lifl.cli.plan_view import plan_tree

    names, servers = cluster_of(clients, nodes, capacity, cores, rate, execution)
    planned, planning_ms = timed_plan(names, servers, rule, fan_in, arity)
    if svg is not None:
        svg.write(planned._repr_html_())
    if as_json:
        typer.echo(json.dumps({"planning_ms": planning_ms, **planned.to_dict()}, indent=2))
        return
    console = Console()
    console.print(plan_tree(planned))
    console.print(f"{planned}, planned in {planning_ms:.1f} ms", soft_wrap=True)


@main.command()
@reporting_errors
def top(
    interval: Annotated[float, typer.Option(min=0.05, help="Seconds between two looks.")] = 1.0,
    pid: Annotated[int | None, typer.Option(help="Only the Nodes of this process.", show_default="all")] = None,
    once: Annotated[bool, typer.Option("--once", help="Look twice, an interval apart, print and exit.")] = False,
    svg: Annotated[typer.FileTextWrite | None, typer.Option(help="Draw the view once, into this file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Live view of this user's Nodes and lifl-superlinks.

    Shows memory, open rounds, and the role, queue and load of each worker, until Ctrl-C. With --json one look, as
    JSON. If the output is no terminal, the command behaves as with --once. A Node without workers (workers=0) is not
    found.
    """
    from lifl.monitor.top import Watcher, ask_all
    from lifl.monitor.top_view import nodes_view, show_live

    if as_json:
        typer.echo(json.dumps({"nodes": [stats.to_dict() for stats in ask_all(pid)]}, indent=2))
        return
    console, watcher = Console(), Watcher(pid)
    if not once and svg is None and console.is_terminal:
        show_live(console, watcher, interval)
        return
    watcher.look()
    time.sleep(interval)
    sights = watcher.look()
    if svg is None:
        console.print(nodes_view(sights))
    else:
        svg.write(terminal_svg(nodes_view(sights), "lifl top", SVG_WIDTH))


@main.command()
@reporting_errors
def doctor(
    svg: Annotated[typer.FileTextWrite | None, typer.Option(help="Write the table as a picture here.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show the features of this machine that lifl uses, and ways to get more.

    Changes nothing and needs no privileges. The status is 1 if lifl cannot run here at all.
    """
    from lifl.cli.doctor import examine
    from lifl.cli.doctor_view import SVG_COLUMNS, findings_table

    findings = examine()
    if svg is not None:
        svg.write(terminal_svg(findings_table(findings), "lifl doctor", SVG_COLUMNS))
    show(findings.to_dict(), lambda _: findings_table(findings), as_json)
    raise typer.Exit(0 if findings.can_run else 1)
