"""Byte quotas: what one client, and all of a round, may hold of the arena; who waits and who is refused."""

from __future__ import annotations

import gc
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lifl
from lifl.errors import AdmissionError
from lifl.round.round import core_of
from lifl.shm.sizes import units_of

pytestmark = pytest.mark.transports

WAIT_S = 60.0
SPEC = lifl.TensorSpec.from_arrays({"w": np.zeros(40_000, np.float32)})
UNIT = units_of(SPEC.nbytes)


def update(value: float) -> dict[str, Any]:
    """An update of SPEC."""
    return {"w": np.full(40_000, value, np.float32)}


def refused(caught: Any, client: str, held: int, bound: int) -> None:
    """Checks that a refusal names client, rule, value and bound."""
    error = caught.value
    assert (error.client_id, error.rule, error.value) == (client, "quota", held + UNIT)
    assert f"{held:,}" in error.reason
    assert f"{bound:,}" in error.reason


def test_a_thousand_loans_that_are_never_sent(node: lifl.Node) -> None:
    """They take the round's share and no more: another round goes on, and so does this one when they end."""
    limits = lifl.Limits(total_bytes=10 * UNIT)
    with node.open_round(SPEC, 3, limits=limits) as flooded, node.open_round(SPEC, 2) as other:
        loans = [flooded.loan(f"bot{i}") for i in range(10)]
        for i in range(10, 1000):
            with pytest.raises(AdmissionError) as caught:
                flooded.loan(f"bot{i}")
        refused(caught, "bot999", 10 * UNIT, 10 * UNIT)
        with pytest.raises(AdmissionError) as caught:
            flooded.submit(update(1), client_id="good")
        refused(caught, "good", 10 * UNIT, 10 * UNIT)
        for i in (1, 3):
            other.submit(update(i), client_id=i)
        assert other.result(WAIT_S).arrays["w"][7] == 2
        loans.pop().release()
        for i in (1, 2, 3):
            flooded.submit(update(i), client_id=i)
        result = flooded.result(WAIT_S)
        assert result.arrays["w"][-1] == 2
        assert [r.rule for r in result.rejected] == ["quota"] * 991
        for loan in loans:
            loan.release()


def test_a_forgotten_loan_is_no_longer_counted(node: lifl.Node) -> None:
    """A loan that the garbage collector took does not use up the quota for ever."""
    with node.open_round(SPEC, 1, limits=lifl.Limits(total_bytes=UNIT)) as round_:
        round_.loan("a")
        gc.collect()
        round_.submit(update(4), client_id="b")
        assert round_.result(WAIT_S).arrays["w"][0] == 4


def test_one_client_in_several_rounds(node: lifl.Node) -> None:
    """The bytes of a client in all open rounds count; others are not concerned, nor updates without a client."""
    limits = lifl.Limits(client_bytes=2 * UNIT)
    rounds = [node.open_round(SPEC, 9, limits=limits) for _ in range(3)]
    one, two, three = rounds
    loans = [one.loan("greedy"), two.loan("greedy")]
    for enter in (lambda: three.loan("greedy"), lambda: three.submit(update(1), client_id="greedy")):
        with pytest.raises(AdmissionError) as caught:
            enter()
        refused(caught, "greedy", 2 * UNIT, 2 * UNIT)
    three.submit(update(1), client_id="modest")
    unnamed = [round_.loan() for round_ in rounds]
    loans.pop().release()
    three.submit(update(1), client_id="greedy")
    for loan in loans + unnamed:
        loan.release()
    assert [r.rule for r in three.report().rejected] == ["quota", "quota"]
    for round_ in rounds:
        round_.close()


@pytest.mark.parametrize("limits", [{"client_bytes": UNIT - 1}, {"total_bytes": UNIT - 1}], ids=str)
def test_an_update_larger_than_the_quota_is_refused(node: lifl.Node, limits: Any) -> None:
    """At once, whatever else there is."""
    with node.open_round(SPEC, 1, limits=lifl.Limits(**limits)) as round_:
        free = node.arena.free_bytes
        for enter in (lambda: round_.loan("a"), lambda: round_.submit(update(1), client_id="a")):
            with pytest.raises(AdmissionError) as caught:
                enter()
            refused(caught, "a", 0, UNIT - 1)
        assert node.arena.free_bytes == free


