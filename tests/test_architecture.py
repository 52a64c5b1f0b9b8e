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

EVERYBODY = {"errors", "tensor"}
"""Any package may import these."""

ALLOWED: dict[str, set[str]] = {
    # what everybody stands on
    "errors": set(),
    "tensor": set(),
    "ipc": set(),
    "_shm_build": set(),
    "shm": {"_shm_ffi"},
    "fold": {"shm"},
    # one Node
    "planner": set(),
    "report": set(),
    "round": {"fold", "planner", "report", "shm"},
    "ebpf": {"shm"},
    "workers": {"ebpf", "fold", "shm"},
    "monitor": {"ipc"},
    "node": {"monitor", "planner", "report", "round", "shm", "workers"},
    "": {"node", "planner", "report", "round"},
    # Flower
    "strategy": {"ipc", "node", "report", "round", "shm"},
    "superlink": {"", "ipc", "monitor", "node", "report", "round", "shm", "strategy"},
    # programs
    "deploy": set(),
    "bench": {"deploy", "ebpf", "fold", "node", "planner", "report", "round", "shm", "strategy", "workers"},
    "cli": {"", "bench", "deploy", "ebpf", "monitor", "node", "planner", "shm", "superlink", "workers"},
}
"""package, or file beside them -> packages and files that it may import, also only for a type."""

MAX_PACKAGES, MAX_FILES, MAX_ARROWS = 14, 8, 45

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
    "superlink.rounds.model_objects": {"attrs", "collections", "hashlib", "json", "typing"},
    "round.pacing": {"collections"},
    "report.report": {"attrs", "matplotlib", "os", "typing"},  # the last three for types
    "monitor.stats": {"attrs", "collections", "typing"},
    "report.scene": {"attrs", "collections", "math", "typing"},
    "report.shapes": {"attrs", "collections", "itertools", "typing"},
    "errors": set(),
    "planner.load": {"attrs", "math"},
    "planner.shape": {"attrs"},
    "planner.placement": {"attrs", "bisect", "collections", "enum", "heapq"},
    "planner.hierarchy": {"attrs", "collections", "enum", "itertools", "typing"},
    "planner.drawing": {"attrs", "collections", "html", "typing"},
    "planner.reuse": {"attrs", "collections"},
    "planner.plan": {"attrs", "collections", "typing"},
    "planner.timing": {"math", "typing"},
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
    "platformdirs": ("node.calibration",),
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


def imported(node: ast.AST) -> Iterator[str]:
    """Every module or name that is imported below a node, in functions and only for types too."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"line {child.lineno}: relative import"
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
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


def package_of(room: str) -> str:
    """The first part of a room's name: strategy.fedavg is in strategy."""
    return room.partition(".")[0]


def package_arrows() -> dict[str, set[str]]:
    """package -> the packages that it imports."""
    found: dict[str, set[str]] = {package_of(room): set() for room in ARROWS}
    for room, (inner, _) in ARROWS.items():
        found[package_of(room)] |= {package_of(target) for target in inner} - {package_of(room)}
    return found


PACKAGES = package_arrows()


def test_every_package_is_known() -> None:
    """A new package is named in the table, and the table names none that is gone."""
    assert set(PACKAGES) == set(ALLOWED), f"write a paragraph in {PAGE} about the new package, then list it in ALLOWED"


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_no_arrow_is_new(package: str) -> None:
    """A package imports what the table says, no more and no less."""
    found = PACKAGES[package] - EVERYBODY
    assert not found - ALLOWED[package], (
        f"{package or 'lifl'} -> {sorted(found - ALLOWED[package])} is a new arrow: first write a paragraph in {PAGE} "
        "that says why, then list it in ALLOWED"
    )
    assert not ALLOWED[package] - found, (
        f"{package or 'lifl'} -> {sorted(ALLOWED[package] - found)} is gone: take it off ALLOWED"
    )


def drawn() -> str:
    """The packages and files on their floors, the highest first, each with what it imports."""
    shown = {name: targets for name, targets in ALLOWED.items() if name and not name.startswith("_")}

    def floor(name: str) -> int:
        return 1 + max((floor(target) for target in shown[name] if target in shown), default=0)

    lines = []
    for name in sorted(shown, key=lambda name: (-floor(name), name)):
        targets = " ".join(sorted(target for target in shown[name] if target in shown))
        lines.append(f"{floor(name)}  {name:10}  {targets}".rstrip())
    return "\n".join(lines)


def test_the_page_shows_the_arrows() -> None:
    """As the table has them."""
    text = (ROOT / PAGE).read_text()
    said = text.partition("<!-- arrows -->\n```\n")[2].partition("\n```\n<!-- arrows end -->")[0]
    assert said == drawn(), f"put this between the marks in {PAGE}:\n{drawn()}"


def test_the_house_is_small() -> None:
    """Few packages, few files beside them, few arrows from package to package."""
    folders = {package for package in PACKAGES if (ROOT / "lifl" / package / "__init__.py").exists() and package}
    files = sorted(path.name for path in (ROOT / "lifl").glob("*.py"))
    count = sum(len(PACKAGES[package] & folders) for package in folders)
    print(f"{len(folders)} packages, {len(files)} files beside them, {count} arrows")
    for package in sorted(folders):
        print(f"  {package} -> {', '.join(sorted(PACKAGES[package] & folders)) or 'nothing'}")
    assert len(folders) <= MAX_PACKAGES
    assert len(files) <= MAX_FILES
    assert count <= MAX_ARROWS


def circle(arrows: dict[str, set[str]]) -> str | None:
    """A way from a room to itself, if there is one."""
    done: set[str] = set()

    def visit(room: str, way: tuple[str, ...]) -> str | None:
        if room in way:
            return " -> ".join([*way[way.index(room) :], room])
        if room not in done:
            for target in sorted(arrows.get(room, set()) - {""}):
                if (found := visit(target, (*way, room))) is not None:
                    return found
            done.add(room)
        return None

    return next((found for room in arrows if (found := visit(room, ())) is not None), None)


def test_there_is_no_circle() -> None:
    """No room and no package can reach itself; the package's own names are not a way through it."""
    assert circle({room: inner for room, (inner, _) in ARROWS.items()}) is None
    assert circle({package: PACKAGES[package] - {package} for package in PACKAGES}) is None


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


def test_the_c_core_never_ends_the_process() -> None:
    """A function of the C core that fails returns a status: the process belongs to the user."""
    for path in sorted((ROOT / "lifl").glob("_*.c")):
        if path.name != "_shm_ffi.c":  # made by the build
            code = re.sub(r"/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)
            assert not re.findall(r"\b(?:abort|assert|_?exit)\s*\(", code), path.name


def test_no_tracked_file_names_a_package_index() -> None:
    """The machine that installs the packages decides from where they come."""
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
