"""The ``lifl`` commands: what they are called, what they say, and their exit statuses.

Owns arguments, output and errors in one line. Measures and runs nothing itself, and imports what does
only inside the command that needs it. Status 1: it failed, and why; 2: wrong arguments; 130: Ctrl-C.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, ParamSpec

import typer
from rich.console import Console

from lifl.errors import LiflError
from lifl.planner.hierarchy import FAN_IN
from lifl.planner.load import EXECUTION_S
from lifl.planner.placement import Rule

if TYPE_CHECKING:
    from rich.console import RenderableType

P = ParamSpec("P")

REMEDIES = {
    "grpc": "pip install 'lifl[bench]'",
    "matplotlib": "pip install 'lifl[plot]'",
    "nvflare": "pip install 'lifl[peers]'",
    "sklearn": "pip install 'lifl[demo]'",
    "torch": "pip install 'lifl[torch]'",
}
"""Extras by the module that is missing without them."""

INTERRUPTED = 130


class Model(StrEnum):
    """The names in ``lifl.bench.shapes.MODELS``, which is not imported for ``--help``."""

    RESNET18 = "resnet18"
    RESNET34 = "resnet34"
    RESNET152 = "resnet152"


main = typer.Typer(
    name="lifl",
    help="Aggregate Flower's model updates in shared memory.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
bench = typer.Typer(
    help="Measure this machine, the fold, the hand-off, the recovery, the planning, the runtimes.",
    no_args_is_help=True,
)
main.add_typer(bench, name="bench")

AsJson = Annotated[bool, typer.Option("--json", help="Print the figures as JSON, and nothing else, on stdout.")]


def _told(command: Callable[P, None]) -> Callable[P, None]:
    """Turns the errors that a user can do something about into one line and a status."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt:
            _end("stopped by Ctrl-C; nothing is left running", INTERRUPTED)
        except ModuleNotFoundError as error:
            name = (error.name or "").partition(".")[0]
            _end(f"{name} is not installed: {REMEDIES.get(name, f'pip install {name}')}", 1)
        except (LiflError, ValueError) as error:
            # The text of an OSError begins with its number, which says nothing to a user.
            _end(getattr(error, "strerror", None) or str(error), 1)

    return run


def _end(message: str, status: int) -> NoReturn:
    typer.echo(f"lifl: {message}", err=True)
    raise typer.Exit(status)


def _version(is_asked: bool) -> None:
    if is_asked:
        from lifl import __version__

        typer.echo(f"lifl {__version__}")
        raise typer.Exit


@main.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print lifl's version and end.")
    ] = False,
) -> None:
    """Aggregate Flower's model updates in shared memory."""


