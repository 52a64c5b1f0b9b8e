"""The ``lifl bench`` commands: their names, their arguments, and their output.

Owns arguments. Each benchmark is imported only inside its command.
"""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from lifl.cli.console import AsJson, end, progress, reporting_errors, show


class Model(StrEnum):
    """The names in ``lifl.bench.shapes.MODELS``, which is not imported for ``--help``."""

    RESNET18 = "resnet18"
    RESNET34 = "resnet34"
    RESNET152 = "resnet152"
    SMALL2000 = "small2000"


class Peer(StrEnum):
    """Other libraries that can be measured."""

    NVFLARE = "nvflare"


class Timing(StrEnum):
    """The values of ``lifl.planner.timing.Timing``."""

    EAGER = "eager"
    LAZY = "lazy"
    JIT = "jit"


Picture = Annotated[
    Path | None,
    typer.Option(dir_okay=False, writable=True, help="Draw the figures into this file: .svg, .png or .pdf."),
]

bench = typer.Typer(
    help="Measure this machine, the fold, the hand-off, the recovery, the planning, the workers.",
    no_args_is_help=True,
)


@bench.command()
@reporting_errors
def limits(
    repetitions: Annotated[int, typer.Option(min=1, help="Each figure is the median of this many.")] = 5,
    as_json: AsJson = False,
) -> None:
    """Limits of this machine.

    Reading and copying memory, hashing, waking and starting processes; and the costs that the planner uses, which are
    measured anew and kept. Takes about 15 seconds and 1 GiB of memory.
    """
    from lifl.bench.limits import limits_table, measure_limits

    with progress() as say:
        figures = measure_limits(repetitions=repetitions, on_progress=say)
    show(figures, limits_table, as_json)


@bench.command()
@reporting_errors
def fold(
    model: Annotated[
        Model, typer.Option(metavar="NAME", help="Shapes of the updates: resnet18, resnet34, resnet152, small2000.")
    ] = Model.RESNET18,
    updates: Annotated[int, typer.Option(min=1, help="Number of updates to average.")] = 16,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Worker processes of lifl.", show_default="one per core")
    ] = None,
    repetitions: Annotated[int, typer.Option(min=1, help="Each figure is the median of this many.")] = 5,
    as_json: AsJson = False,
) -> None:
    """The mean of ready updates, by lifl, Flower and NVFLARE.

    All take turns in one run, on the same updates. "updates ready": all lie in shared memory, and the
    clock runs from the last one to the mean. "copied in": the clock includes copying all of them into
    shared memory. NVFLARE needs lifl's extra "peers". Takes about 30 seconds and 3 GB of memory with the
    defaults, 13 GB with resnet152.
    """
    from lifl.bench.fold import fold_table, measure_fold

    with progress() as say:
        figures = measure_fold(model.value, updates, workers, repetitions, on_progress=say)
    show(figures, fold_table, as_json)


@bench.command()
@reporting_errors
def handoff(
    messages: Annotated[
        int, typer.Option(min=1, help="Hand-overs between the spinning sides; the other ways get a tenth.")
    ] = 20_000,
    as_json: AsJson = False,
) -> None:
    """One descriptor from one Python process to another.

    lifl's rings and its eBPF sidecar against Unix sockets, a proxy, multiprocessing.Queue and gRPC; on two cores and
    on one, with the CPU time. A figure is half of a round trip. Takes about fifteen seconds.
    """
    from lifl.bench.handoff import handoff_table, measure_handoff

    with progress() as say:
        figures = measure_handoff(messages, on_progress=say)
    show(figures, handoff_table, as_json)


@bench.command()
@reporting_errors
def recovery(
    deaths: Annotated[int, typer.Option(min=1, help="Deaths of each way; each figure is over this many.")] = 200,
    updates: Annotated[int, typer.Option(min=1, help="Updates of ResNet-18 that each worker has.")] = 8,
    workers: Annotated[int, typer.Option(min=1, help="Worker processes; one of them is killed at a time.")] = 2,
    as_json: AsJson = False,
) -> None:
    """Time from a worker's SIGKILL until its blocks are reclaimed.

    Workers are killed while their updates wait and while they fold them; the others fold on. Every mean is checked.
    Takes about a minute and a half and 1.3 GB of memory with the defaults.
    """
    from lifl.bench.recovery import measure_recovery, recovery_table

    with progress() as say:
        figures = measure_recovery(deaths, updates, workers, on_progress=say)
    show(figures, recovery_table, as_json)


