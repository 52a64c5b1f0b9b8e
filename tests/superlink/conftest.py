"""Every test of the server runs with the content invariant checked: an id's bytes are its bytes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lifl.superlink.store import store


@pytest.fixture(autouse=True)
def contents_are_checked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Contents are hashed again when they are read and when they go; who reads may swallow what that raises."""
    monkeypatch.setattr(store, "IS_CHECKING", True)
    store.broken.clear()
    yield
    assert not store.broken
