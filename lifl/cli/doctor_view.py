"""The table of what ``lifl doctor`` found out, for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from lifl.cli.doctor import Findings, Line

TITLES = {"lifl": "lifl", "machine": "Machine", "arena": "Arena", "ebpf": "eBPF", "flower": "Flower"}
TITLES |= {"packages": "Optional packages", "calibration": "Calibration"}

FINE, BETTER, WRONG = Text("✓", "green"), Text("+", "yellow"), Text("✗", "bold red")
SVG_COLUMNS = 116


def findings_table(findings: Findings) -> Table:
    """A row for each finding and, if it can be improved, its remedy below."""
    table = Table.grid(padding=(0, 1))
    for _ in range(2):
        table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for number, (section, lines) in enumerate(findings.sections.items()):
        if number:
            table.add_row()
        table.add_row("", Text(TITLES[section], "bold"))
        for line in lines:
            if line.text:
                name = line.name if section == "packages" else _label(line.name)
                table.add_row(_mark(line), Text(name, "cyan"), Text(line.text))
            if line.text and line.remedy:
                table.add_row("", "", Text(f"→ {line.remedy}", "yellow"))
    return table


def _label(name: str) -> str:
    return name.removeprefix("is_").removesuffix("_bytes").replace("_", " ")


def _mark(line: Line) -> Text:
    if line.name == "runs" and not line.value:
        return WRONG
    return BETTER if line.remedy else FINE
