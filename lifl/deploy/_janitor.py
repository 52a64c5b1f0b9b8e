"""The janitor: the process that ends a `Deployment`, however its owner ends.

Owns the end of every process that carries the deployment's mark in its environment, and then
the removal of the deployment's folder. Never starts a process, imports nothing but the standard
library, and does nothing while its owner lives.

The owner starts it as `python -I -S _janitor.py FOLDER`. The janitor waits for the end of its standard
input, a pipe whose only writer is the owner. The kernel closes that pipe on a normal close
and on Ctrl-C, and also when the owner crashes or is killed. The usual ways are not enough:

- PR_SET_PDEATHSIG reaches direct children only, fires when the *thread* that forked ends,
  and needs a `preexec_fn`, which may deadlock in a process with threads (a notebook);
- killing a process group misses `flower-superexec`, which flower-superlink moves to a
  session of its own, and so the ServerApp below it.

An environment is inherited by every descendant, across sessions and re-parenting.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time

MARK = "LIFL_DEPLOYMENT"
# Flower's programs end about a second after SIGTERM, and up to 5 s in the middle of a
# request. A temporary deployment has no data that would justify the longer wait.
GRACE_S = 2.0
GIVE_UP_S = 10.0


def marked_processes(folder: str) -> list[int]:
    """The ids of the living processes that belong to the deployment in `folder`."""
    mark = os.fsencode(f"{MARK}={folder}")
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/environ", "rb") as file:
                environment = file.read().split(b"\0")
        except OSError:  # the process ended meanwhile, or belongs to another user
            continue
        if mark in environment:
            found.append(int(name))
    return found


def end_all(folder: str) -> bool:
    """Sends SIGTERM to all processes in `folder`, and SIGKILL after GRACE_S; False if some live after GIVE_UP_S."""
    started = time.monotonic()
    asked: set[int] = set()
    num_empty_looks = 0
    # A process in the middle of execve() has no environment for an instant, so one empty look proves nothing.
    while num_empty_looks < 2:
        seconds = time.monotonic() - started
        if seconds > GIVE_UP_S:
            return False
        processes = marked_processes(folder)
        num_empty_looks = 0 if processes else num_empty_looks + 1
        for pid in processes:
            try:
                if seconds > GRACE_S:
                    os.kill(pid, signal.SIGKILL)
                elif pid not in asked:
                    os.kill(pid, signal.SIGTERM)
                    asked.add(pid)
            except ProcessLookupError:
                continue
        time.sleep(0.05)
    return True


if __name__ == "__main__":
    while os.read(0, 1):
        pass
    is_clean = end_all(sys.argv[1])
    shutil.rmtree(sys.argv[1], ignore_errors=True)
    sys.exit(0 if is_clean else 1)
