"""What this machine allows: the program loaded, or why not and what to do about it.

Nothing is guessed from versions: it is tried.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import attrs

from lifl.ebpf import prebuilt
from lifl.ebpf.prebuilt import Program
from lifl.errors import EbpfUnavailableError

LOADERS = ("prebuilt", "bcc")
VARIABLE = "LIFL_EBPF_LOADER"
"""Which loader is used if none is named."""

CAPABILITIES = {"CAP_NET_ADMIN": 12, "CAP_BPF": 39}
CAP_SYS_ADMIN = 21
"""It includes the two."""


@attrs.frozen
class Support:
    """Whether the sidecar can be had here.

    Attributes
    ----------
    available : bool
    loader : str or None
        What has loaded the program.
    reason : str
        Why it is not available, or that it is.
    remedy : str
        What to do to have it; empty if there is nothing.
    """

    available: bool
    loader: str | None
    reason: str
    remedy: str = ""


def load(loader: str | None = None) -> Program:
    """The program, loaded and attached; raises :class:`EbpfUnavailableError` with the reason and the remedy."""
    loader = loader or os.environ.get(VARIABLE) or "prebuilt"
    if loader not in LOADERS:
        raise ValueError(f"{VARIABLE}={loader!r}: give one of {', '.join(LOADERS)}")
    try:
        if loader == "bcc":
            from lifl.ebpf import compiled  # late: it looks for a compiler

            return compiled.load()
        return prebuilt.load()
    except OSError as error:
        raise EbpfUnavailableError(*explained(error)) from error


def support(loader: str | None = None) -> Support:
    """Tries it, with a socket in the map, and lets go of it."""
    from lifl.ebpf.pairs import pair

    try:
        program = load(loader)
    except EbpfUnavailableError as error:
        return Support(False, None, error.reason, error.remedy)
    try:
        own, anchor = pair()
        with own, anchor:
            program.socks.update(1, own.fileno())
    except OSError as error:
        return Support(False, None, *explained(error))
    finally:
        program.close()
    return Support(True, program.loader, f"loaded ({program.loader}) and attached")


def explained(error: OSError) -> tuple[str, str]:
    """Why the kernel refused, and what to do, as far as can be told."""
    kernel = f"Linux {os.uname().release}"
    said = error.strerror or str(error)
    if error.errno in (errno.EPERM, errno.EACCES) and (missing := missing_capabilities()):
        names = " and ".join(missing)
        both = ",".join(name.lower() for name in CAPABILITIES)
        return f"this process has no {names} ({said})", (
            f"run as root, or allow it to this Python: sudo setcap {both}+ep $(readlink -f $(command -v python3)); "
            "in a container: --cap-add BPF --cap-add NET_ADMIN"
        )
    if error.errno in (errno.EPERM, errno.EACCES):
        return f"the kernel refuses bpf(2) although the capabilities are there ({said})", (
            "a container's seccomp profile, a user namespace or kernel lockdown refuses it: "
            "--security-opt seccomp=unconfined, or run outside of it"
        )
    if error.errno == errno.ENOSYS:
        return f"{kernel} has no bpf(2), or a seccomp profile hides it ({said})", (
            "a kernel with CONFIG_BPF_SYSCALL; in a container: --security-opt seccomp=unconfined"
        )
    if error.errno in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOENT):
        return f"{kernel} has no SK_MSG programs on a SOCKHASH, or no bytecode fits it ({said})", (
            "Linux 5.15 or newer with CONFIG_BPF_STREAM_PARSER or CONFIG_NET_SOCK_MSG, on a little-endian machine"
        )
    return f"the kernel refuses the program ({said})", ""


def missing_capabilities() -> list[str]:
    """Those that are needed and that this process does not have in effect."""
    status = Path("/proc/self/status").read_text()
    line = next((line for line in status.splitlines() if line.startswith("CapEff:")), "CapEff: 0")
    effective = int(line.split()[1], 16)
    if effective >> CAP_SYS_ADMIN & 1 and effective >> CAPABILITIES["CAP_NET_ADMIN"] & 1:
        return []
    return [name for name, bit in CAPABILITIES.items() if not effective >> bit & 1]
