"""A real lifl-superlink with real SuperNodes, watched: `lifl top` and a scrape see the round, and that it has gone."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fedavg_runs
import pytest
from prometheus_client.parser import text_string_to_metric_families
from servers import Servers

from lifl.monitor import top
from lifl.monitor.stats import NodeStats

WAIT_S = 240.0


def lifl_top(*arguments: str, status: int = 0) -> str:
    """The output of the command."""
    command = [sys.executable, "-c", "from lifl.cli.main import main; main(prog_name='lifl')", "top", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert done.returncode == status, done.stderr
    return done.stdout or done.stderr


def wait_for(pid: int, is_so: Callable[[NodeStats], Any]) -> NodeStats:
    """The first look at which it is so."""
    end = time.monotonic() + WAIT_S
    while not is_so(stats := top.ask_all(pid)[0]):
        assert time.monotonic() < end, stats
        time.sleep(0.1)
    return stats


def scrape(servers: Servers) -> dict[str, float]:
    """The metrics at the address in the server's log: values without labels."""
    found = re.search(r"metrics at (http://\S+/metrics)", servers.log(servers.server))
    assert found is not None
    with urllib.request.urlopen(found[1], timeout=WAIT_S) as answer:
        text = answer.read().decode()
    families = text_string_to_metric_families(text)
    return {s.name: s.value for family in families for s in family.samples if not s.labels}


@pytest.mark.leaves("Flower's programs reap the processes of their tasks late")
def test_a_round_of_a_lifl_superlink(tmp_path: Path) -> None:
    """In the middle, with one of two updates there, and after it; the scrape says the same; killed, it is gone."""
    out = tmp_path / "out"
    out.mkdir()
    with Servers(arguments=("--lifl-metrics-port", "0", "--lifl-workers", "1")) as servers:
        pid = servers.pid(servers.server)
        with ThreadPoolExecutor(2) as threads:
            list(threads.map(servers.start_node, range(2)))
        stats = wait_for(pid, lambda stats: stats.superlink and stats.superlink.held_requests == 2)
        assert (stats.pid, stats.totals.accepted, stats.open_rounds) == (pid, 0, 0)

        servers.submit(fedavg_runs.APP, {"out": str(out), "strategy": "lifl", "rounds": 1, "sleep": 1})
        stats = wait_for(pid, lambda stats: stats.totals.accepted == 1)
        (seen,) = stats.rounds
        assert (seen.phase, seen.accepted, seen.expected) == ("open", 1, 2)
        assert stats.superlink is not None
        assert stats.superlink.messages == 2
        assert stats.superlink.received_bytes > 0
        assert stats.superlink.sent_bytes > 0
        assert stats.superlink.objects is not None
        text = lifl_top("--once", "--interval", "0.1", "--pid", str(pid))
        assert "lifl-superlink" in text
        assert "1/2" in text
        assert "gateway in" in text
        (said,) = json.loads(lifl_top("--json", "--pid", str(pid)))["nodes"]
        assert NodeStats.from_dict(said).totals == stats.totals
        found = scrape(servers)
        assert found["lifl_rounds_open"] == found["lifl_updates_accepted_total"] == 1
        assert found["lifl_superlink_messages_total"] == 2
        assert found["lifl_superlink_received_bytes_total"] >= stats.superlink.received_bytes

        (out / "go").touch()
        servers.wait_for_run()
        stats = wait_for(pid, lambda stats: not stats.open_rounds)
        assert (stats.totals.rounds_done, stats.totals.rounds_failed, stats.totals.accepted) == (1, 0, 2)
        assert stats.superlink is not None
        assert stats.superlink.replies == 2
        servers.end(servers.server, signal.SIGKILL)
        assert f"process {pid} has no Node" in lifl_top("--json", "--pid", str(pid), status=1)
