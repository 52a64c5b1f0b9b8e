"""Reading and the order of answers on one connection, as uvicorn's requests and ours share them.

Owns when the socket is read, and what is known of a body that goes to Flower. Knows no route.
"""

from __future__ import annotations

import asyncio
from typing import Any

from lifl.superlink import flower
from lifl.superlink.http.allowance import Share

_names = flower.part("gateway")


class Flow(_names.FlowControl):  # type: ignore[misc,name-defined]
    """uvicorn's, which pauses and resumes as its own requests need it; beside that reading is held for ours."""

    def __init__(self, transport: Any, pipeline: Any) -> None:
        super().__init__(transport)
        self._pipeline = pipeline
        self.is_held = False

    @property
    def is_paused(self) -> bool:
        """True if nothing is read."""
        return bool(self.read_paused or self.is_held)

    def pause_reading(self) -> None:
        """For uvicorn."""
        if not self.is_paused:
            self._transport.pause_reading()
        self.read_paused = True

    def resume_reading(self) -> None:
        """For uvicorn."""
        # The body of a request that others wait behind has come: an app that waits for more of it would let those in.
        if self.read_paused and not self._pipeline:
            self.read_paused = False
            if not self.is_held:
                self._transport.resume_reading()

    def hold(self) -> None:
        """For us."""
        if not self.is_paused:
            self._transport.pause_reading()
        self.is_held = True

    def let_go(self) -> None:
        """For us; reading goes on unless uvicorn has paused it."""
        if self.is_held:
            self.is_held = False
            if not self.read_paused:
                self._transport.resume_reading()


class Turn:
    """Stands for uvicorn's cycle while an exchange goes on, so that uvicorn queues what comes behind it."""

    def __init__(self) -> None:
        self.response_complete = self.disconnected = False
        self.keep_alive = True
        self.message_event = asyncio.Event()


class Body:
    """What has come of a body that goes to Flower, and what it may be."""

    def __init__(self, cycle: Any, path: str, headers: Any, limit: int) -> None:
        self.cycle, self.path, self.headers, self.limit = cycle, path, headers, limit
        self.nbytes = self.unshared_bytes = 0
        self.is_asked_for = False
        self.share: Share | None = None
