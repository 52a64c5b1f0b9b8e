"""Names of files by which the profiler knows a purpose: they are those of this source tree."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import lifl
from lifl.superlink.profiler import KNOWN, _purpose

HERE = Path(lifl.__file__).parent


def frame_in(file: Path) -> FrameType:
    """A frame of code of that file."""
    found: dict[str, Any] = {"sys": sys}
    exec(compile("frame = sys._getframe()", str(file), "exec"), found)
    frame: FrameType = found["frame"]
    return frame


@pytest.mark.parametrize(
    ("file", "purpose"),
    [
        ("rounds/rounds.py", "object store"),
        ("rounds/registry.py", "object store"),
        ("rounds/reply_index.py", "object store"),
        ("rounds/served_round.py", "object store"),
        ("rounds/incoming_reply.py", "gateway"),
        ("store/store.py", "object store"),
        ("http/signatures.py", "signatures"),
        ("http/gateway.py", "gateway"),
    ],
)
def test_a_file_has_a_purpose(file: str, purpose: str) -> None:
    """Rounds count as the object store, reading and folding of replies as the gateway."""
    path = HERE / "superlink" / file
    assert path.exists()
    assert _purpose(frame_in(path)) == purpose


def test_known_files_exist() -> None:
    """Those of lifl's: a file that is moved would count as something else."""
    names = [
        name for name, _, _ in KNOWN if name.startswith(("superlink/http/", "superlink/rounds/", "superlink/store/"))
    ]
    assert len(names) > 5
    assert all((HERE / name).exists() for name in names)
