"""The soak of rung 6 for a moment, so that it is known to run; ``make soak`` takes as long as it is told."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import soak

pytestmark = pytest.mark.ladder


@pytest.mark.timeout(240)
def test_soak_for_a_moment(tmp_path: Path) -> None:
    """Rounds, kills, stops, forks and refusals for some seconds: exact, and nothing drifts."""
    file = tmp_path / "soak.json"
    # In a process of its own, as `make soak` runs it: what other tests left behind would come and go in its memory.
    command = [sys.executable, soak.__file__, "--minutes", "0.33", "--seed", "7", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=220, check=False)
    assert file.exists(), done.stderr
    found = json.loads(file.read_text())
    assert found["wrong"] == [], done.stdout
    assert done.returncode == 0
    at_leasts = {"rounds": 50, "kills": 20, "workers died": 10, "refused": 20, "forks": 1, "spawners killed": 1}
    for what, at_least in at_leasts.items():
        assert found["counts"][what] > at_least, what
    assert found["counts"]["parents killed"] > 0
    assert {key: n for key, n in found["drift"].items() if "memory" not in key and n} == {}


@pytest.mark.timeout(240)
def test_soak_fails_on_a_wrong_mean(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The check can fail: a mean in which one weighs more than it should ends it with status 1, seed and reason."""
    real = soak.Model.check

    def check(self: soak.Model, arrays: object, weights: dict[int, int], order: str) -> None:
        first = next(iter(weights))
        real(self, arrays, {**weights, first: weights[first] + len(weights)} | {1 + max(weights): 1}, order)

    monkeypatch.setattr(soak.Model, "check", check)
    file = tmp_path / "soak.json"
    assert soak.main(["--minutes", "0.33", "--seed", "7", "--json", str(file)]) == 1
    assert "the mean of" in json.loads(file.read_text())["wrong"][0]
    assert "WRONG (seed 7)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("what", "change", "seconds", "is_wrong"),
    [
        ("bytes lost", 65_536, 9, True),
        ("descriptors", 1, 9, True),
        ("processes", -1, 9, True),
        ("threads", 0, 9, False),
        ("memory", soak.MEMORY_DRIFT + 1, 1800, True),
        ("memory", soak.MEMORY_DRIFT + 1, 9, False),
        ("spawner's memory", -(2**30), 1800, False),
    ],
)
def test_what_drift_is(what: str, change: int, seconds: float, is_wrong: bool) -> None:
    """Nothing may be more or less; memory may not grow, but for what the allocator keeps."""
    assert soak.is_drift(what, change, seconds) is is_wrong
