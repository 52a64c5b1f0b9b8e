"""A round's report to look at: a Gantt picture as SVG, a table for notebooks, files.

Draws what ``scene`` says; measures nothing. What comes from outside (client ids, reasons) is escaped. Colours
are of middle lightness and all else is ``currentColor``, so that the picture fits light and dark pages.
"""

from __future__ import annotations

import html
import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import IO

from lifl.report import mpl as plot
from lifl.report.scene import (
    COLOURS,
    LABEL_PX,
    LANES,
    LETTER_PX,
    MIN_PX,
    WIDTH_PX,
    Scene,
    Shown,
    Window,
    arrivals_in,
    bars_in,
    ends_at_mark,
    headline,
    lane_of,
    marks_in,
    plain,
    remarks,
    role_labels,
    roles_of,
    row_name,
    short_time,
    shorten,
    show_scene,
)

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
    """For HTML and XML: special characters escaped, those that cannot be shown replaced, a long text's middle cut."""
    return html.escape(shorten(plain(text), most))


# ---------------------------------------------------------------- SVG


def gantt_svg(report: Shown) -> str:
    """A row for each runtime over time, as an ``<svg>`` to be put into a page, in the page's text colour."""
    return _svg(report, f'style="display:block;max-width:{WIDTH_PX:g}px;width:100%;height:auto"', "")


def _svg(report: Shown, how: str, behind: str) -> str:
    scene = show_scene(report)
    pitch = 40.0 if len(scene.runtimes) <= 12 else 32.0
    bottom = TOP_PX + pitch * len(scene.runtimes)
    tracks = {runtime: (TOP_PX + pitch * row + 16, pitch - 16) for row, runtime in enumerate(scene.runtimes)}
    parts = [behind, _line_of_text(20, headline(report), 14, 'font-weight="600"')]
    parts += [_line_of_text(38, remarks(report), 12)] if remarks(report) else []
    parts += [_text(12, top + height / 2 + 4, row_name(runtime), 12) for runtime, (top, height) in tracks.items()]
    for window in scene.windows:
        parts += _window(scene, window, tracks, bottom)
    parts += _legend(bottom + (58 if len(scene.windows) > 1 else 46))
    height = bottom + (70 if len(scene.windows) > 1 else 58)
    label = f'role="img" aria-label="{escaped(headline(report))}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH_PX:g} {height:g}" {how} {label}'
    return "\n".join([f'{head} font-family="{FONT}" fill="currentColor">', *filter(None, parts), "</svg>"])


def _window(scene: Scene, window: Window, tracks: dict[int, tuple[float, float]], bottom: float) -> Iterator[str]:
    left, width = window.left_px, window.width_px
    for top, height in tracks.values():
        yield _rect(left, top, width, height, 'opacity="0.08"')
    for at, text in window.ticks():
        yield _line(window.x(at), TOP_PX + 12, bottom + 4, 'opacity="0.2"')
        yield _text(window.x(at), bottom + 18, text, 11, 'text-anchor="middle"')
    if window.origin_s:
        yield _text(
            left + width / 2, bottom + 34, "the end, enlarged: after the last update", 11, 'text-anchor="middle"'
        )
    elif len(scene.windows) > 1:
        begin, end = (window.x(at) for at in (scene.windows[1].begin_s, scene.windows[1].end_s))
        yield _rect(begin - 1, TOP_PX + 8, max(end - begin, 3) + 2, bottom - TOP_PX - 4, 'opacity="0.15"')
    # The shortest last, so that none is hidden.
    for bar in sorted(bars_in(scene, window), key=lambda bar: bar.begin_s - bar.end_s):
        top, height = tracks[bar.runtime]
        low, high = lane_of(scene, bar.runtime, bar.step)
        x = min(window.x(bar.begin_s), left + width - MIN_PX)
        # Half a pixel keeps neighbours apart.
        wide = max(window.x(bar.end_s) - x - 0.5, MIN_PX)
        colour = f'fill="{COLOURS.get(bar.step, "currentColor")}"'
        yield _rect(x, top + low * height, wide, (high - low) * height, colour, str(bar))
    top, height = tracks[0]
    for at, text in arrivals_in(scene, window):
        yield _line(window.x(at), top - 4, top + 5, 'opacity="0.7"', text)
    for runtime, (top, height) in tracks.items():
        yield from _roles(scene, window, runtime, top, height)
    yield from _marks(scene, window, bottom)


def _roles(scene: Scene, window: Window, runtime: int, top: float, height: float) -> Iterator[str]:
    roles = roles_of(scene, runtime)
    for x, is_end, text in role_labels(roles, window):
        yield _text(x, top - 3, text, 11, 'text-anchor="end"' if is_end else "")
    for (_, _, before), (begin, _, after) in pairwise(roles):
        if window.has(begin):
            x, y = window.x(begin), top + height / 2
            yield _line(x, top - 2, top + height + 2, 'stroke-width="1.5"')
            shape = f"M{x:.1f} {y - 5:.1f}l5 5-5 5-5-5z"
            yield f'<path d="{shape}"><title>{escaped(f"from {before} to {after} at {begin:.6g} s")}</title></path>'


