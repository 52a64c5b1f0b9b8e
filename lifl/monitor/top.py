"""Finds the Nodes of this user on this machine, and asks them for snapshots.

Owns the search, the question, and the rates that follow from two snapshots. Draws nothing, and trusts no answer.
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
from pathlib import Path

import attrs

from lifl.errors import LiflError, PeerGoneError
from lifl.ipc import uid_of_peer
from lifl.monitor.beacon import PREFIX, name_of
from lifl.monitor.stats import NodeStats

TIMEOUT_S = 2.0
"""A Node answers in milliseconds, unless its process is stopped."""
RETRY_S = 0.005
MAX_BYTES = 2**24
MAX_GONE = 5
"""Nodes that are still shown after they have gone."""
LISTENING = 0x10000  # __SO_ACCEPTCON, in the flags of /proc/net/unix

HOW_TO_START = (
    "no Node of this user is running on this machine: start a lifl-superlink, run a ServerApp with a strategy of "
    "lifl.strategy, or make a lifl.Node with workers in a program; then try again"
)


@attrs.frozen(order=True)
class Place:
    """The address of a Node: its process, and its number in that process."""

    pid: int
    number: int


def find_places() -> list[Place]:
    """The Nodes of this user that can be asked, sorted by process. A Node without workers cannot be asked.

    Nodes in other network namespaces (of another container) are not found.
    """
    wanted = re.compile(rf"@{PREFIX}-{os.getuid()}-(\d+)-(\d+)")
    found = set()
    for line in Path("/proc/net/unix").read_text(errors="replace").splitlines()[1:]:
        columns = line.split(None, 7)
        if len(columns) == 8 and int(columns[3], 16) & LISTENING and (match := wanted.fullmatch(columns[7])):
            found.add(Place(int(match[1]), int(match[2])))
    return sorted(found)


def ask(place: Place, timeout_s: float = TIMEOUT_S) -> NodeStats:
    """A snapshot of a Node.

    Raises :class:`PeerGoneError` if the Node is gone, :class:`LiflError` if it does not answer, or if the answer is no
    snapshot.
    """
    who = f"the Node of process {place.pid}"
    with socket.socket(socket.AF_UNIX) as asking:
        asking.settimeout(timeout_s)
        try:
            _connect(asking, f"\0{name_of(place.pid, place.number)}", timeout_s)
            if (uid := uid_of_peer(asking)) != os.getuid():  # any process may take a name that is free
                raise LiflError(f"{who} is not asked: a process of user {uid} has taken its name")
            data = bytearray()
            while (part := asking.recv(2**16)) and len(data) < MAX_BYTES:
                data += part
        except ConnectionError as error:
            raise PeerGoneError(f"{who} is gone") from error
        except (TimeoutError, BlockingIOError) as error:
            raise LiflError(f"{who} does not answer: it is stopped, or very busy") from error
    if not data:
        raise PeerGoneError(f"{who} is gone")
    try:
        answer = json.loads(data)
        if isinstance(answer, dict) and "error" in answer:
            raise LiflError(f"{who} has no figures: {answer['error']}")
        return NodeStats.from_dict(answer)
    except (ValueError, RecursionError) as error:
        advice = "it may run another version of lifl"
        raise LiflError(f"{who} gave an answer that is no snapshot; {advice}: {error}") from None


def _connect(asking: socket.socket, name: str, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return asking.connect(name)
        except BlockingIOError:  # many processes ask at once, and the queue is full
            if time.monotonic() > deadline:
                raise
            time.sleep(RETRY_S)


def command_of(pid: int) -> str:
    """The command line of a process, its programs without their folders; empty if it cannot be read.

    A script that a Python runs stands for itself: ``lifl-superlink --insecure``.
    """
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
    except OSError:
        return ""
    if len(words) > 1 and os.path.isabs(words[1]) and os.path.basename(words[0]).startswith("python"):
        del words[0]
    return " ".join([os.path.basename(words[0]), *words[1:]])


# ---------------------------------------------------------------- two snapshots


@attrs.frozen
class Rates:
    """Rates of a worker between two snapshots: descriptors that arrive in a second, and its share of a core."""

    arrivals: float
    busy: float


@attrs.frozen
class Sight:
    """All that is known of one Node: the newest snapshot, and its workers' rates since the snapshot before.

    ``trouble`` says why there is no newer snapshot; ``now`` is then the last one, or None if there was none.
    ``received`` and ``sent`` are bytes a second of a lifl-superlink.
    """

    place: Place
    command: str
    now: NodeStats | None
    trouble: str = ""
    is_gone: bool = False
    rates: dict[int, Rates] = attrs.field(factory=dict)
    received: float | None = None
    sent: float | None = None


def rates_of(before: NodeStats, now: NodeStats) -> dict[int, Rates]:
    """The rates of each worker that is in both snapshots; empty if no time is between them."""
    seconds = now.uptime_s - before.uptime_s
    if seconds <= 0:
        return {}
    then = {worker.id: worker for worker in before.workers}
    # A fold is reported at its end and may have begun before the first snapshot: a share above 1 is cut.
    return {
        worker.id: Rates(
            (worker.arrivals - then[worker.id].arrivals) / seconds,
            min(1.0, (worker.busy_s - then[worker.id].busy_s) / seconds),
        )
        for worker in now.workers
        if worker.id in then
    }


class Watcher:
    """Asks the Nodes again and again; the last ones that have gone are still shown.

    Raises :class:`LiflError` if no Node is there at the start.
    """

    def __init__(self, pid: int | None = None) -> None:
        self._pid = pid
        self._sights: dict[Place, Sight] = {}
        ask_all(pid)

    def look(self) -> list[Sight]:
        """Asks all Nodes that are there, and returns them and those that have gone."""
        places = [place for place in find_places() if self._pid in (None, place.pid)]
        for place in {*places, *self._sights}:
            self._sights[place] = self._look_at(place, self._sights.pop(place, None))
        gone = [place for place, sight in self._sights.items() if sight.is_gone]
        for place in gone[:-MAX_GONE]:
            del self._sights[place]
        return [self._sights[place] for place in sorted(self._sights)]

    def _look_at(self, place: Place, before: Sight | None) -> Sight:
        if before is not None and before.is_gone:
            return before
        was = None if before is None else before.now
        command = command_of(place.pid) or ("" if before is None else before.command)
        try:
            now = ask(place)
        except PeerGoneError:
            return Sight(place, command, was, "gone", is_gone=True)
        except LiflError as error:
            return Sight(place, command, was, str(error))
        if was is None:
            return Sight(place, command, now)
        return Sight(place, command, now, "", False, rates_of(was, now), *_bytes_a_second(was, now))


def _bytes_a_second(before: NodeStats, now: NodeStats) -> tuple[float | None, float | None]:
    seconds = now.uptime_s - before.uptime_s
    if before.superlink is None or now.superlink is None or seconds <= 0:
        return None, None
    received = now.superlink.received_bytes - before.superlink.received_bytes
    return received / seconds, (now.superlink.sent_bytes - before.superlink.sent_bytes) / seconds


def ask_all(pid: int | None = None) -> list[NodeStats]:
    """A snapshot of each Node that answers; raises :class:`LiflError`, with a remedy, if none does."""
    found: list[NodeStats] = []
    trouble = LiflError(HOW_TO_START if pid is None else nothing_of(pid))
    for place in find_places():
        if pid in (None, place.pid):
            try:
                found.append(ask(place))
            except PeerGoneError:
                continue
            except LiflError as error:
                trouble = error
    if not found:
        raise trouble
    return found


def nothing_of(pid: int) -> str:
    """The message for a process without a Node."""
    return (
        f"process {pid} has no Node with workers that this user could ask: leave out --pid to see the Nodes that "
        "there are, or run the command as the user of that process"
    )
