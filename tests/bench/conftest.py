"""Fixtures of the benchmarks' tests."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def own_folder() -> Iterator[Path]:
    """A folder for temporary files of this module and of what it starts, where nothing of lifl's is left.

    The usual folder has the files of the tests beside this one.
    """
    before, usual = os.environ.get("TMPDIR"), tempfile.tempdir
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TMPDIR"] = tempfile.tempdir = folder
        yield Path(folder)
        tempfile.tempdir = usual
        del os.environ["TMPDIR"]
        if before is not None:
            os.environ["TMPDIR"] = before
        sockets = f"lifl-{os.getuid()}"  # the folder for sockets of servers, which stays
        assert not [name for name in os.listdir(folder) if name.startswith("lifl-") and name != sockets]
