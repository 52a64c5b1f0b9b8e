"""``lifl doctor``: the features of this machine, those that lifl will use and why, and remedies for missing ones.

Examines the machine and changes nothing; returns values, which ``lifl.cli.doctor_view`` shows. Each feature is examined
on its own, by a trial if possible; a check that fails becomes a line with the reason, and the others still run.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from typing import Any

import attrs

from lifl.cli.console import text_of
from lifl.errors import EbpfUnavailableError, LiflError, RoundError, ShmError

# Each part imports the other modules of lifl itself, so that a failing import ends only that part.

ROUND_TIMEOUT_S = 20.0
MANY_FILES = 4096
"""Descriptors that a server should be allowed: it has one for each SuperNode that is connected."""

EBPF_LOADER = "LIFL_EBPF_LOADER"
"""The name in ``lifl.ebpf.probe.VARIABLE``, repeated here because that module may fail to import."""

PACKAGES = {
    "torch": ("torch", "torch's tensors in and out"),
    "ray": ("simulation", "Flower's simulation"),
    "scikit-learn": ("demo", "lifl demo"),
    "matplotlib": ("plot", "pictures as PNG and PDF"),
    "tensorboardX": ("tensorboard", "scalars for TensorBoard"),
    "prometheus_client": ("metrics", "metrics for Prometheus"),
    "nvflare": ("peers", "benchmarks against NVFLARE"),
}
"""Optional packages: the extra of lifl that installs each, and its purpose."""


@attrs.frozen
class Line:
    """A finding.

    Attributes
    ----------
    name : str
        Name of the finding, unique in its section.
    value : object
        The finding for programs, as a value that JSON can hold.
    text : str
        The finding for people; empty if the text of another line contains it.
    remedy : str
        Advice to improve it; empty if it cannot be better.
    """

    name: str
    value: Any
    text: str = ""
    remedy: str = ""


@attrs.frozen
class Findings:
    """All findings, by section."""

    sections: Mapping[str, tuple[Line, ...]]

    @property
    def can_run(self) -> bool:
        """False if lifl cannot run a round here at all."""
        return all(line.value for line in self.sections["lifl"] if line.name == "runs")

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """The findings for JSON: for each section a dict of the lines' values by name, with ``remedies`` by name."""
        return {
            section: {line.name: line.value for line in lines}
            | {"remedies": {line.name: line.remedy for line in lines if line.remedy}}
            for section, lines in self.sections.items()
        }


def examine() -> Findings:
    """Examines this machine; takes a few seconds, most of them for Flower's imports. Raises nothing."""
    return Findings({section: tuple(_found(parts)) for section, parts in SECTIONS.items()})


def _found(parts: tuple[Callable[[], Iterator[Line]], ...]) -> Iterator[Line]:
    for part in parts:
        try:
            yield from part()
        except Exception as error:  # on an unknown machine any error is possible
            is_ours = isinstance(error, LiflError)
            remedy = "the message says what to do" if is_ours else "please report this to lifl's developers"
            yield Line(part.__name__.strip("_"), None, f"cannot be found out: {text_of(error)}", remedy)


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:,.1f} GiB"


# ---------------------------------------------------------------- lifl and the machine


def _lifl() -> Iterator[Line]:
    from lifl import __version__

    yield Line("version", __version__, f"{__version__}, with Python {platform.python_version()}")
    try:
        _do_a_round()
    except Exception as error:
        advice = "lifl cannot run a round here before this is mended; the message says what to do"
        yield Line("runs", False, f"no: {text_of(error)}", advice)
    else:
        yield Line("runs", True, "yes: a worker was started and has computed the mean of a round")


def _do_a_round() -> None:
    import numpy as np

    from lifl import Node, TensorSpec
    from lifl.shm.sizes import round_bytes

    spec = TensorSpec.from_arrays({"w": np.zeros(8, "float32")})
    with (
        Node(round_bytes(spec, 1, 1), workers=1, transport="rings") as node,
        node.open_round(spec, expected=1) as round_,
    ):
        round_.submit({"w": np.arange(8, dtype="float32")}, client_id="doctor")
        if round_.result(timeout=ROUND_TIMEOUT_S).arrays["w"][7] != 7:
            raise RoundError("the mean of a round is wrong: build lifl anew, on this machine")


def _kernel() -> Iterator[Line]:
    system = os.uname()
    yield Line("kernel", system.release, f"{system.sysname} {system.release}")
    yield Line("architecture", system.machine, system.machine)


