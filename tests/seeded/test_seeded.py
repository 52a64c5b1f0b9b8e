"""Rung 7 of the ladder: known bugs, put in one after another. A rung that misses its bug proves nothing.

Each file under bugs/ is a patch. Its first lines say what is broken, by which rung of the ladder it must be
caught, and what is run; that run, on a copy of the repository with the patch, must fail and say one of the texts that
stand there, with " | " between them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import attrs
import pytest

pytestmark = pytest.mark.ladder

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 240


@attrs.frozen
class Bug:
    """The fields at the head of a patch."""

    path: Path
    what: str
    rung: str
    run: tuple[str, ...]
    says: tuple[str, ...]

    @classmethod
    def read(cls, path: Path) -> Bug:
        """Reads ``Key: value`` lines up to the diff."""
        head = path.read_text().partition("\ndiff ")[0]
        fields = dict(line.split(": ", 1) for line in head.splitlines() if line)
        return cls(
            path, fields["What"], fields["Rung"], tuple(fields["Run"].split()), tuple(fields["Says"].split(" | "))
        )


BUGS = [Bug.read(path) for path in sorted((Path(__file__).parent / "bugs").glob("*.patch"))]
WANTED = {
    "free-before-commit",
    "no-manifest-check",
    "no-requeue",
    "no-reclaim",
    "pop-without-cas",
    "relaxed-publish",
}
"""Those that the design page names."""


def test_the_bugs_of_the_design_are_there() -> None:
    """None of them was taken away."""
    assert {bug.path.stem for bug in BUGS} >= WANTED


@pytest.mark.timeout(TIMEOUT_S + 60)
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.path.stem)
def test_seeded_bug_is_caught(bug: Bug, tmp_path: Path) -> None:
    """The rung that is named fails on a copy with the bug, by the test and for the reason that is named."""
    copy = tmp_path / "lifl"
    for name in ("lifl", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "seeded"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    applied = subprocess.run(["git", "apply", str(bug.path)], cwd=copy, capture_output=True, text=True, check=False)
    assert applied.returncode == 0, f"{bug.path.name} no longer fits the code, renew it: {applied.stderr}"
    command = [sys.executable, "-m", "pytest", "-x", "--no-header", "-p", "no:cacheprovider", *bug.run]
    env = os.environ | {"PYTHONPATH": str(copy), "LIFL_SEEDED": "1"}
    done = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    # 1: tests ran, and some failed. Anything else is an error of the run, which would prove nothing.
    assert done.returncode == 1, f"{bug.what}: survived {bug.rung}\n{done.stdout[-3000:]}{done.stderr[-2000:]}"
    said = any(text in done.stdout for text in bug.says)
    assert said, f"{bug.what}: failed, but not by saying {bug.says!r}\n{done.stdout[-5000:]}"
