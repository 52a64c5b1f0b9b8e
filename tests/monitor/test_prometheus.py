"""Metrics for Prometheus: what is scraped is what the Node says, and the server ends with the Node."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import prometheus_client
import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

import lifl
from lifl.errors import AdmissionError
from lifl.monitor import prometheus as exporter
from lifl.monitor.stats import MemoryStats, NodeStats, SuperlinkStats, Totals

WAIT_S = 60.0
MODEL = {"w": np.ones(1000, np.float32)}
SPEC = lifl.TensorSpec.from_arrays(MODEL)


@pytest.fixture
def node() -> Iterator[lifl.Node]:
    """With metrics at any port."""
    with lifl.Node("8MiB", workers=2, metrics_port=0) as node:
        yield node


def scrape(address: str | None) -> str:
    """The text that Prometheus would get."""
    assert address is not None
    connection = http.client.HTTPConnection(address, timeout=WAIT_S)
    connection.request("GET", "/metrics")
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    assert response.status == 200, text
    return text


def families(text: str) -> dict[str, Metric]:
    """By name, as Prometheus reads them."""
    return {family.name: family for family in text_string_to_metric_families(text)}


def samples(text: str) -> dict[tuple[str, tuple[str, ...]], float]:
    """Each value by its name and its labels' values."""
    return {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in families(text).values()
        for sample in family.samples
    }


def one_round(node: lifl.Node) -> None:
    """Three updates, after one that is refused."""
    with node.open_round(SPEC, 3, shape=lifl.Shape(2, 0)) as round_:
        with pytest.raises(AdmissionError):
            round_.submit({"w": np.full(1000, np.inf, np.float32)})
        for k in range(3):
            round_.submit(MODEL, client_id=k)
        round_.result(WAIT_S)


@pytest.mark.transports
def test_scrape_is_what_the_node_says(node: lifl.Node) -> None:
    """Every figure, with an open round, after one that is over and one that failed."""
    one_round(node)
    node.open_round(SPEC, 2).close()
    with node.open_round(SPEC, 5, "lazy") as round_:
        round_.submit(MODEL)
        found, stats = samples(scrape(node.metrics_address)), node.stats()
    names = ("lifl_node_info", tuple(str(one) for one in (stats.loader or "none", stats.number, stats.transport)))
    assert found.pop(names) == 1
    assert 0 < found.pop(("lifl_node_uptime_seconds", ())) < stats.uptime_s
    assert 0 < found.pop(("lifl_rounds_open_oldest_age_seconds", ())) < stats.rounds[0].age_s
    expected: dict[tuple[str, tuple[str, ...]], float] = {
        ("lifl_arena_bytes", ()): stats.memory.total_bytes,
        ("lifl_arena_used_bytes", ()): stats.memory.used_bytes,
        ("lifl_rounds_open", ()): 1,
        ("lifl_rounds_open_expected", ()): 5,
        ("lifl_rounds_open_accepted", ()): 1,
        ("lifl_rounds_total", ("done",)): 1,
        ("lifl_rounds_total", ("failed",)): 1,
        ("lifl_updates_accepted_total", ()): 4,
        ("lifl_updates_accepted_bytes_total", ()): 4 * SPEC.nbytes,
        ("lifl_updates_refused_total", ("values",)): 1,
    }
    roles = [role for worker in stats.workers for role in worker.roles]
    expected |= {("lifl_workers", (role,)): roles.count(role) for role in exporter.ROLES}
    for worker in stats.workers:
        name = (str(worker.id),)
        expected[("lifl_worker_arrivals_total", name)] = worker.arrivals
        expected[("lifl_worker_queue", name)] = worker.queued
        expected[("lifl_worker_updates_folded_total", name)] = worker.folded
        expected[("lifl_worker_busy_seconds_total", name)] = worker.busy_s
        expected[("lifl_worker_deaths_total", name)] = worker.deaths
    assert found == expected
    assert found[("lifl_worker_busy_seconds_total", ("1",))] > 0


