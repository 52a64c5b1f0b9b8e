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
    "metrics": {"picture", "plot"},
    "scene": set(),
    "picture": {"plot", "scene"},
    "plot": {"scene"},
    "_shm_build": set(),
    "shm": {"_shm_ffi", "errors"},
    # the parts of a round
    "npy": {"tensor"},
    "admission": {"errors", "tensor"},
    "ring": {"shm"},
    "kernels": {"shm"},
    "sizes": {"shm", "tensor"},
    "fold": {"kernels", "tensor"},
    "checkpoint": {"errors"},
    "clip": {"admission", "errors", "tensor"},
    "intake": {"admission", "kernels", "loan", "tensor"},
    "host": {"errors", "ring", "shm"},
    "order": {"tensor"},
    "pace": {"planner.load", "planner.shape", "terms"},
    "loan": {"kernels", "shm", "tensor"},
    "tally": set(),
    "books": {"metrics", "shm", "tally"},
    "result": {"metrics", "tensor"},
    "roster": set(),
    "terms": {"admission", "clip", "intake", "order", "planner.shape", "shm", "tensor"},
    "recovery": {"books", "shm"},
    "assignment": {
        *("books", "errors", "host", "order", "planner.hierarchy", "planner.shape", "recovery", "ring", "shm", "sizes"),
        *("tensor", "terms"),
    },
    "finish": {"assignment", "books", "fold", "host", "order", "ring", "shm"},
    "course": {
        *("assignment", "books", "errors", "finish", "host", "metrics", "pace", "result", "ring", "roster", "shm"),
        "terms",
    },
    "quota": {"admission", "assignment", "errors", "host", "roster", "shm", "sizes"},
    "round": {
        *("admission", "assignment", "books", "course", "errors", "host", "intake", "loan", "metrics", "pace", "quota"),
        *("result", "roster", "shm", "terms"),
    },
    # the planner
    "gauge": {"admission", "intake", "kernels", "loan", "shm", "tensor"},
    "calibration": {"errors", "gauge", "nursery", "planner.costs", "ring", "shm"},
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
    "ebpf.links": {"ebpf.record", "errors", "ring", "shm"},
    "ebpf.sidecar": {
        *("ebpf.links", "ebpf.pairs", "ebpf.probe", "ebpf.record", "errors", "ring", "shm"),
    },
    # the processes
    "transport": {"ebpf.sidecar", "errors", "ring", "shm"},
    "aggregator": {"ebpf.links", "errors", "fold", "order", "ring", "shm", "tensor"},
    "nursery": {"aggregator", "ebpf.links", "errors"},
    "crew": {"errors", "nursery"},
    "pool": {"crew", "errors"},
    "staff": {"aggregator", "crew", "ring", "shm", "traffic", "transport"},
    "agent": {"crew", "errors", "ring", "traffic"},
    "traffic": {"shm"},
    "forecast": {
        *("metrics", "pace", "planner.choose", "planner.costs", "planner.load", "planner.shape", "terms"),
        "traffic",
    },
    "stats": set(),
    "forks": set(),
    "heap": set(),
    "beacon": {"errors", "forks", "wire"},
    "exporter": {"errors", "forks", "stats"},
    "watch": {"beacon", "errors", "exporter", "ring", "stats"},
    "runtime": {
        *("admission", "agent", "assignment", "calibration", "errors", "forecast", "planner.shape"),
        *("pool", "ring", "round", "shm", "sizes", "staff", "stats", "tally", "tensor", "terms", "transport", "watch"),
    },
    "embedded": {"calibration", "errors", "runtime", "shm", "sizes", "tensor", "terms"},
    # Flower
    "strategy.extent": set(),
    "strategy.pulling": {"errors", "strategy.extent"},
    "strategy.exchange": {"heap", "strategy.pulling"},
    "strategy.landing": {
        *("admission", "embedded", "errors", "metrics", "npy", "result", "round", "runtime", "tensor", "terms"),
        *("strategy.reading", "strategy.served"),
    },
    "strategy.reading": {"errors", "tensor"},
    "strategy.served": {
        *("admission", "errors", "heap", "metrics", "result", "shm", "strategy.exchange", "tensor", "terms", "wire"),
    },
    "strategy.journal": {"checkpoint", "errors", "metrics"},
    "strategy.averaging": {"admission", "errors", "metrics", "strategy.landing"},
    "strategy.fedavg": {
        *("admission", "errors", "metrics", "runtime", "strategy.averaging", "strategy.exchange", "strategy.landing"),
        *("strategy.journal", "strategy.options", "strategy.scalars", "strategy.served", "tensor", "terms"),
    },
    "strategy.options": {"admission", "runtime", "strategy.scalars", "terms"},
    "strategy.scalars": {"metrics", "strategy.landing"},
    "strategy.on_the_mean": {"strategy.fedavg", "strategy.options"},
    "strategy.reference": {"npy", "tensor"},
    # the SuperLink from the outside
    "superlink": set(),
    "superlink.caller": {"errors"},
    "superlink.prebuilt": {"strategy.reference", "tensor"},
    "superlink.virtual_node": {"errors", "superlink.caller", "superlink.prebuilt"},
    "superlink.fleet": {"errors", "superlink.caller", "superlink.prebuilt", "superlink.virtual_node"},
    # the server
    "wire": set(),
    "superlink.flower": set(),
    "superlink.body": set(),
    "superlink.geometry": {"tensor"},
    "superlink.derived": {"superlink.geometry"},
    "superlink.content": {"shm", "superlink.flower"},
    "superlink.targets": {"shm", "superlink.content"},
    "superlink.upload": {"superlink.body", "superlink.content", "superlink.targets"},
    "superlink.store": {"superlink.content", "superlink.flower"},
    "superlink.holding": set(),
    "superlink.signatures": set(),
    "superlink.checks": {"superlink.flower"},
    "superlink.allowance": set(),
    "superlink.rates": set(),
    "superlink.relief": {"superlink.rates"},
    "superlink.turns": {"superlink.allowance", "superlink.flower"},
    "superlink.desk": {"superlink.allowance"},
    "superlink.protocol": {
        *("superlink.allowance", "superlink.desk", "superlink.flower", "superlink.rates", "superlink.turns"),
    },
    "superlink.exchanges": {
        *("superlink.allowance", "superlink.body"),
        *("superlink.checks", "superlink.flower", "superlink.holding", "superlink.protocol"),
        *("superlink.store", "superlink.targets", "superlink.upload"),
    },
    "superlink.gateway": {
        "superlink.allowance",
        *("superlink.checks", "superlink.content", "superlink.exchanges", "superlink.flower", "superlink.holding"),
        *("shm", "superlink.protocol", "superlink.store", "superlink.targets", "superlink.upload"),
    },
    "superlink.reception": {
        *("errors", "loan", "metrics", "round", "strategy.reading", "superlink.content", "superlink.geometry"),
        *("superlink.reply", "superlink.store"),
    },
    "superlink.reply": {
        *("admission", "errors", "npy", "strategy.reading", "superlink.body", "superlink.content"),
        *("superlink.flower", "superlink.geometry", "superlink.store"),
    },
    "superlink.announcements": {"superlink.flower", "superlink.store"},
    "superlink.awaited": {"superlink.reception"},
    "superlink.served_round": {"round", "superlink.geometry", "superlink.reception"},
    "superlink.rounds": {
        *("admission", "errors", "metrics", "runtime", "superlink.awaited", "superlink.comings", "superlink.content"),
        "superlink.derived",
        *("superlink.flower", "superlink.geometry", "superlink.holding", "superlink.offering", "superlink.reception"),
        *("superlink.served_round", "superlink.store", "tensor", "terms"),
    },
    "superlink.comings": {"superlink.holding"},
    "superlink.offering": {"superlink.content", "superlink.derived", "superlink.geometry", "superlink.store"},
    "superlink.agency": {
        *("admission", "errors", "superlink.flower", "superlink.reception", "superlink.rounds"),
        *("superlink.served_round", "tensor", "wire"),
    },
    "superlink.resumption": {"superlink.flower", "superlink.store"},
    "superlink.plane": {
        *("superlink.announcements", "superlink.rates", "superlink.relief", "superlink.resumption"),
        *("runtime", "stats", "superlink.agency", "superlink.checks", "superlink.flower", "superlink.gateway"),
        *("superlink.holding", "superlink.protocol", "superlink.rounds", "superlink.signatures", "superlink.store"),
        "wire",
    },
    "superlink.sampler": set(),
    "superlink.command": {
        *("", "errors", "runtime", "shm", "sizes", "superlink.flower", "superlink.plane", "superlink.sampler"),
    },
    "superlink.__main__": {"superlink.command"},
    # programs
    "_janitor": set(),
    "programs": {"_janitor"},
    "deployment": {"programs"},
    "demo": {"deployment"},
    "bench.shapes": {"tensor"},
    "bench.echo": {"aggregator"},
    "bench.sockets": {"bench.echo", "ebpf.links", "ebpf.sidecar", "ring", "shm"},
    "bench.pair": {"aggregator", "bench.echo", "bench.sockets", "errors", "ring", "shm"},
    "bench.handoff": {"bench.pair", "ebpf.probe", "runtime"},
    "bench.limits": {
        *("bench.handoff", "bench.pair", "calibration", "errors", "kernels", "nursery", "ring", "runtime", "shm"),
        "tensor",
    },
    "bench.fold": {
        *("bench.limits", "bench.shapes", "fold", "planner.shape", "runtime", "sizes", "strategy.reference", "tensor"),
    },
    "bench.idle": {"errors", "runtime", "tensor", "transport"},
    "bench.roles": {"bench.limits", "metrics", "planner.shape", "runtime", "tensor"},
    "bench.trickle": {
        *("bench.idle", "bench.limits", "bench.shapes", "errors", "fold", "metrics", "runtime", "shm", "sizes"),
        *("tensor", "terms"),
    },
    "bench.recovery": {"bench.shapes", "crew", "errors", "planner.shape", "round", "runtime", "shm", "sizes", "tensor"},
    "bench.planning": {
        *("planner.drawing", "planner.hierarchy", "planner.load", "planner.placement", "planner.plan"),
    },
    "bench.usage": set(),
    "bench.cluster": {
        *("bench.usage", "errors", "kernels", "planner.shape", "planner.simulate", "planner.traces", "result", "round"),
        *("runtime", "sizes", "tensor", "terms"),
    },
    "bench.ablation": {
        *("bench.cluster", "bench.shapes", "bench.usage", "calibration", "errors", "fold", "planner.costs"),
        *("planner.simulate", "planner.traces", "runtime", "tensor"),
    },
    "bench.ablation_view": set(),
    "bench.tree": set(),
    "bench.work": {"bench.shapes", "bench.tree", "errors", "fold", "tensor", "terms"},
    "bench.load": {"bench.shapes", "bench.work", "superlink.fleet", "superlink.prebuilt", "superlink.virtual_node"},
    "bench.peer": {"bench.shapes", "bench.tree", "bench.work", "programs"},
    "bench.peer_job": {"bench.shapes", "bench.tree", "bench.work"},
    "bench.round": {
        *("bench.load", "bench.peer", "bench.shapes", "bench.tree", "bench.work", "calibration", "deployment"),
        *("errors", "sizes", "tensor", "terms"),
    },
    "bench.round_view": {"bench.ablation_view"},
    "top": {"beacon", "errors", "stats", "wire"},
    "top_view": {"stats", "top"},
    "console": {"errors"},
    "bench.commands": {
        *("bench.ablation", "bench.ablation_view"),
        *("bench.fold", "bench.handoff", "bench.idle", "bench.limits", "bench.planning", "bench.recovery"),
        *("bench.roles", "bench.round", "bench.round_view", "bench.trickle", "console"),
    },
    "pages": set(),
    "doctor": {
        *("", "calibration", "ebpf.compiled", "ebpf.probe", "errors", "kernels", "pages", "runtime", "shm", "sizes"),
        *("superlink.command", "superlink.flower", "transport"),
    },
    "doctor_view": set(),
    "cli": {
        *("bench.commands", "bench.planning", "console", "demo", "doctor", "doctor_view", ""),
        *("planner.hierarchy", "planner.load", "planner.placement", "top", "top_view"),
    },
    # the public names ("" is the package itself)
    "": {"admission", "errors", "loan", "metrics", "planner.shape", "result", "round", "runtime", "tensor"},
    "bench": set(),
    "strategy": {"strategy.fedavg", "strategy.on_the_mean"},
}
"""room -> rooms that it may import."""

