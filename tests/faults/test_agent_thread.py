"""The thread that hears the workers: without it nothing works, so its end is everybody's business, at once."""

from __future__ import annotations

import threading
from contextlib import suppress

import numpy as np
import pytest

import lifl
from lifl.errors import PeerGoneError

pytestmark = pytest.mark.transports

SPEC = lifl.TensorSpec.from_arrays({"w": np.zeros(4)})


def test_its_end_is_loud(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A bug in the agent's thread: the traceback is logged, open rounds and new calls raise, close leaves nothing."""
    with lifl.Node("4MiB", workers=2) as node:
        round_ = node.open_round(SPEC, 2)
        assert node._supervisor is not None

        def broken(*_: object) -> None:
            raise RuntimeError("a bug of lifl's own")

        monkeypatch.setattr(node, "drain", broken)
        with suppress(PeerGoneError):  # this wakes it; the end may be heard of here already
            round_.submit({"w": np.ones(4)}, client_id="a")
        with pytest.raises(PeerGoneError, match="a bug of lifl's own"):
            round_.result(30)
        with pytest.raises(PeerGoneError, match="the thread that hears the workers ended"):
            node.open_round(SPEC, 1)
        assert "Traceback" in caplog.text
        round_.close()


def test_no_thread_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error goes through, and the workers that were started already end, which the fixture checks."""

    def refused(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        lifl.Node("4MiB", workers=2)