def test_names_are_prometheus_conventions() -> None:
    """Every metric, also of a lifl-superlink, has a prefix, a help text, base units, and `_total` if it only rises."""
    stats = NodeStats(
        *(1, 1, "rings", None, 1.0, MemoryStats(1, 1), (), 0, Totals(0, 0, 0, 0, {}), ()),
        SuperlinkStats(1, 2, 3, 4, 5, 6, 7, 8),
    )
    told = list(exporter.metrics_of(stats))
    assert len({family.name for family in told}) == len(told)
    for family in told:
        assert family.name.startswith("lifl_")
        assert family.documentation.endswith(".")
        assert family.type in ("info", "gauge", "counter")
        assert not family.name.endswith(("_total", "_count", "_ms", "_us", "_ns", "_mib"))
        if family.type == "counter":
            assert all(sample.name.endswith("_total") for sample in family.samples)
    values = {sample.name: sample.value for family in told for sample in family.samples if "superlink" in sample.name}
    assert list(values.values()) == [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.transports
def test_counters_only_rise(node: lifl.Node) -> None:
    """From scrape to scrape, over rounds and the death of a worker."""
    before = samples(scrape(node.metrics_address))
    for number in range(6):
        if number == 3:
            os.kill(node.pids()[0], signal.SIGKILL)
        one_round(node)
        after = samples(scrape(node.metrics_address))
        counters = {key for key in before if key[0].endswith("_total")}
        assert counters <= set(after)
        assert all(before[key] <= after[key] for key in counters)
        assert after[("lifl_updates_accepted_total", ())] == before[("lifl_updates_accepted_total", ())] + 3
        before = after


def test_two_nodes_and_the_programs_own_metrics() -> None:
    """Each Node of a process has its own port and figures; the default registry of prometheus_client has none."""
    own = {family.name for family in prometheus_client.REGISTRY.collect()}
    with lifl.Node("4MiB", workers=0, metrics_port=0) as one, lifl.Node("4MiB", workers=0, metrics_port=0) as two:
        one_round(one)
        done = ("lifl_rounds_total", ("done",))
        assert samples(scrape(one.metrics_address))[done] == 1
        assert samples(scrape(two.metrics_address))[done] == 0
        assert {family.name for family in prometheus_client.REGISTRY.collect()} == own


def test_it_ends_with_the_node() -> None:
    """The port is free again and no thread is left; without a port there is no address."""
    with lifl.Node("1MiB", workers=0, metrics_port=0) as node:
        address = node.metrics_address
        assert address is not None
    with pytest.raises(ConnectionRefusedError):
        scrape(address)
    port = int(address.rpartition(":")[2])
    with lifl.Node("1MiB", workers=0, metrics_port=port) as node:
        assert node.metrics_address == address
        scrape(address)
    with lifl.Node("1MiB", workers=0) as node:
        assert node.metrics_address is None


def test_port_in_use_is_told() -> None:
    """With the port and what to do; the Node that could not have it leaves nothing."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=rf"127.0.0.1 port {port}: Address already in use; give another port"):
            lifl.Node("1MiB", workers=1, metrics_port=port)


@pytest.mark.parametrize("port", [-1, 65536])
def test_what_is_no_port_is_refused(port: int) -> None:
    """Before a socket is made."""
    with pytest.raises(ValueError, match=f"metrics_port={port}"):
        lifl.Node("1MiB", workers=1, metrics_port=port)


def test_address_that_is_not_this_machines_is_told() -> None:
    """With the address."""
    with pytest.raises(OSError, match=r"192\.0\.2\.1 port 0: .*give an address of this machine"):
        lifl.Node("1MiB", workers=0, metrics_port=0, metrics_host="192.0.2.1")


def test_another_address_of_this_machine() -> None:
    """Metrics are at 127.0.0.1 only, unless another address is given."""
    with lifl.Node("1MiB", workers=0, metrics_port=0, metrics_host="127.0.0.2") as node:
        assert node.metrics_address is not None
        assert node.metrics_address.startswith("127.0.0.2:")
        scrape(node.metrics_address)


def test_without_prometheus_client() -> None:
    """The error says what to install, and only who asks for metrics needs it."""
    code = (
        "import sys; sys.modules['prometheus_client'] = None; import lifl\n"
        "lifl.Node('1MiB', workers=0).close()\n"
        "lifl.Node('1MiB', workers=1, metrics_port=0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert done.returncode == 1
    assert "pip install 'lifl[metrics]'" in done.stderr.splitlines()[-1]


def test_fork_does_not_keep_the_port() -> None:
    """While a fork of the process lives, the Node can be closed and another one has its port."""
    reading, writing = os.pipe()
    node = lifl.Node("1MiB", workers=1, metrics_port=0)
    address = node.metrics_address
    pid = os.fork()
    if pid == 0:
        os.close(writing)
        os.read(reading, 1)
        os._exit(0)
    try:
        os.close(reading)
        scrape(address)
        node.close()
        with lifl.Node("1MiB", workers=0, metrics_port=int(str(address).rpartition(":")[2])) as node:
            scrape(node.metrics_address)
    finally:
        os.close(writing)
        os.waitpid(pid, 0)


@pytest.mark.transports
def test_silent_and_rude_connections_hold_nobody_up(node: lifl.Node) -> None:
    """Some say nothing, some nonsense, some leave in the middle: others are answered, and the Node works."""
    host, _, port = str(node.metrics_address).rpartition(":")
    silent = [socket.create_connection((host, int(port))) for _ in range(5)]
    for nonsense in (b"\0" * 1000, b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"POST /metrics HTTP/1.1\r\n\r\n", b""):
        with socket.create_connection((host, int(port))) as rude:
            rude.sendall(nonsense)
    one_round(node)
    assert samples(scrape(node.metrics_address))[("lifl_updates_accepted_total", ())] == 3
    for one in silent:
        one.close()


def drips(address: str, count: int, stop: threading.Event) -> threading.Thread:
    """So many connections that bring a head a byte at a time, and never all of it; those that are cut come again."""
    host, _, port = address.rpartition(":")

    def drip() -> None:
        lines: list[socket.socket] = []
        while not stop.is_set():
            while len(lines) < count:
                lines.append(socket.create_connection((host, int(port)), 5))
                lines[-1].sendall(b"GET /metrics HTTP/1.1\r\nx: ")
            for line in list(lines):
                try:
                    line.sendall(b"y")
                except OSError:
                    line.close()
                    lines.remove(line)
            stop.wait(0.1)
        for line in lines:
            line.close()

    thread = threading.Thread(target=drip)
    thread.start()
    return thread


def test_dripping_connections_take_few_threads(node: lifl.Node) -> None:
    """Beside a hundred of them every scrape is answered, and at most eight threads are at it."""
    address = str(node.metrics_address)
    before, most, stop = threading.active_count(), 0, threading.Event()
    dripping = drips(address, 100, stop)
    try:
        for _ in range(10):
            most = max(most, threading.active_count())
            assert samples(scrape(address))
            time.sleep(0.05)
    finally:
        stop.set()
        dripping.join(WAIT_S)
    assert most <= before + 1 + 8
    deadline = time.monotonic() + WAIT_S
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


def test_a_request_has_a_deadline(node: lifl.Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """However regularly its bytes come."""
    monkeypatch.setattr(exporter, "REQUEST_S", 0.3)
    host, _, port = str(node.metrics_address).rpartition(":")
    with socket.create_connection((host, int(port)), 5) as line, contextlib.suppress(ConnectionError):
        line.sendall(b"GET /metrics HTTP/1.1\r\nx: ")
        for _ in range(100):
            line.sendall(b"y")
            line.settimeout(0.05)
            with contextlib.suppress(TimeoutError):
                assert line.recv(100) == b""
                break
        else:
            pytest.fail("it goes on for ever")
    assert samples(scrape(node.metrics_address))


def test_scrapes_beside_each_other_are_all_answered(node: lifl.Node) -> None:
    """More than there are places."""
    with ThreadPoolExecutor(24) as pool:
        told = list(pool.map(lambda _: scrape(node.metrics_address), range(96)))
    assert all(samples(one) for one in told)


def test_node_that_is_closed_meanwhile_has_no_figures() -> None:
    """The collector tells nothing of it, instead of an error page."""
    node = lifl.Node("1MiB", workers=0)
    node.close()
    registry: Any = prometheus_client.CollectorRegistry()
    registry.register(exporter._Collector(node.stats))
    assert prometheus_client.generate_latest(registry) == b""
