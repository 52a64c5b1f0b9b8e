"""Freed memory goes back to the machine."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from types import SimpleNamespace

import pytest

from lifl.strategy import heap

PROGRAM = """
from pathlib import Path
from lifl.strategy.heap import give_back

def own_bytes():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))

bytearray(16 * 2**20)  # freed at once: from now on glibc keeps pieces up to this size
pieces = [bytes([k]) * 2**20 for k in range(1, 200)]
keeps_the_end = bytes([7]) * 2**20
before = own_bytes()
pieces.clear()
kept = own_bytes()
give_back()
print(before - kept, before - own_bytes())
"""


def test_freed_pieces_go_back() -> None:
    """Pieces below one that lives stay with glibc when they are freed; after `give_back` they are the machine's."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    by_itself, given_back = map(int, done.stdout.split())
    assert by_itself < 100 * 2**20, "glibc gave them back by itself: there is nothing to see here"
    assert given_back > 190 * 2**20


def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """musl has no malloc_trim: nothing happens."""
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())
    heap.give_back()
