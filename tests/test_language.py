"""The house's words: how docstrings and comments begin, and the one word for each thing."""

from __future__ import annotations

import ast
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "lifl").rglob("*.py"))
CORE = sorted([*(ROOT / "lifl").glob("_*.[ch]"), *(ROOT / "lifl" / "ebpf").glob("*.[ch]")])

OPENING = re.compile(r"(?:What|Who|Whom|Whose|Where|Which|Of)\b")
"""A sentence that begins so hides its subject."""

NOT_WORDS = re.compile(r"\b(?:nursery|crew|employer|undertaker|MOST_\w+|LEAST_\w+|FEWEST_\w+)\b")
"""A worker's processes are the spawner and the supervisor; bounds are MAX_ and MIN_."""


def relative(path: Path) -> str:
    """The path of a file, from the root of the repository."""
    return str(path.relative_to(ROOT))


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of every string that stands alone: a docstring, or the note below an attribute."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value.strip()


def comments(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of every comment; a comment of several lines begins once."""
    before = 0
    with tokenize.open(path) as file:
        for token in tokenize.generate_tokens(file.readline):
            if token.type == tokenize.COMMENT:
                if token.start[0] != before + 1:
                    yield token.start[0], token.string.lstrip("# ")
                before = token.start[0]


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_sentences_begin_with_their_subject(path: Path) -> None:
    """No docstring and no comment opens with What, Who, Where, Which, Whose or Of."""
    opened = [*docstrings(path), *comments(path)]
    assert not [f"{relative(path)}:{line}: {text[:60]}" for line, text in opened if OPENING.match(text)]


@pytest.mark.parametrize("path", [*FILES, *CORE], ids=relative)
def test_one_word_for_one_thing(path: Path) -> None:
    """The words that were replaced do not come back."""
    lines = enumerate(path.read_text().splitlines(), 1)
    assert not [f"{relative(path)}:{number}: {line.strip()}" for number, line in lines if NOT_WORDS.search(line)]
