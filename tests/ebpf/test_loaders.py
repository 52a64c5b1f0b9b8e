"""The two loaders of one source: a record's bytes, the bytecode that ships, and the program that bcc compiles."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

import lifl
from lifl.ebpf import build, compiled, probe
from lifl.ebpf import record as record_module
from lifl.ebpf.record import METRICS_BYTES, RECORD_BYTES, Metrics, Record
from lifl.ebpf.sidecar import Sidecar
from lifl.errors import EbpfUnavailableError
from lifl.shm.arena import AGENT, Arena
from lifl.shm.ring import Descriptor, Kind

HEADER = build.HERE / "record.h"
LOADERS = ["prebuilt", "bcc"]
GiveUp = Callable[[str], NoReturn]


@pytest.fixture(params=LOADERS)
def loader(request: pytest.FixtureRequest, kernel: None) -> str:
    """Each of them."""
    if request.param == "bcc":
        request.getfixturevalue("bcc")
    return str(request.param)


# ---------------------------------------------------------------- record.h and record.py


@pytest.fixture(scope="module")
def in_c(tmp_path_factory: pytest.TempPathFactory, give_up: GiveUp) -> dict[str, Any]:
    """The sizes, offsets and numbers of record.h, from a C compiler."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        give_up("there is no C compiler: install gcc")
    fields = [f'  FIELD("record", struct lifl_record, {name})' for name in Record._fields]
    fields += [f'  FIELD("metrics", struct lifl_metrics, {name})' for name in Metrics._fields]
    numbers = re.findall(r"#define (LIFL_\w+) \S", HEADER.read_text())
    fields += [f'  printf("\\"{name}\\": %llu, ", (unsigned long long){name});' for name in numbers]
    folder = tmp_path_factory.mktemp("record")
    (folder / "record.c").write_text(
        "#include <linux/types.h>\n#include <stddef.h>\n#include <stdio.h>\n"
        f'#include "{HEADER}"\n'
        "#define FIELD(of, type, name) "
        'printf("\\"%s.%s\\": [%zu, %zu], ", of, #name, offsetof(type, name), sizeof(((type *)0)->name));\n'
        "int main(void) {\n"
        '  printf("{");\n' + "\n".join(fields) + "\n"
        '  printf("\\"record\\": %zu, \\"metrics\\": %zu}", sizeof(struct lifl_record), sizeof(struct lifl_metrics));\n'
        "}\n"
    )
    subprocess.run([compiler, "-Wall", "-Werror", "-o", str(folder / "record"), str(folder / "record.c")], check=True)
    said: dict[str, Any] = json.loads(subprocess.run([folder / "record"], capture_output=True, check=True).stdout)
    return said


def test_a_record_is_the_same_bytes_in_c(in_c: dict[str, Any]) -> None:
    """Every field is where record.h has it, as wide as there; all of them together are the whole record."""
    assert in_c["record"] == in_c["LIFL_RECORD_BYTES"] == RECORD_BYTES == 32
    nothing = Record(*(0,) * len(Record._fields))
    covered = bytearray(RECORD_BYTES)
    for name in Record._fields:
        at, size = in_c[f"record.{name}"]
        packed = nothing._replace(**{name: 2 ** (8 * size) - 1}).pack()
        assert packed == bytes(at) + b"\xff" * size + bytes(RECORD_BYTES - at - size)
        covered = bytearray(a | b for a, b in zip(covered, packed, strict=True))
        assert getattr(Record.unpack(packed)[0], name) == 2 ** (8 * size) - 1
    assert covered == b"\xff" * RECORD_BYTES


def test_metrics_are_the_same_bytes_in_c(in_c: dict[str, Any]) -> None:
    """Every counter is read from where the program writes it."""
    assert in_c["metrics"] == METRICS_BYTES
    data = bytearray(METRICS_BYTES)
    for i, name in enumerate(Metrics._fields, 1):
        at, size = in_c[f"metrics.{name}"]
        data[at : at + size] = i.to_bytes(size, "little")
    assert Metrics.merged(data) == Metrics(*range(1, 1 + len(Metrics._fields)))


