"""Where a server's CPU time goes: a look at what its loop is doing at every few milliseconds of it.

Owns the profiling timer while it runs. Python sees the signal when a call into C has returned, so that such a call's
time falls on who made it; what other threads take falls on them together.
"""

from __future__ import annotations

import json
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType

EVERY_S = 0.001  # the kernel does it at its next tick, which may be later: what was seen are shares
DEPTH = 40

# The innermost frame that is known says what the time was for: (end of the file's name, function or "" for any).
KNOWN = (
    ("awscrt/crypto.py", "", "signatures"),
    ("superlink/signatures.py", "", "signatures"),
    ("routers/fleet/node_auth.py", "", "signatures"),
    ("superlink/upload.py", "advance", "hash"),
    ("asyncio/selector_events.py", "write", "socket out"),
    ("asyncio/selector_events.py", "_write_ready", "socket out"),
    ("asyncio/selector_events.py", "_read_ready__get_buffer", "socket in"),
    ("asyncio/sslproto.py", "", "TLS"),
    ("protocols/http/httptools_impl.py", "", "head parsing"),
    ("superlink/protocol.py", "on_headers_complete", "head parsing"),
    ("superlink/protocol.py", "answer", "head parsing"),
    ("linkstate/in_memory_linkstate.py", "", "link state"),
    ("linkstate/sql_linkstate.py", "", "link state"),
    ("supercore/corestate/", "", "link state"),
    ("superlink/servicer/", "", "link state"),
    ("server/superlink/utils.py", "", "link state"),
    ("superlink/store.py", "", "object store"),
    ("superlink/rounds.py", "", "object store"),
    ("superlink/content.py", "", "object store"),
    ("superlink/", "", "gateway"),
    ("starlette/", "", "Flower's own routes"),
    ("fastapi/", "", "Flower's own routes"),
    ("selectors.py", "select", "other threads"),
)


class Sampler:
    """From :meth:`start` to :meth:`stop`. Main thread only.

    Writes a JSON file with "seconds", by purpose, and "bytes", which are asked for each time.
    """

    def __init__(self, path: Path, count_bytes: Callable[[], dict[str, int]]) -> None:
        self._path, self._count_bytes = path, count_bytes
        self._counts: Counter[str] = Counter()
        self._begin_s = 0.0

    def start(self) -> None:
        """Begins to look."""
        self._begin_s = time.process_time()
        signal.signal(signal.SIGPROF, self._look)
        signal.setitimer(signal.ITIMER_PROF, EVERY_S, EVERY_S)

    def stop(self) -> None:
        """Ends and writes."""
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, signal.SIG_IGN)
        self._write()

    def _write(self) -> None:
        each_s = (time.process_time() - self._begin_s) / max(sum(self._counts.values()), 1)
        seconds = {name: count * each_s for name, count in self._counts.most_common()}
        self._path.write_text(json.dumps({"seconds": seconds, "bytes": self._count_bytes()}))

    def _look(self, _: int, frame: FrameType | None) -> None:
        self._counts[_purpose(frame)] += 1
        if sum(self._counts.values()) % 200 == 0:  # a server may be killed
            self._write()


def _purpose(frame: FrameType | None) -> str:
    for _ in range(DEPTH):
        if frame is None:
            break
        file, function = frame.f_code.co_filename, frame.f_code.co_name
        for name, wanted, purpose in KNOWN:
            if name in file and (not wanted or wanted == function):
                return purpose
        frame = frame.f_back
    return "event loop"
