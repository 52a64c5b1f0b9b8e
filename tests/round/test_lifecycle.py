"""The phases of a round: the table of transitions is complete, and the code refuses what it does not allow."""

from __future__ import annotations

from itertools import product

import pytest

from lifl.errors import RoundError
from lifl.round.lifecycle import NEXT, Lifecycle, Phase


def in_phase(phase: Phase) -> Lifecycle:
    """A lifecycle in a phase, with nothing else in it."""
    lifecycle = Lifecycle.__new__(Lifecycle)
    lifecycle.number, lifecycle._phase = 1, phase
    return lifecycle


def test_every_phase_can_be_reached_and_ended() -> None:
    """From the first phase each other one can be reached; all but the last have a way to it."""
    assert set(NEXT) == set(Phase)
    reached, waiting = {Phase.OPEN}, [Phase.OPEN]
    while waiting:
        new = NEXT[waiting.pop()] - reached
        reached |= new
        waiting += new
    assert reached == set(Phase)
    assert {phase for phase in Phase if not NEXT[phase]} == {Phase.CLOSED}
    assert all(Phase.FAILED in NEXT[phase] for phase in Phase if phase.is_running)


@pytest.mark.parametrize(("phase", "to"), list(product(Phase, Phase)))
def test_only_the_transitions_of_the_table_are_taken(phase: Phase, to: Phase) -> None:
    """Each other one is an error, and leaves the phase as it is."""
    lifecycle = in_phase(phase)
    if to in NEXT[phase]:
        lifecycle._move(to)
        assert lifecycle.phase is to
    else:
        with pytest.raises(RoundError, match=f"from {phase} to {to}"):
            lifecycle._move(to)
        assert lifecycle.phase is phase


def test_the_phase_is_written_by_its_owner_alone() -> None:
    """Others read it."""
    with pytest.raises(AttributeError):
        in_phase(Phase.OPEN).phase = Phase.DONE  # type: ignore[misc]


def test_a_mean_that_is_made_is_shown_as_folding() -> None:
    """Statistics have five phases; the wait for the last reports is no other one to a user."""
    assert [phase.shown for phase in Phase] == ["open", "folding", "folding", "done", "failed", "closed"]
