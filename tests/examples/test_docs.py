"""The documentation is complete and self-contained, as far as a machine can tell."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOREIGN = re.compile(r"""(?:src|srcset|action|<link[^>]* href)=["']?((?:https?:)?//[^"' >]+)""")


def test_every_module_is_described() -> None:
    """architecture.md says something of every module of lifl."""
    text = (ROOT / "docs/architecture.md").read_text().partition("## Arrows")[0]
    files = [path for path in (ROOT / "lifl").rglob("*.py") if not {"_demo_app", "_round_app"} & set(path.parts)]
    names = {path.stem for path in files} - {"__init__"}
    assert not {name for name in names if f"`{name}`" not in text and f"`{name}.py`" not in text}


def test_site_is_built_and_self_contained(tmp_path: Path) -> None:
    """The pages build without a warning and load nothing from another host."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert pages
    assert not {url for page in pages for url in FOREIGN.findall(page.read_text())}
