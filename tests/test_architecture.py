"""The rooms and the arrows between them, read from the imports; limits that keep files small; labels in the C."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
APPS = {"_demo_app", "_round_app"}
PAGE = "docs/architecture.md"

ALLOWED: dict[str, set[str]] = {
    # what everybody stands on
    "errors": set(),
    "tensor": set(),
    "report.report": {"report.svg", "report.mpl"},
    "report.scene": set(),
    "report.svg": {"report.mpl", "report.scene"},
    "report.mpl": {"report.scene"},
    "_shm_build": set(),
    "shm.arena": {"_shm_ffi", "errors"},
    # the parts of a round
    "strategy.npy": {"tensor"},
    "round.admission": {"errors", "tensor"},
    "shm.ring": {"shm.arena"},
    "shm.kernels": {"shm.arena"},
    "shm.sizes": {"shm.arena", "tensor"},
    "fold": {"shm.kernels", "tensor"},
    "strategy.checkpoint": {"errors"},
    "round.clip": {"round.admission", "errors", "tensor"},
    "round.intake": {"round.admission", "shm.kernels", "round.loan", "tensor"},
    "round.host": {
        "errors",
        "report.report",
        "planner.shape",
        "shm.arena",
        "shm.ring",
        "round.tally",
        "round.settings",
    },
    "shm.control_block": {"tensor"},
    "round.pacing": {"planner.load", "planner.shape", "round.settings"},
    "round.loan": {"shm.kernels", "shm.arena", "tensor"},
    "round.tally": set(),
    "round.record": {"report.report", "shm.arena", "round.tally"},
    "report.result": {"report.report", "tensor"},
    "round.clients": set(),
    "round.settings": {
        "round.admission",
        "round.clip",
        "round.intake",
        "shm.control_block",
        "planner.shape",
        "shm.arena",
        "tensor",
    },
    "round.recovery": {"round.record", "shm.arena"},
    "round.blocks": {
        *(
            "round.record",
            "errors",
            "round.host",
            "shm.control_block",
            "planner.hierarchy",
            "planner.shape",
            "round.recovery",
            "shm.ring",
            "shm.arena",
            "shm.sizes",
        ),
        *("tensor", "round.settings"),
    },
    "round.mean": {"round.blocks", "round.record", "fold", "round.host", "shm.control_block", "shm.ring", "shm.arena"},
    "round.lifecycle": {
        *(
            "round.blocks",
            "round.record",
            "errors",
            "round.mean",
            "round.host",
            "report.report",
            "round.pacing",
            "report.result",
            "shm.ring",
            "round.clients",
            "shm.arena",
        ),
        "round.settings",
    },
    "round.quota": {
        "round.admission",
        "round.blocks",
        "errors",
        "round.host",
        "round.clients",
        "shm.arena",
        "shm.sizes",
    },
    "round.round": {
        *(
            "round.admission",
            "round.blocks",
            "round.record",
            "round.lifecycle",
            "errors",
            "round.host",
            "round.intake",
            "round.loan",
            "report.report",
            "round.pacing",
            "round.quota",
        ),
        *("report.result", "round.clients", "shm.arena", "round.settings"),
    },
    # the planner
    "node.microbench": {"round.admission", "round.intake", "shm.kernels", "round.loan", "shm.arena", "tensor"},
    "node.calibration": {"errors", "node.microbench", "workers.spawner", "planner.costs", "shm.ring", "shm.arena"},
    "planner": set(),
    "planner.load": set(),
    "planner.shape": {"errors"},
    "planner.placement": {"errors", "planner.load"},
    "planner.hierarchy": {"errors", "planner.load", "planner.placement"},
    "planner.reuse": {"planner.hierarchy", "planner.load"},
    "planner.drawing": {"planner.hierarchy"},
    "planner.plan": {
        *("planner.drawing", "planner.hierarchy", "planner.load", "planner.placement", "planner.reuse"),
    },
    "planner.engine": set(),
    "planner.site": {"planner.engine"},
    "planner.aggregation": {"planner.engine", "planner.shape", "planner.site"},
    "planner.costs": {
        *("errors", "planner.aggregation", "planner.engine", "planner.load", "planner.shape", "planner.site"),
    },
    "planner.choose": {"errors", "planner.costs", "planner.shape"},
    "planner.traces": {"errors", "planner.costs"},
    "planner.simulate": {
        *("errors", "planner.aggregation", "planner.choose", "planner.costs", "planner.engine", "planner.hierarchy"),
        *("planner.load", "planner.placement", "planner.shape", "planner.site", "planner.traces"),
    },
    # the sidecar
    "ebpf": set(),
    "ebpf.record": set(),
    "ebpf.bpf": set(),
    "ebpf.build": set(),
    "ebpf.pairs": set(),
    "ebpf.prebuilt": {"ebpf.bpf"},
    "ebpf.compiled": {"ebpf.bpf", "ebpf.prebuilt", "ebpf.record", "errors"},
    "ebpf.probe": {"ebpf.compiled", "ebpf.pairs", "ebpf.prebuilt", "errors"},
    "ebpf.links": {"ebpf.record", "errors", "shm.ring", "shm.arena"},
    "ebpf.sidecar": {
        *("ebpf.links", "ebpf.pairs", "ebpf.probe", "ebpf.record", "errors", "shm.ring", "shm.arena"),
    },
    # the processes
    "workers.transport": {"ebpf.sidecar", "errors", "shm.ring", "shm.arena"},
    "workers.aggregator": {"ebpf.links", "errors", "fold", "shm.control_block", "shm.ring", "shm.arena", "tensor"},
    "workers.spawner": {"workers.aggregator", "ebpf.links", "errors"},
    "workers.supervisor": {"errors", "workers.spawner"},
    "workers.pool": {"workers.supervisor", "errors"},
    "workers.team": {
        "workers.aggregator",
        "workers.supervisor",
        "shm.ring",
        "shm.arena",
        "workers.traffic",
        "workers.transport",
    },
    "workers.listener": {"workers.supervisor", "errors", "shm.ring", "workers.traffic"},
    "workers.traffic": {"shm.arena"},
    "node.forecast": {
        *(
            "report.report",
            "round.pacing",
            "planner.choose",
            "planner.costs",
            "planner.load",
            "planner.shape",
            "round.settings",
        ),
        "workers.traffic",
    },
    "monitor.stats": set(),
    "strategy.heap": set(),
    "monitor.beacon": {"errors", "ipc"},
    "monitor.prometheus": {"errors", "ipc", "monitor.stats"},
    "node.telemetry": {"monitor.beacon", "errors", "monitor.prometheus", "shm.ring", "monitor.stats"},
    "node.node": {
        *(
            "round.admission",
            "workers.listener",
            "round.blocks",
            "node.calibration",
            "errors",
            "node.forecast",
            "planner.shape",
        ),
        *(
            "workers.pool",
            "shm.ring",
            "round.round",
            "shm.arena",
            "shm.sizes",
            "workers.team",
            "monitor.stats",
            "round.tally",
            "tensor",
            "round.settings",
            "workers.transport",
            "node.telemetry",
        ),
    },
    "node.embedded": {"node.calibration", "errors", "node.node", "shm.arena", "shm.sizes", "tensor", "round.settings"},
    # Flower
    "strategy.extent": set(),
    "strategy.pulling": {"errors", "strategy.extent"},
    "strategy.exchange": {"strategy.heap", "strategy.pulling"},
    "strategy.landing": {
        *(
            "round.admission",
            "node.embedded",
            "errors",
            "report.report",
            "strategy.npy",
            "report.result",
            "round.round",
            "node.node",
            "tensor",
            "round.settings",
        ),
        *("strategy.reply", "strategy.server_client"),
    },
    "strategy.reply": {"errors", "tensor"},
    "strategy.server_client": {
        *(
            "round.admission",
            "errors",
            "strategy.heap",
            "report.report",
            "report.result",
            "shm.arena",
            "strategy.exchange",
            "tensor",
            "round.settings",
            "ipc",
        ),
    },
    "strategy.journal": {"strategy.checkpoint", "errors", "report.report"},
    "strategy.metrics": {"round.admission", "errors", "report.report", "strategy.landing"},
    "strategy.fedavg": {
        *(
            "round.admission",
            "errors",
            "report.report",
            "node.node",
            "strategy.metrics",
            "strategy.exchange",
            "strategy.landing",
        ),
        *(
            "strategy.journal",
            "strategy.options",
            "strategy.tensorboard",
            "strategy.server_client",
            "tensor",
            "round.settings",
        ),
    },
    "strategy.options": {"round.admission", "node.node", "strategy.tensorboard", "round.settings"},
    "strategy.tensorboard": {"report.report", "strategy.landing"},
    "strategy.optimizers": {"strategy.fedavg", "strategy.options"},
    "strategy.reference": {"strategy.npy", "tensor"},
    # the SuperLink from the outside
    "superlink": set(),
    "bench.fleet.caller": {"errors"},
    "bench.fleet.canned_reply": {"strategy.reference", "tensor"},
    "bench.fleet.virtual_node": {"errors", "bench.fleet.caller", "bench.fleet.canned_reply"},
    "bench.fleet.fleet": {"errors", "bench.fleet.caller", "bench.fleet.canned_reply", "bench.fleet.virtual_node"},
    # the server
    "ipc": set(),
    "superlink.flower": set(),
    "superlink.http.body": set(),
    "superlink.rounds.chunk_map": {"tensor"},
    "superlink.rounds.model_objects": {"superlink.rounds.chunk_map"},
    "superlink.store.content": {"shm.arena", "superlink.flower"},
    "superlink.http.targets": {"shm.arena", "superlink.store.content"},
    "superlink.http.upload": {"superlink.http.body", "superlink.store.content", "superlink.http.targets"},
    "superlink.store.store": {"superlink.store.content", "superlink.flower"},
    "superlink.http.long_poll": set(),
    "superlink.http.signatures": set(),
    "superlink.http.checks": {"superlink.flower"},
    "superlink.http.allowance": set(),
    "superlink.http.rates": set(),
    "superlink.http.relief": {"superlink.http.rates"},
    "superlink.http.turns": {"superlink.http.allowance", "superlink.flower"},
    "superlink.http.desk": {"superlink.http.allowance"},
    "superlink.http.protocol": {
        *(
            "superlink.http.allowance",
            "superlink.http.desk",
            "superlink.flower",
            "superlink.http.rates",
            "superlink.http.turns",
        ),
    },
    "superlink.http.requests": {
        *("superlink.http.allowance", "superlink.http.body"),
        *("superlink.http.checks", "superlink.flower", "superlink.http.long_poll", "superlink.http.protocol"),
        *("superlink.store.store", "superlink.http.targets", "superlink.http.upload"),
    },
    "superlink.http.gateway": {
        "superlink.http.allowance",
        *(
            "superlink.http.checks",
            "superlink.store.content",
            "superlink.http.requests",
            "superlink.flower",
            "superlink.http.long_poll",
        ),
        *(
            "shm.arena",
            "superlink.http.protocol",
            "superlink.store.store",
            "superlink.http.targets",
            "superlink.http.upload",
        ),
    },
    "superlink.rounds.incoming_reply": {
        *(
            "errors",
            "round.loan",
            "report.report",
            "round.round",
            "strategy.reply",
            "superlink.store.content",
            "superlink.rounds.chunk_map",
        ),
        *("superlink.rounds.reply", "superlink.store.store"),
    },
    "superlink.rounds.reply": {
        *(
            "round.admission",
            "errors",
            "strategy.npy",
            "strategy.reply",
            "superlink.http.body",
            "superlink.store.content",
        ),
        *("superlink.flower", "superlink.rounds.chunk_map", "superlink.store.store"),
    },
    "superlink.announcements": {"superlink.flower", "superlink.store.store"},
    "superlink.rounds.reply_index": {"superlink.rounds.incoming_reply"},
    "superlink.rounds.served_round": {"round.round", "superlink.rounds.chunk_map", "superlink.rounds.incoming_reply"},
    "superlink.rounds.rounds": {
        *(
            "round.admission",
            "errors",
            "report.report",
            "node.node",
            "superlink.rounds.reply_index",
            "superlink.rounds.outgoing",
            "superlink.rounds.model_objects",
        ),
        *(
            "superlink.flower",
            "superlink.rounds.chunk_map",
            "superlink.http.long_poll",
            "superlink.rounds.offering",
            "superlink.rounds.incoming_reply",
        ),
        *("superlink.rounds.served_round", "superlink.store.store", "tensor", "round.settings"),
    },
    "superlink.rounds.outgoing": {"superlink.http.long_poll"},
    "superlink.rounds.offering": {
        "superlink.store.content",
        "superlink.rounds.model_objects",
        "superlink.rounds.chunk_map",
        "superlink.store.store",
    },
    "superlink.app_socket": {
        *(
            "round.admission",
            "errors",
            "superlink.flower",
            "superlink.rounds.incoming_reply",
            "superlink.rounds.rounds",
        ),
        *("superlink.rounds.served_round", "tensor", "ipc"),
    },
    "superlink.resumption": {"superlink.flower", "superlink.store.store"},
    "superlink.plane": {
        *("superlink.announcements", "superlink.http.rates", "superlink.http.relief", "superlink.resumption"),
        *(
            "node.node",
            "monitor.stats",
            "superlink.app_socket",
            "superlink.http.checks",
            "superlink.flower",
            "superlink.http.gateway",
        ),
        *(
            "superlink.http.long_poll",
            "superlink.http.protocol",
            "superlink.rounds.rounds",
            "superlink.http.signatures",
            "superlink.store.store",
        ),
        "ipc",
    },
    "superlink.profiler": set(),
    "superlink.command": {
        *(
            "",
            "errors",
            "node.node",
            "shm.arena",
            "shm.sizes",
            "superlink.flower",
            "superlink.plane",
            "superlink.profiler",
        ),
    },
    "superlink.__main__": {"superlink.command"},
    # programs
    "deploy._janitor": set(),
    "deploy.programs": {"deploy._janitor"},
    "deploy.deployment": {"deploy.programs"},
    "deploy.demo": {"deploy.deployment"},
    "bench.shapes": {"tensor"},
    "bench.echo": {"workers.aggregator"},
    "bench.sockets": {"bench.echo", "ebpf.links", "ebpf.sidecar", "shm.ring", "shm.arena"},
    "bench.pair": {"workers.aggregator", "bench.echo", "bench.sockets", "errors", "shm.ring", "shm.arena"},
    "bench.handoff": {"bench.pair", "ebpf.probe", "node.node"},
    "bench.limits": {
        *(
            "bench.handoff",
            "bench.pair",
            "node.calibration",
            "errors",
            "shm.kernels",
            "workers.spawner",
            "shm.ring",
            "node.node",
            "shm.arena",
        ),
        "tensor",
    },
    "bench.fold": {
        *(
            "bench.limits",
            "bench.shapes",
            "fold",
            "planner.shape",
            "node.node",
            "shm.sizes",
            "strategy.reference",
            "tensor",
        ),
    },
    "bench.idle": {"errors", "node.node", "tensor", "workers.transport"},
    "bench.roles": {"bench.limits", "report.report", "planner.shape", "node.node", "tensor"},
    "bench.trickle": {
        *(
            "bench.idle",
            "bench.limits",
            "bench.shapes",
            "errors",
            "fold",
            "report.report",
            "node.node",
            "shm.arena",
            "shm.sizes",
        ),
        *("tensor", "round.settings"),
    },
    "bench.recovery": {
        "bench.shapes",
        "workers.supervisor",
        "errors",
        "planner.shape",
        "round.round",
        "node.node",
        "shm.arena",
        "shm.sizes",
        "tensor",
    },
    "bench.planning": {
        *("planner.drawing", "planner.hierarchy", "planner.load", "planner.placement", "planner.plan"),
    },
    "bench.usage": set(),
    "bench.cluster": {
        *(
            "bench.usage",
            "errors",
            "shm.kernels",
            "planner.shape",
            "planner.simulate",
            "planner.traces",
            "report.result",
            "round.round",
        ),
        *("node.node", "shm.sizes", "tensor", "round.settings"),
    },
    "bench.ablation": {
        *("bench.cluster", "bench.shapes", "bench.usage", "node.calibration", "errors", "fold", "planner.costs"),
        *("planner.simulate", "planner.traces", "node.node", "tensor"),
    },
    "bench.ablation_view": set(),
    "bench.tree": set(),
    "bench.work": {"bench.shapes", "bench.tree", "errors", "fold", "tensor", "round.settings"},
    "bench.load": {
        "bench.shapes",
        "bench.work",
        "bench.fleet.fleet",
        "bench.fleet.canned_reply",
        "bench.fleet.virtual_node",
    },
    "bench.peer": {"bench.shapes", "bench.tree", "bench.work", "deploy.programs"},
    "bench.peer_job": {"bench.shapes", "bench.tree", "bench.work"},
    "bench.round": {
        *(
            "bench.load",
            "bench.peer",
            "bench.shapes",
            "bench.tree",
            "bench.work",
            "node.calibration",
            "deploy.deployment",
        ),
        *("errors", "shm.sizes", "tensor", "round.settings"),
    },
    "bench.round_view": {"bench.ablation_view"},
    "monitor.top": {"monitor.beacon", "errors", "monitor.stats", "ipc"},
    "monitor.top_view": {"monitor.stats", "monitor.top"},
    "cli.console": {"errors"},
    "cli.bench": {
        *("bench.ablation", "bench.ablation_view"),
        *("bench.fold", "bench.handoff", "bench.idle", "bench.limits", "bench.planning", "bench.recovery"),
        *("bench.roles", "bench.round", "bench.round_view", "bench.trickle", "cli.console"),
    },
    "cli.huge_pages": set(),
    "cli.doctor": {
        *(
            "",
            "node.calibration",
            "ebpf.compiled",
            "ebpf.probe",
            "errors",
            "shm.kernels",
            "cli.huge_pages",
            "node.node",
            "shm.arena",
            "shm.sizes",
        ),
        *("superlink.command", "superlink.flower", "workers.transport"),
    },
    "cli.doctor_view": set(),
    "cli.main": {
        *("cli.bench", "bench.planning", "cli.console", "deploy.demo", "cli.doctor", "cli.doctor_view", ""),
        *("planner.hierarchy", "planner.load", "planner.placement", "monitor.top", "monitor.top_view"),
    },
    "shm": {"shm.arena"},
    "report": set(),
    "round": set(),
    "workers": set(),
    "monitor": set(),
    "node": set(),
    "superlink.http": set(),
    "superlink.store": set(),
    "superlink.rounds": set(),
    "bench.fleet": set(),
    "deploy": set(),
    "cli": set(),
    # the public names ("" is the package itself)
    "": {
        "round.admission",
        "errors",
        "round.loan",
        "report.report",
        "planner.shape",
        "report.result",
        "round.round",
        "node.node",
        "tensor",
    },
    "bench": set(),
    "strategy": {"strategy.fedavg", "strategy.optimizers"},
}
"""room -> rooms that it may import."""

PURE = {
    "tensor": {"attrs", "collections", "functools", "numpy", "struct", "torch", "typing"},
    "fold": {"attrs", "collections", "fractions", "math", "numpy", "typing"},
    "round.admission": {"attrs", "collections", "math", "numbers", "numpy", "typing"},
    "round.clip": {"collections", "math", "numpy", "typing"},
    "strategy.npy": {"attrs", "io", "numpy", "re", "typing"},
    "shm.control_block": {"attrs", "collections", "struct", "typing"},
    "strategy.extent": {"attrs", "collections", "json", "re"},
    "superlink.http.body": {"attrs", "collections"},
    "superlink.http.rates": set(),
    "superlink.http.relief": {"collections", "typing"},
    "superlink.rounds.chunk_map": {"attrs", "collections", "io", "numpy"},
    "superlink.rounds.model_objects": {"attrs", "collections", "hashlib", "json", "typing"},
    "round.pacing": {"collections", "math"},
    "report.report": {"attrs", "typing"},
    "monitor.stats": {"attrs", "collections", "typing"},
    "round.tally": {"attrs", "collections"},
    "report.scene": {"attrs", "collections", "math", "typing"},
    "errors": set(),
    "planner.load": {"attrs", "math"},
    "planner.shape": {"attrs"},
    "planner.placement": {"attrs", "bisect", "collections", "enum", "heapq"},
    "planner.hierarchy": {"attrs", "collections", "enum", "itertools", "typing"},
    "planner.drawing": {"attrs", "collections", "html", "typing"},
    "planner.reuse": {"attrs", "collections"},
    "planner.plan": {"attrs", "collections", "enum", "typing"},
    "planner.engine": {"collections", "heapq", "math", "typing"},
    "planner.site": {"attrs", "collections", "functools"},
    "planner.aggregation": {"attrs", "collections", "functools"},
    "planner.costs": {"attrs", "collections", "itertools", "math", "typing"},
    "planner.choose": {"attrs", "collections"},
    "planner.traces": {"attrs", "collections", "itertools", "math", "random"},
    "planner.simulate": {"attrs", "collections", "functools", "math"},
}
"""room without a clock, file, process or global -> all that it may import from elsewhere."""

# Name of a library -> the rooms, by prefix, that may import it.
OWNERS = {
    "flwr": ("bench.fleet.", "strategy.", "superlink."),
    "ray": ("cluster.",),
    "_shm_ffi": ("shm.arena",),
    "multiprocess": ("workers.spawner",),
    "bcc": ("ebpf.",),
    "prometheus_client": ("monitor.prometheus",),
}


def room_of(path: Path) -> str:
    """lifl/strategy/fedavg.py is the room strategy.fedavg."""
    parts = path.relative_to(ROOT / "lifl").with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def sources() -> dict[str, Path]:
    """Every room and its file; not the apps that the demo and a benchmark run, which are users' programs."""
    files = sorted((ROOT / "lifl").rglob("*.py"))
    return {room_of(path): path for path in files if not APPS & set(path.parts)}


