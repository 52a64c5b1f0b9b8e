"""A round's report to look at: a Gantt picture as SVG, a table for notebooks, files.

Paints the shapes of ``shapes``; decides and measures nothing. Text from outside (client ids, reasons) is escaped.
Colours are of middle lightness and all else is ``currentColor``, so that the picture fits light and dark pages.
"""

from __future__ import annotations

import html
import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO

from lifl.report.mpl import make_figure
from lifl.report.scene import (
    COLOURS,
    LABEL_PX,
    LANES,
    LETTER_PX,
    MIN_PX,
    WIDTH_PX,
    Shown,
    Window,
    headline,
    plain,
    remarks,
    row_name,
    scene_of,
    short_time,
    shorten,
)
from lifl.report.shapes import ENLARGED, LEGEND, TOP, TRACK, Block, Label, Shape, Sign, enlarged_part, shapes_in

SUFFIXES = (".html", ".svg", ".png", ".pdf", ".json")
FONT = "ui-sans-serif, system-ui, 'DejaVu Sans', Helvetica, Arial, sans-serif"
TOP_PX, MAX_SHOWN, MAX_LETTERS = 74.0, 12, 300
CARD = (
    "<style>svg{color:#1f2430}.card{fill:#fbfbf8}"
    "@media(prefers-color-scheme:dark){svg{color:#e8ebf0}.card{fill:#1a1e26}}</style>"
    '<rect class="card" width="100%" height="100%" rx="8"/>'
)
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 960px; margin: 2em auto; padding: 0 1em;
  color: #1f2430; background: #fbfbf8; }}
