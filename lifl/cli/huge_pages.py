"""The pages that the kernel gives to shared memory: from its setting, and by a trial on a memfd.

Frees the memory of the trial, and changes no setting.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

SHMEM_ENABLED = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
"""The kernel's setting for memory like an arena's: whether it is in huge pages from the start."""
HUGE_BYTES = 2 * 2**20
_MADV_COLLAPSE = 25  # Linux 6.1; the module mmap has no name for it before Python 3.13
_MAP_FIXED = 0x10

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_FAILED = ctypes.c_void_p(-1).value


def shmem_enabled() -> str | None:
    """The chosen value, in brackets in the kernel's file; None if the kernel has no huge pages for shared memory."""
    try:
        words = SHMEM_ENABLED.read_text().split()
    except OSError:
        return None
    return next((word.strip("[]") for word in words if word.startswith("[")), None)


def collapse() -> None:
    """Makes the kernel put 2 MiB of a memfd into one huge page; raises the kernel's ``OSError`` if it cannot."""
    fd = os.memfd_create("lifl-doctor")
    try:
        os.ftruncate(fd, HUGE_BYTES)
        # A huge page begins at a multiple of its size, so the address range is twice as large: it contains one.
        room = _mapped(None, 2 * HUGE_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
        try:
            start = -(-room // HUGE_BYTES) * HUGE_BYTES
            _mapped(start, HUGE_BYTES, mmap.MAP_SHARED | _MAP_FIXED, fd)
            ctypes.memset(start, 1, HUGE_BYTES)
            if _libc.madvise(start, HUGE_BYTES, _MADV_COLLAPSE):
                raise _error()
        finally:
            _libc.munmap(room, 2 * HUGE_BYTES)
    finally:
        os.close(fd)


def _mapped(address: int | None, nbytes: int, flags: int, fd: int) -> int:
    found = _libc.mmap(address, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd, 0)
    if found is None or found == _FAILED:
        raise _error()
    return int(found)


def _error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))
