"""The ablation's tables and its picture show every setting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from terminal import shown
from typer.testing import CliRunner

from lifl.bench import ablation as bench
from lifl.bench.ablation import measure_ablation
from lifl.bench.ablation_view import ablation_tables, save_picture
from lifl.cli import main as cli
from lifl.node import calibration

pytest.importorskip("matplotlib")
pytestmark = pytest.mark.leaves("matplotlib keeps its fonts open")


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    """Simulated rounds, and the same once more as if they had been real."""
    figures = measure_ablation((5, 30), is_simulated_only=True, costs=calibration.default_costs())
    more = {"error": 0.1, "last_error": 0.2, "others": 0.0, "rounds": 1}
    rows = [row | {"simulated": row} | more for row in figures["simulated"][0]["rows"]]
    real = [{"nodes": 5, "updates": 5, "window_s": w, "memory_bytes": 1, "rows": rows} for w in (0.0, 2.0)]
    return figures | {"real": real, "median_error": 0.1, "median_last_error": 0.2}


def test_tables_have_every_row(figures: dict[str, Any]) -> None:
    """Each setting has a table, with the simulation's error below the last."""
    text = " ".join(shown(ablation_tables(figures)).split())  # titles and captions are as wide as their tables
    assert text.count("+ hierarchy") == 8
    assert "5 updates over 2 s" in text
    assert "off by 10% of the completion time (goal: under 20 %), and by 20%" in text


def test_no_number_is_cut_off_in_a_pipe(figures: dict[str, Any]) -> None:
    """There rich's tables are 80 characters wide."""
    assert "…" not in shown(ablation_tables(figures), width=80)


def test_picture_is_written(figures: dict[str, Any], tmp_path: Path) -> None:
    """In either format, and without real rounds too."""
    for ending in (".svg", ".png"):
        save_picture(figures, tmp_path / f"a{ending}")
        assert (tmp_path / f"a{ending}").stat().st_size > 1000
    save_picture({**figures, "real": []}, tmp_path / "b.svg")
    with pytest.raises(ValueError, match=r"\.svg, \.png"):
        save_picture(figures, tmp_path / "a.txt")
    with pytest.raises(ValueError, match="no such folder"):
        save_picture(figures, tmp_path / "none" / "a.svg")


def test_simulation_alone_starts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command with `--simulate-only` prints its tables and writes the picture; wrong numbers are one line."""
    monkeypatch.setattr(bench, "_calibrated", lambda _: calibration.default_costs())
    picture = tmp_path / "a.svg"
    command = ["bench", "ablation", "--simulate-only", "--updates", "10", "--picture", str(picture)]
    done = CliRunner().invoke(cli.main, command)
    assert done.exit_code == 0, done.output
    assert "Simulated: 10 updates, 5 nodes" in done.stdout
    assert "For real" not in done.stdout
    assert picture.read_text().startswith("<?xml")
    wrong = CliRunner().invoke(cli.main, ["bench", "ablation", "--updates", "1,x"])
    assert (wrong.exit_code, wrong.stdout) == (1, "")
    assert wrong.stderr == "lifl: --updates 1,x: give numbers with commas between them, such as 20,60,100\n"
    many = CliRunner().invoke(cli.main, ["bench", "ablation", "--simulate-only", "--updates", "101"])
    assert many.exit_code == 1
    assert many.stderr == "lifl: updates=(101,), real_updates=(20, 30, 40): 5 nodes have room for 100\n"
