"""Workers that die at the step they are told: the core built with steps, and the page that controls them."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import lifl

HERE = Path(__file__).parent
LIFL = Path(lifl.__file__).parent
COUNT, TARGET, NEXT, SIGNAL = range(4)
SPAWNER = 100
"""The number in the page of the process that starts workers, as in ``sitecustomize``."""

BUILD = """
import sys
from cffi import FFI
lifl, here, target = sys.argv[1:]
ffi = FFI()
lines = open(f"{lifl}/_shm.h").read().splitlines()
ffi.cdef("\\n".join(line for line in lines if not line.startswith("#")))
ffi.cdef("void lifl_steps_use(const char *path, uint32_t me); void lifl_step(void);")
ffi.set_source(
    "_shm_ffi",
    '#include "_shm.h"\\nvoid lifl_steps_use(const char *path, uint32_t me); void lifl_step(void);',
    sources=[f"{lifl}/_shm.c", f"{lifl}/_link.c", f"{lifl}/_fold.c", f"{here}/steps.c"],
    include_dirs=[lifl],
    define_macros=[("LIFL_STEPS", None)],
    extra_compile_args=["-std=gnu11", "-O1", "-ffp-contract=off"],
    libraries=["m"],
)
print(ffi.compile(tmpdir=target))
"""


def build(target: Path) -> Path:
    """Compiles the core with steps; the sources are those of the lifl that is imported here."""
    command = [sys.executable, "-c", BUILD, str(LIFL), str(HERE), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip().splitlines()[-1])


class Control:
    """The page that workers of a Node share with the test: who dies at which step."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_bytes(bytes(4096))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 4096)
        self._words = np.frombuffer(self._map, np.int64).reshape(-1, 4)

    def arm(self, me: int, step: int, successor_step: int = 0, sent: int = signal.SIGKILL) -> None:
        """Participant `me` gets the signal at its `step`-th step from now, its successor at its own."""
        words = self._words[me]
        words[TARGET] = 0
        words[COUNT], words[NEXT], words[SIGNAL] = 0, successor_step, sent
        words[TARGET] = step

    def disarm(self, me: int) -> tuple[bool, bool]:
        """True if the participant died at its step, and if its successor did; neither dies after this call."""
        words = self._words[me]
        died = not words[TARGET] or not words[NEXT], not words[TARGET] and not words[NEXT]
        words[TARGET] = words[NEXT] = 0
        return died

    def count(self, me: int) -> int:
        """Steps of `me` since it was armed, or since it started."""
        return int(self._words[me][COUNT])

    def close(self) -> None:
        """Lets go of the page."""
        del self._words
        self._map.close()


@contextmanager
def stepping(library: Path, directory: Path, detail: str) -> Iterator[Control]:
    """Nodes that are made meanwhile have workers that count their steps, in this detail."""
    control = Control(directory / "page")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(HERE), prepend=os.pathsep)
        patch.setenv("LIFL_STEPS_LIB", str(library))
        patch.setenv("LIFL_STEPS_PAGE", str(control.path))
        patch.setenv("LIFL_STEPS_DETAIL", detail)
        yield control
    control.close()
