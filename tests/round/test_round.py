"""A round from its opening to its close: who counts, who is refused, and that every block comes back."""

from __future__ import annotations

import errno
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lifl
from lifl.errors import AdmissionError, RoundError, ShmError
from lifl.fold import flower_mean
from lifl.tensor import DTYPES, NUMPY_DTYPES, Tensor

pytestmark = pytest.mark.transports

WAIT_S = 60.0
SPEC = lifl.TensorSpec.from_arrays({"w": np.zeros((2, 3), np.float32), "steps": np.array(0)})
BIG = lifl.TensorSpec.from_arrays({"w": np.zeros(2**18, np.float32)})  # 1 MiB; its sums are twice that
FLOATS = ("float16", "bfloat16", "float32", "float64")


def update(value: float = 1.0) -> dict[str, Any]:
    """An update of SPEC whose every number is `value`."""
    return {"w": np.full((2, 3), value, np.float32), "steps": np.array(int(value))}


def big(value: float) -> dict[str, Any]:
    """An update of BIG."""
    return {"w": np.full(2**18, value, np.float32)}


def means(result: lifl.RoundResult) -> set[float]:
    """The different numbers in a result."""
    return {float(x) for array in result.arrays.values() for x in array.flat}


# ---------------------------------------------------------------- what counts


@pytest.mark.parametrize("timing", ["eager", "lazy"])
def test_report_names_exactly_who_is_in_the_model(node: lifl.Node, timing: Any) -> None:
    """The accepted are reported in order of arrival, with their weights, runtimes and times."""
    with node.open_round(SPEC, expected=3, timing=timing) as round_:
        for i, weight in enumerate((1, 2, 5)):
            round_.submit(update(i), weight=weight, client_id=i)
        result = round_.result(WAIT_S)
    assert [(c.client_id, c.weight) for c in result.report.accepted] == [("0", 1.0), ("1", 2.0), ("2", 5.0)]
    assert (result.weight, result.num_updates, result.rejected) == (8.0, 3, ())
    assert means(result) == {1.5, 2.0}  # the counter is rounded to even
    assert all(1 <= c.runtime <= max(node.workers, 1) for c in result.report.accepted)
    assert all(0 <= c.arrived_s <= c.folded_s for c in result.report.accepted)
    assert result.report.error is None
    assert (result.report.expected, result.report.timing, result.report.order) == (3, timing, "any")


def test_result_is_the_same_object_for_every_caller(node: lifl.Node) -> None:
    """Asked again, or by several threads at once, a round gives one and the same result."""
    with node.open_round(SPEC, expected=1) as round_:
        with ThreadPoolExecutor(4) as threads:
            asked = [threads.submit(round_.result, WAIT_S) for _ in range(4)]
            round_.submit(update())
            results = [a.result() for a in asked]
        assert all(r is round_.result() for r in results)


def test_unnamed_updates_are_numbered(node: lifl.Node) -> None:
    """Without a client_id every update is a client of its own, also beside loans that were given back."""
    with node.open_round(SPEC, expected=3) as round_:
        first, second = round_.loan(), round_.loan()
        first.release()
        third = round_.loan()
        for loan in (second, third):
            loan.arrays["w"][...] = loan.arrays["steps"][...] = 2
            loan.send(1)
        round_.submit(update(2))
        result = round_.result(WAIT_S)
    assert len({c.client_id for c in result.report.accepted}) == 3
    assert means(result) == {2.0}


@pytest.mark.parametrize("has_names", [True, False], ids=["named", "unnamed"])
def test_many_threads_submit_to_one_round(node: lifl.Node, has_names: bool) -> None:
    """Updates from eight threads at once all count, named or not."""
    with node.open_round(SPEC, expected=200) as round_:
        with ThreadPoolExecutor(8) as threads:
            names = range(200) if has_names else [None] * 200
            list(threads.map(lambda name: round_.submit(update(3), client_id=name), names))
        result = round_.result(WAIT_S)
    assert result.num_updates == 200
    assert means(result) == {3.0}


# ---------------------------------------------------------------- rounds beside each other


