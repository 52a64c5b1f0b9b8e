"""The C core by itself, without Python, under the sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import NoReturn

import pytest

HERE = Path(__file__).parent
LIFL = HERE.parent.parent / "lifl"
FLAGS = ["-std=c11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", f"-I{LIFL}"]
SANITIZERS = {
    "plain": [],
    "address and undefined": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
}


def give_up(reason: str) -> NoReturn:
    """It cannot be tested here: in CI, which has all that it takes, that is a failure."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def build(target: Path, flags: list[str]) -> None:
    """Compiles the core and its test into one program; skips, but not in CI, where the compiler lacks a sanitizer."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        give_up("there is no C compiler: install gcc")
    probe = target.with_name("probe.c")
    probe.write_text("int main(void) { return 0; }\n")
    command = [compiler, *flags, "-o", str(target)]
    if subprocess.run([*command, str(probe)], capture_output=True, check=False).returncode:
        give_up(f"{compiler} has no {flags}: install gcc's libasan and libubsan")
    files = [HERE / "test_shm.c", LIFL / "_shm.c", LIFL / "_link.c", LIFL / "_fold.c"]
    subprocess.run([*command, *FLAGS, *map(str, files), "-lm", "-lpthread"], check=True)


@pytest.mark.parametrize("name", SANITIZERS)
def test_core_in_c(tmp_path: Path, name: str) -> None:
    """Arena, blocks, rings, wake-ups and kernels hold what they promise, with no error of memory or arithmetic."""
    program = tmp_path / "test_shm"
    build(program, SANITIZERS[name])
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout
    assert done.stderr == ""
