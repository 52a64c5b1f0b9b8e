"""Any sequence of calls on a Node's rounds: the mean is of exactly those that were accepted, and no block is lost."""

from __future__ import annotations

import os
from typing import Any

import hypothesis.strategies as st
import numpy as np
from hypothesis import Phase, settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, precondition, rule

import lifl
from lifl.errors import AdmissionError, LeaseError, RoundError, ShmError
from lifl.round.round import core_of

MOST = 20
SPEC = lifl.TensorSpec.from_arrays({"w": np.zeros((2, 3)), "n": np.array(0)})
BAD: dict[str, tuple[dict[str, Any], Any]] = {
    "keys": ({"w": np.zeros((2, 3))}, 1),
    "shape": ({"w": np.zeros(6), "n": np.array(0)}, 1),
    "dtype": ({"w": np.zeros((2, 3), "f4"), "n": np.array(0)}, 1),
    "values": ({"w": np.full((2, 3), np.nan), "n": np.array(0)}, 1),
    "weight": ({"w": np.zeros((2, 3)), "n": np.array(0)}, -1),
}


def update(client: int) -> dict[str, Any]:
    """Client i's, of which a sum tells who is in it."""
    return {"w": np.full((2, 3), 2.0**client), "n": np.array(2**client)}


class Open:
    """A round and what must be true of it."""

    def __init__(self, round_: lifl.Round, expected: int, is_bounded: bool) -> None:
        self.round, self.expected, self.is_bounded = round_, expected, is_bounded
        self.accepted: set[int] = set()
        self.refused: list[tuple[str, str]] = []
        self.lent: set[int] = set()
        self.is_open = True
        self.is_closed = False

    def why_not(self, client: int) -> str | None:
        """The rule by which another update of a client must be refused; None if it must not."""
        if client in self.accepted or client in self.lent:
            return "duplicate"
        if not self.is_open:
            return "closed"
        return None

    def count(self, client: int) -> None:
        """It has been accepted."""
        self.accepted.add(client)
        self.is_open = self.is_open and len(self.accepted) < self.expected

    def refuse(self, client: int, error: AdmissionError, rule_: str) -> None:
        """It has been refused, as it had to be."""
        assert error.rule == rule_, (error, rule_)
        self.refused.append((str(client), error.rule))


