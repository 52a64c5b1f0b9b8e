"""The test whether this machine allows the sidecar: the program loaded, or the reason and the remedy.

Nothing is guessed from versions: the program is loaded.
"""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import attrs

from lifl.ebpf import prebuilt
from lifl.ebpf.prebuilt import Program
from lifl.errors import EbpfUnavailableError

LOADERS = ("prebuilt", "bcc")
VARIABLE = "LIFL_EBPF_LOADER"
"""The environment variable with the loader that is used if none is named."""

CAPABILITIES = {"CAP_NET_ADMIN": 12, "CAP_BPF": 39}
CAP_SYS_ADMIN = 21
"""A capability that includes the two others."""


@attrs.frozen
class Support:
    """The availability of the sidecar on this machine.

    Attributes
    ----------
    available : bool
    loader : str or None
        The loader that has loaded the program.
    reason : str
        The reason why the sidecar is not available; else how it was loaded.
    remedy : str
        The way to make it available; empty if it is.
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
    """Loads the program, puts a socket into its map, and closes both."""
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
    """The reason why the kernel refused, and the remedy, as far as they can be known."""
    kernel = f"Linux {os.uname().release}"
    message = error.strerror or str(error)
    if error.errno in (errno.EPERM, errno.EACCES):
        return _refused(message)
    if error.errno == errno.ENOSYS and _has_seccomp_filter():
        return f"a seccomp filter hides bpf(2) from this process ({message})", UNFILTERED
    if error.errno == errno.ENOSYS:
        return f"{kernel} has no bpf(2) ({message})", "a kernel with CONFIG_BPF_SYSCALL"
    if error.errno in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOENT, errno.E2BIG):
        return f"{kernel} has no SK_MSG programs on a SOCKHASH, or no bytecode fits it ({message})", (
            "Linux 5.15 or newer with CONFIG_BPF_STREAM_PARSER or CONFIG_NET_SOCK_MSG, on a little-endian machine"
        )
    if error.errno in (errno.EADDRNOTAVAIL, errno.ENETUNREACH, errno.ENETDOWN) or isinstance(error, TimeoutError):
        return f"no TCP sockets over the loopback device ({message})", "ip link set lo up"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return f"no descriptor is left ({message})", "raise the limit: ulimit -n"
    return (
        f"the kernel refuses the program or its socket ({message})",
        "look into dmesg; rings need none of it",
    )


UNFILTERED = (
    "in a container: --security-opt seccomp=unconfined, or a profile that allows bpf; in a systemd unit: "
    "SystemCallFilter=bpf"
)


def _refused(message: str) -> tuple[str, str]:
    if missing := missing_capabilities():
        both = ",".join(name.lower() for name in CAPABILITIES)
        return f"this process has no {' and '.join(missing)} ({message})", (
            f"run as root, or allow it to this Python: sudo setcap {both}+ep {os.path.realpath(sys.executable)}; "
            "in a container: --cap-add BPF --cap-add NET_ADMIN"
        )
    although = f"the kernel refuses bpf(2) although the capabilities are there ({message})"
    if _has_seccomp_filter():
        return f"{although}: a seccomp filter is on this process", UNFILTERED
    if not _is_in_first_user_namespace():
        return f"{although}: they are those of a user namespace, which do not count for it", (
            "run it as root of the machine; containers: not rootless, and without a remapping of users"
        )
    return (
        f"{although}: a security module may do so",
        "look into dmesg for what SELinux or AppArmor say",
    )


def missing_capabilities() -> list[str]:
    """The needed capabilities that this process does not have in effect."""
    effective = int(_status("CapEff") or "0", 16)
    if effective >> CAP_SYS_ADMIN & 1 and effective >> CAPABILITIES["CAP_NET_ADMIN"] & 1:
        return []
    return [name for name, bit in CAPABILITIES.items() if not effective >> bit & 1]


def _has_seccomp_filter() -> bool:
    return _status("Seccomp") == "2"


def _is_in_first_user_namespace() -> bool:
    """True if this process's map of users is the identity over all of them."""
    try:
        return Path("/proc/self/uid_map").read_text().split() == ["0", "0", str(2**32 - 1)]
    except OSError:  # the kernel has no user namespaces
        return True


def _status(name: str) -> str:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next((line.split()[1] for line in lines if line.startswith(f"{name}:")), "")
