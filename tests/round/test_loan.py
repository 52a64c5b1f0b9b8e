"""Loans: room in the arena that is written in place."""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import lifl
from lifl.errors import AdmissionError, LeaseError

pytestmark = pytest.mark.transports

WAIT_S = 60.0
SPEC = lifl.TensorSpec.from_arrays({"w": np.zeros((2, 3), np.float32), "steps": np.array(0)})
HUGE = lifl.TensorSpec.from_arrays({"w": np.zeros(3 * 2**19)})  # 12 MiB


def private_bytes(pid: int | str = "self") -> int:
    """Memory that is a process's alone: RssAnon, which shared mappings do not count towards."""
    line = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert line is not None
    return int(line[1]) * 1024


def test_what_is_written_in_place_counts(node: lifl.Node) -> None:
    """A loan's arrays have the spec's names, shapes and dtypes, and what they hold is the update."""
    with node.open_round(SPEC, expected=2) as round_:
        for i in range(2):
            with round_.loan(i) as loan:
                assert {n: (a.shape, a.dtype) for n, a in loan.arrays.items()} == {
                    "w": ((2, 3), np.dtype("float32")),
                    "steps": ((), np.dtype("int64")),
                }
                loan.arrays["w"][...] = [[0, 1, 2], [3, 4, 5]]
                loan.arrays["steps"][...] = 4 * i
                loan.send(weight=1)
        result = round_.result(WAIT_S)
    assert result.arrays["w"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert int(result.arrays["steps"]) == 2


def test_address_is_that_of_the_arrays(node: lifl.Node) -> None:
    """The arrays of a loan show the bytes that another library writes at its address."""
    with node.open_round(SPEC, expected=1) as round_, round_.loan() as loan:
        name, _, offset, _ = round_.spec.offsets[0]
        assert loan.arrays[name].ctypes.data == loan.address + offset


def test_sent_loan_is_over(node: lifl.Node) -> None:
    """After send every use raises LeaseError, and a view that was kept can no longer be written."""
    with node.open_round(SPEC, expected=5) as round_:
        with round_.loan("a") as loan:
            kept = loan.arrays["w"]
            kept[...] = 1
            loan.arrays["steps"][...] = 1
            loan.send(1)
            for use in (lambda: loan.arrays, lambda: loan.address, lambda: loan.send(1), loan.release, loan.tensors):
                with pytest.raises(LeaseError):
                    use()
            with pytest.raises(ValueError, match="read-only"):
                kept[0, 0] = 9
        round_.close_early()
        assert round_.result(WAIT_S).num_updates == 1


def test_release_after_send_lets_nobody_in_twice(node: lifl.Node) -> None:
    """A needless release raises LeaseError and does not open the door for the same client again."""
    with node.open_round(SPEC, expected=5) as round_:
        loan = round_.loan("a")
        loan.arrays["w"][...] = loan.arrays["steps"][...] = 1
        loan.send(1)
        with pytest.raises(LeaseError):
            loan.release()
        with pytest.raises(AdmissionError, match="duplicate"):
            round_.loan("a")


def test_unsent_loan_gives_its_room_back(node: lifl.Node) -> None:
    """Leaving the ``with`` without send, or releasing, frees the room and lets the client try again."""
    with node.open_round(SPEC, expected=1) as round_:
        free = node.arena.free_bytes
        with round_.loan("a") as loan:
            loan.arrays["w"][...] = 9
        loan = round_.loan("a")
        loan.release()
        with pytest.raises(LeaseError):
            loan.release()
        with pytest.raises(LeaseError):
            loan.send(1)
        assert node.arena.free_bytes == free


def test_forgotten_loan_gives_its_room_back(node: lifl.Node) -> None:
    """A loan that nobody holds any more is over when its round is closed, like one that was released."""
    free = node.arena.free_bytes
    with node.open_round(SPEC, expected=1) as round_:
        round_.loan("a")
    gc.collect()
    assert node.arena.free_bytes == free


def test_release_is_refused_while_a_view_is_held(node: lifl.Node) -> None:
    """A loan with a view kept elsewhere cannot be released; it stays usable."""
    with node.open_round(SPEC, expected=1) as round_:
        loan = round_.loan()
        kept = loan.arrays["w"][0]
        with pytest.raises(LeaseError, match="view"):
            loan.release()
        loan.arrays["w"][...] = loan.arrays["steps"][...] = 3
        assert kept.tolist() == [3, 3, 3]
        del kept
        loan.release()


def test_forgotten_view_keeps_its_bytes(node: lifl.Node) -> None:
    """A view of an abandoned loan never shows another update's bytes: its block waits for it."""
    with node.open_round(SPEC, expected=40) as round_:
        with round_.loan() as loan:
            kept = loan.arrays["w"]
            kept[...] = 42
        for _ in range(40):
            round_.submit({"w": np.zeros((2, 3), np.float32), "steps": np.array(0)})
        round_.result(WAIT_S)
        assert kept.min() == kept.max() == 42
        del kept


@pytest.mark.parametrize("weight", [0, -1, float("nan"), True, "3"])
def test_refused_send_ends_the_loan(node: lifl.Node, weight: float) -> None:
    """A loan sent with a bad weight is refused, over, and its room free; the client may try again."""
    with node.open_round(SPEC, expected=1) as round_:
        free = node.arena.free_bytes
        loan = round_.loan("a")
        loan.arrays["w"][...] = loan.arrays["steps"][...] = 1
        with pytest.raises(AdmissionError) as caught:
            loan.send(weight)
        assert (caught.value.client_id, caught.value.rule) == ("a", "weight")
        assert node.arena.free_bytes == free
        with pytest.raises(LeaseError):
            loan.send(1)
        assert [r.rule for r in round_.report().rejected] == ["weight"]
        round_.loan("a").release()


def test_loan_cannot_be_used_in_a_fork(node: lifl.Node, in_fork: Callable[[Callable[[], None]], int]) -> None:
    """In a forked child a loan raises LeaseError; in the parent it goes on."""
    with node.open_round(SPEC, expected=1) as round_, round_.loan() as loan:
        loan.arrays["w"][...] = loan.arrays["steps"][...] = 1

        def child() -> None:
            for use in (lambda: loan.arrays, lambda: loan.send(1), loan.release):
                with pytest.raises(LeaseError, match="fork"):
                    use()

        assert in_fork(child) == 0
        loan.send(1)
        assert round_.result(WAIT_S).num_updates == 1


def test_private_memory_does_not_grow_with_the_update(node: lifl.Node) -> None:
    """Writing, sending and folding 12 MiB takes no memory of its own, neither here nor in a worker."""
    with node.open_round(HUGE, expected=2) as round_:
        before = {pid: private_bytes(pid) for pid in ("self", *node.pids())}
        for i in range(2):
            with round_.loan(i) as loan:
                loan.arrays["w"].fill(i)
                loan.send(1)
        result = round_.result(WAIT_S)
        grown = {pid: private_bytes(pid) - n for pid, n in before.items()}
        assert result.arrays["w"].min() == result.arrays["w"].max() == 0.5
    assert all(n < HUGE.nbytes // 4 for n in grown.values()), grown


def test_worker_reads_the_block_that_was_lent(node: lifl.Node) -> None:
    """A change in the arena after a loan was sent is in the mean: nobody has taken a copy.

    A lazy worker holds the descriptor of the block; the change is made through the memfd, at the offset
    of the lent address in this process's mapping of it.
    """
    with node.open_round(SPEC, expected=2, timing="lazy") as round_:
        with round_.loan() as loan:
            loan.arrays["w"][...] = loan.arrays["steps"][...] = 1
            inode, offset = where(os.getpid(), loan.address)
            loan.send(1)
        assert inode == os.fstat(node.arena.fd).st_ino
        assert all(inode in inodes(pid) for pid in node.pids())
        os.pwrite(node.arena.fd, np.full(6, 101, np.float32).tobytes(), offset)
        round_.submit({"w": np.ones((2, 3), np.float32), "steps": np.array(1)})
        result = round_.result(WAIT_S)
    assert result.arrays["w"].tolist() == [[51.0] * 3] * 2


def mappings(pid: int) -> list[tuple[int, int, int, int]]:
    """The mappings of a process: first address, end, offset in its file, inode."""
    rows = []
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        addresses, _, offset, _, inode = line.split()[:5]
        first, end = (int(x, 16) for x in addresses.split("-"))
        rows.append((first, end, int(offset, 16), int(inode)))
    return rows


def inodes(pid: int) -> set[int]:
    """The files that a process has mapped."""
    return {inode for *_, inode in mappings(pid)}


def where(pid: int, address: int) -> tuple[int, int]:
    """The file, and the offset in it, that a process sees at an address."""
    return next(
        (inode, offset + address - first) for first, end, offset, inode in mappings(pid) if first <= address < end
    )


def test_torch_tensors_are_the_block(node: lifl.Node) -> None:
    """A loan's torch tensors are the block's memory, bfloat16 too, and the result's are the mean's."""
    torch = pytest.importorskip("torch")
    model = {"w": torch.ones(2, 3), "h": torch.ones(4, dtype=torch.bfloat16), "n": torch.tensor(3)}
    spec = lifl.TensorSpec.from_arrays(model)
    with node.open_round(spec, expected=3) as round_:
        with round_.loan() as loan:
            tensors = loan.tensors()
            for name, tensor in tensors.items():
                assert (tensor.dtype, tensor.shape) == (model[name].dtype, model[name].shape)
                assert tensor.data_ptr() == loan.arrays[name].ctypes.data
                tensor.copy_(model[name])
            del tensors, tensor
            loan.send(1)
        round_.submit(model)
        round_.submit({"w": torch.ones(3, 2).T, "h": torch.ones(8, dtype=torch.bfloat16)[::2], "n": torch.tensor(3)})
        result = round_.result(WAIT_S)
    for name, tensor in result.tensors().items():
        assert tensor.dtype == model[name].dtype
        assert torch.equal(tensor, model[name])
        assert tensor.data_ptr() == result.arrays[name].ctypes.data


@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_torch_values_are_checked(node: lifl.Node, bad: str) -> None:
    """A NaN or Inf in a torch tensor, bfloat16 or with a gradient, is refused with its place."""
    torch = pytest.importorskip("torch")
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        model = {"w": torch.ones(5, dtype=dtype, requires_grad=True)}
        poisoned = model["w"].detach().clone()
        poisoned[3] = float(bad)
        with node.open_round(lifl.TensorSpec.from_arrays(model), expected=1) as round_:
            with pytest.raises(AdmissionError, match="flat index 3"):
                round_.submit({"w": poisoned})
            round_.submit(model)
            assert torch.equal(round_.result(WAIT_S).tensors()["w"], torch.ones(5, dtype=dtype))
