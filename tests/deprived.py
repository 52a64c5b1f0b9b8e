"""Runs a command with less than this process has: ``python deprived.py WAY COMMAND ...``, as root.

It imports the standard library alone, which every user can read. The command and all that it starts never get back
what is taken away.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys
from pathlib import Path

NOBODY = 65534
CAP_DAC_READ_SEARCH, CAP_NET_ADMIN, CAP_BPF = 2, 12, 39
BCC = Path("/usr/lib/python3/dist-packages/bcc")

_PR_SET_KEEPCAPS, _PR_SET_SECCOMP, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT = 8, 22, 24, 38, 47
_RAISE, _FILTER = 2, 2
_CAPABILITY_VERSION_3 = 0x20080522
_CLONE_NEWNS, _CLONE_NEWUSER, _CLONE_NEWNET = 0x00020000, 0x10000000, 0x40000000
_MS_REC, _MS_PRIVATE = 0x4000, 0x40000
_BPF = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "ppc64le": 361, "s390x": 351}

libc = ctypes.CDLL(None, use_errno=True)


def checked(result: int) -> None:
    """Raises what a C function's result says."""
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def prctl(option: int, *arguments: object) -> None:
    """prctl(2) with four arguments, as it insists on for some."""
    values = [ctypes.c_ulong(value) if isinstance(value, int) else value for value in arguments]
    values += [ctypes.c_ulong(0)] * (4 - len(values))
    checked(libc.prctl(option, *values))


def set_capabilities(*kept: int) -> None:
    """Has these and no others, in all sets."""
    low, high = (sum(1 << bit % 32 for bit in kept if bit // 32 == word) for word in (0, 1))
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    checked(libc.capset(header, struct.pack("=6I", low, low, low, high, high, high)))


def become_nobody(*kept: int) -> None:
    """Another user, with no capability but these; they reach the command too."""
    os.setgroups([])
    os.setgid(NOBODY)
    prctl(_PR_SET_KEEPCAPS, 1)
    os.setuid(NOBODY)
    set_capabilities(*kept)
    for capability in kept:
        prctl(_PR_CAP_AMBIENT, _RAISE, capability)


def nobody() -> None:
    """Another user, who may read every file all the same: not every checkout is open to everybody."""
    become_nobody(CAP_DAC_READ_SEARCH)


def just_enough() -> None:
    """Another user with the two capabilities that lifl asks for."""
    become_nobody(CAP_DAC_READ_SEARCH, CAP_NET_ADMIN, CAP_BPF)


def powerless() -> None:
    """Root, as in a container: without a capability, and with no way to get one."""
    last = int(Path("/proc/sys/kernel/cap_last_cap").read_text())
    for capability in range(last + 1):
        prctl(_PR_CAPBSET_DROP, capability)
    set_capabilities()


def refuse_bpf(error: int) -> None:
    """Every later bpf(2) fails with this error; everything else goes on."""
    instructions = (
        (0x20, 0, 0, 0),  # the number of the call
        (0x15, 0, 1, _BPF[platform.machine()]),
        (0x06, 0, 0, 0x00050000 | error),
        (0x06, 0, 0, 0x7FFF0000),
    )
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *one) for one in instructions))
    program = ctypes.create_string_buffer(struct.pack("@HP", len(instructions), ctypes.addressof(code)))
    prctl(_PR_SET_NO_NEW_PRIVS, 1)
    prctl(_PR_SET_SECCOMP, _FILTER, program)


def eperm() -> None:
    """As Docker's profile does."""
    refuse_bpf(1)


def enosys() -> None:
    """As a kernel without bpf(2) does, or podman's profile."""
    refuse_bpf(38)


def no_loopback() -> None:
    """A network namespace in which nothing has been set up."""
    checked(libc.unshare(_CLONE_NEWNET))


def user_namespace() -> None:
    """Root of a user namespace: all capabilities, and none that counts for bpf(2)."""
    checked(libc.unshare(_CLONE_NEWUSER))
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text("0 0 1")
    Path("/proc/self/gid_map").write_text("0 0 1")


def no_bcc() -> None:
    """The distribution's bcc is not installed: where it would be is an empty folder."""
    if BCC.is_dir():
        checked(libc.unshare(_CLONE_NEWNS))
        checked(libc.mount(b"none", b"/", None, ctypes.c_ulong(_MS_REC | _MS_PRIVATE), None))
        checked(libc.mount(b"none", str(BCC).encode(), b"tmpfs", ctypes.c_ulong(0), None))


WAYS = {
    way.__name__: way for way in (nobody, just_enough, powerless, eperm, enosys, no_loopback, user_namespace, no_bcc)
}

if __name__ == "__main__":
    WAYS[sys.argv[1]]()
    os.execvp(sys.argv[2], sys.argv[2:])
