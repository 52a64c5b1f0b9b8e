"""Tests that are to run on both transports do, whatever they ask for; and a program that they start does too."""

from __future__ import annotations

import subprocess
import sys

import pytest

import lifl

pytestmark = pytest.mark.transports

CODE = "import lifl\nwith lifl.Node('4MiB', workers=1) as node: print(node.stats().transport)"


def carried() -> str:
    """The transport of a Node that is made here."""
    with lifl.Node("4MiB", workers=1) as node:
        return node.stats().transport


def test_a_test_without_fixtures(request: pytest.FixtureRequest) -> None:
    """It asks for nothing, and its Node has the transport that its name says."""
    assert carried() in request.node.name


@pytest.mark.parametrize("number", [1, 2])
def test_a_test_with_other_parameters(request: pytest.FixtureRequest, number: int) -> None:
    """The test's other parameters do not matter."""
    assert carried() in request.node.name


@pytest.fixture
def made() -> str:
    """A Node that a fixture makes."""
    return carried()


def test_a_test_with_a_fixture(request: pytest.FixtureRequest, made: str) -> None:
    """The fixture's Node has it too."""
    assert made in request.node.name


def test_a_program(request: pytest.FixtureRequest) -> None:
    """So has that of a program that the test starts."""
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert done.stdout.strip() in request.node.name