def test_several_rounds_are_open_at_once(node: lifl.Node) -> None:
    """Interleaved updates of five rounds of two specs come out in the right means."""
    rounds = [node.open_round(SPEC if i % 2 else BIG, 3, "lazy" if i % 3 else "eager") for i in range(5)]
    for k in range(3):
        for i, round_ in enumerate(rounds):
            value = 10 * i + k
            round_.submit(update(value) if i % 2 else big(value), client_id=k)
    for i, round_ in reversed([*enumerate(rounds)]):
        assert means(round_.result(WAIT_S)) == {10.0 * i + 1}
        round_.close()


def test_several_threads_have_rounds_of_their_own(node: lifl.Node) -> None:
    """Four threads that each run round after round do not disturb each other."""

    def work(k: int) -> None:
        for n in range(15):
            timing: Any = ("eager", "lazy")[n % 2]
            with node.open_round(SPEC, expected=4, timing=timing) as round_:
                for i in range(4):
                    round_.submit(update(k + i % 2 * 2))
                assert means(round_.result(WAIT_S)) == {k + 1.0}

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4)))


# ---------------------------------------------------------------- more clients than fit


@pytest.mark.parametrize("timing", ["eager", "lazy"])
def test_more_clients_than_fit_the_arena(node: lifl.Node, timing: Any) -> None:
    """A round whose updates are many times the arena's size waits for room and loses nobody."""
    assert 200 * BIG.nbytes > 3 * node.arena.block_bytes
    with node.open_round(BIG, expected=200, timing=timing) as round_:
        for i in range(200):
            round_.submit(big(i), weight=1 + i % 2, client_id=i)
        result = round_.result(WAIT_S)
    expected = sum(i * (1 + i % 2) for i in range(200)) / 300
    assert means(result) == {np.float32(expected)}


@pytest.mark.parametrize("timing", ["eager", "lazy"])
def test_more_clients_than_fit_from_several_threads(node: lifl.Node, timing: Any) -> None:
    """The same with four threads that wait for room in two rounds at once."""
    with node.open_round(BIG, 50, timing) as one, node.open_round(BIG, 50, timing) as two:
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(lambda i: (one, two)[i % 2].submit(big(i)), range(100)))
        assert means(one.result(WAIT_S)) == {49.0}
        assert means(two.result(WAIT_S)) == {50.0}


def test_more_updates_than_a_ring_holds(node: lifl.Node) -> None:
    """Hundreds of tiny updates in a lazy round overflow every ring and batch, and all are counted and freed."""
    free = node.arena.free_bytes
    for _ in range(4):
        with node.open_round(SPEC, expected=700, timing="lazy") as round_:
            with node.changed:  # nothing is heard from the workers meanwhile, so that their rings fill up
                for i in range(700):
                    round_.submit(update(i % 7))
            result = round_.result(WAIT_S)
        assert (result.num_updates, means(result)) == (700, {3.0})
        assert all(c.folded_s > 0 for c in result.report.accepted)
        result = None
        assert node.arena.free_bytes == free


def test_own_loans_that_fill_the_arena_are_told(node: lifl.Node) -> None:
    """A thread that holds all the room itself is told so, instead of waiting for itself for ever."""
    with node.open_round(BIG, expected=1000) as round_:
        loans = []
        with pytest.raises(ShmError, match="no room") as caught:
            loans.extend(round_.loan() for _ in range(1000))
        assert caught.value.errno == errno.ENOSPC
        for loan in loans:
            loan.release()