def is_for_types(node: ast.AST) -> bool:
    """True for ``if TYPE_CHECKING:``, whose imports never run."""
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def imported(node: ast.AST) -> Iterator[str]:
    """Every module or name that is imported below a node, functions included."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"line {child.lineno}: relative import"
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        elif is_for_types(child):
            assert isinstance(child, ast.If)
            yield from imported(ast.Module(child.orelse, []))
        else:
            yield from imported(child)


def arrows() -> dict[str, tuple[set[str], set[str]]]:
    """room -> the rooms that it imports, and the outer packages."""
    rooms, found = sources(), {}
    for room, path in rooms.items():
        inner, outer = set(), set()
        for name in imported(ast.parse(path.read_text())):
            top, _, rest = name.partition(".")
            if top != "lifl":
                outer.add(top)
                continue
            # `lifl.shm.Arena` is the room `shm`, `lifl.fold` is `fold`, `lifl.__version__` the package.
            parts = rest.split(".")
            while parts and ".".join(parts) not in rooms and parts != ["_shm_ffi"]:
                parts.pop()
            inner.add(".".join(parts))
        found[room] = (inner, outer - {"__future__"})
    return found


ARROWS = arrows()


def test_every_room_is_known() -> None:
    """A new module is named in the table, and the table names no module that is gone."""
    assert set(ARROWS) == set(ALLOWED), f"write a paragraph in {PAGE} about the new room, then list it in ALLOWED"


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_no_arrow_is_new(room: str) -> None:
    """A room imports what the table says, no more and no less."""
    inner = ARROWS[room][0]
    assert not inner - ALLOWED[room], (
        f"{room or 'lifl'} -> {sorted(inner - ALLOWED[room])} is a new arrow: first write a paragraph in {PAGE} "
        "that says why, then list it in ALLOWED"
    )
    assert not ALLOWED[room] - inner, (
        f"{room or 'lifl'} -> {sorted(ALLOWED[room] - inner)} is gone: take it off ALLOWED"
    )


def test_there_is_no_cycle() -> None:
    """No room can reach itself; the package's own names are not a way through it."""
    done: set[str] = set()

    def visit(room: str, way: tuple[str, ...]) -> None:
        assert room not in way, " -> ".join([*way[way.index(room) :], room])
        if room not in done:
            for target in sorted(ARROWS.get(room, (set(), set()))[0] - {""}):
                visit(target, (*way, room))
            done.add(room)

    for room in ARROWS:
        visit(room, ())


