"""Rung 2 of the ladder: the rings, the wake-ups and the ownership words, model checked with relacy.

The source that is checked is lifl/_shm.c itself (see translate.py); each check is shown to fail when it is wrong.
Not every interleaving is tried: these are many random ones and a bounded search.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from translate import translate

pytestmark = pytest.mark.ladder

HERE = Path(__file__).parent
LIFL = HERE.parents[1] / "lifl"
ITERATIONS = 500_000
SUITES = 5
# An old library: it wants an old dialect, and warns.
FLAGS = ["-std=gnu++11", "-O1", "-w", "-fpermissive", f"-I{LIFL}"]

WRONG = {
    "taken without acquire": (
        "    end->cached = atomic_load_explicit(&r->tail, memory_order_acquire);",
        "    end->cached = atomic_load_explicit(&r->tail, memory_order_relaxed);",
        "DATA RACE",
    ),
    "slot written over unseen": (
        "  if (end->mine - end->cached >= RING_SLOTS) {\n",
        "  if (end->mine - end->cached > RING_SLOTS) {\n",
        "",
    ),
    "woken without a fence": (
        "sleeps on a full ring. */\n  atomic_thread_fence(memory_order_seq_cst);\n",
        "sleeps on a full ring. */\n",
        "DEADLOCK",
    ),
    "handed over without release": (
        "pack(generation, to_owner, to_state), memory_order_acq_rel,",
        "pack(generation, to_owner, to_state), memory_order_acquire,",
        "DATA RACE",
    ),
    "generation not raised at reclaim": (
        "pack(generation + 1, 0, LIFL_FREE)",
        "pack(generation, 0, LIFL_FREE)",
        "",
    ),
    "ring of a dead consumer not emptied": (
        "  atomic_store_explicit(&line.ring->head, end->mine, memory_order_release);\n",
        "",
        "",
    ),
}
"""what is wrong -> the right text, the wrong one, what relacy calls it; more of them are in tests/seeded"""


@pytest.fixture(scope="module", autouse=True)
def relacy() -> None:
    """In CI it is installed; elsewhere somebody may not have it."""
    if not Path("/usr/include/relacy/relacy.hpp").exists():
        message = "relacy is not installed: apt-get install relacy-dev"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)


def check(source: str, directory: Path, iterations: int) -> subprocess.CompletedProcess[str]:
    """Compiles the model over this text of _shm.c and runs it."""
    (directory / "core.inc").write_text(translate(source))
    program = directory / "model"
    command = ["g++", *FLAGS, f"-I{directory}", str(HERE / "model.cpp"), "-o", str(program), "-lpthread"]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr[-3000:]
    return subprocess.run([str(program), str(iterations)], capture_output=True, text=True, timeout=240, check=False)


def test_core_holds_in_every_interleaving(tmp_path: Path, record_property: Any) -> None:
    """500,000 random schedules, and a search with at most two switches: nothing lost or torn, nobody sleeps on."""
    done = check((LIFL / "_shm.c").read_text(), tmp_path, ITERATIONS)
    assert done.returncode == 0, done.stdout
    said = done.stdout.splitlines()
    assert [line.count("passed after") for line in said] == [1] * 2 * SUITES
    record_property("model", said)
    print(done.stdout)


@pytest.mark.parametrize("what", WRONG)
def test_model_finds(what: str, tmp_path: Path) -> None:
    """The same check of a source that is wrong fails, and says so."""
    right, wrong, name = WRONG[what]
    source = (LIFL / "_shm.c").read_text().replace("  STEP();\n", "")
    assert source.count(right) == 1, "the source has changed: so must this"
    done = check(source.replace(right, wrong), tmp_path, ITERATIONS // 5)
    assert done.returncode == 1, done.stdout
    assert name in done.stdout.splitlines()[-1].upper(), done.stdout