def test_numbers_are_the_same_in_c(in_c: dict[str, Any]) -> None:
    """The launcher's key, the sizes of the tables, and the kinds that the program knows."""
    for name in ("LAUNCHER", "MAX_SOCKETS", "MAX_ROUTES"):
        assert in_c[f"LIFL_{name}"] == getattr(record_module, name)
    kinds = {name.removeprefix("LIFL_KIND_"): number for name, number in in_c.items() if name.startswith("LIFL_KIND_")}
    assert kinds == {name: Kind[name] for name in ("UPDATE", "FOLDED")}


# ---------------------------------------------------------------- the bytecode


def test_bytecode_is_what_the_source_makes(clang: str, give_up: GiveUp, capsys: pytest.CaptureFixture[str]) -> None:
    """The same clang makes the same instructions again; another one's are not compared."""
    shipped = json.loads(build.BYTECODE.read_text())
    made = build.compiled(clang)
    if made["compiler"] != shipped["compiler"]:
        give_up(f"the bytecode was made by {shipped['compiler']}, this is {made['compiler']}: install that one")
    assert made == shipped
    assert build.main(["--check"]) == 0
    assert "prebuilt.json is what lifl.bpf.c makes" in capsys.readouterr().out


def test_bytecode_of_another_source_is_noticed(
    clang: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A change of the program without one of the bytecode is an error; building the bytecode again mends it."""
    monkeypatch.setattr(build, "BYTECODE", tmp_path / "prebuilt.json")
    changed = json.loads((build.HERE / "prebuilt.json").read_text())
    changed["instructions"] = changed["instructions"].replace("20", "21", 1)
    (tmp_path / "prebuilt.json").write_text(json.dumps(changed, indent=1) + "\n")
    assert build.main(["--check"]) == 1
    assert "is not what lifl.bpf.c makes" in capsys.readouterr().out
    assert build.main([]) == 0
    assert build.main(["--check"]) == 0


def test_bytecode_and_source_are_in_the_package() -> None:
    """The files that both loaders read are in an installed lifl."""
    for name in ("lifl.bpf.c", "record.h", "prebuilt.json"):
        assert (Path(lifl.__file__).parent / "ebpf" / name).is_file()


# ---------------------------------------------------------------- both loaders


def test_both_loaders_route_and_count_alike(arena: Arena, loader: str) -> None:
    """The same traffic reaches the same participants and makes the same figures."""
    sidecar = Sidecar(arena, loader)
    assert sidecar.loader == loader
    outboxes = {me: sidecar.outbox(me) for me in range(3)}
    inboxes = {me: sidecar.inbox(me) for me in range(3)}
    sidecar.route_top(1, 2)
    for me, outbox in outboxes.items():
        outbox.spent.ns = 1000 * me
        for target in range(3):
            outbox.push(target, Descriptor(Kind.UPDATE, me))
        outbox.push(1, Descriptor(Kind.SUM, 1, arg=me))
        outbox.push(AGENT, Descriptor(Kind.FOLDED, 1))
        outbox.push(1, Descriptor(Kind.SUM, 9))  # a top that there is not
    got = {me: [(source, d.kind) for source, d in iter(inbox.try_pop, None)] for me, inbox in inboxes.items()}
    update, folded, total = Kind.UPDATE, Kind.FOLDED, Kind.SUM
    assert got == {
        AGENT: [pair for me in range(3) for pair in ((me, update), (me, folded))],
        1: [(me, update) for me in range(3)],
        2: [pair for me in range(3) for pair in ((me, update), (me, total))],
    }
    metrics = {me: counted._replace(first_ns=0, last_ns=0) for me, counted in sidecar.metrics().items()}
    # The agent sends what workers sent to nobody on to nobody, once: 3 and 2 more.
    assert metrics == {
        AGENT: Metrics(6, 6 * 32, 3, 0, 0, 1, 0, 5),
        1: Metrics(3, 3 * 32, 3, 0, 0, 1, 1_000, 0),
        2: Metrics(6, 6 * 32, 3, 0, 0, 1, 2_000, 0),
    }
    sidecar.close()


def test_a_node_works_with_either(loader: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole round, with the loader that the environment names."""
    monkeypatch.setenv(probe.VARIABLE, loader)
    update = {"w": np.ones(1000, np.float32)}
    with lifl.Node("16MiB", workers=2, transport="ebpf") as node:
        assert node.transport.loader == loader
        with node.open_round(lifl.TensorSpec.from_arrays(update), expected=4, shape=lifl.Shape(2, 0)) as round_:
            for k in range(4):
                round_.submit({"w": update["w"] * k}, client_id=k)
            assert (round_.result(60).arrays["w"] == 1.5).all()
        assert sum(node.transport.metrics()[me].updates for me in (1, 2)) == 4


def test_a_loader_leaves_no_descriptor(arena: Arena, loader: str) -> None:
    """Neither one that is closed, nor one after another."""
    Sidecar(arena, loader).close()
    before = os.listdir("/proc/self/fd")
    for _ in range(3):
        Sidecar(arena, loader).close()
    assert os.listdir("/proc/self/fd") == before


def test_an_unknown_loader_is_refused(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message lists what there is."""
    monkeypatch.setenv(probe.VARIABLE, "llvm")
    with pytest.raises(ValueError, match="LIFL_EBPF_LOADER='llvm': give one of prebuilt, bcc"):
        Sidecar(arena)


# ---------------------------------------------------------------- bcc missing, or another project of that name


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder on the path in which there may be another bcc; nothing of bcc has been imported yet."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "bcc"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


OTHERS = {
    "another project": ("class Lattice: pass\n", "another project of that name"),
    "of another Python": ("print 'body-centred cubic'\n", "cannot be imported .*print"),
    "missing what it needs": ("import lifl_has_no_such_module\n", ""),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_bcc_is_told_with_the_remedy(
    name: str, elsewhere: Path, arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error says what was found if the distribution has no bcc, and what to install."""
    text, said = OTHERS[name]
    (elsewhere / "bcc.py").write_text(text)
    monkeypatch.setattr(compiled, "DISTRIBUTION", elsewhere / "none")
    with pytest.raises(EbpfUnavailableError, match=f"bcc, the BPF Compiler Collection, is not installed.*{said}") as e:
        Sidecar(arena, "bcc")
    assert e.value.remedy == "apt-get install --no-install-recommends python3-bpfcc"
    assert e.value.remedy in str(e.value)


def test_no_bcc_is_told_with_the_remedy(elsewhere: Path, arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no package of that name at all."""
    monkeypatch.setattr(compiled, "DISTRIBUTION", elsewhere / "none")
    with pytest.raises(EbpfUnavailableError, match=r"is not installed; apt-get install .* python3-bpfcc$"):
        Sidecar(arena, "bcc")


@pytest.mark.parametrize("name", OTHERS)
def test_another_bcc_does_not_hide_the_distributions(bcc: None, name: str, elsewhere: Path, arena: Arena) -> None:
    """The right one is found behind it."""
    (elsewhere / "bcc.py").write_text(OTHERS[name][0])
    sidecar = Sidecar(arena, "bcc")
    assert sidecar.loader == "bcc"
    sidecar.close()


def test_what_bcc_cannot_compile_is_told_as_it_says_it(
    bcc: None, arena: Arena, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The compiler's words are in the error and not on the terminal, and nothing is left."""
    monkeypatch.setenv("BCC_KERNEL_SOURCE", str(tmp_path))
    before = os.listdir("/proc/self/fd")
    with pytest.raises(EbpfUnavailableError, match=r"bcc does not compile the program: .*not found"):
        Sidecar(arena, "bcc")
    assert capfd.readouterr().err == ""
    assert os.listdir("/proc/self/fd") == before