@pytest.mark.parametrize("library", OWNERS)
def test_library_is_imported_only_by_its_owner(library: str) -> None:
    """Flower only in the strategies and the SuperLink, cffi's module only in shm, multiprocess in the spawner."""
    importers = {room for room, (inner, outer) in ARROWS.items() if library in inner | outer}
    assert {room for room in importers if not room.startswith(OWNERS[library])} == set()


@pytest.mark.parametrize("room", PURE)
def test_pure_room_touches_nothing(room: str) -> None:
    """The arithmetic and the rules import no clock, file, process, thread or socket."""
    assert ARROWS[room][1] <= PURE[room]


@pytest.mark.parametrize("room", ["fold", "round.admission", "round.clip", "tensor", "strategy.npy"])
def test_pure_room_has_no_global_state(room: str) -> None:
    """Nor do they write to a global."""
    tree = ast.parse(sources()[room].read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, (ast.Global, ast.Nonlocal))]


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("room", sorted(sources()))
def test_python_file_is_small(room: str) -> None:
    """A Python file has at most 600 lines."""
    lines = len(sources()[room].read_text().splitlines())
    assert lines <= 600, "split it by noun"


@pytest.mark.parametrize("path", sorted((ROOT / "lifl").glob("_*.[ch]")), ids=lambda path: path.name)
def test_c_file_is_small(path: Path) -> None:
    """A C file has at most 1,200 lines. The build's own output is not one of them."""
    if path.name != "_shm_ffi.c":
        assert len(path.read_text().splitlines()) <= 1200


