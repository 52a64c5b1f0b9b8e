"""Draws what `lifl top` shows: a panel for each Node, once or live.

Text from other processes is shown as text, whatever is in it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Mapping, Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lifl.monitor.stats import NodeStats, RoundStats, SuperlinkStats, WorkerStats
from lifl.monitor.top import Rates, Sight, Watcher

MAX_ROUNDS = 8
MAX_WORKERS = 32
BAR = 20
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
UNKNOWN = "–"  # noqa: RUF001 # a dash for a number that is not known yet

ROLE_STYLES = {"leaf": "green", "top": "magenta", "shard": "cyan", "idle": "dim", "off": "dim"}
PHASE_STYLES = {"open": "green", "folding": "cyan", "done": "dim", "failed": "red"}


def nodes_view(sights: Sequence[Sight]) -> RenderableType:
    """All Nodes; those that have gone come last."""
    return Group(*(node_view(one) for one in sorted(sights, key=lambda one: (one.is_gone, one.place))))


def node_view(sight: Sight) -> RenderableType:
    """The panel of a Node."""
    title = Text(f"process {sight.place.pid}", style="bold")
    if sight.place.number > 1:
        title.append(f", Node {sight.place.number}")
    command = Text(_plain(sight.command) or "(its command line cannot be read)", no_wrap=True, overflow="ellipsis")
    parts: list[RenderableType] = [command]
    if sight.trouble:
        parts.append(Text(_plain(sight.trouble), style="red"))
    if sight.now is not None and not sight.is_gone:
        parts += _parts_of(sight.now, sight)
    style = "red" if sight.trouble else "blue"
    return Panel(Group(*parts), title=title, title_align="left", border_style=style, box=box.ROUNDED)


def _parts_of(now: NodeStats, sight: Sight) -> list[RenderableType]:
    how = now.transport if now.loader is None else f"{now.transport} ({now.loader})"
    there = sum(worker.pid is not None for worker in now.workers)
    parts: list[RenderableType] = [
        Text(
            f"up {time_text(now.uptime_s)}, {there} of {len(now.workers)} workers, transport {_plain(how)}", style="dim"
        ),
        _memory(now),
        _totals(now),
    ]
    if now.superlink is not None:
        parts += _superlink(sight, now.superlink)
    parts += [Text(), _rounds(now), Text(), _workers(now.workers, sight.rates)]
    return parts


def _memory(now: NodeStats) -> RenderableType:
    used, total = now.memory.used_bytes, now.memory.total_bytes
    row = Table.grid(padding=(0, 1))
    style = "red" if used > 0.9 * total else "green"
    row.add_row("memory", _bar(used, total, style), f"{size_text(used)} of {size_text(total)}")
    return row


def _bar(done: int, of: int, style: str) -> ProgressBar:
    return ProgressBar(total=max(of, 1), completed=done, width=BAR, complete_style=style, finished_style=style)


def _totals(now: NodeStats) -> Text:
    totals = now.totals
    line = Text(f"rounds {totals.rounds_done:,} done")
    if totals.rounds_failed:
        line.append(f", {totals.rounds_failed:,} failed", style="red")
    line.append(f"; updates {totals.accepted:,} accepted ({size_text(totals.accepted_bytes)})")
    if totals.refused:
        line.append(f"; refused: {_refused(totals.refused)}", style="yellow")
    return line


def _superlink(sight: Sight, stats: SuperlinkStats) -> list[RenderableType]:
    received, sent = size_text(stats.received_bytes), size_text(stats.sent_bytes)
    gateway = f"gateway in {_rate(sight.received)} ({received}), out {_rate(sight.sent)} ({sent})"
    objects = "objects in the database" if stats.objects is None else f"objects {stats.objects:,}"
    passed = f"messages {stats.messages:,}, replies {stats.replies:,}, requests held {stats.held_requests:,}"
    return [
        Text(f"{gateway}, copied {size_text(stats.copied_bytes)}"),
        Text(f"uploads {stats.uploads:,}, {objects}; {passed}"),
    ]


def _rounds(now: NodeStats) -> RenderableType:
    if not now.rounds:
        return Text("no round is open", style="dim")
    table = _table("round", "", ">updates", ">bytes", ">age", "refused")
    for one in now.rounds[:MAX_ROUNDS]:
        table.add_row(
            str(one.number),
            _progress(one),
            f"{one.accepted:,}/{one.expected:,}",
            size_text(one.accepted_bytes),
            time_text(one.age_s),
            Text(_refused(one.refused), style="yellow"),
        )
    if (more := now.open_rounds - min(len(now.rounds), MAX_ROUNDS)) > 0:
        return Group(table, Text(f"and {more:,} more rounds", style="dim"))
    return table


def _progress(one: RoundStats) -> RenderableType:
    row = Table.grid(padding=(0, 1))
    phase = Text(_plain(one.phase).ljust(7), style=PHASE_STYLES.get(one.phase, ""))
    row.add_row(phase, _bar(one.accepted, one.expected, "cyan"))
    return row


def _workers(workers: Sequence[WorkerStats], rates: Mapping[int, Rates]) -> RenderableType:
    table = _table("worker", ">pid", "role", "rounds", ">queue", ">arrivals/s", ">busy", ">folded", ">deaths")
    there = [worker for worker in workers if worker.pid is not None]
    for one in there[:MAX_WORKERS]:
        rate = rates.get(one.id)
        table.add_row(
            str(one.id),
            str(one.pid),
            Text(" ").join(Text(_plain(role), style=ROLE_STYLES.get(role, "")) for role in one.roles),
            _shortened(one.rounds),
            f"{one.queued:,}",
            UNKNOWN if rate is None else f"{rate.arrivals:,.0f}",
            UNKNOWN if rate is None else f"{rate.busy:.0%}",
            f"{one.folded:,}",
            Text(f"{one.deaths:,}", style="red" if one.deaths else "dim"),
        )
    parts: list[RenderableType] = [table] if there else []
    if (more := len(there) - MAX_WORKERS) > 0:
        parts.append(Text(f"and {more:,} more workers", style="dim"))
    if (off := len(workers) - len(there)) > 0:
        parts.append(Text(f"{off:,} worker{'' if off == 1 else 's'} off: started when a round needs them", style="dim"))
    return Group(*parts)


def _table(*columns: str) -> Table:
    """A table with these columns; ">" before a name is for numbers. No cell is wrapped: a wide one is cut off."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1))
    for name in columns:
        table.add_column(name.lstrip(">"), justify="right" if name.startswith(">") else "left", no_wrap=True)
    return table