@media (prefers-color-scheme: dark) {{ body {{ color: #e8ebf0; background: #1a1e26; }} }}
</style></head><body>
{body}
</body></html>
"""


def escaped(text: object, most: int = MAX_LETTERS) -> str:
    """Text for HTML and XML: special characters escaped, unprintable ones replaced, a long text's middle cut out."""
    return html.escape(shorten(plain(text), most))


# ---------------------------------------------------------------- SVG


def gantt_svg(report: Shown) -> str:
    """The picture, a row for each worker over time, as an ``<svg>`` for a page, in the page's text colour."""
    return _svg(report, f'style="display:block;max-width:{WIDTH_PX:g}px;width:100%;height:auto"', "")


def _svg(report: Shown, how: str, behind: str) -> str:
    scene = scene_of(report)
    pitch = 40.0 if len(scene.workers) <= 12 else 32.0

    def y(row: float) -> float:
        return TOP_PX + 16 + (row - TOP) * pitch

    bottom = y(len(scene.workers) - 1 + TRACK / 2)
    parts = [behind, _line_of_text(20, headline(report), 14, 'font-weight="600"')]
    parts += [_line_of_text(38, remarks(report), 12)] if remarks(report) else []
    parts += [_text(12, y(row) + 4, row_name(worker), 12) for row, worker in enumerate(scene.workers)]
    parts += [_element(shape, scene.windows[0], y) for shape in enlarged_part(scene)]
    for window in scene.windows:
        parts += [_element(shape, window, y) for shape in shapes_in(scene, window)]
        parts += [_text(window.x(at), bottom + 18, text, 11, 'text-anchor="middle"') for at, text in window.ticks()]
    for window in scene.windows[1:]:
        parts.append(_text(window.left_px + window.width_px / 2, bottom + 34, ENLARGED, 11, 'text-anchor="middle"'))
    parts += _legend(bottom + (58 if len(scene.windows) > 1 else 46))
    height = bottom + (70 if len(scene.windows) > 1 else 58)
    label = f'role="img" aria-label="{escaped(headline(report))}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH_PX:g} {height:g}" {how} {label}'
    return "\n".join([f'{head} font-family="{FONT}" fill="currentColor">', *filter(None, parts), "</svg>"])


def _element(shape: Shape, window: Window, y: Callable[[float], float]) -> str:
    """A shape as an element; `y` gives the pixel of a height in rows."""
    if isinstance(shape, Block):
        x = window.x(shape.begin_s)
        width = max(window.x(shape.end_s) - x, MIN_PX)  # rounding must not make it less
        more = f'fill="{shape.colour or "currentColor"}"' + (f' opacity="{shape.opacity:g}"' * (shape.opacity < 1))
        return _rect(x, y(shape.top), width, y(shape.bottom) - y(shape.top), more, shape.title)
    x = window.x(shape.at_s)
    if isinstance(shape, Sign):
        return _sign(shape.kind, x, y(shape.y), shape.title)
    if isinstance(shape, Label):
        more = " ".join(['text-anchor="end"'] * shape.is_end + ['font-weight="600"'] * shape.is_bold)
        return _text(x - shape.gap_px if shape.is_end else x + shape.gap_px, y(shape.y), shape.text, 11, more)
    dash = {"dotted": ' stroke-dasharray="1 3"', "dashed": ' stroke-dasharray="5 4"'}.get(shape.style, "")
    thick = f' stroke-width="{shape.width_px:g}"' * (shape.width_px != 1)
    opacity = f' opacity="{shape.opacity:g}"' * (shape.opacity < 1)
    return _line(x, y(shape.top), y(shape.bottom), f"{thick}{dash}{opacity}", shape.title)


def _legend(y: float) -> Iterator[str]:
    x = LABEL_PX
    for step, colour in COLOURS.items():
        low, high = LANES[step]
        yield _rect(x, y - 10, 14, 12, 'opacity="0.08"')
        yield _rect(x, y - 10 + 12 * low, 14, 12 * (high - low), f'fill="{colour}"')
        yield _text(x + 20, y, step, 11)
        x += 34 + LETTER_PX * len(step)
    yield _rect(x, y - 10, 14, 12, 'opacity="0.08"') + _text(x + 20, y, "idle", 11)
    x += 60
    for kind, text in LEGEND.items():
        yield _sign(kind, x + 6, y - 4) + _text(x + 16, y, text, 11)
        x += 30 + LETTER_PX * len(text)


def _sign(kind: str, x: float, y: float, title: str = "") -> str:
    """A sign with its middle at (x, y). A tick is drawn as a sign only in the legend."""
    shapes = {
        "diamond": f"M{x:.1f} {y - 5:.1f}l5 5-5 5-5-5z",
        "triangle": f"M{x - 4:.1f} {y - 3.5:.1f}h8l-4 7z",
    }
    if kind not in shapes:
        return _line(x, y - 5, y + 5, 'opacity="0.7"', title)
    return f'<path d="{shapes[kind]}">{_title(title)}</path>'


def _line_of_text(y: float, text: str, size: int, more: str = "") -> str:
    # A long line would run out of the picture. Its title has more of the text.
    most = int(WIDTH_PX / (0.58 * size))
    return _text(12, y, shorten(text, most), size, more, text if len(text) > most else "")


def _text(x: float, y: float, text: str, size: int, more: str = "", title: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" {more}>{_title(title)}{escaped(text)}</text>'


def _rect(x: float, y: float, width: float, height: float, more: str, title: str = "") -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" {more}>{_title(title)}</rect>'


def _line(x: float, top: float, bottom: float, more: str, title: str = "") -> str:
    return f'<path d="M{x:.1f} {top:.1f}V{bottom:.1f}" stroke="currentColor" {more}>{_title(title)}</path>'


def _title(text: str) -> str:
    return f"<title>{escaped(text)}</title>" if text else ""


# ---------------------------------------------------------------- HTML


def report_html(report: Shown) -> str:
    """The picture and tables below it, as a notebook shows a report."""
    count = f"{len(report.accepted)} of {report.expected}, weight {report.weight:g}"
    clipped = [f"{c.client_id} (to {c.clipped:.3g})" for c in report.accepted if c.clipped < 1]
    rows = [
        ("accepted", [count]),
        ("refused", [f"{r.client_id} ({r.rule}: {r.reason})" for r in report.rejected]),
        ("clipped", clipped),
        ("late", list(report.late)),
        ("shape", [report.shape] if report.shape else []),
        ("started cold", [str(report.started)] if report.started else []),
        ("workers replaced", [str(report.deaths)] if report.deaths else []),
        ("no result", [report.error] if report.error is not None else []),
    ]
    facts = "".join(_row(name, [_several(values)]) for name, values in rows if values)
    times = "".join(_row(*row) for row in _times(report))
    head = _row("", ["real", "predicted"] if report.predicted else ["real"], "th") if times else ""
    return (
        f'<div class="lifl-round">\n{gantt_svg(report)}\n'
        f'<div style="display:flex;flex-wrap:wrap;gap:8px 3em;align-items:flex-start;margin-top:8px">\n'
        f"<table>{facts}</table>\n<table>{head}{times}</table>\n</div></div>"
    )


def _times(report: Shown) -> Iterator[tuple[str, list[str]]]:
    predicted = dict(report.predicted or {})
    pairs = {"total": "completion_s", "last_to_result": "last_to_result_s"}
    for name, real in report.stages.items():
        cells = [short_time(real)]
        if report.predicted:
            guess = predicted.pop(pairs.get(name, ""), None)
            cells.append("" if guess is None else short_time(guess) + _off(guess, real))
        yield name.replace("_", " "), cells
    if "cpu_s" in predicted:
        yield "CPU time", ["", short_time(predicted["cpu_s"])]
    if "peak_bytes" in predicted:
        megabytes = predicted["peak_bytes"] / 1e6
        yield "peak memory", ["", f"{megabytes:,.0f} MB" if megabytes >= 100 else f"{megabytes:.3g} MB"]


def _off(guess: float, real: float) -> str:
    if real <= 0:
        return ""
    off = (guess - real) / real
    return f" ({off:+.0%})" if abs(off) >= 0.1 else f" ({off:+.1%})"


def _several(values: list[str]) -> str:
    more = [f"and {len(values) - MAX_SHOWN} more"] if len(values) > MAX_SHOWN else []
    return "<br>".join(escaped(value) for value in values[:MAX_SHOWN] + more)


def _row(name: str, cells: list[str], tag: str = "td") -> str:
    """A row of a table. The cells are HTML already."""
    style = "text-align:left;padding:1px 12px 1px 0;vertical-align:top"
    inner = "".join(f'<{tag} style="{style};overflow-wrap:anywhere">{cell}</{tag}>' for cell in cells)
    return f'<tr><th style="{style};white-space:nowrap">{escaped(name)}</th>{inner}</tr>'


# ---------------------------------------------------------------- files


def save(report: Shown, path: str | os.PathLike[str]) -> None:
    """Writes a file in the format of its suffix: see :meth:`lifl.RoundReport.save`."""
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix == ".json":
        text = json.dumps(report.to_dict(), indent=2) + "\n"
        _replace(path, lambda file: file.write(text.encode()))
    elif suffix == ".svg":
        image = _svg(report, f'width="{WIDTH_PX:g}"', CARD)
        _replace(path, lambda file: file.write(image.encode()))
    elif suffix == ".html":
        page = PAGE.format(title=escaped(headline(report)), body=report_html(report))
        _replace(path, lambda file: file.write(page.encode()))
    elif suffix in (".png", ".pdf"):
        figure = make_figure(report)
        _replace(path, lambda file: figure.savefig(file, format=suffix[1:], dpi=150))
    else:
        raise ValueError(f"cannot save a report as {path.name!r}: the suffix must be one of {', '.join(SUFFIXES)}")


def _replace(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Writes a file beside the path, then renames it over the path, so that no reader meets half a file."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "wb") as file:
            write(file)
        os.replace(beside, path)
    except BaseException:
        with suppress(OSError):
            beside.unlink()
        raise
