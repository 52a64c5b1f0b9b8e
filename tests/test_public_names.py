"""The names of ``import lifl``: the list, the imports that a type checker reads, and the table name the same things."""

from __future__ import annotations

import ast
import inspect
from importlib import import_module

import pytest

import lifl


def imports_for_type_checkers() -> dict[str, str]:
    """Public name -> module, as ``lifl/__init__.py`` imports it under ``if TYPE_CHECKING``."""
    (block,) = (
        node
        for node in ast.parse(inspect.getsource(lifl)).body
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name)
    )
    return {
        name.name: node.module or ""
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for name in node.names
        if node.module != "lifl"
    }


def test_the_list_and_the_imports_and_the_table_agree() -> None:
    """A name that stands in one of the three only would be public for some of its users."""
    assert imports_for_type_checkers() == lifl._HOMES
    assert {*lifl._HOMES, "__version__", "errors"} == set(lifl.__all__)


def test_every_public_name_is_there() -> None:
    """Each can be had as an attribute, is the one of its module, and ``dir`` shows it."""
    for name, home in lifl._HOMES.items():
        assert getattr(lifl, name) is getattr(import_module(home), name)
    for name in lifl._PACKAGES:
        assert getattr(lifl, name) is import_module(f"lifl.{name}")
    assert {*lifl.__all__, *lifl._PACKAGES} <= set(dir(lifl))


def test_a_name_that_is_not_there() -> None:
    """Python's own message."""
    with pytest.raises(AttributeError, match="module 'lifl' has no attribute 'Nod'"):
        lifl.Nod  # noqa: B018
