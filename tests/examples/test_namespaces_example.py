"""The example with network namespaces runs, and says what its README shows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lifl.ebpf import probe

FOLDER = Path(__file__).parents[2] / "examples" / "namespaces"
TIMEOUT_S = 60


def run(*prefix: str) -> subprocess.CompletedProcess[str]:
    """Runs it as a user would."""
    command = [*prefix, sys.executable, str(FOLDER / "aggregate.py")]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


def test_example_runs_and_its_readme_shows_what_it_prints() -> None:
    """Word for word."""
    support = probe.support()
    if not support.available:
        reason = f"{support.reason}; {support.remedy}"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    done = run()
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    shown = re.findall(r"^    (.*)$", (FOLDER / "README.md").read_text().partition("prints")[2], re.MULTILINE)
    assert done.stdout.splitlines() == shown
