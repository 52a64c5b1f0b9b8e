"""The same rounds on NVFLARE's own server and clients, with a tiny model."""

from __future__ import annotations

import importlib.util
import json
import math

import numpy as np
import pytest

from lifl import TensorSpec
from lifl.bench.round import measure_round

pytestmark = pytest.mark.ladder

SPEC = TensorSpec.from_arrays({"w": np.empty((300, 70), np.float32), "n": np.empty((), np.int64)})


@pytest.mark.skipif(importlib.util.find_spec("nvflare") is None, reason="needs nvflare: pip install 'lifl[peers]'")
@pytest.mark.usefixtures("own_folder")
def test_nvflare_has_its_figures() -> None:
    """Its model is the mean, what can be measured is there, and nothing stays."""
    measured = measure_round("tiny", 2, 2, ("nvflare",), spec=SPEC)
    assert json.loads(json.dumps(measured)) == measured
    (row,) = measured["rows"]
    for name in ("wall_s", "last_to_model_s", "cpu_s", "idle_bytes", "peak_bytes", "peak_over_updates"):
        assert math.isfinite(row[name]), name
        assert row[name] > 0, name
    assert row["requests"] is row["load_cpu_s"] is None
    assert row["error_over_tolerance"] <= 1
    (run,) = row["runs"]
    assert [one["round"] for one in run] == [1, 2]
    assert all(0 < one["last_to_model_s"] < one["wall_s"] for one in run)


def test_a_peer_that_is_not_installed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is started."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ModuleNotFoundError, match="nvflare is not installed"):
        measure_round(sides=("flower", "nvflare"))
