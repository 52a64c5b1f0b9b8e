"""A profile of a server's CPU time: a look at the main thread's frames every few milliseconds of it.

Owns the profiling timer while it runs. Python sees the signal when a call into C has returned, so the time of such a
call counts for the function that called it. The time of all other threads counts together, as "other threads".
"""

from __future__ import annotations

import json
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType

EVERY_S = 0.001  # the kernel's ticks may be longer, so looks are counted as shares of the CPU time
MAX_DEPTH = 40

# The innermost known frame decides the purpose: (part of the file's name, function or "" for any, purpose).
KNOWN = (
    ("awscrt/crypto.py", "", "signatures"),
    ("superlink/http/signatures.py", "", "signatures"),
    ("routers/fleet/node_auth.py", "", "signatures"),
    ("superlink/http/upload.py", "advance", "hash"),
    ("asyncio/selector_events.py", "write", "socket out"),
    ("asyncio/selector_events.py", "_write_ready", "socket out"),
    ("asyncio/selector_events.py", "_read_ready__get_buffer", "socket in"),
    ("asyncio/sslproto.py", "", "TLS"),
    ("protocols/http/httptools_impl.py", "", "head parsing"),
    ("superlink/http/protocol.py", "on_headers_complete", "head parsing"),
    ("superlink/http/protocol.py", "answer", "head parsing"),
    ("linkstate/in_memory_linkstate.py", "", "link state"),
    ("linkstate/sql_linkstate.py", "", "link state"),
    ("supercore/corestate/", "", "link state"),
    ("superlink/servicer/", "", "link state"),
    ("server/superlink/utils.py", "", "link state"),
    ("superlink/store/", "", "object store"),
    ("superlink/rounds/rounds.py", "", "object store"),
    ("superlink/rounds/registry.py", "", "object store"),
    ("superlink/rounds/reply_index.py", "", "object store"),
    ("superlink/rounds/served_round.py", "", "object store"),
    ("superlink/", "", "gateway"),
    ("starlette/", "", "Flower's own routes"),
    ("fastapi/", "", "Flower's own routes"),
    ("selectors.py", "select", "other threads"),
)


class Profiler:
    """Profiles from :meth:`start` to :meth:`stop`. Main thread only, since Python's signal handlers run there.

    Parameters
    ----------
    path : Path
        The JSON file, with "seconds" by purpose and "bytes".
    count_bytes : callable
        Returns the bytes; called each time the file is written.
    """

    def __init__(self, path: Path, count_bytes: Callable[[], dict[str, int]]) -> None:
        self._path = path
        self._count_bytes = count_bytes
        self._counts: Counter[str] = Counter()
        self._begin_s = 0.0

    def start(self) -> None:
        """Starts the timer."""
        self._begin_s = time.process_time()
        signal.signal(signal.SIGPROF, self._look)
        signal.setitimer(signal.ITIMER_PROF, EVERY_S, EVERY_S)

    def stop(self) -> None:
        """Stops the timer and writes the file."""
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, signal.SIG_IGN)
        self._write()

    def _write(self) -> None:
        each_s = (time.process_time() - self._begin_s) / max(sum(self._counts.values()), 1)
        seconds = {name: count * each_s for name, count in self._counts.most_common()}
        self._path.write_text(json.dumps({"seconds": seconds, "bytes": self._count_bytes()}))

    def _look(self, _: int, frame: FrameType | None) -> None:
        self._counts[_purpose(frame)] += 1
        if sum(self._counts.values()) % 200 == 0:  # now and then, since a server may be killed
            self._write()


def _purpose(frame: FrameType | None) -> str:
    for _ in range(MAX_DEPTH):
        if frame is None:
            break
        file, function = frame.f_code.co_filename, frame.f_code.co_name
        for name, wanted, purpose in KNOWN:
            if name in file and (not wanted or wanted == function):
                return purpose
        frame = frame.f_back
    return "event loop"
