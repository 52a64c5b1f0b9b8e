"""Everything that README and documentation promise can be done: code blocks, commands, names, links."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import typer

from lifl.cli import main as cli

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(ROOT.glob("docs/*.md"))]
TIMEOUT_S = 120

RUNNABLE = re.compile(r"<!-- runnable -->\n```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
FENCE = re.compile(r"^ *```(\w*)[^\n]*\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
CODE_SPAN = re.compile(r"`([^`\n]+)`")
NAME = re.compile(r"(?<![\w/])lifl(?:\.[A-Za-z_]\w*)+")
COMMAND = re.compile(r"^(?:lifl|make)(?: [\w=./'\[\]-]+)*$")
LINK = re.compile(r"\]\(([^)\s#]+)(?:#[^)\s]*)?\)")
ELSEWHERE = ("http:", "https:")


def relative(path: Path) -> str:
    """For the names of tests."""
    return str(path.relative_to(ROOT))


def code_in(page: Path) -> Iterator[str]:
    """Every line of a code block, and every code span."""
    text = page.read_text()
    for _, block in FENCE.findall(text):
        yield from (line.strip() for line in block.splitlines())
    yield from CODE_SPAN.findall(FENCE.sub("", text))


def runnable_blocks() -> Iterator[Any]:
    """The Python blocks below a ``runnable`` mark, of all pages."""
    for page in PAGES:
        for number, block in enumerate(RUNNABLE.findall(page.read_text()), 1):
            yield pytest.param(block, id=f"{relative(page)}-{number}")


def resolve(name: str) -> object:
    """The module or attribute behind a dotted name; raises AttributeError or ImportError if there is none."""
    first, *rest = name.split(".")
    found: Any = importlib.import_module(first)
    path = first
    for part in rest:
        path = f"{path}.{part}"
        if hasattr(found, part):
            found = getattr(found, part)
        elif inspect.isclass(found) and f"self.{part}" in inspect.getsource(found):
            return None  # an attribute that only instances have
        else:
            found = importlib.import_module(path)
    return found


def check_lifl_command(words: list[str]) -> None:
    """Fails unless `words`, which follow ``lifl``, are a command with options that it has."""
    command: click.Command = typer.main.get_command(cli.main)
    while words and not words[0].startswith("-"):
        assert isinstance(command, click.Group), f"{command.name} has no command {words[0]}"
        assert words[0] in command.commands, f"no command {words[0]} in {sorted(command.commands)}"
        command, words = command.commands[words[0]], words[1:]
    known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
    assert not {word for word in words if word.startswith("--")} - known


@pytest.mark.parametrize("block", list(runnable_blocks()))
def test_block_runs(block: str, tmp_path: Path) -> None:
    """A block that is marked runnable runs as it stands, as a script in an empty folder, and leaves nothing."""
    script = tmp_path / "block.py"
    script.write_text(block)
    work = tmp_path / "work"
    work.mkdir()
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=work, env=env, capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert not list(work.iterdir())


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs/howto-node.md"], ids=relative)
def test_page_shows_a_program(page: Path) -> None:
    """The pages that promise a program have one that is run here."""
    assert RUNNABLE.findall(page.read_text())


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_python_blocks_compile(page: Path) -> None:
    """Every Python block is Python, also one that is only a part of a program."""
    for language, block in FENCE.findall(page.read_text()):
        if language == "python":
            compile(block, relative(page), "exec")


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_names_exist(page: Path) -> None:
    """Every dotted name that begins with ``lifl`` is a module, or an attribute of one."""
    for name in sorted({name for code in code_in(page) for name in NAME.findall(code)}):
        resolve(name)


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_commands_exist(page: Path) -> None:
    """Every ``lifl`` command, with its options, and every ``make`` target exists."""
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for code in code_in(page):
        words = code.split()
        if not COMMAND.match(code) or len(words) == 1:
            continue
        if words[0] == "make":
            assert set(words[1:]) <= set(targets), code
        elif words[1] != "=":
            check_lifl_command(words[1:])


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_lead_somewhere(page: Path) -> None:
    """Every relative link, also of a picture, leads to a file."""
    for target in LINK.findall(page.read_text()):
        if not target.startswith(ELSEWHERE):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_named_files_exist(page: Path) -> None:
    """Every path into the repository that is in a code span exists."""
    for code in CODE_SPAN.findall(page.read_text()):
        if re.fullmatch(r"(?:docs|examples|lifl|tests|\.ci)/[\w./-]+", code):
            assert (ROOT / code).exists(), code