def _marks(scene: Scene, window: Window, bottom: float) -> Iterator[str]:
    for at, what, is_told in marks_in(scene, window):
        x, is_predicted = window.x(at), what == "predicted"
        dash = {"last update": 'stroke-dasharray="1 3"', "predicted": 'stroke-dasharray="5 4"'}.get(what, "")
        yield _line(x, TOP_PX + 4, bottom + 4, f'stroke-width="1.5" {dash}', f"{what}: {at:.6g} s")
        if what == "last update":
            yield f'<path d="M{x - 4:.1f} {TOP_PX + 3:g}h8l-4 7z"/>'
        if is_told:
            is_left = ends_at_mark(what, x, window)
            anchor = 'text-anchor="end"' if is_left else ""
            weight = 'font-weight="600"' if what in ("model ready", "no result") else ""
            yield _text(
                x + (-2 if is_left else 2), TOP_PX - (14 if is_predicted else 0), what, 11, f"{anchor} {weight}"
            )


def _legend(y: float) -> Iterator[str]:
    x = LABEL_PX
    for step, colour in COLOURS.items():
        low, high = LANES[step]
        yield _rect(x, y - 10, 14, 12, 'opacity="0.08"')
        yield _rect(x, y - 10 + 12 * low, 14, 12 * (high - low), f'fill="{colour}"')
        yield _text(x + 20, y, step, 11)
        x += 34 + LETTER_PX * len(step)
    yield _rect(x, y - 10, 14, 12, 'opacity="0.08"') + _text(x + 20, y, "idle", 11)
    yield f'<path d="M{x + 66:.1f} {y - 9:g}l5 5-5 5-5-5z"/>' + _text(x + 76, y, "role changes", 11)
    yield _line(x + 168, y - 9, y + 1, 'opacity="0.7"') + _text(x + 174, y, "update has arrived", 11)
    yield f'<path d="M{x + 310:.1f} {y - 8:g}h8l-4 7z"/>' + _text(x + 324, y, "the last one", 11)


def _line_of_text(y: float, said: str, size: int, more: str = "") -> str:
    # A long line would run out of the picture: its title has more of it.
    most = int(WIDTH_PX / (0.58 * size))
    return _text(12, y, shorten(said, most), size, more, said if len(said) > most else "")


def _text(x: float, y: float, said: str, size: int, more: str = "", title: str = "") -> str:
    inner = f"<title>{escaped(title)}</title>" if title else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" {more}>{inner}{escaped(said)}</text>'


def _rect(x: float, y: float, width: float, height: float, more: str, title: str = "") -> str:
    inner = f"<title>{escaped(title)}</title>" if title else ""
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" {more}>{inner}</rect>'


def _line(x: float, top: float, bottom: float, more: str, title: str = "") -> str:
    inner = f"<title>{escaped(title)}</title>" if title else ""
    return f'<path d="M{x:.1f} {top:.1f}V{bottom:.1f}" stroke="currentColor" {more}>{inner}</path>'


# ---------------------------------------------------------------- HTML


def report_html(report: Shown) -> str:
    """The picture and a table below it, as a notebook shows a report."""
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
    said = dict(report.predicted or {})
    pairs = {"total": "completion_s", "last_to_result": "last_to_result_s"}
    for name, real in report.stages.items():
        cells = [short_time(real)]
        if report.predicted:
            guess = said.pop(pairs.get(name, ""), None)
            cells.append("" if guess is None else short_time(guess) + _off(guess, real))
        yield name.replace("_", " "), cells
    if "cpu_s" in said:
        yield "CPU time", ["", short_time(said["cpu_s"])]
    if "peak_bytes" in said:
        megabytes = said["peak_bytes"] / 1e6
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
    """A row of a table; the cells are HTML."""
    style = "text-align:left;padding:1px 12px 1px 0;vertical-align:top"
    inner = "".join(f'<{tag} style="{style};overflow-wrap:anywhere">{cell}</{tag}>' for cell in cells)
    return f'<tr><th style="{style};white-space:nowrap">{escaped(name)}</th>{inner}</tr>'


# ---------------------------------------------------------------- files


def save(report: Shown, path: str | os.PathLike[str]) -> None:
    """Writes a file of the kind that its suffix says: see :meth:`lifl.RoundReport.save`."""
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
        figure = plot.make_figure(report)
        _replace(path, lambda file: figure.savefig(file, format=suffix[1:], dpi=150))
    else:
        raise ValueError(f"cannot save a report as {path.name!r}: the suffix must be one of {', '.join(SUFFIXES)}")


def _replace(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """The file is old or new, never half: written beside it, then renamed over it."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "wb") as file:
            write(file)
        os.replace(beside, path)
    except BaseException:
        with suppress(OSError):
            beside.unlink()
        raise
