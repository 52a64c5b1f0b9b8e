"""The history of a run: lines of text in a file beside a checkpoint, so that a checkpoint does not grow with the run.

The checkpoint says how many bytes of the file count, and has their checksum: lines of a checkpoint that was never
finished are cut off by the next one. Knows neither Flower nor rounds.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lifl.errors import CheckpointError


class History:
    """The file beside the checkpoint at `path`: its name with ``.history`` added."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        path = Path(path)
        self.path = path.with_name(path.name + ".history")
        self._checkpoint = path
        self._counting = self._next = 0, hashlib.sha256()  # bytes and their checksum: of those that count, and soon do

    def read(self, mark: dict[str, Any]) -> list[str] | None:
        """The lines that a checkpoint counts; later ones are appended to them. None if the file is not there.

        Raises
        ------
        CheckpointError
            If the file cannot be read, or its bytes are not those that were written.
        """
        if not mark["bytes"]:
            return []
        try:
            with open(self.path, "rb") as file:
                data = file.read(mark["bytes"])
        except FileNotFoundError:
            return None
        except OSError as error:
            raise CheckpointError(
                f"cannot read the history {self.path}: {error}; restore it from a copy, or move it away"
            ) from error
        digest = hashlib.sha256(data)
        if digest.hexdigest() != mark["sha256"]:
            raise CheckpointError(
                f"the history {self.path} is not the one of the checkpoint {self._checkpoint}, or was damaged: restore "
                "it from a copy, or move it away to go on without the metrics and reports of the rounds in it"
            )
        self._counting = self._next = len(data), digest
        return data.decode().splitlines()

    def append(self, lines: Iterable[str]) -> dict[str, Any]:
        """Writes lines behind those that count, and syncs them; returns the mark for the next checkpoint.

        They count once :meth:`commit` says that this checkpoint is written; until then, the next call replaces them.

        Raises
        ------
        CheckpointError
            If they cannot be written.
        """
        data = "".join(f"{line}\n" for line in lines).encode()
        nbytes, digest = self._counting
        if data:
            try:
                self._write(data, nbytes)
            except OSError as error:
                raise CheckpointError(
                    f"cannot write the history {self.path}: {error}; make room or choose another checkpoint="
                ) from error
        digest = digest.copy()
        digest.update(data)
        self._next = nbytes + len(data), digest
        return {"bytes": self._next[0], "sha256": digest.hexdigest()}

    def _write(self, data: bytes, begin: int) -> None:
        with open(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
            file.truncate(begin)
            file.seek(begin)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def commit(self) -> None:
        """Notes that the checkpoint with the mark of the last :meth:`append` is written."""
        self._counting = self._next
