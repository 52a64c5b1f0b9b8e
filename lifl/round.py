"""One round as its owner sees it: open, submit or loan, result, closed.

Owns the round's blocks and its books: who was accepted, refused, folded. It starts no process and reads
no ring; its host (a Node) carries descriptors to and from it, with the host's lock held.
"""

from __future__ import annotations

import errno
import sys
import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Protocol

import attrs
import numpy as np

from lifl import admission, fold, shm
from lifl.errors import AdmissionError, ArenaCorruptError, RoundError, ShmError
from lifl.metrics import Contribution, Rejection, RoundReport
from lifl.ring import Descriptor, Kind, Outbox
from lifl.shm import AGENT, Arena, Block, Lease, State
from lifl.tensor import CODES, Array, TensorSpec, torch_views

if TYPE_CHECKING:
    import torch

Timing = Literal["eager", "lazy"]
Order = Literal["any", "flower"]

WAIT_CAP_S = 0.1
CLOSE_TIMEOUT_S = 30.0


class Host(Protocol):
    """What a round needs of the Node that runs it."""

    arena: Arena
    outbox: Outbox
    changed: threading.Condition

    def pump(self) -> None:
        """Without workers: does the work that is there, now."""

    def check_workers(self) -> None:
        """Raises PeerGoneError if one is gone."""

    def relieve(self) -> bool:
        """Memory is short: makes lazy rounds fold what they hold; false if nothing will come free."""

    def forget(self, round_: Round) -> None:
        """The round is closed."""


@attrs.define(eq=False)
class _Update:
    """An accepted update, until it is folded and after."""

    client_id: str
    weight: float
    block: Block
    arrived_s: float
    runtime: int = 0
    folded_s: float = 0.0
    fold_ns: tuple[int, int] = (0, 0)
    is_folded: bool = False


@attrs.frozen
class RoundResult:
    """A round's mean and how it came about.

    Attributes
    ----------
    arrays : mapping of str to numpy.ndarray
        The weighted mean: the spec's names, shapes and dtypes (with ``order="flower"``, Flower's dtypes).
        Views of the arena, no copies; they stay valid after the round and the Node are closed, and the
        memory goes back when the last one is dropped. bfloat16 arrays are their bits as uint16.
    weight : float
        The sum of the weights in the mean.
    num_updates : int
        How many updates are in it.
    rejected : tuple of Rejection
        Who is not, and why.
    report : RoundReport
        All of it, with times.
    """

    spec: TensorSpec
    arrays: Mapping[str, Array]
    weight: float
    num_updates: int
    rejected: tuple[Rejection, ...]
    report: RoundReport

    def tensors(self) -> dict[str, torch.Tensor]:
        """The same memory as torch tensors (imports torch)."""
        return torch_views(self.spec, self.arrays)


class Loan:
    """Room for one update in the arena, to be written in place and sent without a copy.

    A context manager: leaving it without :meth:`send` gives the room back.
    """

    def __init__(self, round_: Round, client_id: str, lease: Lease) -> None:
        self._round, self.client_id, self._lease = round_, client_id, lease
        self._arrays: dict[str, Array] | None = None

    @property
    def arrays(self) -> Mapping[str, Array]:
        """Writable NumPy views of the block by name. What they hold before they are written is undefined.

        Raises :class:`LeaseError` after ``send`` or ``release``.
        """
        buffer = self._lease.buffer
        if self._arrays is None:
            self._arrays = self._round.spec.views(buffer)
        return self._arrays

    def tensors(self) -> dict[str, torch.Tensor]:
        """The same memory as torch tensors (imports torch)."""
        return torch_views(self._round.spec, self.arrays)

    @property
    def address(self) -> int:
        """Where the block begins in this process, for those who write it through another library."""
        return shm.address_of(self._lease.buffer)

    def send(self, weight: float) -> None:
        """Submits what was written. The memory is the round's from here on; arrays become read-only.

        Raises
        ------
        AdmissionError
            If the update is refused: weight, NaN or Inf, the round is complete. The room is given back.
        LeaseError
            If it was sent or released before.
        """
        self._round._send(self, weight, looked_at=False)

    def release(self) -> None:
        """Gives the room back unsent; :class:`LeaseError` while a view of it is held elsewhere."""
        kept, self._arrays = self._arrays, None
        try:
            if kept is not None:
                kept.clear()
            self._lease.release()
        finally:
            self._round._returned(self, is_live=self._lease.is_live)

    def __enter__(self) -> Loan:
        return self

    def __exit__(self, *_: object) -> None:
        if self._lease.is_live:
            self._end()
            self._lease.abandon()
            self._round._returned(self, is_live=False)

    def _end(self) -> None:
        for view in (self._arrays or {}).values():
            view.flags.writeable = False
        self._arrays = None


