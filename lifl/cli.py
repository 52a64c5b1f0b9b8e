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
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, ParamSpec

import typer
from rich.console import Console

from lifl.errors import LiflError

if TYPE_CHECKING:
    from rich.table import Table

P = ParamSpec("P")

REMEDIES = {
    "grpc": "pip install 'lifl[bench]'",
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
    help="Measure this machine, the fold, the hand-off, the recovery.",
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


@bench.command()
@_told
def limits(
    repetitions: Annotated[int, typer.Option(min=1, help="Each figure is the median of so many.")] = 5,
    as_json: AsJson = False,
) -> None:
    """What this machine can do at most.

    Reading and copying memory, hashing, waking and starting processes. Takes about ten seconds and 1 GiB of memory.
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
    """The mean of ready updates, by lifl and by Flower.

    Both take turns in one run, on the same updates. "updates ready": all lie in shared memory, and the
    clock runs from the last one to the mean. "copied in": the clock includes copying all of them into
    shared memory. Takes about 20 seconds and 3 GB of memory with the defaults, 13 GB with resnet152.
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


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """What is being measured, on stderr and only on a terminal; gone afterwards."""
    console = Console(stderr=True)
    with console.status("starting") as status:
        yield lambda what: status.update(f"measuring: {what}")


def _show(figures: dict[str, Any], table: Callable[[dict[str, Any]], Table], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(figures, indent=2))
    else:
        Console().print(table(figures))
