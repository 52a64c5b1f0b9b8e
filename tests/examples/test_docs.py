"""The documentation is complete and self-contained, as far as a machine can tell."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
MAX_ARCHITECTURE_WORDS = 1200
FOREIGN = re.compile(r"""(?:src|srcset|action|<link[^>]* href)=["']?((?:https?:)?//[^"' >]+)""")


def test_every_package_is_described() -> None:
    """architecture.md has a row for every package of lifl and every file beside them."""
    text = (ROOT / "docs/architecture.md").read_text().partition("## The life of one update")[0]
    names = {path.parent.name for path in (ROOT / "lifl").glob("*/__init__.py")}
    names |= {path.stem for path in (ROOT / "lifl").glob("*.py") if not path.stem.startswith("_")}
    assert not {name for name in names if f"`{name}`" not in text}


def test_architecture_is_short() -> None:
    """architecture.md has at most 1,200 words, the diagram included: a module's docstring says what the module owns."""
    words = (ROOT / "docs/architecture.md").read_text().replace("|", " ").split()
    assert len(words) <= MAX_ARCHITECTURE_WORDS, "move what a module owns into its docstring"


def test_every_module_says_what_it_is() -> None:
    """By its docstring."""
    for path in (ROOT / "lifl").rglob("*.py"):
        if not {"_demo_app", "_round_app"} & set(path.parts):
            assert ast.get_docstring(ast.parse(path.read_text())), path


def test_site_is_built_and_self_contained(tmp_path: Path) -> None:
    """The pages build without a warning and load nothing from another host."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert pages
    assert not {url for page in pages for url in FOREIGN.findall(page.read_text())}
