"""The text that a terminal shows, for tests of tables and trees."""

from __future__ import annotations

import io

from rich.console import Console, RenderableType


def shown(renderable: RenderableType, width: int = 160) -> str:
    """The text of a table or tree on a terminal of `width` columns."""
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(renderable)
    return console.export_text()
