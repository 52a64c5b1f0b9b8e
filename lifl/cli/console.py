"""The output of the ``lifl`` commands: progress, figures, and errors in one line.

Owns output and exit statuses. Status 1: the command failed or refused a value, and the line has the reason; 2: typer
refused the arguments; 130: Ctrl-C.
"""

from __future__ import annotations

import functools
import io
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, ParamSpec

import typer
from rich.console import Console

from lifl.errors import LiflError

if TYPE_CHECKING:
    from rich.console import RenderableType

P = ParamSpec("P")

REMEDIES = {
    "grpc": "pip install 'lifl[bench]'",
    "matplotlib": "pip install 'lifl[plot]'",
    "nvflare": "pip install 'lifl[peers]'",
    "prometheus_client": "pip install 'lifl[metrics]'",
    "sklearn": "pip install 'lifl[demo]'",
    "torch": "pip install 'lifl[torch]'",
}
"""Commands that install a missing module, by its name."""

INTERRUPTED = 130

AsJson = Annotated[bool, typer.Option("--json", help="Print the figures as JSON, and nothing else, on stdout.")]


def reporting_errors(command: Callable[P, None]) -> Callable[P, None]:
    """Decorates a command: an error that the user can mend becomes one line on stderr and an exit status."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt:
            end("stopped by Ctrl-C; nothing is left running", INTERRUPTED)
        except ModuleNotFoundError as error:
            name = (error.name or "").partition(".")[0]
            end(f"{name} is not installed: {REMEDIES.get(name, f'pip install {name}')}", 1)
        except (LiflError, ValueError) as error:
            end(text_of(error), 1)

    return run


def text_of(error: Exception) -> str:
    """The text of an error for a user; its class if it has none."""
    # The text of an OSError begins with errno, which a user does not need; strerror is the text without it.
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def end(message: str, status: int) -> NoReturn:
    """Ends the command with a line on stderr."""
    typer.echo(f"lifl: {message}", err=True)
    raise typer.Exit(status)


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """A function that shows the present step, on stderr and only on a terminal; the line is removed at the end."""
    console = Console(stderr=True)
    with console.status("starting") as status:
        yield lambda step: status.update(f"measuring: {step}")


def show(figures: dict[str, Any], table: Callable[[dict[str, Any]], RenderableType], as_json: bool) -> None:
    """Prints figures, as JSON or as the table that `table` makes of them."""
    if as_json:
        typer.echo(json.dumps(figures, indent=2))
    else:
        Console().print(table(figures))


def terminal_svg(view: RenderableType, title: str, columns: int) -> str:
    """A picture of a terminal that shows the view, as SVG that refers to no other host."""
    console = Console(width=columns, record=True, force_terminal=True, file=io.StringIO())
    console.print(view)
    drawn = console.export_svg(title=title, unique_id=title.replace(" ", "-"))
    # Its fonts would be fetched from a server; without them the reader's own are used.
    return re.sub(r"\s*@font-face \{.*?\}", "", drawn, flags=re.DOTALL)
