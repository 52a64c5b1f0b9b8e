"""A run whose process is SIGKILLed at any of a dozen moments, resumed, ends bit-equal to the undisturbed one."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from resumable import MOMENTS
from safetensors import safe_open

PROGRAM = Path(__file__).with_name("resumable.py")


def part(checkpoint: Path, out: Path, moment: str = "") -> int:
    """A process that begins or resumes the run; its exit status."""
    command = [sys.executable, str(PROGRAM), str(checkpoint), str(out), moment]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode


def end_of(out: Path) -> tuple[dict[str, tuple[str, bytes]], dict[str, str]]:
    """The final model's bytes, and what was measured."""
    with safe_open(str(out), "numpy") as file:
        names = sorted(file.keys())
        return {n: (str(file.get_tensor(n).dtype), file.get_tensor(n).tobytes()) for n in names}, file.metadata()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed run."""
    folder = tmp_path_factory.mktemp("whole")
    assert part(folder / "run", folder / "out") == 0
    return folder / "out"


@pytest.mark.parametrize("moment", MOMENTS.values(), ids=MOMENTS)
def test_killed_and_resumed(moment: str, whole: Path, tmp_path: Path) -> None:
    """Killed once: the same model, the same nodes in each round, the same random numbers."""
    path, out = tmp_path / "run", tmp_path / "out"
    assert part(path, out, moment) == -signal.SIGKILL
    assert not out.exists()
    assert part(path, out) == 0
    assert end_of(out) == end_of(whole)


@pytest.mark.timeout(300)
def test_killed_at_every_moment_of_one_run(whole: Path, tmp_path: Path) -> None:
    """Killed a dozen times, each time a little further on: the same end."""
    path, out = tmp_path / "run", tmp_path / "out"
    assert [part(path, out, moment) for moment in MOMENTS.values()] == [-signal.SIGKILL] * len(MOMENTS)
    assert part(path, out) == 0
    assert end_of(out) == end_of(whole)