PURE = {
    "tensor": {"attrs", "collections", "functools", "numpy", "struct", "torch", "typing"},
    "fold": {"attrs", "collections", "fractions", "math", "numpy", "typing"},
    "admission": {"attrs", "collections", "math", "numbers", "numpy", "typing"},
    "clip": {"collections", "math", "numpy", "typing"},
    "npy": {"attrs", "io", "numpy", "re", "typing"},
    "order": {"attrs", "collections", "struct", "typing"},
    "strategy.extent": {"attrs", "collections", "json", "re"},
    "superlink.body": {"attrs", "collections"},
    "superlink.rates": set(),
    "superlink.relief": {"collections", "typing"},
    "superlink.geometry": {"attrs", "collections", "io", "numpy"},
    "superlink.derived": {"attrs", "collections", "hashlib", "json", "typing"},
    "pace": {"collections", "math"},
    "metrics": {"attrs", "typing"},
    "stats": {"attrs", "collections", "typing"},
    "tally": {"attrs", "collections"},
    "scene": {"attrs", "collections", "math", "typing"},
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
    "flwr": ("strategy.", "superlink."),
    "ray": ("cluster.",),
    "_shm_ffi": ("shm",),
    "multiprocess": ("nursery",),
    "bcc": ("ebpf.",),
    "prometheus_client": ("exporter",),
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
    """Flower only in the strategies and the SuperLink, cffi's module only in shm, multiprocess in the nursery."""
    importers = {room for room, (inner, outer) in ARROWS.items() if library in inner | outer}
    assert {room for room in importers if not room.startswith(OWNERS[library])} == set()


@pytest.mark.parametrize("room", PURE)
def test_pure_room_touches_nothing(room: str) -> None:
    """The arithmetic and the rules import no clock, file, process, thread or socket."""
    assert ARROWS[room][1] <= PURE[room]


@pytest.mark.parametrize("room", ["fold", "admission", "clip", "tensor", "npy"])
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
