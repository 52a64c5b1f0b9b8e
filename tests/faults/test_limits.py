"""Descriptors, rounds and processes that run out: an error that says what, nothing left, and it goes on afterwards."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = [pytest.mark.ladder, pytest.mark.transports]

AT_THE_START = """
before, said = fds(), []
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
highest = max(map(int, before))
for extra in range(60):
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + extra, hard))
    try:
        with lifl.Node("4MiB", workers=2) as node:
            a_round(node)
            said.append("ok")
    except (LiflError, OSError) as error:
        said.append(f"{type(error).__name__}: {error}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    check_nothing_left(before)
    if said[-3:] == ["ok"] * 3:
        break
with lifl.Node("4MiB", workers=2) as node:
    a_round(node)
print(json.dumps(said))
"""


def test_descriptors_run_out_at_the_start(program: Any) -> None:
    """Whichever descriptor cannot be had: an error, or with one more a Node that works."""
    said = program(AT_THE_START)
    assert said[-3:] == ["ok"] * 3
    failed = said[: said.index("ok")]
    assert len(failed) > 3
    assert said[len(failed) :] == ["ok"] * 3  # more descriptors never make it worse
    for one in failed:
        assert any(word in one for word in ("Too many open files", "ulimit -n", "ended with status")), one


AT_A_DEATH = """
said = []
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
for extra in range(14):
    before = fds()
    with lifl.Node("4MiB", workers=2) as node:
        a_round(node)
        who = {who}
        highest = max(int(n) for n in os.listdir(f"/proc/{{who}}/fd"))
        resource.prlimit(who, resource.RLIMIT_NOFILE, (max(highest - 4 + extra, 3), hard))
        try:
            a_round(node, kill=True)
            said.append("ok")
        except (LiflError, OSError) as error:
            said.append(f"{{type(error).__name__}}: {{error}}")
        if who == os.getpid():
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    check_nothing_left(before)
print(json.dumps(said))
"""


@pytest.mark.parametrize("who", ["os.getpid()", "node._supervisor.spawner.pid"], ids=["agent", "spawner"])
def test_descriptors_run_out_when_a_worker_dies(program: Any, who: str) -> None:
    """Neither the agent nor the spawner has one for the successor: the round ends with the reason."""
    said = program(AT_A_DEATH.format(who=who))
    assert "ok" in said
    failed = [one for one in said if one != "ok"]
    assert failed
    for one in failed:
        assert one.startswith("PeerGoneError: worker")
        assert "ulimit -n" in one or "Too many open files" in one


def test_too_many_rounds(program: Any) -> None:
    """Rounds are opened until there is no room: the error says how much; each closed one makes room for another."""
    said = program("""
with lifl.Node("4MiB", workers=2) as node:
    free, rounds = node.arena.free_bytes, []
    try:
        while True:
            rounds.append(node.open_round(SPEC, 6))
    except ShmError as error:
        said = [error.errno, str(error)]
    for round_ in rounds:
        for i, update in enumerate(SENT):
            round_.submit(update, client_id=i, timeout=30)
        assert round_.result(30).arrays["w"][0] == 63 / 6
        round_.close()
        a_round(node)
    del round_, rounds
    gc.collect()
    assert node.arena.free_bytes == free
print(json.dumps(said))
""")
    assert said[0] == 28
    assert "no room for a round" in said[1]
    assert "close rounds" in said[1]


def test_no_process_is_left_for_a_successor(program: Any, shim: Any) -> None:
    """The fork of a successor fails with EAGAIN: the round ends and says so, later calls too, and all is closed."""
    said = program(
        """
before = fds()
os.environ["LIFL_FAULT"] = f"fork 3 {errno.EAGAIN}"  # for the spawner: two workers, then their successor
with lifl.Node("4MiB", workers=2) as node:
    a_round(node)
    said = []
    for attempt in (lambda: a_round(node, kill=True), lambda: node.open_round(SPEC, 1)):
        try:
            attempt()
        except PeerGoneError as error:
            said.append(str(error))
check_nothing_left(before)
print(json.dumps(said))
""",
        preload=shim,
    )
    assert len(said) == 2
    assert said[0] == said[1]
    assert "died and has no successor" in said[0]
    assert "Resource temporarily unavailable" in said[0]
