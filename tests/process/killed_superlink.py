"""A SuperLink, lifl's or Flower's by the first argument, that kills itself at a moment which a file names.

The file $LIFL_KILL has a moment's name and a number: at the moment that comes as this number since the file was there,
the file goes and the process with it, by SIGKILL. The fork server runs it: ``killed-superlink KIND ...``.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState
from flwr.supercore.object_store.sql_object_store import SqlObjectStore
from flwr.superlink.servicer.fleet import fleet_handlers
from flwr.superlink.servicer.runtime import runtime_handlers

LARGE_BYTES = 2**20
counts: dict[str, int] = {}


def reached(moment: str) -> None:
    """Ends this process, if this is the moment."""
    told = Path(os.environ["LIFL_KILL"])
    try:
        name, number = told.read_text().rsplit(" ", 1)
    except (FileNotFoundError, ValueError):
        counts.clear()
        return
    if name != moment:
        return
    counts[moment] = counts.get(moment, 0) + 1
    if counts[moment] == int(number):
        told.unlink()
        os.kill(os.getpid(), signal.SIGKILL)


def has_any(_: Any) -> bool:
    """Each call counts."""
    return True


def watch(owner: Any, name: str, moment: str, counts_if: Callable[[Any], bool] = has_any) -> None:
    """Makes moments of a function: `before MOMENT` and, if its answer counts, `after MOMENT`."""
    real = getattr(owner, name)

    @functools.wraps(real)
    def called(*args: Any, **kwargs: Any) -> Any:
        reached(f"before {moment}")
        answer = real(*args, **kwargs)
        if counts_if(answer):
            reached(f"after {moment}")
        return answer

    setattr(owner, name, called)


def main() -> None:
    """Runs the server of the kind that comes first; the rest of the command line is its own."""
    kind = sys.argv.pop(1)
    watch(SqlObjectStore, "get", "large", lambda content: content is not None and len(content) > LARGE_BYTES)
    watch(fleet_handlers, "pull_messages", "pull", lambda answer: bool(answer.messages_list))
    for name in ("push_messages", "push_object", "confirm_message_received"):
        watch(fleet_handlers, name, f"node's {name}")
    watch(runtime_handlers, "pull_messages", "app's pull_messages", lambda answer: bool(answer.messages_list))
    for name in ("push_messages", "push_object"):
        watch(runtime_handlers, name, f"app's {name}")
    push_object = runtime_handlers.push_object

    def push_last(request: Any, state: SqlLinkState, *rest: Any) -> Any:
        answer = push_object(request, state, *rest)
        (row,) = state.query("SELECT count(*) AS left_over FROM object_push_session_pending")
        if not row["left_over"]:
            reached("after app's last push_object")
        return answer

    runtime_handlers.push_object = push_last
    if kind == "flower":
        from flwr.superlink.cli.flower_superlink import flower_superlink

        flower_superlink()
        return
    from lifl.superlink import app_socket, command

    for name in ("open", "bound", "finish", "close"):
        watch(app_socket.Connection, f"_on_{name}", name)
    command.main()
