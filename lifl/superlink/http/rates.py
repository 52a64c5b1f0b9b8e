"""The rate of bytes in each direction of a connection, and the decision that a peer is too slow.

Pure: the caller measures the bytes and the time.
"""

from __future__ import annotations

MIN_RATE = 2**14
"""Bytes a second. A peer that is slower on average over a window is dropped."""


class Rate:
    """The rate in one direction.

    Attributes
    ----------
    of_late : float or None
        Bytes a second between the last two looks; None if bytes were not on their way for all of that time.
    """

    def __init__(self) -> None:
        self.of_late: float | None = None
        self._is_going = False
        self._seconds = 0.0
        self._nbytes = 0

    def begin(self) -> None:
        """Begins with another request or answer: the bytes before it do not count."""
        self.of_late, self._is_going = None, False

    def look(self, is_going: bool, nbytes: int, elapsed_s: float, window_s: float) -> float | None:
        """Counts the bytes since the last look; the rate over a whole window if that was too low, else None."""
        if not is_going or not self._is_going or elapsed_s <= 0:
            # The first look only begins: the time since the first byte is not known.
            self.of_late, self._is_going = None, is_going
            self._seconds, self._nbytes = 0.0, 0
            return None
        self.of_late = nbytes / elapsed_s
        self._seconds += elapsed_s
        self._nbytes += nbytes
        if self._seconds < window_s:
            return None
        rate, self._seconds, self._nbytes = self._nbytes / self._seconds, 0.0, 0
        return rate if rate < MIN_RATE else None


class Rates:
    """The rates in both directions of one connection, and the time that a head takes."""

    def __init__(self, now_s: float) -> None:
        self.came_bytes = 0  # bytes that have come since the last look
        self._queued_bytes = 0  # bytes of answers that were begun since the last look
        self._unsent_bytes = 0  # bytes of answers that the peer had not had at the last look
        self._in, self._out = Rate(), Rate()
        self._head_s = 0.0
        self._looked_s = now_s

    @property
    def sending(self) -> float | None:
        """Bytes a second that the peer took of late; None if nothing was sent for a part of that time."""
        return self._out.of_late

    def begin_in(self) -> None:
        """Begins a request, or goes on with one that had to wait."""
        self._in.begin()
        self._head_s = 0.0

    def begin_out(self, nbytes: int) -> None:
        """Begins an answer of `nbytes`."""
        self._out.begin()
        self._queued_bytes += nbytes

    def look(self, now_s: float, window_s: float, awaits: str | None, unsent_bytes: int | None) -> str | None:
        """The reason why the connection has to end, or None.

        Parameters
        ----------
        now_s, window_s : float
            Time of ``time.monotonic``, and the window over which rates are averaged.
        awaits : "head", "body" or None
            The part of a request that is coming in.
        unsent_bytes : int or None
            Bytes of answers that the peer has not had; None if no answer is on its way.
        """
        # The time is bounded, since a loop that had no time for its sockets is not the peer's fault.
        elapsed_s = min(now_s - self._looked_s, 2 * look_s(window_s))
        self._looked_s = now_s
        came_bytes, self.came_bytes = self.came_bytes, 0
        passed_bytes = max(0, self._unsent_bytes + self._queued_bytes - (unsent_bytes or 0))
        self._queued_bytes, self._unsent_bytes = 0, unsent_bytes or 0
        if awaits == "head":
            self._head_s += elapsed_s
            if self._head_s > window_s:
                return f"the head of a request has not come whole in {self._head_s:.0f} s"
        rate = self._in.look(awaits == "body", came_bytes, elapsed_s, window_s)
        if rate is not None:
            return f"a request comes at {rate:,.0f} bytes a second, less than {MIN_RATE:,}"
        rate = self._out.look(unsent_bytes is not None, passed_bytes, elapsed_s, window_s)
        if rate is not None:
            return f"an answer is taken at {rate:,.0f} bytes a second, less than {MIN_RATE:,}"
        return None


def look_s(window_s: float) -> float:
    """Seconds between two looks at each connection."""
    return min(1.0, window_s / 8)