def _cores() -> Iterator[Line]:
    from lifl.shm import machine

    usable, quota = machine.cores(), machine.cpu_quota()
    present, allowed = os.cpu_count() or 1, len(os.sched_getaffinity(0))
    text = f"{usable} of {present} may be used: a Node has one worker for each by default"
    remedy = "" if allowed >= present else "allow more: taskset, cpuset, or the container's --cpuset-cpus"
    if quota is not None and quota < allowed:
        text += f"; a control group gives time for {quota:g}"
        remedy = "a larger share: the container's --cpus"
    yield Line("cores", usable, text, remedy)
    yield Line("cores_there", present)
    yield Line("cpu_quota", quota)


def _vector_width() -> Iterator[Line]:
    from lifl.shm import kernels

    width = kernels.vector_width()
    is_narrow = width == "sse2"
    remedy = "a processor with AVX2; a virtual machine's may hide it (qemu: -cpu host)" if is_narrow else ""
    yield Line("vector_width", width, f"the kernels that fold use {width}", remedy)


def _memory() -> Iterator[Line]:
    from lifl.shm import machine

    available, limit = machine.available_bytes(), machine.limit_bytes()
    yield Line("available_bytes", available, f"{_gib(available)} of memory")
    bound = "not bounded by a control group" if limit is None else f"a control group bounds it to {_gib(limit)}"
    yield Line("memory_limit_bytes", limit, bound, "" if limit is None else "a container's --memory gives more")


def _open_files() -> Iterator[Line]:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = None if soft == resource.RLIM_INFINITY else soft
    text = (
        "not bounded"
        if limit is None
        else f"{limit:,} descriptors; lifl-superlink has one for each SuperNode that is connected"
    )
    remedy = ""
    if limit is not None and limit < MANY_FILES:
        may = hard == resource.RLIM_INFINITY or hard >= MANY_FILES
        remedy = f"ulimit -n {2**16 if hard < 0 else min(hard, 2**16)}, before the server is started"
        remedy = remedy if may else f"more than {hard:,}: limits.conf, or LimitNOFILE= of a systemd unit"
    yield Line("open_files", limit, text, remedy)


# ---------------------------------------------------------------- the arena


def _arenas() -> Iterator[Line]:
    from lifl.node import node
    from lifl.shm.sizes import default_bytes
    from lifl.superlink import command

    for name, owner, most, option in (
        ("node_bytes", "a Node", node.DEFAULT_MEMORY, "memory="),
        ("superlink_bytes", "lifl-superlink", command.DEFAULT_MEMORY, "--lifl-memory"),
    ):
        nbytes = default_bytes(most)
        is_whole = nbytes >= most
        why = "the default" if is_whole else f"a quarter of the available memory, which is less than {_gib(most)}"
        remedy = "" if is_whole else f"free memory, or say how much: {option}"
        yield Line(name, nbytes, f"{owner} takes {_gib(nbytes)}: {why}", remedy)


def _memfd() -> Iterator[Line]:
    from lifl.shm import arena as shm

    try:
        shm.Arena.create(1, 2).close()
    except ShmError as error:
        remedy = "Linux 4.14 or newer, and a seccomp profile that allows memfd_create"
        yield Line("memfd", False, f"no: {text_of(error)}", remedy)
    else:
        yield Line("memfd", True, "shared memory without a name can be created, and sealed")


def _huge_pages() -> Iterator[Line]:
    from lifl.cli import huge_pages as pages

    chosen = pages.shmem_enabled()
    is_huge = chosen in ("always", "force", "within_size")
    text = f"an arena is in {'huge pages if some are free' if is_huge else 'small pages'} (shmem_enabled: {chosen})"
    remedy = "" if is_huge else f"as root: echo always > {pages.SHMEM_ENABLED}"
    if chosen is None:
        text = "the kernel has no huge pages for shared memory"
        remedy = "a kernel with CONFIG_TRANSPARENT_HUGEPAGE"
    yield Line("shmem_enabled", chosen, text, remedy)
    try:
        pages.collapse()
    except OSError as error:
        text, remedy = (
            f"MADV_COLLAPSE does not work on a memfd ({text_of(error)})",
            "Linux 6.1 or newer, and free memory",
        )
        yield Line("madv_collapse", False, text, remedy)
    else:
        yield Line("madv_collapse", True, "MADV_COLLAPSE works on a memfd; lifl does not need it")


# ---------------------------------------------------------------- eBPF


def _ebpf() -> Iterator[Line]:
    try:
        from lifl.ebpf import probe

        found = probe.support()
        loader = found.loader
        reason = found.reason
        remedy = found.remedy
        auto = "ebpf" if found.available else "rings"
    except Exception as error:  # unknown loader, or not Linux
        loader = None
        reason = text_of(error)
        remedy = f"on Linux: unset {EBPF_LOADER}"
        auto = None
    yield Line("available", loader is not None, f"{'no' if loader is None else 'yes'}: {reason}", remedy)
    yield Line("loader", loader)
    yield Line("reason", reason)
    yield Line("auto", auto, f'transport="auto" uses {auto or "nothing: it is an error"}')