@pytest.mark.parametrize("timing", ["eager", "lazy"])
@pytest.mark.parametrize("room", [1, 3])
def test_submits_wait_for_what_is_folded(node: lifl.Node, timing: Any, room: int) -> None:
    """Four threads submit forty updates through a quota of one or three: all count, none is refused."""
    with node.open_round(SPEC, 40, timing, limits=lifl.Limits(total_bytes=room * UNIT)) as round_:
        with ThreadPoolExecutor(4) as pool:
            done = [pool.submit(round_.submit, update(i), 1.0, i, timeout=WAIT_S) for i in range(40)]
        assert [future.exception() for future in done] == [None] * 40
        result = round_.result(WAIT_S)
    assert result.num_updates == 40
    assert result.arrays["w"][123] == 19.5
    assert not result.rejected


def test_flowers_order_keeps_all_and_so_needs_room_for_all(node: lifl.Node) -> None:
    """A loan does not wait for room that nothing frees before the end."""
    with node.open_round(SPEC, 3, order="flower", limits=lifl.Limits(total_bytes=2 * UNIT)) as round_:
        for i in (1, 2):
            round_.submit(update(i), client_id=i)
        with pytest.raises(AdmissionError) as caught:
            round_.submit(update(3), client_id=3)
        refused(caught, "3", 2 * UNIT, 2 * UNIT)
        round_.close_early()
        assert round_.result(WAIT_S).arrays["w"][0] == 1.5


def test_waiting_for_a_share_can_be_bounded() -> None:
    """While a worker is stopped nothing is folded: a submit with a time-out is refused after it, and later taken."""
    with lifl.Node("16MiB", workers=1) as node:
        (pid,) = node.pids()
        with node.open_round(SPEC, 2, limits=lifl.Limits(total_bytes=UNIT)) as round_:
            os.kill(pid, signal.SIGSTOP)
            try:
                round_.submit(update(1), client_id="a")
                with pytest.raises(AdmissionError) as caught:
                    round_.submit(update(5), client_id="b", timeout=0.05)
                refused(caught, "b", UNIT, UNIT)
            finally:
                os.kill(pid, signal.SIGCONT)
            round_.submit(update(3), client_id="b", timeout=WAIT_S)
            assert round_.result(WAIT_S).arrays["w"][0] == 2


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 4),
    st.integers(1, 4),
    st.lists(st.tuples(st.sampled_from("lrsx"), st.integers(0, 4), st.integers(0, 1)), max_size=40),
)
def test_quotas_hold_whatever_clients_do(
    warm_node: lifl.Node, client: int, total: int, steps: list[tuple[str, int, int]]
) -> None:
    """Lend, release, send and submit in any order: no bound is ever passed, and in the end nothing is held."""
    limits = lifl.Limits(client_bytes=client * UNIT, total_bytes=total * UNIT)
    free = warm_node.arena.free_bytes
    rounds = [warm_node.open_round(SPEC, 100, limits=limits) for _ in range(2)]
    loans: dict[tuple[int, int], lifl.Loan] = {}
    rules: set[str] = set()
    for action, who, where in steps:
        round_, key = rounds[where], (who, where)
        try:
            if action == "l" and key not in loans:
                loans[key] = round_.loan(who, timeout=WAIT_S)
            elif action == "s" and key in loans:
                loan = loans.pop(key)
                loan.arrays["w"].fill(1)
                loan.send(1)
            elif action == "r" and key in loans:
                loans.pop(key).release()
            elif action == "x":
                round_.submit(update(1), client_id=who, timeout=WAIT_S)
        except AdmissionError as error:
            rules.add(error.rule)
        with warm_node.changed:
            assert all(core_of(round_).quota.held <= total * UNIT for round_ in rounds)
            assert all(warm_node.held_by(str(c)) <= client * UNIT for c in range(5))
    assert rules <= {"quota", "duplicate"}
    while loans:
        loans.popitem()[1].release()
    for round_ in rounds:
        round_.close()
    assert warm_node.arena.free_bytes == free
