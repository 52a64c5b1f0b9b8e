"""The program with one rule taken out, and sockets to see what then happens.

Each naive program is lifl's own source with one line of it changed: what a test sees is that line's doing.
"""

from __future__ import annotations

import socket
from pathlib import Path

from lifl.ebpf import build, prebuilt
from lifl.ebpf.pairs import pair
from lifl.ebpf.prebuilt import Program
from lifl.ebpf.record import LAUNCHER, RECORD_BYTES, Record

MISS = "if (!is_delivered) redirect(msg, &launcher);"
APPLY = "bpf_msg_apply_bytes(msg, LIFL_RECORD_BYTES);"
CORK = "bpf_msg_cork_bytes(msg, LIFL_RECORD_BYTES);"
DEAD, NOBODY = 98, 99


def without(folder: Path, clang: str, rule: str, instead: str) -> Program:
    """lifl's program with `instead` in the place of a line that keeps a rule; loaded and attached."""
    text = build.SOURCE.read_text()
    assert text.count(rule) == 1, f"{rule!r} is to be found once in {build.SOURCE.name}"
    (source := folder / "naive.bpf.c").write_text(text.replace(rule, instead))
    return prebuilt.loaded(build.compiled(clang, source))


def record(dst: int, seq: int = 0, src: int = 1) -> Record:
    """A record for an aggregator."""
    return Record(dst, src, dst & 0xFFFF, seq, 0, 0, 0, 0, 0, 0)


def packed(*records: Record) -> bytes:
    """Their bytes, one after another."""
    return b"".join(one.pack() for one in records)


class Wires:
    """The launcher's and three participants' sockets in a program's map. Owns them and the program.

    Every aggregator's records go to the participant of its number; of 98, who has died, there is only the route left,
    and 99 has never been.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.own: dict[int, socket.socket] = {}
        self.anchors: dict[int, socket.socket] = {}
        for key in (LAUNCHER, 1, 2, 3):
            self.own[key], self.anchors[key] = pair()
            program.socks.update(key, self.own[key].fileno())
            program.routes.update(key, key)
        program.routes.update(DEAD, DEAD)

    def send(self, me: int, data: bytes) -> int:
        """Sends a participant's bytes in one call; returns the number of bytes that were taken."""
        return self.own[me].send(data, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)

    def received(self, me: int) -> list[int]:
        """The aggregators that a participant's records were meant for, in order: those that have come by now.

        A record is in its receiver's queue when the sender's call returns.
        """
        data = b""
        while True:
            try:
                data += (more := self.own[me].recv(2**20, socket.MSG_DONTWAIT))
            except BlockingIOError:
                break
            if not more:
                break
        assert len(data) % RECORD_BYTES == 0, "a part of a record has come"
        return [one.dst for one in Record.unpack(data)]

    def close(self) -> None:
        """Lets go of all."""
        for one in (*self.own.values(), *self.anchors.values()):
            one.close()
        self.program.close()

    def __enter__(self) -> Wires:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
