"""Rung 4 of the ladder: the decoders and admission under a fuzzer, for a bounded time."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("targets.py")
SECONDS = {"npy": 4, "layout": 2, "admission": 3, "landing": 5, "sizes": 1}
"""The seconds of each target in `make test`; `make fuzz` sets FUZZ_SECONDS for all together."""
FEWEST = {"npy": 20_000, "layout": 10_000, "admission": 2_000, "landing": 200, "sizes": 10_000}


@pytest.mark.parametrize("target", SECONDS)
def test_target(target: str) -> None:
    """No input makes it raise anything but its documented error, or take memory that did not come."""
    if importlib.util.find_spec("atheris") is None:
        if os.environ.get("CI") and sys.version_info < (3, 14):
            pytest.fail("atheris is not installed: it is in the extra `dev`")
        pytest.skip("atheris has no build for this Python or machine")
    seconds = SECONDS[target]
    if total := int(os.environ.get("FUZZ_SECONDS", "0")):
        seconds = max(1, total * seconds // sum(SECONDS.values()))
    done = subprocess.run(
        [sys.executable, str(PROGRAM), target, f"-max_total_time={seconds}", "-timeout=20", "-rss_limit_mb=1500"],
        capture_output=True,
        text=True,
        timeout=seconds + 120,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (runs,) = re.findall(r"Done (\d+) runs", done.stderr)
    assert int(runs) > FEWEST[target] * seconds // SECONDS[target] // 4
    print(f"\n{target}: {int(runs):,} inputs in {seconds} s")
