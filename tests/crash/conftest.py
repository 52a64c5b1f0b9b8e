"""Fixtures that the crash tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
from stepping import build


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The core with steps, built once."""
    return build(tmp_path_factory.mktemp("steps"))
