"""The one copy: a client's arrays into a block, looked at for NaN and Inf on the way."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from lifl.round import admission
from lifl.round.loan import Loan
from lifl.shm import kernels
from lifl.tensor import CODES, Array, TensorSpec


def copy_in(spec: TensorSpec, arrays: Mapping[str, Any], loan: Loan) -> None:
    """Copies `arrays`, which have the spec's names, shapes and dtypes, to where they lie in the loan's block.

    Raises :class:`~lifl.errors.AdmissionError` at the first NaN or Inf.
    """
    base = loan.address
    for name, code, offset, count in spec.offsets:
        if count == 0:
            continue
        array, target = as_numpy(arrays[name]), base + offset
        if array.flags.c_contiguous:
            bad = kernels.copy_finite(code, target, array.ctypes.data, count)
        else:
            loan.arrays[name][...] = array.view(np.uint16) if array.dtype.name == "bfloat16" else array
            bad = kernels.copy_finite(code, target, target, count)
        if bad >= 0:
            raise admission.refuse_value(loan.client_id, name, bad, _value(array, code, bad))


def look_for_nonfinite(spec: TensorSpec, loan: Loan) -> None:
    """Raises :class:`~lifl.errors.AdmissionError` if what was written in place holds a NaN or Inf."""
    base = loan.address
    for name, code, offset, count in spec.offsets:
        bad = kernels.copy_finite(code, base + offset, base + offset, count)
        if bad >= 0:
            raise admission.refuse_value(loan.client_id, name, bad, _value(loan.arrays[name], code, bad))


def as_numpy(array: Any) -> Array:
    """The same memory as a NumPy array; of a torch tensor too if it is on the CPU."""
    if not hasattr(array, "detach"):
        return np.asarray(array)
    tensor = array.detach().cpu()
    if str(tensor.dtype) == "torch.bfloat16":
        tensor = tensor.view(sys.modules["torch"].uint16)
    return np.asarray(tensor.numpy())


def _value(array: Array, code: int, index: int) -> float:
    if code == CODES["bfloat16"]:
        array = (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return float(array.flat[index])
