"""The soak of rung 6 for a moment, so that it is known to run; ``make soak`` takes as long as it is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import soak


@pytest.mark.timeout(120)
def test_soak_for_a_moment(tmp_path: Path) -> None:
    """Rounds, kills, stops and refusals for some seconds: exact, and nothing drifts."""
    file = tmp_path / "soak.json"
    assert soak.main(["--minutes", "0.2", "--seed", "7", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert found["counts"]["rounds"] > 50
    assert found["counts"]["kills"] > 20
    assert found["counts"]["refused"] > 20
    assert {key: n for key, n in found["drift"].items() if key not in ("private", "nursery") and n} == {}


def test_soak_fails_on_a_wrong_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check can fail: a mean that leaves somebody out ends it with status 1."""
    real = soak.Model.check
    monkeypatch.setattr(soak.Model, "check", lambda self, arrays, who: real(self, arrays, who | {self.most + 1}))
    assert soak.main(["--minutes", "0.2", "--seed", "7"]) == 1