class Rounds(RuleBasedStateMachine):
    """Several rounds on one Node, folded in this thread; one has bounded quotas."""

    rounds = Bundle("rounds")
    loans = Bundle("loans")

    def __init__(self) -> None:
        super().__init__()
        self.node = lifl.Node("6MiB", workers=0, debug=True)
        self.free = self.node.arena.free_bytes
        self.all: list[Open] = []
        self.lent: list[Any] = []

    @precondition(lambda self: sum(not one.is_closed for one in self.all) < 3)
    @rule(
        target=rounds,
        expected=st.integers(1, 6),
        timing=st.sampled_from(["eager", "lazy"]),
        order=st.sampled_from(["any", "flower"]),
        is_bounded=st.booleans(),
        commit_every=st.sampled_from([None, 1, 3]),
    )
    def open(self, expected: int, timing: Any, order: Any, is_bounded: bool, commit_every: int | None) -> Open:
        """Another round."""
        limits = lifl.Limits(client_bytes=65536 if is_bounded else None)
        opened = self.node.open_round(SPEC, expected, timing, order, commit_every=commit_every, limits=limits)
        self.all.append(Open(opened, expected, is_bounded))
        return self.all[-1]

    def holds(self, client: int) -> bool:
        """True if the client has something out, in any round, that its quota counts."""
        return any(client in one.lent or client in one.accepted for one in self.all if not one.is_closed)

    @rule(one=rounds, client=st.integers(0, MOST - 1))
    def submit(self, one: Open, client: int) -> None:
        """A good update: accepted, unless the client has one or the round is complete."""
        why = one.why_not(client)
        try:
            one.round.submit(update(client), weight=1 + client % 3, client_id=client, timeout=0)
        except AdmissionError as error:
            if error.rule == "quota":  # what lies unfolded in other rounds counts too
                assert one.is_bounded
                assert self.holds(client)
                why = "quota"
            assert why is not None
            one.refuse(client, error, why)
        except ShmError:
            assert self.node.arena.free_bytes < 2 * 65536 + 1
        else:
            assert why is None
            one.count(client)

    @rule(one=rounds, client=st.integers(0, MOST - 1), kind=st.sampled_from(sorted(BAD)))
    def submit_bad(self, one: Open, client: int, kind: str) -> None:
        """A bad one: refused by its rule; the client may try again."""
        arrays, weight = BAD[kind]
        try:
            one.round.submit(arrays, weight=weight, client_id=client, timeout=0)
        except AdmissionError as error:
            rule_ = error.rule
        except ShmError:
            assert kind == "values"
            return
        else:
            raise AssertionError(f"a bad {kind} was accepted")
        # Only a NaN needs a block to be seen.
        assert rule_ in ({kind} if kind != "values" else {one.why_not(client) or kind, "quota"})
        one.refused.append((str(client), rule_))

    @rule(target=loans, one=rounds, client=st.integers(0, MOST - 1))
    def borrow(self, one: Open, client: int) -> Any:
        """A loan, of which nothing has been sent yet."""
        why = one.why_not(client)
        try:
            loan = one.round.loan(client, timeout=0)
        except AdmissionError as error:
            if error.rule == "quota":
                assert one.is_bounded
                assert self.holds(client)
                why = "quota"
            assert why is not None
            one.refuse(client, error, why)
            return multiple()
        except ShmError:
            return multiple()
        assert why is None
        one.lent.add(client)
        self.lent.append((one, client, loan))  # not in the bundle, which would keep it for ever
        return len(self.lent) - 1

    @rule(number=consumes(loans), how=st.sampled_from(["send", "nan", "release", "drop"]))
    def give_back(self, number: int, how: str) -> None:
        """Sent, spoiled, released or forgotten."""
        one, client, loan = self.lent[number]
        self.lent[number] = None
        one.lent.discard(client)
        for name, array in update(client).items():
            loan.arrays[name][...] = array
        if how == "nan":
            loan.arrays["w"][1, 1] = np.inf
        if how == "release":
            loan.release()
        elif how in ("send", "nan"):
            try:
                loan.send(1 + client % 3)
            except AdmissionError as error:
                one.refuse(client, error, "values" if how == "nan" else "closed")
            except LeaseError:
                assert one.is_closed
            else:
                assert one.is_open
                assert how == "send"
                one.count(client)

    @rule(one=rounds)
    def close_early(self, one: Open) -> None:
        """No more updates."""
        one.round.close_early()
        one.is_open = False

    @rule(one=rounds)
    def result(self, one: Open) -> None:
        """The mean of exactly those that were accepted, or an error that says why there is none."""
        try:
            result = one.round.result(timeout=0)
        except RoundError:
            assert one.is_open or one.is_closed or not one.accepted
            return
        assert not one.is_open
        self.check(one, result)

    def check(self, one: Open, result: lifl.RoundResult) -> None:
        """Exact: sums of powers of two, rounded once when they are divided (in Flower's order, a little more)."""
        total = sum(1 + i % 3 for i in one.accepted)
        mean = sum((1 + i % 3) * 2**i for i in one.accepted) / total
        rtol = 0 if core_of(one.round).terms.order == "any" else 2.0**-45
        np.testing.assert_allclose(result.arrays["w"], np.full((2, 3), mean), rtol=rtol)
        assert abs(float(result.arrays["n"]) - mean) <= 0.5 + 2.0**-45 * mean
        assert result.weight == total
        assert {int(c.client_id) for c in result.report.accepted} == one.accepted

    @rule(one=consumes(rounds))
    def close(self, one: Open) -> None:
        """Ended, at any moment."""
        one.round.close()
        one.is_open, one.is_closed = False, True

    @invariant()
    def reports_name_all(self) -> None:
        """Every refusal is in the report, in order."""
        for one in self.all:
            report = one.round.report()
            assert [(r.client_id, r.rule) for r in report.rejected] == one.refused
            assert {int(c.client_id) for c in report.accepted} == one.accepted

    def teardown(self) -> None:
        """All rounds closed and all loans gone: every block is back."""
        for one in self.all:
            one.round.close()
        self.lent.clear()
        try:
            assert self.node.arena.free_bytes == self.free
        finally:
            self.node.close()


TestRounds = Rounds.TestCase
# A run that is known to fail needs no search for the shortest way (tests/seeded).
PHASES = set(Phase) - ({Phase.shrink, Phase.explain} if os.environ.get("LIFL_SEEDED") else set())
TestRounds.settings = settings(
    max_examples=400, stateful_step_count=60, deadline=None, derandomize=True, phases=PHASES, report_multiple_bugs=False
)
