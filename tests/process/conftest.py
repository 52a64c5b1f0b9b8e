"""Flower's programs that the tests of this folder start are forked by a process that has Flower imported."""

from __future__ import annotations

import pytest

from lifl.deploy.programs import Programs
from tests.forkserver import ForkServer

ENVIRONMENT = Programs._environment
"""The environment of programs that are not forked."""

_SERVER = pytest.StashKey[ForkServer]()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Starts the fork server with the first test, before the fixtures that look for what a test leaves behind."""
    stash = item.config.stash
    if _SERVER in stash:
        return
    server = stash[_SERVER] = ForkServer()
    Programs._environment = lambda self: server.environment(ENVIRONMENT(self))  # type: ignore[method-assign]
    item.config.add_cleanup(server.close)


@pytest.fixture(scope="session")
def fork_server(request: pytest.FixtureRequest) -> ForkServer:
    """The fork server of this process."""
    return request.config.stash[_SERVER]


@pytest.fixture
def own_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower's programs start as a user's do, each with its own Python."""
    monkeypatch.setattr(Programs, "_environment", ENVIRONMENT)