class Round:
    """An open round. Made by :meth:`lifl.Node.open_round`; a context manager that closes it.

    Safe to use from several threads.
    """

    def __init__(
        self,
        host: Host,
        number: int,
        spec: TensorSpec,
        expected: int,
        timing: Timing,
        order: Order,
        leaves: tuple[int, ...],
        mean: Block,
        reserved: list[Block],
    ) -> None:
        self._host, self.number, self.spec, self.expected = host, number, spec, expected
        self.timing, self.order = timing, order
        self._leaves, self._mean, self._reserved = leaves, mean, reserved
        self._phase: Literal["open", "folding", "done", "failed", "closed"] = "open"
        self._error: Exception | None = None
        self._updates: list[_Update] = []
        self._by_block: dict[tuple[int, int], _Update] = {}
        self._clients: set[str] = set()  # accepted, or with a loan out
        self._rejected: list[Rejection] = []
        self._outstanding = dict.fromkeys(leaves, 0)
        self._loans = 0
        self._acks: set[int] = set()
        self._opened = time.monotonic()
        self._land_s = 0.0
        self._done_s = 0.0
        self._finish_ns = 0
        self._result: RoundResult | None = None

    # ------------------------------------------------------------ updates in

    def submit(
        self,
        arrays: Mapping[str, Any],
        weight: float = 1.0,
        client_id: object = None,
        *,
        timeout: float | None = None,
    ) -> None:
        """Copies one update into the arena, looking for NaN and Inf on the way, and hands it on.

        Parameters
        ----------
        arrays : mapping of str to array
            NumPy arrays or torch tensors with exactly the spec's names, shapes and dtypes.
        weight : float
            Finite, above 0; usually the client's number of examples.
        client_id : object
            Named in refusals and in the report by its ``str``; one update of each client counts. Without
            one, the update is numbered.
        timeout : float or None
            Seconds to wait for room in the arena; ``None`` waits as long as room can still come free.

        Raises
        ------
        AdmissionError
            If it is refused; the round goes on.
        ShmError
            If the arena stays full.
        """
        who = self._name(client_id)
        try:
            weight = admission.check_weight(who, weight)
            admission.check_arrays(who, self.spec, arrays)
        except AdmissionError as error:
            self.reject(error)
            raise
        with self.loan(who, timeout=timeout) as loan:
            begin = time.monotonic()
            base = loan.address
            for name, code, offset, count in self.spec.offsets:
                bad = self._copy(arrays[name], loan, name, code, base + offset, count)
                if bad >= 0:
                    value = float(np.ravel(_bits_as_float(arrays[name], code))[bad])
                    error = admission.refuse_value(who, name, bad, value)
                    self.reject(error)
                    raise error
            self._land_s += time.monotonic() - begin
            self._send(loan, weight, looked_at=True)

    def _copy(self, array: Any, loan: Loan, name: str, code: int, target: int, count: int) -> int:
        """Copies one array to its place; the flat index of its first non-finite element, or -1."""
        if count == 0:
            return -1
        array = _as_numpy(array)
        if array.flags.c_contiguous:
            return shm.copy_finite(code, target, array.ctypes.data, count)
        loan.arrays[name][...] = array.view(np.uint16) if array.dtype.name == "bfloat16" else array
        return shm.copy_finite(code, target, target, count)

    def loan(self, client_id: object = None, *, timeout: float | None = None) -> Loan:
        """Room for one update, to be written in place: see :class:`Loan`.

        Waits while the arena is full and room can come free; `timeout` in seconds bounds that.

        Raises
        ------
        AdmissionError
            If the client has an update in the round, or the round is complete.
        ShmError
            ENOSPC if the arena stays full.
        """
        who = self._name(client_id)
        host = self._host
        with host.changed:
            try:
                self._check_open(who)
            except AdmissionError as error:
                self.reject(error)
                raise
            block = wait_for_block(host, self.spec.layout.update_bytes, timeout, f"an update of client {who}")
            self._check_open(who)
            self._clients.add(who)
            self._loans += 1
        return Loan(self, who, Lease(host.arena, block))

    def reject(self, error: AdmissionError) -> None:
        """Puts a refusal into the report, also one decided elsewhere (an error reply, a bad format)."""
        with self._host.changed:
            self._rejected.append(Rejection(error.client_id, error.rule, error.reason))

    def _name(self, client_id: object) -> str:
        if client_id is not None:
            return str(client_id)
        with self._host.changed:
            return f"#{len(self._updates) + len(self._rejected) + self._loans + 1}"

    def _check_open(self, who: str) -> None:
        self._host.check_workers()
        if who in self._clients:
            raise AdmissionError(who, "duplicate", "an update of this client is in the round: the first one counts")
        if self._phase != "open":
            state = "complete" if self._phase in ("folding", "done") else self._phase
            raise AdmissionError(who, "closed", f"round {self.number} is {state}: open another one")

    def _returned(self, loan: Loan, *, is_live: bool) -> None:
        if is_live:
            return
        with self._host.changed:
            self._loans -= 1
            self._clients.discard(loan.client_id)
            self._host.changed.notify_all()

    def _send(self, loan: Loan, weight: float, *, looked_at: bool) -> None:
        lease, who, host = loan._lease, loan.client_id, self._host
        address = shm.address_of(lease.buffer)  # raises if the loan has ended
        try:
            weight = admission.check_weight(who, weight)
            if not looked_at:
                self._look_for_nonfinite(who, address)
            with host.changed:
                host.check_workers()
                if self._phase != "open":
                    self._clients.discard(who)
                    self._check_open(who)
                self._accept(loan, weight)
        except AdmissionError as error:
            self.reject(error)
            loan.__exit__()
            raise
        host.pump()

    def _look_for_nonfinite(self, who: str, address: int) -> None:
        for name, code, offset, count in self.spec.offsets:
            bad = shm.copy_finite(code, address + offset, address + offset, count)
            if bad >= 0:
                raise admission.refuse_value(who, name, bad, float("nan"))

    def _accept(self, loan: Loan, weight: float) -> None:
        lease = loan._lease
        update = _Update(loan.client_id, weight, lease.block, time.monotonic() - self._opened)
        note = self._host.arena.note(update.block.index)
        note.weight, note.tag = weight, len(self._updates)
        loan._end()
        lease.hand_over()
        self._loans -= 1
        self._updates.append(update)
        self._by_block[update.block.index, update.block.generation] = update
        if self.order == "any":
            self._hand_on(update)
        if len(self._updates) == self.expected:
            self._flush()

    def _hand_on(self, update: _Update) -> None:
        leaf = min(self._leaves, key=lambda i: self._outstanding[i])
        update.runtime = leaf
        self._outstanding[leaf] += 1
        if not self._host.arena.move(update.block, (AGENT, State.WRITING), (leaf, State.READY)):
            raise ArenaCorruptError(errno.EBADMSG, f"block {update.block.index} changed hands while it was written")
        block = update.block
        self._host.outbox.push(leaf, Descriptor(Kind.UPDATE, self.number, block.index, block.generation))

    def press(self) -> None:
        """Makes lazy leaves fold what they hold, because memory is short. The host holds the lock."""
        for leaf, n in self._outstanding.items():
            if n and self.timing == "lazy":
                self._host.outbox.push(leaf, Descriptor(Kind.PRESS, self.number))

    @property
    def is_moving(self) -> bool:
        """True if blocks of this round will come free without anybody's help. The host holds the lock."""
        return self._phase == "folding" or any(self._outstanding.values()) or self._loans > 0

    def _flush(self) -> None:
        """Everything that will come has come: commit, send to the top, finish."""
        self._phase = "folding"
        if self.order == "flower":
            factors = fold.flower_factors([u.weight for u in self._updates])
            for update, factor in zip(self._updates, factors, strict=True):
                self._host.arena.note(update.block.index).weight = factor
                self._hand_on(update)
        top, mean = self._leaves[0], self._mean
        self._host.arena.move(mean, (AGENT, State.WRITING), (top, State.WRITING))
        arg = top << 8 | len(self._leaves)
        for leaf in self._leaves:
            self._host.outbox.push(leaf, Descriptor(Kind.FLUSH, self.number, mean.index, mean.generation, arg))

    # ------------------------------------------------------------ the result

    def close_early(self) -> None:
        """Takes no more updates: the result is made of those that are in. Harmless when complete."""
        with self._host.changed:
            if self._phase == "open":
                if self._updates:
                    self._flush()
                else:
                    self._fail(RoundError(f"round {self.number} was closed without an update{self._refusals()}"))
        self._host.pump()

    def result(self, timeout: float | None = None) -> RoundResult:
        """Waits until `expected` updates are in and folded, or the round was closed early.

        Parameters
        ----------
        timeout : float or None
            Seconds; ``None`` waits for ever. Ctrl-C ends the wait.

        Raises
        ------
        RoundError
            At the time-out (the round stays open), if no update was accepted, if a mean overflowed,
            or if the round was closed.
        PeerGoneError
            If a worker died.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._host.changed:
            while self._phase in ("open", "folding"):
                self._host.check_workers()
                left = WAIT_CAP_S if deadline is None else deadline - time.monotonic()
                if left <= 0:
                    have = f"{len(self._updates)} of {self.expected} updates are in"
                    advice = "wait longer, or call close_early() for what is there"
                    raise RoundError(
                        f"round {self.number}: {have} after {timeout:g} s{self._refusals()}: {advice}"
                    )
                self._host.changed.wait(min(left, WAIT_CAP_S))
            if self._result is None:
                raise self._error or RoundError(f"round {self.number} is closed")
            return self._result

    def report(self) -> RoundReport:
        """The books as they stand now; final once there is a result."""
        with self._host.changed:
            return self._report()

    def _report(self) -> RoundReport:
        updates, now = self._updates, self._done_s or time.monotonic() - self._opened
        last = max((u.arrived_s for u in updates), default=0.0)
        folds = {(u.runtime, u.fold_ns) for u in updates}
        stages = {
            "receive": last,
            "land": self._land_s,
            "fold": sum(end - begin for _, (begin, end) in folds) / 1e9,
            "finish": self._finish_ns / 1e9,
            "last_to_result": now - last,
            "total": now,
        }
        return RoundReport(
            round=self.number,
            expected=self.expected,
            timing=self.timing,
            order=self.order,
            accepted=tuple(
                Contribution(u.client_id, u.weight, u.runtime, u.arrived_s, u.folded_s) for u in updates
            ),
            rejected=tuple(self._rejected),
            stages=stages,
            error=None if self._error is None else str(self._error),
        )

    def _refusals(self) -> str:
        if not self._rejected:
            return ""
        shown = "; ".join(f"{r.client_id} ({r.rule}: {r.reason})" for r in self._rejected[:5])
        return f"; refused: {shown}" + (f" and {len(self._rejected) - 5} more" if len(self._rejected) > 5 else "")

    # ------------------------------------------------------------ what workers say; the host holds the lock

    def handle(self, sender: int, d: Descriptor) -> None:
        """Takes a descriptor from a worker into the books."""
        if d.kind == Kind.FOLDED:
            self._folded(sender, d)
        elif d.kind == Kind.RESULT:
            self._finished(d)
        elif d.kind == Kind.ABORTED:
            self._acks.add(sender)
        elif d.kind == Kind.FAILED:
            self._fail(RoundError(f"round {self.number}: worker {sender} met an error, see its traceback above"))

    def _folded(self, sender: int, d: Descriptor) -> None:
        update = self._by_block.pop((d.block, d.generation), None)
        if update is None:
            raise ArenaCorruptError(errno.EBADMSG, f"worker {sender} folded block {d.block}, which is no update")
        note = self._host.arena.note(d.block)
        update.fold_ns = (note.begin_ns, note.end_ns)
        update.folded_s = note.end_ns / 1e9 - self._opened
        update.is_folded = True
        self._outstanding[sender] -= 1
        self._host.arena.reclaim(update.block)

    def _finished(self, d: Descriptor) -> None:
        note = self._host.arena.note(d.block)
        if note.tag != len(self._updates):
            message = f"round {self.number}: the mean contains {note.tag} updates, {len(self._updates)} were accepted"
            self._fail(ArenaCorruptError(errno.EBADMSG, message))
            return
        if d.arg:
            message = f"round {self.number}: a weighted sum left the range of float64: use smaller weights"
            self._fail(RoundError(message))
            return
        self._finish_ns = note.end_ns - note.begin_ns
        self._done_s = time.monotonic() - self._opened
        self._phase = "done"
        buffer = self._host.arena.buffer(self._mean)
        views = self.spec.flower_views if self.order == "flower" else self.spec.views
        report = self._report()
        weight = sum(u.weight for u in self._updates)
        self._result = RoundResult(
            self.spec, views(buffer), weight, len(self._updates), report.rejected, report
        )
        del buffer
        self._host.arena.reclaim(self._mean)
        for block in self._reserved:
            self._host.arena.reclaim(block)
        self._reserved = []

    def _fail(self, error: Exception) -> None:
        if self._phase in ("open", "folding"):
            self._phase, self._error = "failed", error
            self._done_s = time.monotonic() - self._opened

    def fail(self, error: Exception) -> None:
        """Ends the round without a result. The host holds the lock."""
        self._fail(error)

    # ------------------------------------------------------------ the end

    def close(self) -> None:
        """Ends the round, with or without a result, and gives every block back. Harmless when closed.

        Loans that are still out end at their ``send`` or ``release``. The result stays valid.
        """
        host = self._host
        with host.changed:
            if self._phase == "closed":
                return
            is_done = self._phase == "done"
            if not is_done:
                self._fail(RoundError(f"round {self.number} was closed before its result"))
                for leaf in self._leaves:
                    host.outbox.push(leaf, Descriptor(Kind.ABORT, self.number))
        if not is_done:
            host.pump()
            self._take_back()
        with host.changed:
            self._phase = "closed"
            self._result = None  # who asked for it has it; a kept Round must not pin its memory
            host.forget(self)
            host.changed.notify_all()

    def _take_back(self) -> None:
        """Waits until no worker touches the round any more, then reclaims what it had."""
        host, deadline = self._host, time.monotonic() + CLOSE_TIMEOUT_S
        with host.changed:
            while self._acks < set(self._leaves):
                try:
                    host.check_workers()
                except Exception:
                    return  # a worker is gone, and with it the Node: nothing is reclaimed from the living
                if time.monotonic() > deadline:
                    raise RoundError(f"round {self.number}: workers did not let go of it in {CLOSE_TIMEOUT_S:g} s")
                host.changed.wait(WAIT_CAP_S)
            host.arena.move(self._mean, (self._leaves[0], State.WRITING), (AGENT, State.FREE))
            for block in [*self._reserved, self._mean, *(u.block for u in self._by_block.values())]:
                host.arena.reclaim(block)
            self._reserved, self._by_block = [], {}

    def __enter__(self) -> Round:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Round {self.number}: {len(self._updates)} of {self.expected} updates, {self._phase}>"


def wait_for_block(host: Host, nbytes: int, timeout: float | None, purpose: str) -> Block:
    """A WRITING block of the agent's, as soon as there is one. The caller holds ``host.changed``.

    Raises :class:`ShmError` (ENOSPC) at the time-out, or at once if nothing will come free by itself.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    while (block := host.arena.alloc(nbytes)) is None:
        host.check_workers()
        moving = host.relieve()
        left = WAIT_CAP_S if deadline is None else deadline - time.monotonic()
        if not moving or left <= 0:
            if (block := host.arena.alloc(nbytes)) is not None:
                break
            free, total = host.arena.free_bytes, host.arena.block_bytes
            why = "nothing in it will come free by itself" if not moving else f"it was for {timeout:g} s"
            raise ShmError(
                errno.ENOSPC,
                f"no room for {purpose}: {nbytes:,} bytes wanted, {free:,} of {total:,} free, and {why}; "
                "give the Node more memory, close rounds, or drop old results",
            )
        host.changed.wait(min(left, WAIT_CAP_S))
    return block


def _as_numpy(array: Any) -> Array:
    """The same memory as a NumPy array; of a torch tensor too if it is on the CPU."""
    if not hasattr(array, "detach"):
        return np.asarray(array)
    tensor = array.detach().cpu()
    if str(tensor.dtype) == "torch.bfloat16":
        tensor = tensor.view(sys.modules["torch"].uint16)
    return np.asarray(tensor.numpy())


def _bits_as_float(array: Any, code: int) -> Array:
    array = _as_numpy(array)
    if code == CODES["bfloat16"]:
        return (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return array
