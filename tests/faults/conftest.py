"""Programs that run with faults put in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

from lifl.ebpf import probe

HERE = Path(__file__).parent

Run = Callable[..., Any]

HEAD = """
import ctypes, errno, gc, json, os, resource, signal, sys, threading, time
import numpy as np
import lifl
from lifl.errors import LiflError, PeerGoneError, RoundError, ShmError
faults = ctypes.CDLL(os.environ["LD_PRELOAD"]) if "LD_PRELOAD" in os.environ else None
SPEC = lifl.TensorSpec.from_arrays({"w": np.zeros(64), "n": np.array(0)})
SENT = [{"w": np.full(64, 2.0**i), "n": np.array(2**i)} for i in range(6)]

def a_round(node, kill=False, timing="eager"):
    with node.open_round(SPEC, 6, timing) as round_:
        for i, update in enumerate(SENT):
            if kill and i == 3:
                os.kill(node.pids()[0], signal.SIGKILL)
            round_.submit(update, client_id=i, timeout=30)
        assert (round_.result(30).arrays["w"] == 63 / 6).all()

def fds():
    found = {n: f"/proc/self/fd/{n}" for n in os.listdir("/proc/self/fd")}
    return {n: os.readlink(path) for n, path in found.items() if os.path.lexists(path)}

def children():
    found = []
    for task in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{task}/children") as file:
            found += file.read().split()
    return found

def check_nothing_left(before):
    gc.collect()
    end = time.monotonic() + 10
    while (fds() != before or children()) and time.monotonic() < end:
        time.sleep(0.01)
    assert fds() == before, (before, fds())
    assert not children(), children()
"""


def give_up(reason: str) -> NoReturn:
    """It cannot be tested here. CI is root with all capabilities: there it must not go unnoticed."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture
def root() -> None:
    """Only root can become another user."""
    if os.geteuid() != 0:
        give_up("only root can become another user: run it as root")


@pytest.fixture(scope="session")
def ebpf() -> None:
    """A kernel that takes the sidecar's program from this process."""
    support = probe.support()
    if not support.available:
        give_up(f"{support.reason}; {support.remedy}")


@pytest.fixture(scope="session")
def namespaces() -> None:
    """Only root with CAP_SYS_ADMIN can make namespaces, choose pids and mount file systems in them."""
    command = ["unshare", "--mount", "--pid", "--fork", "mount", "-t", "tmpfs", "none", "/mnt"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        give_up("there is no unshare: install util-linux")
    if done.returncode:
        give_up(f"no namespaces can be made here ({done.stderr.strip()}): run it as root with CAP_SYS_ADMIN")


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that makes calls fail."""
    library = tmp_path_factory.mktemp("faults") / "faults.so"
    command = ["cc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-Wno-nonnull-compare"]
    subprocess.run([*command, "-o", str(library), str(HERE / "faults.c"), "-ldl"], check=True)
    return library


@pytest.fixture
def program() -> Run:
    """Runs a program that ends by printing a JSON value; what it printed."""

    def run(code: str, preload: Path | None = None, prefix: tuple[str, ...] = (), timeout: float = 120.0) -> Any:
        env = os.environ | ({"LD_PRELOAD": str(preload)} if preload else {})
        command = [*prefix, sys.executable, "-c", HEAD + code]
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=timeout, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run
