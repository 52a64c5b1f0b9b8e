"""The house's words: how docstrings and comments begin, and the one word for each thing."""

from __future__ import annotations

import ast
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "lifl").rglob("*.py"))
TESTS = sorted(path for path in (ROOT / "tests").rglob("*.*") if path.suffix in {".py", ".c", ".h", ".cpp"})
CORE = sorted([*(ROOT / "lifl").glob("_*.[ch]"), *(ROOT / "lifl" / "ebpf").glob("*.[ch]")])

OPENING = re.compile(r"(?:^|(?<=[.:!?]\s))(?:What|Who|Whom|Whose|Where|Which|Of)\b")
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
            yield node.lineno, node.value.value


def comments(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of every comment; the lines of one that goes on are one text."""
    lines: list[str] = []
    last = 0
    with tokenize.open(path) as file:
        for token in tokenize.generate_tokens(file.readline):
            if token.type == tokenize.COMMENT:
                if lines and token.start[0] != last + 1:
                    yield last, " ".join(lines)
                    lines = []
                lines.append(token.string.lstrip("# "))
                last = token.start[0]
    if lines:
        yield last, " ".join(lines)


def core_comments(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of every comment of a file in C or C++."""
    text = path.read_text()
    for found in re.finditer(r"/\*(.*?)\*/|(?:^|\s)//([^\n]*)", text, re.DOTALL):
        yield text.count("\n", 0, found.start()) + 1, re.sub(r"\n\s*\*", " ", found[1] or found[2] or "")


def test_sentences_begin_with_their_subject() -> None:
    """No sentence of a docstring or a comment opens with What, Who, Where, Which, Whose or Of."""
    opened = []
    for path in (*FILES, *CORE, *TESTS):
        for line, text in [*docstrings(path), *comments(path)] if path.suffix == ".py" else core_comments(path):
            told = " ".join(text.split())
            opened += [f"{relative(path)}:{line}: {told[found.start() :][:60]}" for found in OPENING.finditer(told)]
    assert not opened


def test_one_word_for_one_thing() -> None:
    """The words that were replaced do not come back."""
    found = []
    for path in (*FILES, *CORE):
        lines = enumerate(path.read_text().splitlines(), 1)
        found += [f"{relative(path)}:{number}: {line.strip()}" for number, line in lines if NOT_WORDS.search(line)]
    assert not found
