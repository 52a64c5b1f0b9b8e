"""The costs of aggregation on a machine, and the prediction of a round's time that follows from them.

``lifl.node.calibration`` measures the rates; here they are only numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import attrs

from lifl.errors import PlanError
from lifl.planner.aggregation import Aggregation, Work
from lifl.planner.engine import Engine, Machine
from lifl.planner.load import ALPHA
from lifl.planner.shape import Shape
from lifl.planner.site import Site
from lifl.planner.timing import check_timing


def _above_zero(instance: object, attribute: attrs.Attribute[Any], value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise PlanError(f"{attribute.name}={value!r}: give a finite number above 0")


def _not_negative(instance: object, attribute: attrs.Attribute[Any], value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise PlanError(f"{attribute.name}={value!r}: give a finite number from 0 up")


@attrs.frozen
class Sizes:
    """Bytes of an update, of a partial sum and of the mean, by the names of a ``Layout``.

    ``arrays`` is the number of arrays in an update.
    """

    update_bytes: int = attrs.field(validator=_above_zero)
    sum_bytes: int = attrs.field(validator=_above_zero)
    mean_bytes: int = attrs.field(validator=_above_zero)
    arrays: int = attrs.field(default=1, validator=_above_zero)

    @classmethod
    def of_float32(cls, parameters: int) -> Sizes:
        """The sizes of a model of float32: 4 bytes a parameter, and 8 in a sum."""
        return cls(4 * parameters, 8 * parameters, 4 * parameters)


@attrs.frozen
class Costs:
    """The abilities of one machine. Rates are those of one core while the others rest, in bytes a second.

    Attributes
    ----------
    cores : int
        c, the workers that can work at a time.
    land_bytes_s : float
        Copying and checking updates: bytes of updates.
    land_array_s : float
        Seconds more for each array of an update: its name, shape and dtype are checked, and its copy is begun.
    fold_bytes_s : float
        Reading updates while folding: bytes of updates.
    sum_bytes_s : float
        Reading or writing partial sums: bytes of sums.
    mean_bytes_s : float
        Writing the mean: bytes of the mean.
    parallel : float
        P, the rate of all cores over that of one, for work that reads memory: 1 to c.
    dispatch_s : float
        From a decision to the first instruction of a warm worker's work.
    cold_start_s : float
        From a decision to a new worker that waits for work; a core works all that time.
    first_read_bytes_s, first_write_bytes_s : float
        The additional cost of memory that a new worker reads or writes for the first time: the kernel enters the pages
        into the worker's address space, for reading several at a time.
    wire_bytes_s : float
        Between nodes: bytes a second that one node receives.
    wire_cpu_bytes_s : float
        Sending, and receiving: bytes that one core handles in a second.
    """

    cores: int = attrs.field(validator=_above_zero)
    land_bytes_s: float = attrs.field(validator=_above_zero)
    land_array_s: float = attrs.field(validator=_not_negative)
    fold_bytes_s: float = attrs.field(validator=_above_zero)
    sum_bytes_s: float = attrs.field(validator=_above_zero)
    mean_bytes_s: float = attrs.field(validator=_above_zero)
    parallel: float = attrs.field(validator=_above_zero)
    dispatch_s: float = attrs.field(validator=_not_negative)
    cold_start_s: float = attrs.field(validator=_not_negative)
    first_read_bytes_s: float = attrs.field(validator=_above_zero)
    first_write_bytes_s: float = attrs.field(validator=_above_zero)
    wire_bytes_s: float = attrs.field(validator=_above_zero)
    wire_cpu_bytes_s: float = attrs.field(validator=_above_zero)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return attrs.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Costs:
        """The reverse of :meth:`to_dict`; raises ``PlanError`` for other names or values that are no costs."""
        names = {field.name for field in attrs.fields(cls)}
        if set(values) != names or not all(type(value) in (int, float) for value in values.values()):
            raise PlanError(f"{sorted(values)} are not the costs {sorted(names)}")
        numbers: dict[str, Any] = {name: float(value) for name, value in values.items()}
        return cls(**numbers | {"cores": int(values["cores"])})

    def corrected(self, predicted_s: float, real_s: float, alpha: float = ALPHA) -> Costs:
        """The costs after one more round, whose time after the last arrival was predicted and measured.

        With ``f = (predicted / real) ** (1 - alpha)``, the ratio limited to 1/4 to 4, the fold rate is multiplied by
        f, and those of sums and the mean, which are fewer and so vary less, by f ** 0.5: an EWMA of their logarithms.
        So the rates follow effects that a short calibration cannot see: the place of the arena in memory, and other
        users of the machine.

        Raises ``PlanError`` for a time that is not above 0, or an alpha outside 0 to 1.
        """
        if not (predicted_s > 0 and real_s > 0 and 0 <= alpha <= 1):
            raise PlanError(f"predicted_s={predicted_s!r}, real_s={real_s!r}, alpha={alpha!r}: above 0; from 0 to 1")
        factor = min(max(predicted_s / real_s, 0.25), 4.0) ** (1 - alpha)
        return attrs.evolve(
            self,
            fold_bytes_s=self.fold_bytes_s * factor,
            sum_bytes_s=self.sum_bytes_s * factor**0.5,
            mean_bytes_s=self.mean_bytes_s * factor**0.5,
        )

    def machine(self) -> Machine:
        """Such a machine, with nothing to do."""
        return Machine(self.cores, self.parallel)

    def work(self, sizes: Sizes) -> Work:
        """The seconds of each step for updates, sums and means of these sizes: ``bytes / rate``.

        Landing takes ``arrays * land_array_s`` more.
        """
        return Work(
            land_s=sizes.update_bytes / self.land_bytes_s + sizes.arrays * self.land_array_s,
            update_s=sizes.update_bytes / self.fold_bytes_s,
            sum_s=sizes.sum_bytes / self.sum_bytes_s,
            mean_s=sizes.mean_bytes / self.mean_bytes_s,
            dispatch_s=self.dispatch_s,
            cold_s=self.cold_start_s,
            update_touch_s=sizes.update_bytes / self.first_read_bytes_s,
            sum_touch_s=sizes.sum_bytes / self.first_read_bytes_s,
            sum_made_s=sizes.sum_bytes / self.first_write_bytes_s,
            mean_made_s=sizes.mean_bytes / self.first_write_bytes_s,
            update_bytes=sizes.update_bytes,
            sum_bytes=sizes.sum_bytes,
            mean_bytes=sizes.mean_bytes,
        )


@attrs.frozen
class Prediction:
    """The predicted cost of a round on one Node.

    Attributes
    ----------
    completion_s : float
        From the first arrival to the mean.
    last_to_result_s : float
        From the last arrival to the mean.
    cpu_s : float
        Seconds of all cores: aggregation and the start of workers, and landing where it is predicted too.
    peak_bytes : int
        The largest size of updates, sums and the mean together at any time.
    runtimes : int
        Workers that had a role in the round or were warm.
    started : int
        Workers that were started.
    """

    completion_s: float
    last_to_result_s: float
    cpu_s: float
    peak_bytes: int
    runtimes: int
    started: int


def predict(
    shape: Shape,
    timing: str,
    arrivals: Sequence[float],
    sizes: Sizes,
    costs: Costs,
    workers: int,
    *,
    warm: int | None = None,
    rate: float | None = None,
    has_landed: bool = True,
) -> Prediction:
    """Predicts a round on one Node whose updates arrive at `arrivals`.

    The rules of ``lifl.planner.aggregation`` are played through in virtual time; each event costs microseconds.

    Parameters
    ----------
    shape : Shape
    timing : str
        One of ``lifl.planner.timing.TIMINGS``.
    arrivals : sequence of float
        Seconds, sorted, at least one.
    sizes : Sizes
    costs : Costs
        The costs of this machine.
    workers : int
        The most workers; 0: the calling process does the work, as one worker.
    warm : int, optional
        Workers that wait for work already; default: all.
    rate : float, optional
        Updates per second that ``jit`` expects until it has seen a rate; default: unknown.
    has_landed : bool
        True: an update can be folded at its arrival. False: its bytes are there at its arrival, and it is landed
        first, at the cost of a core.

    Raises ``PlanError`` without arrivals, for arrivals that are not sorted, or for an unknown timing.
    """
    check_timing(timing)
    if not arrivals or any(later < earlier for earlier, later in pairwise(arrivals)):
        raise PlanError(f"{len(arrivals)} arrivals: give at least one, sorted")
    engine, machine = Engine(), costs.machine()
    workers = max(1, workers)
    node = Aggregation(
        Site(engine, machine),
        costs.work(sizes),
        shape,
        timing,
        len(arrivals),
        workers=workers,
        warm=workers if warm is None else warm,
        rate=rate,
    )
    first, arrive = arrivals[0], node.ready if has_landed else node.land
    for arrival in arrivals:
        engine.at(arrival - first, arrive)
    engine.run()
    return Prediction(
        completion_s=node.done_s,
        last_to_result_s=node.done_s - (arrivals[-1] - first),
        cpu_s=machine.cpu_s,
        peak_bytes=node.peak_bytes,
        runtimes=node.num_workers,
        started=node.started,
    )
