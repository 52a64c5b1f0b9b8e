"""Freed memory of a process, returned to the operating system."""

from __future__ import annotations

import ctypes


def give_back() -> None:
    """Returns to the operating system the freed memory that glibc keeps; does nothing with another C library.

    glibc keeps freed pieces of up to 32 MB for later use (``M_MMAP_THRESHOLD`` of mallopt(3) grows by itself); after
    the push of a model they take about as many bytes as the model. The call takes milliseconds, without the GIL.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
