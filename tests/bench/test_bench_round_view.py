"""The figures of whole rounds, as a table, as a picture and in files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from terminal import shown
from typer.testing import CliRunner

from lifl.bench import round as bench
from lifl.bench.round import COMPARED, SIDES
from lifl.bench.round_view import profile_table, round_table, save_picture
from lifl.cli import main as cli

pytest.importorskip("matplotlib")
pytestmark = pytest.mark.leaves("matplotlib keeps its fonts open")


def row(side: str, share: float) -> dict[str, Any]:
    """A side that takes that share of what Flower takes."""
    figures = {"wall_s": 24.0, "last_to_model_s": 6.4, "cpu_s": 27.6, "peak_bytes": 1.3e9}
    made: dict[str, Any] = {name: value * share for name, value in figures.items()}
    made |= {"side": side, "title": SIDES[side].title, "over_flower": dict.fromkeys(COMPARED, share)}
    return made | {"peak_over_updates": 3.7 * share, "requests": 4000, "sent_bytes": 3.6e8, "received_bytes": 3.6e8}


FIGURES = {
    "model": "resnet18",
    "arrays": 122,
    "update_bytes": 46_796_608,
    "nodes": 8,
    "rounds": 2,
    "repetitions": 1,
    "timing": "lazy",
    "cores": 2,
    "rows": [row("flower", 1.0), row("strategy", 0.5), row("server", 0.0125)],
}


def test_the_table_shows_every_side() -> None:
    """With how much less lifl takes than Flower."""
    text = shown(round_table(FIGURES), width=80)
    assert "8 nodes, resnet18 (122 arrays, 46.8 MB), lazy, 2 cores" in text
    for name in ("flower", "strategy", "server"):
        assert SIDES[name].title in text
    assert text.count(" 80 x") == text.count(" 2 x") == len(COMPARED)
    assert "6.4" in text
    assert "1,300" in text


def test_the_caption_compares_only_with_a_flower_that_ran() -> None:
    """And counts a single run as one."""
    text = " ".join(shown(round_table(FIGURES), width=80).split())
    assert "Medians of 1 run of 2 rounds; below each, how many times as much Flower takes." in text
    alone = {name: value for name, value in row("server", 0.0125).items() if name != "over_flower"}
    text = " ".join(shown(round_table(FIGURES | {"rows": [alone]}), width=80).split())
    assert "Medians of 1 run of 2 rounds. lifl's strategy" in text


def test_the_profile_is_given_per_round_request_and_byte() -> None:
    """The shares are of all that was spent."""
    profiled = {**row("server", 0.0125), "profile_s": {"hash": 0.3, "fold": 0.1}}
    text = shown(profile_table(FIGURES | {"rows": [{**row("flower", 1.0), "profile_s": None}, profiled]}), width=120)
    (line,) = [line for line in text.splitlines() if "hash" in line]
    assert [cell.strip() for cell in line.split("│")[2:6]] == ["300", "75", "417", "75%"]


@pytest.mark.parametrize("suffix", [".svg", ".png", ".pdf"])
def test_the_picture_is_drawn(tmp_path: Path, suffix: str) -> None:
    """In every format; the same figures make the same file."""
    for name in ("one", "other"):
        save_picture(FIGURES, tmp_path / f"{name}{suffix}")
        assert (tmp_path / f"{name}{suffix}").stat().st_size > 1000


def test_the_picture_cannot_go_just_anywhere(tmp_path: Path) -> None:
    """An ending that says no format is refused."""
    with pytest.raises(ValueError, match="ends in one of"):
        save_picture(FIGURES, tmp_path / "rounds.txt")


def test_the_command_writes_what_it_is_told_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Figures and the picture go into files, the table to the terminal."""
    asked: dict[str, Any] = {}

    def measure(model: str, nodes: int, rounds: int, sides: list[str], **options: Any) -> dict[str, Any]:
        asked.update(options, model=model, nodes=nodes, rounds=rounds, sides=sides)
        return FIGURES

    monkeypatch.setattr(bench, "measure_round", measure)
    arguments = "bench round --model small2000 --nodes 3 --rounds 4 --sides flower,server --timing lazy --memory 1GiB"
    files = ["--json", str(tmp_path / "f.json"), "--picture", str(tmp_path / "f.svg")]
    result = CliRunner().invoke(cli.main, [*arguments.split(), *files])
    assert result.exit_code == 0, result.output
    del asked["on_progress"]
    what = {"model": "small2000", "nodes": 3, "rounds": 4, "sides": ["flower", "server"]}
    options = {"timing": "lazy", "memory": "1GiB", "repetitions": 1, "is_patient": False, "has_profile": False}
    assert asked == what | options
    assert "Flower" in result.stdout
    assert json.loads((tmp_path / "f.json").read_text()) == FIGURES
    assert (tmp_path / "f.svg").exists()


def test_a_path_that_cannot_be_written_loses_no_figures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A folder is refused before anything is measured; the table is shown before a file is written."""
    monkeypatch.setattr(bench, "measure_round", lambda *_, **__: FIGURES)
    for option in ("--json", "--picture"):
        result = CliRunner().invoke(cli.main, ["bench", "round", option, str(tmp_path)])
        assert (result.exit_code, result.stdout) == (2, "")
    result = CliRunner().invoke(cli.main, ["bench", "round", "--json", "/dev/full"])
    assert isinstance(result.exception, OSError)
    assert "Whole rounds" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--sides flower,strategy --profile", "--profile has no effect on flower, strategy: add one of server, unheld"),
        ("--sides strategy --memory 1GiB", "--memory has no effect on strategy: add one of server, unheld to --sides"),
        ("--sides flower --timing jit", "--timing has no effect on flower: add one of strategy, server, unheld"),
    ],
)
def test_an_option_that_no_side_uses_is_refused(arguments: str, said: str) -> None:
    """Before anything is measured, with status 1 and the sides that use it."""
    result = CliRunner().invoke(cli.main, ["bench", "round", *arguments.split()])
    assert result.exit_code == 1
    assert said in result.stderr


@pytest.mark.parametrize(
    ("error", "said"),
    [(TimeoutError("the run did not end"), "the run did not end"), (RuntimeError("load ended"), "load ended")],
)
def test_a_program_that_fails_is_told(monkeypatch: pytest.MonkeyPatch, error: Exception, said: str) -> None:
    """In words, with status 1."""

    def measure(*args: Any, **options: Any) -> dict[str, Any]:
        raise error

    monkeypatch.setattr(bench, "measure_round", measure)
    result = CliRunner().invoke(cli.main, ["bench", "round"])
    assert result.exit_code == 1
    assert said in result.output
