"""Memory that a process has freed, back to the machine."""

from __future__ import annotations

import ctypes


def give_back() -> None:
    """Gives the machine what the C library keeps of freed memory; nothing where it is not glibc.

    glibc keeps freed pieces of up to 32 MB for later (``M_MMAP_THRESHOLD`` of mallopt(3) grows by itself), and a model
    that has been pushed has left about as many bytes of them as it has. Takes milliseconds; the GIL is free meanwhile.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