def _refused(by_rule: Mapping[str, int]) -> str:
    return ", ".join(f"{_plain(rule)} {count:,}" for rule, count in sorted(by_rule.items()))


def _shortened(numbers: Iterable[int]) -> str:
    words = [str(number) for number in numbers]
    return ", ".join(words[:3]) + (f" +{len(words) - 3}" if len(words) > 3 else "")


def _plain(text: str) -> str:
    """The text without characters that would move the cursor."""
    return "".join(c if c.isprintable() else "?" for c in str(text))


def _rate(bytes_a_second: float | None) -> str:
    return UNKNOWN if bytes_a_second is None else f"{size_text(bytes_a_second)}/s"


def size_text(nbytes: float) -> str:
    """Bytes in words, as "1.5 GiB"."""
    power = 0
    while nbytes >= 1024 and power < len(UNITS) - 1:
        nbytes, power = nbytes / 1024, power + 1
    return f"{nbytes:.{0 if nbytes >= 100 or not power else 1}f} {UNITS[power]}"


def time_text(seconds: float) -> str:
    """Seconds in words, as "1 h 05 min"."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = int(seconds // 60)
    return f"{minutes} min {int(seconds % 60):02} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60:02} min"


# ---------------------------------------------------------------- on a terminal


def show_live(console: Console, watcher: Watcher, interval_s: float) -> None:
    """Shows the Nodes again and again until Ctrl-C; lines that do not fit on the terminal are cut off."""
    with contextlib.suppress(KeyboardInterrupt), Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            live.update(nodes_view(watcher.look()), refresh=True)
            time.sleep(interval_s)
