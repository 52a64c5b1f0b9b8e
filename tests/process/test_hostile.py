"""Eight real SuperNodes, five of them hostile, over the real wire: every row of the table of bad clients.

On a lifl-superlink, which takes the replies in; with LIFL_CRASH=all on Flower's SuperLink too, where the ServerApp does
(three minutes more; the same rules in the same words, see tests/strategy/test_landing.py).
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from lifl.deploy.deployment import Deployment

pytestmark = pytest.mark.ladder

APP = Path(__file__).parent / "app_hostile"
FORGER = Path(__file__).parent / "forger"
HONEST = range(3)
SERVERS = ["lifl-superlink", *(["flower-superlink"] if os.environ.get("LIFL_CRASH") == "all" else [])]


@pytest.fixture(scope="module", autouse=True)
def hostile_app() -> Iterator[None]:
    """The app's modules can be imported here too."""
    sys.path.insert(0, str(APP))
    yield
    sys.path.remove(str(APP))


def module(name: str) -> ModuleType:
    """A module of the app."""
    return importlib.import_module(f"hostile_app.{name}")


class Said:
    """The files that the ServerApp wrote."""

    def __init__(self, out: Path, lines: list[str]) -> None:
        self.out, self.lines = out, lines
        self.runs: dict[str, Any] = json.loads((out / "results.json").read_text())
        self.forged = [tuple(json.loads(line)) for line in (out / "forged").read_text().splitlines()]

    def model(self, run: str, server_round: int) -> dict[str, Any]:
        """The model after a round."""
        with np.load(self.out / f"{run}-{server_round}.npz") as arrays:
            return dict(arrays)


@pytest.fixture(scope="module", params=SERVERS)
def said(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Said:
    """All the runs, one after another, on one deployment."""
    out, lines = tmp_path_factory.mktemp("hostile"), list[str]()
    path = os.pathsep.join(filter(None, [str(FORGER), os.environ.get("PYTHONPATH")]))
    with Deployment(8, (request.param,), env={"PYTHONPATH": path, "LIFL_FORGED": str(out / "forged")}) as deployment:
        deployment.run(APP, {"out": str(out)}, lines.append, timeout=280)
    return Said(out, lines)


def mean_of_honest(server_round: int) -> dict[str, Any]:
    """The mean of the three honest nodes: sums of whole numbers, rounded once, when they are divided."""
    updates = [module("client_app").honest(me, server_round) for me in HONEST]
    total = sum(weight for _, weight in updates)
    means = {name: sum(np.float64(w) * u[name] for u, w in updates) / total for name in updates[0][0]}
    return {"w": means["w"].astype(np.float32), "bias": means["bias"], "count": np.rint(means["count"]).astype(int)}


def check_honest(model: dict[str, Any], server_round: int) -> None:
    """The model is that of the honest nodes, bit by bit."""
    for name, array in mean_of_honest(server_round).items():
        np.testing.assert_array_equal(model[name], array)
        assert model[name].dtype == array.dtype


def test_every_row_is_refused_and_named(said: Said) -> None:
    """Each round ends with the model of the three; its report has the other five, by the right rule."""
    nonsense = module("nonsense")
    rows, bad = nonsense.ROWS, nonsense.HOSTILE
    reports = said.runs["table"]["reports"]
    assert len(reports) == nonsense.rounds(rows)
    wrong = {}
    hostile = {rejection["client_id"] for report in reports.values() for rejection in report["rejected"]}
    assert len(hostile) == len(bad)
    for number in map(int, reports):
        report = reports[str(number)]
        assert report["error"] is None
        assert len(report["accepted"]) == len(HONEST)
        assert {one["weight"] for one in report["accepted"]} == {3 + 2 * me for me in HONEST}
        assert {one["client_id"] for one in report["rejected"]} == hostile
        names = [nonsense.row_of(rows, number, me) for me in bad]
        if sorted(rows[name].rule for name in names) != sorted(one["rule"] for one in report["rejected"]):
            wrong[tuple(names)] = report["rejected"]
        check_honest(said.model("table", number), number)
    assert not wrong
    assert not (said.out / nonsense.PROOF).exists()


def test_forged_replies_change_nothing(said: Said) -> None:
    """After each reply a bad node sends it again, and others: none is let in, and each round came out as it should.

    Flower asks for the objects of a reply that it takes, and answers 500 when the run is not known.
    """
    sent = Counter(what for what, _ in said.forged)
    kinds = ("sent again", "a second reply", "of another run", "to no message", "of another node", "of an old round")
    assert sorted(sent) == sorted(kinds)
    assert min(sent.values()) >= len(module("nonsense").ROWS)
    assert {what: answers for what, answers in said.forged if answers not in ([], 500)} == {}


def test_every_reason_says_what_was_wrong(said: Said) -> None:
    """The log names the client, the rule and the reason, in one line for each round, of bounded length."""
    lines = [line for line in said.lines if "3 of 8 updates" in line]
    assert len(lines) >= module("nonsense").rounds(module("nonsense").ROWS)
    assert all("refused: " in line and len(line) < 2000 for line in lines)


def test_bad_evaluations_are_left_out(said: Said) -> None:
    """The mean of the metrics is that of the replies that have one."""
    expected = sum((3 + 2 * me) * me for me in HONEST) / sum(3 + 2 * me for me in HONEST)
    evaluated = said.runs["evaluations"]["evaluated"]
    assert len(evaluated) == module("nonsense").rounds(module("nonsense").EVALUATIONS)
    for metrics in evaluated.values():
        assert metrics["norm"] == pytest.approx(expected, rel=1e-12)


def test_who_goes_too_far_is_clipped(said: Said) -> None:
    """A model a hundred times as large counts, moved onto the allowed distance; one beyond float64 is refused."""
    (report,) = said.runs["far"]["reports"].values()
    assert [one["rule"] for one in report["rejected"]] == ["norm"]
    assert len(report["accepted"]) == 7
    (clipped,) = [one for one in report["accepted"] if one["clipped"] < 1]
    assert clipped["weight"] == 3 + 2 * 6
    client = module("client_app")
    updates = [client.honest(me, 1) for me in range(7)]
    updates[6] = ({k: a * (100 if a.dtype.kind == "f" else 1) for k, a in updates[6][0].items()}, updates[6][1])
    distance = float(np.sqrt(sum((updates[6][0][name].astype(np.float64) ** 2).sum() for name in ("w", "bias"))))
    factor = module("server_app").CLIPPING_NORM / distance
    assert clipped["clipped"] == pytest.approx(factor, rel=1e-12)
    total = sum(weight for _, weight in updates)
    model = said.model("far", 1)
    for name, rtol in (("w", 2**-22), ("bias", 2**-50)):
        parts = [w * u[name].astype(np.float64) * (factor if i == 6 else 1) for i, (u, w) in enumerate(updates)]
        np.testing.assert_allclose(model[name], sum(parts) / total, rtol=rtol)


def test_stock_fedavg_fails(said: Said) -> None:
    """Flower's FedAvg on the same replies: a model of NaN, or no run. So the rows are really sent."""
    assert np.isnan(said.model("a NaN", 1)["bias"]).any()
    assert "InconsistentMessageReplies" in said.runs["one array too many"]["error"]
