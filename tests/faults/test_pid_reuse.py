"""A dead worker's pid that another process gets at once: that one is nobody's business."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = [pytest.mark.ladder, pytest.mark.transports]


@pytest.mark.usefixtures("namespaces")
def test_pids_are_reused(program: Any) -> None:
    """In a namespace of its own, each dead worker's pid goes to a stranger: it lives on, and the rounds are exact."""
    said = program(
        """
import subprocess

def next_pid(pid):
    with open("/proc/sys/kernel/ns_last_pid", "w") as file:
        file.write(str(pid - 1))

strangers = []
with lifl.Node("8MiB", workers=2, stall_timeout=0.5) as node:
    a_round(node)
    for turn in range(12):
        pid = node.pids()[turn % 2]
        with node.open_round(SPEC, 6, "lazy") as round_:
            for i in range(3):
                round_.submit(SENT[i], client_id=i)
            # Killed, or stopped until it is: the agent must end that process and no other.
            os.kill(pid, signal.SIGKILL if turn % 3 else signal.SIGSTOP)
            if turn % 3 == 0:
                round_.close_early()
            end = time.monotonic() + 20
            # Its successor has been started by then, and has another number.
            while (os.path.exists(f"/proc/{pid}") or len({*node.pids()} - {pid}) < 2) and time.monotonic() < end:
                time.sleep(0.001)
            next_pid(pid)
            strangers.append(subprocess.Popen(["sleep", "600"]))
            next_pid(400 + 20 * turn)  # successors are not to take the dead ones' numbers
            is_reused = strangers[-1].pid == pid
            for i in range(3, 6 if turn % 3 else 3):
                round_.submit(SENT[i], client_id=i)
            mean = round_.result(30).arrays["w"][0]
            assert mean == (63 / 6 if turn % 3 else 7 / 3), mean
        assert is_reused, (pid, strangers[-1].pid)
alive = [stranger.poll() is None for stranger in strangers]
for stranger in strangers:
    stranger.kill()
    stranger.wait()
print(json.dumps(alive))
""",
        prefix=("unshare", "--pid", "--fork", "--mount-proc", "--kill-child"),
    )
    assert said == [True] * 12
