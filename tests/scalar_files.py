"""Reads event files as TensorBoard does: record by record, file by file, and without what a restart made void."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Scalars = dict[str, dict[int, float]]


def events(path: Path) -> Iterator[Any]:
    """The events of one file; a record that was cut off ends it, a damaged one fails."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    data, at = path.read_bytes(), 0
    while at + 12 <= len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        record = data[at + 12 : at + 12 + length]
        checks = data[at + 8 : at + 12], data[at + 12 + length : at + 16 + length]
        if len(checks[1]) < 4:
            return
        for part, check in zip((data[at : at + 8], record), checks, strict=True):
            assert struct.unpack("<I", check)[0] == masked_crc32c(part), f"{path} is damaged at byte {at}"
        yield Event.FromString(record)
        at += 16 + length


def scalars(run: Path) -> Scalars:
    """Tag -> step -> value of one run's folder. That there is one value for each is checked."""
    from tensorboardX.proto.event_pb2 import SessionLog

    found: Scalars = {}
    for path in sorted(run.iterdir()):
        for event in events(path):
            if event.session_log.status == SessionLog.START:
                for steps in found.values():
                    for step in [step for step in steps if step >= event.step]:
                        del steps[step]
            for value in event.summary.value:
                steps = found.setdefault(value.tag, {})
                assert event.step not in steps, f"{value.tag} has two values in step {event.step}"
                steps[event.step] = value.simple_value
    return {tag: steps for tag, steps in found.items() if steps}


def untimed(found: Scalars) -> Scalars:
    """Without the seconds, which are others in each run."""
    return {tag: steps for tag, steps in found.items() if not tag.startswith("round_seconds/")}