def _transport() -> Iterator[Line]:
    from lifl.workers import transport

    chosen = os.environ.get(transport.VARIABLE)
    default = chosen or "rings"
    why = f"set by {transport.VARIABLE}" if chosen else "the default, and the fastest"
    remedy = "" if default in transport.NAMES else f"{transport.VARIABLE} is one of {', '.join(transport.NAMES)}"
    yield Line("default", default, f"{default}, if no transport is named ({why})", remedy)


def _capabilities() -> Iterator[Line]:
    from lifl.ebpf import probe

    # No text: the reason of the section's first line names them.
    yield Line("missing_capabilities", probe.missing_capabilities())
    yield Line("kernel", os.uname().release)


def _bcc() -> Iterator[Line]:
    from lifl.ebpf import compiled

    try:
        where = str(next(iter(compiled.find().__path__)))
    except EbpfUnavailableError as error:
        remedy = f"only {EBPF_LOADER}=bcc needs it: {error.remedy}"
        yield Line("bcc", {"found": False, "path": None, "reason": error.reason}, error.reason, remedy)
    else:
        text = f"{where}; used with {EBPF_LOADER}=bcc"
        yield Line("bcc", {"found": True, "path": where, "reason": ""}, text)


# ---------------------------------------------------------------- Flower


def _flower() -> Iterator[Line]:
    from lifl.superlink import command, flower

    install = f"pip install 'flwr=={command.TESTED[-1]}.*'"
    version = _version("flwr")
    if version is None:
        yield Line("version", None, "flwr is not installed: only Node and the planner can be used", install)
        return
    is_tested = version.startswith(tuple(f"{one}." for one in command.TESTED))
    tested = " and ".join(command.TESTED)
    text = f"flwr {version}, {'' if is_tested else 'not '}among the versions that lifl is tested with ({tested})"
    yield Line("version", version, text, "" if is_tested else install)
    yield Line("is_tested", is_tested)
    missing = {name: _missing_name(name) for name in flower.NAMES}
    left = "; ".join(f"{name} ({reason})" for name, reason in missing.items() if reason)
    text = f"left to Flower by lifl-superlink: {left}" if left else "lifl-superlink has every part of its data plane"
    yield Line("parts", missing, text, install if left else "")


def _missing_name(part: str) -> str | None:
    """The reason why a part of the server is left to Flower; None if lifl has the part."""
    from lifl.superlink import flower

    try:
        flower.part(part)
    except Exception as error:  # Flower's own modules are imported here, and may raise any error
        return text_of(error)
    return None


def _signatures() -> Iterator[Line]:
    version = _version("awscrt")
    if version is None:
        text = "SuperNodes' signatures are checked by OpenSSL"
        yield Line("signatures", None, text, "pip install 'lifl[signatures]': AWS-LC is more than twice as fast")
    else:
        yield Line("signatures", version, f"SuperNodes' signatures are checked by AWS-LC (awscrt {version})")


# ---------------------------------------------------------------- the rest


def _packages() -> Iterator[Line]:
    for name, (extra, purpose) in PACKAGES.items():
        version = _version(name)
        text = f"{version or 'not installed'}: {purpose}"
        yield Line(name, version, text, "" if version else f"pip install 'lifl[{extra}]'")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _calibration() -> Iterator[Line]:
    from lifl.node import calibration

    is_measured = calibration.known() is not None
    text = "costs were measured on this machine" if is_measured else "costs are assumed: those of a slow machine"
    remedy = "" if is_measured else "lifl bench limits measures them; a strategy's first run on a machine does too"
    yield Line("is_measured", is_measured, text, remedy)
    yield Line("costs", calibration.costs().to_dict())
    try:
        path = calibration.path()
    except RuntimeError as error:
        yield Line("path", None, f"there is no folder for the costs: {error}", "LIFL_CACHE=FOLDER")
        return
    folder = next(one for one in path.parents if one.exists())
    is_writable = os.access(folder, os.W_OK)
    text = f"kept in {path}" if is_writable else f"they cannot be kept in {path}, which this user cannot write"
    yield Line("path", str(path), text, "" if is_writable else "LIFL_CACHE=FOLDER")


SECTIONS: dict[str, tuple[Callable[[], Iterator[Line]], ...]] = {
    "lifl": (_lifl,),
    "machine": (_kernel, _cores, _vector_width, _memory, _open_files),
    "arena": (_arenas, _memfd, _huge_pages),
    "ebpf": (_ebpf, _transport, _capabilities, _bcc),
    "flower": (_flower, _signatures),
    "packages": (_packages,),
    "calibration": (_calibration,),
}
