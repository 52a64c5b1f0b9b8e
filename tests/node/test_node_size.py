"""The largest thing that a Node is asked to do here. Descriptors do not tell how large a block is: on one transport."""

from __future__ import annotations

import numpy as np
import pytest

import lifl
from lifl.shm import sizes
from lifl.shm.machine import available_bytes
from lifl.tensor import Tensor

WAIT_S = 120.0


@pytest.mark.ladder
@pytest.mark.big
@pytest.mark.timeout(180)
def test_one_array_of_a_gibibyte() -> None:
    """A single array of 1 GiB is averaged in place: a block of the arena, sums of 2 GiB, no copy."""
    count, pattern = 2**28, np.arange(2**14, dtype=np.float32)
    spec = lifl.TensorSpec((Tensor("w", "float32", (count,)),))
    memory = sizes.round_bytes(spec, 1, 1)
    if available_bytes() < memory + 2**30:
        pytest.skip(f"needs {memory + 2**30:,} bytes of memory")
    with lifl.Node(memory, workers=1) as node, node.open_round(spec, expected=2) as round_:
        for i in range(2):
            with round_.loan(i) as loan:
                loan.arrays["w"].reshape(-1, len(pattern))[...] = pattern + 4 * i
                loan.send(weight=1 + 2 * i)
        mean = round_.result(WAIT_S).arrays["w"]
        assert mean.shape == (count,)
        assert (mean.reshape(-1, len(pattern)) == pattern + 3).all()
