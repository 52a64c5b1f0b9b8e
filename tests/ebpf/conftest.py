"""The needs of the sidecar's tests. Without them the tests are skipped with the reason; in CI they then fail."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn

import pytest

from lifl.ebpf import compiled, probe
from lifl.ebpf.sidecar import Sidecar
from lifl.errors import EbpfUnavailableError
from lifl.shm.arena import Arena


def _give_up(reason: str) -> NoReturn:
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def give_up() -> Callable[[str], NoReturn]:
    """Says why something cannot be tested here: elsewhere it is skipped, in CI that must not go unnoticed."""
    return _give_up


@pytest.fixture(scope="session")
def kernel() -> None:
    """A kernel that takes the program from this process."""
    support = probe.support("prebuilt")
    if not support.available:
        _give_up(f"{support.reason}; {support.remedy}")


@pytest.fixture(scope="session")
def bcc(kernel: None) -> None:
    """The distribution's bcc."""
    try:
        compiled.find()
    except EbpfUnavailableError as error:
        _give_up(str(error))


@pytest.fixture(scope="session")
def clang(kernel: None) -> str:
    """A clang that makes BPF programs."""
    found = shutil.which("clang")
    if found is None:
        _give_up("there is no clang: apt-get install clang")
    targets = subprocess.run([found, "--print-targets"], capture_output=True, text=True, check=False).stdout
    if "bpf" not in targets:
        _give_up(f"{found} has no bpf target: apt-get install clang")
    return found


@pytest.fixture(scope="session")
def namespaces(kernel: None) -> None:
    """The right to make network namespaces."""
    make = "import ctypes, sys; sys.exit(ctypes.CDLL(None).unshare(0x40000000) != 0)"
    if subprocess.run([sys.executable, "-c", make], check=False).returncode:
        _give_up("no network namespace can be made here: run it as root with CAP_SYS_ADMIN")


@pytest.fixture
def sidecar(kernel: None, arena: Arena) -> Iterator[Sidecar]:
    """A sidecar over the small arena: the agent and participants 1 to 3."""
    made = Sidecar(arena)
    yield made
    made.close()
