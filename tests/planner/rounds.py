"""Costs and rounds for the tests of the cost model: round numbers to be checked by hand, and odd ones to search."""

from __future__ import annotations

from hypothesis import strategies as st

from lifl.planner.costs import Costs, Sizes
from lifl.planner.shape import Shape
from lifl.planner.timing import TIMINGS

MODEL = Sizes.of_float32(10_000_000)

COSTS = Costs(
    cores=2,
    land_bytes_s=10e9,
    land_array_s=5e-6,
    fold_bytes_s=20e9,
    sum_bytes_s=40e9,
    mean_bytes_s=20e9,
    parallel=1.5,
    dispatch_s=10e-6,
    cold_start_s=5e-3,
    first_read_bytes_s=20e9,
    first_write_bytes_s=4e9,
    wire_bytes_s=2e9,
    wire_cpu_bytes_s=8e9,
)


@st.composite
def costs_of(draw: st.DrawFn) -> Costs:
    """Machines from slow to fast, with few cores and many."""
    rate = st.floats(1e8, 1e11)
    cores = draw(st.integers(1, 16))
    return Costs(
        cores=cores,
        land_bytes_s=draw(rate),
        land_array_s=draw(st.floats(0, 1e-4)),
        fold_bytes_s=draw(rate),
        sum_bytes_s=draw(rate),
        mean_bytes_s=draw(rate),
        parallel=draw(st.floats(1, cores)),
        dispatch_s=draw(st.floats(0, 1e-3)),
        cold_start_s=draw(st.floats(0, 0.1)),
        first_read_bytes_s=draw(rate),
        first_write_bytes_s=draw(rate),
        wire_bytes_s=draw(rate),
        wire_cpu_bytes_s=draw(rate),
    )


@st.composite
def rounds(draw: st.DrawFn, at_once: bool = False) -> tuple[Shape, str, list[float], int]:
    """A shape, a timing, arrivals, and how many workers there are."""
    leaves = draw(st.integers(0, 5))
    shape = Shape(leaves, draw(st.integers(0 if leaves else 1, 5)))
    window = 0.0 if at_once else draw(st.sampled_from([0.0, 0.05, 1.0]))
    n = draw(st.integers(1, 80))
    arrivals = sorted(draw(st.lists(st.floats(0, window), min_size=n, max_size=n)))
    return shape, draw(st.sampled_from(TIMINGS)), arrivals, draw(st.integers(0, 6))
