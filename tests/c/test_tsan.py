"""Rung 3 of the ladder: the core by threads over one mapping, under TSan, and under ASan and UBSan."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
LIFL = HERE.parents[1] / "lifl"
BUGS = HERE.parent / "seeded" / "bugs"
FLAGS = ["-std=c11", "-O1", "-g", "-Wall", "-Wextra", "-Werror"]
# TSan does not model fences, and gcc says so: test_threads.c has why that is no matter here.
THREAD = ["-fsanitize=thread", "-Wno-tsan", "-Wno-unknown-warning-option"]
ADDRESS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def run(tmp_path: Path, core: Path, flags: list[str]) -> subprocess.CompletedProcess[str]:
    """Builds the threads over a copy of the core, and runs them."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    program = tmp_path / "threads"
    (tmp_path / "probe.c").write_text("int main(void) { return 0; }\n")
    if (
        compiler is None
        or subprocess.run(
            [compiler, *flags, "-o", str(program), str(tmp_path / "probe.c")], capture_output=True, check=False
        ).returncode
    ):
        if os.environ.get("CI"):
            pytest.fail(f"{compiler} has no {flags[0]}: install gcc's libtsan and libasan")
        pytest.skip(f"{compiler} has no {flags[0]}")
    files = [str(HERE / "test_threads.c"), str(core / "_shm.c")]
    subprocess.run([compiler, *FLAGS, *flags, f"-I{core}", "-o", str(program), *files, "-lpthread"], check=True)
    # Older TSans find no room for their shadow if the kernel spreads mappings wide: the tests run without that.
    command = ["setarch", "-R", str(program)] if shutil.which("setarch") else [str(program)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("flags", [THREAD, ADDRESS], ids=["thread", "address and undefined"])
def test_no_race_and_no_error(tmp_path: Path, flags: list[str]) -> None:
    """Payload, notes, sums and blocks pass from thread to thread without a data race or an error of memory."""
    done = run(tmp_path, LIFL, flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "30000 updates passed" in done.stdout
    assert done.stderr == ""


@pytest.mark.ladder
@pytest.mark.parametrize("bug", ["relaxed-publish", "relaxed-head"])
def test_seeded_races_are_reported(tmp_path: Path, bug: str) -> None:
    """The same threads over a core with a known bug: TSan says which line races."""
    core = tmp_path / "lifl"
    core.mkdir()
    for name in ("_shm.c", "_shm.h", "_steps.h"):
        shutil.copy(LIFL / name, core)
    subprocess.run(["git", "apply", "--include=lifl/_shm.c", str(BUGS / f"{bug}.patch")], cwd=tmp_path, check=True)
    assert (core / "_shm.c").read_text() != (LIFL / "_shm.c").read_text()
    done = run(tmp_path, core, THREAD)
    assert done.returncode != 0, done.stdout
    assert "WARNING: ThreadSanitizer: data race" in done.stderr
    assert "_shm.c" in done.stderr