@main.command()
@_told
def demo(
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of training, each way.")] = 3,
    supernodes: Annotated[int, typer.Option(min=2, help="Clients: processes that train on this machine.")] = 4,
    keep_logs: Annotated[bool, typer.Option("--keep-logs", help="Keep the processes' logs and say where.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train a small model here, with lifl and then with Flower.

    Starts a real SuperLink and SuperNodes, runs the same rounds with both strategies, compares them and
    ends everything that it started. Takes about a minute and a half. Needs scikit-learn.
    """
    from lifl.demo import run_demo

    results = run_demo(Console(stderr=as_json), rounds, supernodes, keep_logs)
    if as_json:
        typer.echo(json.dumps(results, indent=2))


@main.command()
@_told
def plan(
    clients: Annotated[int, typer.Option(min=1, help="Updates to aggregate in the round, one of each client.")] = 120,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes that can aggregate, all alike.")] = 5,
    capacity: Annotated[
        float | None,
        typer.Option(help="Updates that a node can aggregate at once.", show_default="so that a fifth stays free"),
    ] = None,
    cores: Annotated[int, typer.Option(min=1, help="Of each node; the most leaves that it gets.")] = 8,
    rate: Annotated[float, typer.Option(help="Updates per second that arrive already, over all nodes.")] = 0.0,
    execution: Annotated[float, typer.Option(help="Seconds that one of these takes.")] = EXECUTION_S,
    fan_in: Annotated[int, typer.Option(help="Updates of one leaf, where the cores are enough.")] = FAN_IN,
    arity: Annotated[
        int | None, typer.Option(help="The most sums that a middle or the top adds up.", show_default="no bound")
    ] = None,
    rule: Annotated[Rule, typer.Option(help="Which node takes whose update.")] = Rule.BEST_FIT,
    svg: Annotated[typer.FileTextWrite | None, typer.Option(help="Write the picture of the tree here.")] = None,
    as_json: AsJson = False,
) -> None:
    """Who aggregates what, in which tree: the plan of one round.

    Nothing is started: the nodes are made up. The time is the median of five
    plannings. With --json the plan is printed as a graph: tasks, channels,
    and the routing table of each node.
    """
    from lifl.bench.planning import cluster_of, plan_tree, timed_plan

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


@bench.command()
@_told
def limits(
    repetitions: Annotated[int, typer.Option(min=1, help="Each figure is the median of so many.")] = 5,
    as_json: AsJson = False,
) -> None:
    """What this machine can do at most.

    Reading and copying memory, hashing, waking and starting processes; and what the cost model plans with, which is
    measured anew and remembered. Takes about 15 seconds and 1 GiB of memory.
    """
    from lifl.bench.limits import limits_table, measure_limits

    with _progress() as say:
        figures = measure_limits(repetitions=repetitions, on_progress=say)
    _show(figures, limits_table, as_json)


@bench.command()
@_told
def fold(
    model: Annotated[
        Model, typer.Option(metavar="NAME", help="Shapes of the updates: resnet18, resnet34, resnet152.")
    ] = Model.RESNET18,
    updates: Annotated[int, typer.Option(min=1, help="How many updates are averaged.")] = 16,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Worker processes of lifl.", show_default="one per core")
    ] = None,
    repetitions: Annotated[int, typer.Option(min=1, help="Each figure is the median of so many.")] = 5,
    as_json: AsJson = False,
) -> None:
    """The mean of ready updates, by lifl, Flower and NVFLARE.

    All take turns in one run, on the same updates. "updates ready": all lie in shared memory, and the
    clock runs from the last one to the mean. "copied in": the clock includes copying all of them into
    shared memory. NVFLARE needs lifl's extra "peers". Takes about 30 seconds and 3 GB of memory with the
    defaults, 13 GB with resnet152.
    """
    from lifl.bench.fold import fold_table, measure_fold

    with _progress() as say:
        figures = measure_fold(model.value, updates, workers, repetitions, on_progress=say)
    _show(figures, fold_table, as_json)


@bench.command()
@_told
def handoff(
    messages: Annotated[
        int, typer.Option(min=1, help="Hand-overs between the spinning sides; the other ways get a tenth.")
    ] = 20_000,
    as_json: AsJson = False,
) -> None:
    """One descriptor from one Python process to another.

    lifl's rings against multiprocessing.Queue and gRPC. A figure is half of a round trip. Takes about five seconds.
    """
    from lifl.bench.handoff import handoff_table, measure_handoff

    with _progress() as say:
        figures = measure_handoff(messages, on_progress=say)
    _show(figures, handoff_table, as_json)


@bench.command()
@_told
def recovery(
    deaths: Annotated[int, typer.Option(min=1, help="Deaths of each way; each figure is over so many.")] = 200,
    updates: Annotated[int, typer.Option(min=1, help="Updates of ResNet-18 that each worker has.")] = 8,
    workers: Annotated[int, typer.Option(min=1, help="Worker processes; one of them is killed at a time.")] = 2,
    as_json: AsJson = False,
) -> None:
    """From a worker's SIGKILL to all it held reclaimed.

    Workers die while their updates wait and while they fold them; the others live. Every mean is checked. Takes
    about a minute and a half and 1.3 GB of memory with the defaults.
    """
    from lifl.bench.recovery import measure_recovery, recovery_table

    with _progress() as say:
        figures = measure_recovery(deaths, updates, workers, on_progress=say)
    _show(figures, recovery_table, as_json)


@bench.command()
@_told
def planning(
    repetitions: Annotated[int, typer.Option(min=1, help="Each figure is the median of so many.")] = 5,
    as_json: AsJson = False,
) -> None:
    """Plans of rounds with up to 100,000 clients on up to 1,000 nodes.

    Placement, tree and processes; and the new plan when a node is gone. Takes about five seconds.
    """
    from lifl.bench.planning import measure_planning, planning_table

    with _progress() as say:
        figures = measure_planning(repetitions, on_progress=say)
    _show(figures, planning_table, as_json)


@bench.command()
@_told
def trickle(
    updates: Annotated[int, typer.Option(min=2, help="How many updates of ResNet-18 come.")] = 32,
    seconds: Annotated[float, typer.Option(min=0, help="From the first to the last.")] = 10.0,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Worker processes of lifl.", show_default="one per core")
    ] = None,
    repetitions: Annotated[int, typer.Option(min=1, help="Each figure is the median of so many.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Updates that trickle in: from the last to the new model.

    Eager, just in time and lazy take turns; beside it, how long one core folds one update onto a sum. Takes about
    two minutes and 2.5 GB of memory with the defaults.
    """
    from lifl.bench.trickle import measure_trickle, trickle_table

    with _progress() as say:
        figures = measure_trickle(updates, seconds, workers=workers, repetitions=repetitions, on_progress=say)
    _show(figures, trickle_table, as_json)


@bench.command()
@_told
def roles(
    repetitions: Annotated[int, typer.Option(min=1, help="Each figure is the median of so many.")] = 20,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Of the Node with two rounds.", show_default="one per core")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """A warm worker's next role, against starting one.

    And whether a second round starts a process. Takes about ten seconds.
    """
    from lifl.bench.roles import measure_roles, roles_table

    with _progress() as say:
        figures = measure_roles(repetitions, workers, on_progress=say)
    _show(figures, roles_table, as_json)


@bench.command()
@_told
def idle(
    seconds: Annotated[float, typer.Option(min=0.1, help="How long the Nodes are watched.")] = 60.0,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Worker processes of each Node.", show_default="one per core")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """CPU time of a Node that has nothing to do.

    With warm workers, with a round that waits, and after all workers have gone.
    """
    from lifl.bench.idle import idle_table, measure_idle

    with _progress() as say:
        figures = measure_idle(seconds, workers, on_progress=say)
    _show(figures, idle_table, as_json)


@bench.command()
@_told
def ablation(
    updates: Annotated[str, typer.Option(help="Of 5 simulated nodes; 20 times as many for 100.")] = "20,60,100",
    real_updates: Annotated[str, typer.Option(help="Of the 5 real Nodes; 40 take 12 GB.")] = "20,30,40",
    repetitions: Annotated[int, typer.Option(min=1, help="Each real figure is the median of so many.")] = 3,
    simulate_only: Annotated[bool, typer.Option("--simulate-only", help="Carry nothing out for real.")] = False,
    picture: Annotated[Path | None, typer.Option(help="Draw it into this file: .svg, .png or .pdf.")] = None,
    as_json: AsJson = False,
) -> None:
    """One idea of lifl more at a time, for real and simulated.

    Rounds of ResNet-18: a baseline, then locality, planned trees, reuse of runtimes, eager folding, shards. For real
    on five Nodes of this machine; every model is checked. A round that others on the machine disturb is repeated, and
    how much they took is told. Takes five to fifteen minutes and 12 GB of memory; simulated only, ten seconds.
    """
    from lifl.bench.ablation import measure_ablation
    from lifl.bench.ablation_view import ablation_tables, check_picture, save_picture

    counts, real = _counts("--updates", updates), _counts("--real-updates", real_updates)
    if picture is not None:
        check_picture(picture)
    with _progress() as say:
        figures = measure_ablation(counts, real, repetitions, is_simulated_only=simulate_only, on_progress=say)
    if picture is not None:
        save_picture(figures, picture)
    _show(figures, ablation_tables, as_json)


def _counts(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{option} {text}: give numbers with commas between them, such as 20,60,100") from None


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """What is being measured, on stderr and only on a terminal; gone afterwards."""
    console = Console(stderr=True)
    with console.status("starting") as status:
        yield lambda what: status.update(f"measuring: {what}")


def _show(figures: dict[str, Any], table: Callable[[dict[str, Any]], RenderableType], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(figures, indent=2))
    else:
        Console().print(table(figures))