def test_both_ends_of_an_ordering_are_labelled() -> None:
    """Each ``SYNC: <label>`` in the C core occurs at least twice: an ordering has two ends."""
    labels = re.findall(r"SYNC: ([a-z-]+)", (ROOT / "lifl" / "_shm.c").read_text())
    assert labels
    assert not {label for label in labels if labels.count(label) < 2}


def test_every_atomic_names_its_order() -> None:
    """No atomic is accessed with the default order, and nothing is volatile."""
    code = re.sub(r"/\*.*?\*/", "", (ROOT / "lifl" / "_shm.c").read_text(), flags=re.DOTALL)
    assert not re.findall(r"atomic_(?:load|store|exchange|fetch_\w+|compare_exchange_(?:weak|strong))\s*\(", code)
    assert not re.findall(r"(?<!__)\bvolatile\b", code)


def test_no_tracked_file_names_a_package_index() -> None:
    """Where packages come from is the business of the machine that installs them."""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    # Put together here, or this file would name them.
    hosts = [".".join(parts) for parts in (("pypi", "org"), ("pythonhosted", "org"), ("download", "pytorch", "org"))]
    hosts += ["-".join(("index", "url")), "-".join(("pypi", "more")), ".".join(("anaconda", "org"))]
    naming = []
    for name in filter(None, tracked.stdout.decode().split("\0")):
        path = ROOT / name
        if path.is_file() and not path.is_symlink():
            text = path.read_bytes().decode(errors="replace")
            naming += [f"{name}: {host}" for host in hosts if host in text]
    assert not naming
