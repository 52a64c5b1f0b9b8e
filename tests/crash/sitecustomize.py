"""Read by every interpreter that is started with this directory on its path: the spawner, or a test's agent.

Puts the core with steps in the place of lifl's own, and counts the lines and instructions of the worker too.
"""

import importlib.util
import os
import sys

LIB, PAGE = os.environ["LIFL_STEPS_LIB"], os.environ["LIFL_STEPS_PAGE"]
DETAIL = os.environ.get("LIFL_STEPS_DETAIL", "steps")
"""Steps are those of the core alone, or also "lines" or "opcodes" of the worker's Python, or lines of the "spawner"."""
SPAWNER = 100
"""The place of the spawner in the page; no participant has this number here."""

spec = importlib.util.spec_from_file_location("lifl._shm_ffi", LIB)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
sys.modules["lifl._shm_ffi"] = module

from lifl.workers import aggregator, spawner  # noqa: E402

lib = module.lib
WAITING = {"run", "step", "_advance", "<lambda>", "main"}
"""The functions that an idle worker calls again and again: no step of a round."""


def trace_lines(frame, event, _):
    """Each line, or each instruction, is a step."""
    if event in ("line", "opcode"):
        lib.lifl_step()
    return trace_lines


def tracer(rooms):
    """A trace function that counts the Python of these modules."""
    files = {room.__file__ for room in rooms}

    def trace_calls(frame, event, _):
        code = frame.f_code
        if code.co_filename not in files or code.co_name in WAITING:
            return None
        frame.f_trace_opcodes = DETAIL == "opcodes"
        return trace_lines

    return trace_calls


real = aggregator.main


def main(arena_fd, bell_fd, me, spin_s, parent, *given):
    """A worker's life, counted."""
    lib.lifl_steps_use(PAGE.encode(), me)
    if DETAIL != "steps":
        sys.settrace(tracer([aggregator]) if DETAIL != "spawner" else None)
    real(arena_fd, bell_fd, me, 0.0, parent, *given)


aggregator.main = main
real_spawner = spawner.main


def spawn(*numbers):
    """The life of the process that starts workers, counted; a worker that has not begun counts for it."""
    lib.lifl_steps_use(PAGE.encode(), SPAWNER)
    sys.settrace(tracer([spawner]))
    real_spawner(*numbers)


if DETAIL == "spawner":
    spawner.main = spawn