def test_waiting_for_room_can_be_bounded(node: lifl.Node) -> None:
    """With a time-out, a full arena that others hold is ENOSPC after it."""
    with node.open_round(BIG, expected=1000) as round_:
        with ThreadPoolExecutor(1) as other:
            loans = [other.submit(round_.loan).result() for _ in range(node.arena.free_bytes // BIG.nbytes)]
        with pytest.raises(ShmError, match=r"it was for 0\.05 s"):
            round_.submit(big(1), timeout=0.05)
        for loan in loans:
            loan.release()
        round_.submit(big(1))


# ---------------------------------------------------------------- early, late, closed


def test_loan_that_waits_while_the_round_ends_takes_no_room(node: lifl.Node) -> None:
    """A loan that waits for room has taken no block when the round ends."""
    free = node.arena.free_bytes
    keeper, round_ = node.open_round(BIG, expected=1000), node.open_round(BIG, expected=1000)
    kept = [keeper.loan() for _ in range(node.arena.free_bytes // BIG.nbytes)]

    def wait() -> None:
        with pytest.raises(AdmissionError, match="closed"):
            round_.loan("late")

    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(wait)
        with pytest.raises(TimeoutError):
            waiting.result(0.2)
        round_.close()
        for loan in kept:
            loan.release()
        waiting.result(WAIT_S)
    keeper.close()
    assert node.arena.free_bytes == free


def test_round_closed_early_has_what_is_there(node: lifl.Node) -> None:
    """Closing early gives the mean of the updates that are in; closing again changes nothing."""
    with node.open_round(SPEC, expected=10, timing="lazy") as round_:
        round_.submit(update(1))
        round_.submit(update(3))
        round_.close_early()
        round_.close_early()
        result = round_.result(WAIT_S)
        round_.close_early()
    assert (means(result), result.num_updates, result.report.expected) == ({2.0}, 2, 10)


def test_round_closed_early_without_updates_tells_why(node: lifl.Node) -> None:
    """With nobody in, the error names who was refused."""
    with node.open_round(SPEC, expected=2) as round_:
        with pytest.raises(AdmissionError):
            round_.submit(update(), weight=-5, client_id="evil")
        round_.close_early()
        with pytest.raises(RoundError, match=r"without an update.*evil \(weight") as caught:
            round_.result(WAIT_S)
        assert str(caught.value) == round_.report().error


def test_arguments_of_another_type(node: lifl.Node) -> None:
    """Each is refused by name, with what to give, and no round is left open."""
    wrong: list[tuple[Any, dict[str, Any], str]] = [
        ({"w": np.zeros(3)}, {}, r"spec is a dict: give a lifl.TensorSpec, lifl.TensorSpec.from_arrays\(model\)"),
        (SPEC, {"limits": 5}, r"limits is a int: give a lifl.Limits, lifl.Limits\(\.\.\.\)"),
        (SPEC, {"shape": (1, 2)}, r"shape is a tuple: give a lifl.Shape, lifl.Shape\(leaves=\.\.\., shards=\.\.\.\)"),
    ]
    for spec, more, said in wrong:
        with pytest.raises(TypeError, match=said):
            node.open_round(spec, 1, **more)
    with pytest.raises(TypeError, match=r"workers=1\.5: give a whole number"):
        lifl.Node("1MiB", workers=1.5)  # type: ignore[arg-type]
    assert not node.has_rounds


def test_a_round_that_cannot_engage_its_leaves_is_closed(node: lifl.Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has it, so nobody could close it: its memory is back."""

    def fails(_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr("lifl.round.core.RoundCore.engage_leaves", fails)
        with pytest.raises(MemoryError):
            node.open_round(SPEC, 1)
    assert not node.has_rounds


def test_a_timeout_that_is_no_number(node: lifl.Node) -> None:
    """No moment is after nan, so a wait with it would not end; the round is as it was."""
    with node.open_round(SPEC, expected=1) as round_:
        for call in (round_.result, lambda timeout: round_.submit(update(1), timeout=timeout)):
            with pytest.raises(ValueError, match="timeout=nan: give seconds, or None"):
                call(float("nan"))
            with pytest.raises(TypeError, match="timeout='1': give seconds, or None"):
                call("1")  # type: ignore[arg-type]
        round_.submit(update(3))
        assert means(round_.result(WAIT_S)) == {3.0}


def test_timeout_leaves_the_round_open(node: lifl.Node) -> None:
    """At its time-out result says how many are in; the round can still be completed."""
    with node.open_round(SPEC, expected=2) as round_:
        for timeout in (0, -1, 0.01):
            with pytest.raises(RoundError, match="0 of 2 updates are in"):
                round_.result(timeout)
        round_.submit(update(1))
        with pytest.raises(RoundError, match="1 of 2"):
            round_.result(0.01)
        round_.submit(update(3))
        assert means(round_.result(WAIT_S)) == {2.0}
        assert means(round_.result(0)) == {2.0}


@pytest.mark.parametrize("timing", ["eager", "lazy"])
@pytest.mark.parametrize("order", ["any", "flower"])
@pytest.mark.parametrize("done", [0, 1, 3, 4])
def test_close_in_the_middle_gives_every_block_back(node: lifl.Node, timing: Any, order: Any, done: int) -> None:
    """A round closed before, while or after it folds returns all that it had, at once."""
    free = node.arena.free_bytes
    for _ in range(3):
        round_ = node.open_round(BIG, expected=4, timing=timing, order=order)
        for i in range(done):
            round_.submit(big(i))
        round_.close()
        assert node.arena.free_bytes == free
        with pytest.raises(RoundError, match="closed"):
            round_.result(WAIT_S)
        round_.close()


def test_close_of_tiny_rounds_gives_every_block_back(node: lifl.Node) -> None:
    """Two hundred rounds closed right after their last update, or their result, leave no block behind."""
    free = node.arena.free_bytes
    for i in range(200):
        timing: Any = ("eager", "lazy")[i % 2]
        with node.open_round(SPEC, expected=6, timing=timing) as round_:
            for _ in range(6):
                round_.submit(update(1))
            if i % 3 == 0:
                round_.result(WAIT_S)
        assert node.arena.free_bytes == free, f"round {i}"


def test_close_wakes_who_waits_for_the_result(node: lifl.Node) -> None:
    """Another thread that waits in result is told that the round was closed."""
    round_ = node.open_round(SPEC, expected=1)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(round_.result)
        round_.close()
        with pytest.raises(RoundError, match="closed"):
            waiting.result(WAIT_S)


def test_exception_in_the_callers_block_closes_the_round(node: lifl.Node) -> None:
    """Leaving the ``with`` by an exception lets it through and gives everything back."""
    round_ = node.open_round(SPEC, expected=2)
    round_.submit(update())
    with pytest.raises(ZeroDivisionError), round_:
        _ = 1 / 0
    assert "closed" in repr(round_)


def test_overflow_is_an_error_and_not_a_model(node: lifl.Node) -> None:
    """If a weighted sum leaves float64's range the round fails and says so."""
    spec = lifl.TensorSpec.from_arrays({"w": np.zeros(3)})
    with node.open_round(spec, expected=2) as round_:
        for _ in range(2):
            round_.submit({"w": np.full(3, 1e300)}, weight=1e30)
        with pytest.raises(RoundError, match="range of float64"):
            round_.result(WAIT_S)


# ---------------------------------------------------------------- order="flower"


def test_flower_order_is_bit_equal_to_flower(node: lifl.Node) -> None:
    """With order="flower" the model has Flower's bits, dtypes and shapes, in the order of submission."""
    random = np.random.default_rng(11)
    models = [
        {
            "f": random.standard_normal((50, 70)).astype(np.float32),
            "d": random.standard_normal(33),
            "h": random.standard_normal((5, 5)).astype(np.float16),
            "n": random.integers(0, 2**60, ()),
            "b": random.integers(0, 2, 9).astype(bool),
            "u": random.integers(0, 255, 9).astype(np.uint8),
            "e": np.zeros((0, 2), np.float32),
        }
        for _ in range(70)
    ]
    weights = [float(w) for w in random.integers(1, 1000, len(models))]
    spec = lifl.TensorSpec.from_arrays(models[0])
    expected = flower_mean(spec, models, weights)
    with node.open_round(spec, expected=len(models), order="flower") as round_:
        for model, weight in zip(models, weights, strict=True):
            round_.submit(model, weight)
        result = round_.result(WAIT_S)
    for name, array in expected.items():
        assert (result.arrays[name].dtype, result.arrays[name].shape) == (array.dtype, array.shape)
        assert result.arrays[name].tobytes() == array.tobytes()
    assert result.weight == sum(weights)


def test_flower_order_needs_all_updates_at_once(node: lifl.Node) -> None:
    """The update that does not fit beside the others is ENOSPC, and the others still count."""
    with node.open_round(BIG, expected=1000, order="flower") as round_:
        taken: list[None] = []
        with pytest.raises(ShmError, match="no room") as caught:
            taken.extend(round_.submit(big(1)) for _ in range(1000))
        assert caught.value.errno == errno.ENOSPC
        round_.close_early()
        assert round_.result(WAIT_S).num_updates == len(taken)


# ---------------------------------------------------------------- arrays of every kind


def strided(array: np.ndarray) -> np.ndarray:
    """The same numbers with gaps between them."""
    return np.repeat(array, 2, axis=0)[::2]


def misaligned(array: np.ndarray) -> np.ndarray:
    """The same numbers at an odd address."""
    raw = np.zeros(array.nbytes + 1, np.uint8)[1:]
    raw[...] = array.reshape(-1).view(np.uint8)
    return raw.view(array.dtype).reshape(array.shape)


def read_only(array: np.ndarray) -> np.ndarray:
    """The same numbers, protected."""
    array.flags.writeable = False
    return array


KINDS: list[Callable[[np.ndarray], np.ndarray]] = [
    np.asfortranarray,
    strided,
    misaligned,
    read_only,
    lambda a: a[::-1, ::-1][::-1, ::-1],
    lambda a: np.ascontiguousarray(a.T).T,
    lambda a: np.ascontiguousarray(a[::-1])[::-1],
]


@pytest.mark.parametrize("kind", KINDS)
def test_arrays_of_every_memory_layout_are_taken(node: lifl.Node, kind: Callable[[np.ndarray], np.ndarray]) -> None:
    """Fortran order, gaps, odd addresses, protection and negative strides change nothing, nor the input."""
    spec = lifl.TensorSpec(tuple(Tensor(dtype, dtype, (5, 7)) for dtype in DTYPES))
    sources = {d: (np.arange(35).reshape(5, 7) % 3).astype(NUMPY_DTYPES[d]) for d in DTYPES}
    model = {d: kind(source.copy()) for d, source in sources.items()}
    with node.open_round(spec, expected=1) as round_:
        round_.submit(model)
        result = round_.result(WAIT_S)
    for dtype, source in sources.items():
        assert np.array_equal(model[dtype], source)
        assert np.array_equal(result.arrays[dtype], source)
        assert result.arrays[dtype].flags.c_contiguous


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.sampled_from(["submit", "bad", "loan", "drop", "duplicate", "timeout"]), max_size=12), st.booleans())
def test_any_sequence_of_acts_counts_exactly_the_accepted(warm_node: lifl.Node, acts: list[str], is_lazy: bool) -> None:
    """Whatever a caller does in whatever order, the model is the mean of what was accepted, and nothing leaks."""
    free, accepted = warm_node.arena.free_bytes, []
    with warm_node.open_round(SPEC, 100, "lazy" if is_lazy else "eager") as round_:
        for i, act in enumerate(acts):
            if act == "submit":
                round_.submit(update(i), client_id=i)
                accepted.append(i)
            elif act == "loan":
                with round_.loan(i) as loan:
                    loan.arrays["w"][...] = loan.arrays["steps"][...] = i
                    loan.send(1)
                accepted.append(i)
            elif act == "drop":
                with round_.loan(i) as loan:
                    loan.arrays["w"][...] = 77
            elif act == "timeout":
                with pytest.raises(RoundError):
                    round_.result(0)
            elif act == "bad" or not accepted:
                with pytest.raises(AdmissionError):
                    round_.submit(update() | {"w": np.full((2, 3), np.nan, np.float32)}, weight=i % 2, client_id=i)
            else:
                with pytest.raises(AdmissionError):
                    round_.submit(update(77), client_id=accepted[-1])
        round_.close_early()
        if accepted:
            result = round_.result(WAIT_S)
            assert [c.client_id for c in result.report.accepted] == [str(i) for i in accepted]
            assert np.isclose(result.arrays["w"][0, 0], np.mean(accepted))
        else:
            with pytest.raises(RoundError):
                round_.result(WAIT_S)
    result = None
    assert warm_node.arena.free_bytes == free


def test_a_round_shows_what_a_user_calls() -> None:
    """Nothing else is public; what the Node and the server need is behind it."""
    names = {"submit", "loan", "result", "report", "close_early", "close", "spec", "expected", "number"}
    assert {name for name in dir(lifl.Round) if not name.startswith("_")} == names
