"""Shared memory as Python sees it: the arena and its blocks, rings, messages, kernels. Knows no rounds."""

from lifl.shm.arena import Arena, Lease

__all__ = ["Arena", "Lease"]
