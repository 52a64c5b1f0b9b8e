"""A report is a value: it goes through JSON, is said in a line, and imports what draws it only when asked to."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import attrs
import numpy as np
import pytest

import lifl
from lifl.report.entries import Contribution, Rejection, Span
from lifl.report.report import RoundReport

FULL = RoundReport(
    round=3,
    expected=2,
    timing="eager",
    order="any",
    accepted=(Contribution("a", 10, 1, 0.01, 0.02), Contribution("b", 20, 2, 0.03, 0.05, 0.5)),
    rejected=(Rejection("c", "values", "'w' holds nan at flat index 1"),),
    late=("d",),
    deaths=1,
    stages={"receive": 0.03, "last_to_result": 0.07, "total": 0.1, "wrapped": 0.2},
    spans=(Span(0, "gateway", "receive", 0.0, 0.01, 1), Span(1, "leaf", "aggregate", 0.01, 0.02, 1)),
    leaves=2,
    shards=4,
    started=1,
    predicted={"completion_s": 0.12, "last_to_result_s": 0.09, "cpu_s": 0.2, "peak_bytes": 1e6},
)


def test_report_goes_through_json() -> None:
    """The dict of to_dict is JSON, and from_dict makes the same report of it."""
    assert RoundReport.from_dict(json.loads(json.dumps(FULL.to_dict()))) == FULL


def test_dict_of_an_older_version_loads() -> None:
    """A dict without the fields that came later is a report with their defaults."""
    old = FULL.to_dict()
    for name in ("spans", "leaves", "shards", "started", "predicted"):
        del old[name]
    loaded = RoundReport.from_dict(old)
    assert loaded == attrs.evolve(FULL, spans=(), leaves=0, shards=0, started=0, predicted=None)


def test_report_is_said_in_a_line() -> None:
    """The line has who counts, the shape, and the prediction beside the time that it is about."""
    line = str(FULL)
    assert "\n" not in line
    assert line.startswith("2 of 2 updates, weight 30; refused: c (values: ")
    assert "; 2 leaves, 4 shards; receive 0.030s" in line
    assert "total 0.100s (predicted 0.120s), wrapped 0.200s" in line


def test_line_of_a_plain_report_has_nothing_new() -> None:
    """Without a shape and a prediction the line is what it always was."""
    plain = RoundReport(1, 2, "eager", "any", stages={"receive": 1.0, "total": 2.0})
    assert str(plain) == "0 of 2 updates, weight 0; receive 1.000s, total 2.000s"


def test_line_of_a_failed_round_ends_with_why() -> None:
    """Without a result there are no times."""
    assert str(attrs.evolve(FULL, error="closed")).endswith("; workers replaced: 1; no result: closed")


@pytest.mark.parametrize(
    ("leaves", "shards", "shape"),
    [(0, 0, ""), (1, 0, "1 leaf"), (2, 1, "2 leaves, 1 shard"), (0, 3, "3 shards")],
)
def test_shape_is_said_in_words(leaves: int, shards: int, shape: str) -> None:
    """A part of the shape with the number 0 is not named."""
    assert attrs.evolve(FULL, leaves=leaves, shards=shards).shape == shape


def test_import_draws_nothing(tmp_path: Path) -> None:
    """Importing lifl imports nothing that draws, and a notebook's view and SVG need no matplotlib."""
    code = (
        "import sys, lifl\n"
        "assert not {'matplotlib', 'lifl.report.svg', 'lifl.report.mpl', 'lifl.report.scene'} & set(sys.modules)\n"
        "report = lifl.RoundReport(1, 1, 'eager', 'any')\n"
        "report._repr_html_()\n"
        "report.save('round.svg')\n"
        "assert 'matplotlib' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_real_round_shows_itself(tmp_path: Path) -> None:
    """The report of a round that was run can be looked at and saved."""
    spec = lifl.TensorSpec.from_arrays({"w": np.zeros(3, "float32")})
    with lifl.Node(memory="16MiB", workers=0) as node, node.open_round(spec, expected=1) as round_:
        round_.submit({"w": np.ones(3, "float32")}, weight=1, client_id="a")
        report = round_.result(timeout=30).report
    assert "model ready" in report._repr_html_()
    report.save(tmp_path / "round.html")
    assert [path.name for path in tmp_path.iterdir()] == ["round.html"]