@bench.command()
@reporting_errors
def planning(
    repetitions: Annotated[int, typer.Option(min=1, help="Each figure is the median of this many.")] = 5,
    as_json: AsJson = False,
) -> None:
    """Plans of rounds with up to 100,000 clients on up to 1,000 nodes.

    Placement, tree and processes; and the new plan after a node is gone. Takes about five seconds.
    """
    from lifl.bench.planning import measure_planning, planning_table

    with progress() as say:
        figures = measure_planning(repetitions, on_progress=say)
    show(figures, planning_table, as_json)


@bench.command()
@reporting_errors
def trickle(
    updates: Annotated[int, typer.Option(min=2, help="Number of updates of ResNet-18.")] = 32,
    seconds: Annotated[float, typer.Option(min=0, help="Time from the first update to the last.")] = 10.0,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Worker processes of lifl.", show_default="one per core")
    ] = None,
    repetitions: Annotated[int, typer.Option(min=1, help="Each figure is the median of this many.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Updates that trickle in: time from the last to the new model.

    Eager, just in time and lazy take turns; for comparison, one core folds one update onto a sum. Takes about
    two minutes and 2.5 GB of memory with the defaults.
    """
    from lifl.bench.trickle import measure_trickle, trickle_table

    with progress() as say:
        figures = measure_trickle(updates, seconds, workers=workers, repetitions=repetitions, on_progress=say)
    show(figures, trickle_table, as_json)


@bench.command()
@reporting_errors
def roles(
    repetitions: Annotated[int, typer.Option(min=1, help="Each figure is the median of this many.")] = 20,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Workers of the Node with two rounds.", show_default="one per core")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """A warm worker's next role, against the start of a worker.

    Also counts the processes that a second round starts. Takes about ten seconds.
    """
    from lifl.bench.roles import measure_roles, roles_table

    with progress() as say:
        figures = measure_roles(repetitions, workers, on_progress=say)
    show(figures, roles_table, as_json)


@bench.command()
@reporting_errors
def idle(
    seconds: Annotated[float, typer.Option(min=0.1, help="Length of the measurement.")] = 60.0,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Worker processes of each Node.", show_default="one per core")
    ] = None,
    transport: Annotated[str | None, typer.Option(help="rings, ebpf or auto.", show_default="rings")] = None,
    as_json: AsJson = False,
) -> None:
    """CPU time of an idle Node.

    With warm workers, with a round that waits, and after all workers have gone. Takes about a minute with the defaults;
    the arenas of the three Nodes take 48 MiB.
    """
    from lifl.bench.idle import idle_table, measure_idle

    with progress() as say:
        # The Node refuses unknown names of a transport.
        figures = measure_idle(seconds, workers, transport, on_progress=say)  # type: ignore[arg-type]
    show(figures, idle_table, as_json)


@bench.command()
@reporting_errors
def ablation(
    updates: Annotated[
        str, typer.Option(help="Updates for 5 simulated nodes, at most 100; 20 times as many for 100 nodes.")
    ] = "20,60,100",
    real_updates: Annotated[
        str, typer.Option(help="Updates for the 5 real Nodes, at most 100; 40 take 12 GB.")
    ] = "20,30,40",
    repetitions: Annotated[int, typer.Option(min=1, help="Each real figure is the median of this many.")] = 3,
    simulate_only: Annotated[bool, typer.Option("--simulate-only", help="No real rounds.")] = False,
    picture: Picture = None,
    as_json: AsJson = False,
) -> None:
    """The ideas of lifl, added one at a time, for real and simulated.

    Rounds of ResNet-18: a baseline, then locality, planned trees, reuse of workers, eager folding, shards. The real
    rounds are on five Nodes of this machine; every model is checked. A round that other processes disturb is repeated,
    and their share of the machine is shown. Takes five to fifteen minutes and 12 GB of memory; simulated only, ten
    seconds.
    """
    from lifl.bench.ablation import measure_ablation
    from lifl.bench.ablation_view import ablation_tables, check_picture, save_picture

    counts, real = _counts("--updates", updates), _counts("--real-updates", real_updates)
    if picture is not None:
        check_picture(picture)
    with progress() as say:
        figures = measure_ablation(counts, real, repetitions, is_simulated_only=simulate_only, on_progress=say)
    show(figures, ablation_tables, as_json)  # first, so that no file that cannot be written loses the figures
    if picture is not None:
        save_picture(figures, picture)


@bench.command()
@reporting_errors
def round(
    model: Annotated[
        Model, typer.Option(metavar="NAME", help="Shapes of the model: resnet18, resnet34, resnet152, small2000.")
    ] = Model.RESNET18,
    nodes: Annotated[int, typer.Option(min=1, help="Virtual SuperNodes, which train nothing.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of one run.")] = 2,
    sides: Annotated[str, typer.Option(help="The sides that take turns.")] = "flower,strategy,server",
    peer: Annotated[Peer | None, typer.Option(metavar="NAME", help="One more side: nvflare.")] = None,
    timing: Annotated[
        Timing, typer.Option(metavar="WHEN", help="lifl folds updates eager, lazy or jit.")
    ] = Timing.EAGER,
    memory: Annotated[
        str | None, typer.Option(help="Size of lifl-superlink's arena, such as 2GiB.", show_default="its own default")
    ] = None,
    profile: Annotated[bool, typer.Option(help="Show lifl-superlink's CPU time by activity.")] = False,
    patient: Annotated[bool, typer.Option(help="The nodes wait as long as SuperNodes do.")] = False,
    repetitions: Annotated[int, typer.Option(min=1, help="Runs of each side.")] = 1,
    json_file: Annotated[
        Path | None, typer.Option("--json", dir_okay=False, writable=True, help="Write the figures into this file.")
    ] = None,
    picture: Picture = None,
) -> None:
    """Whole Flower rounds, end to end, on real servers.

    A real SuperLink, a real ServerApp, and one process for all SuperNodes, over HTTP. "flower": Flower's server and
    FedAvg. "strategy": Flower's server, lifl's FedAvg. "server": lifl-superlink, lifl's FedAvg; "unheld": the same,
    but the server does not hold requests for work open. Every model is checked. A round of Flower's takes half a
    minute with the defaults, and three minutes with small2000 and 2 nodes. NVFLARE needs lifl's extra "peers".
    """
    from lifl.bench.ablation_view import check_picture
    from lifl.bench.round import SIDES, measure_round
    from lifl.bench.round_view import profile_table, round_table, save_picture

    if picture is not None:
        check_picture(picture)
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise ValueError(f"{json_file}: there is no such folder")
    chosen = [side.strip() for side in sides.split(",") if side.strip()]
    chosen += [peer.value] if peer is not None else []
    for option, is_given, users in (
        ("--memory", memory is not None, [name for name, side in SIDES.items() if side.takes_memory]),
        ("--profile", profile, [name for name, side in SIDES.items() if side.takes_memory]),
        ("--timing", timing is not Timing.EAGER, [name for name, side in SIDES.items() if side.strategy == "lifl"]),
    ):
        if is_given and not set(users) & set(chosen):
            raise ValueError(f"{option} has no effect on {', '.join(chosen)}: add one of {', '.join(users)} to --sides")
    options: dict[str, Any] = {"timing": timing.value, "memory": memory, "repetitions": repetitions}
    options |= {"is_patient": patient, "has_profile": profile}
    try:
        with progress() as say:
            figures = measure_round(model.value, nodes, rounds, chosen, on_progress=say, **options)
    except (FileNotFoundError, RuntimeError, TimeoutError) as error:  # a program could not start, failed or hung
        end(str(error), 1)
    show(figures, round_table, as_json=False)  # first, so that no file that cannot be written loses the figures
    if any(row.get("profile_s") for row in figures["rows"]):
        show(figures, profile_table, as_json=False)
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=2))
    if picture is not None:
        save_picture(figures, picture)


def _counts(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{option} {text}: give numbers with commas between them, such as 20,60,100") from None
