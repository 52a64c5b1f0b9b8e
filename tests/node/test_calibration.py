"""Costs are measured, remembered, and never a reason to fail."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from lifl.errors import PeerGoneError
from lifl.node import calibration
from lifl.node import microbench as gauge
from lifl.planner.costs import Costs


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder for the file; few and small runs."""
    monkeypatch.setenv("LIFL_CACHE", str(tmp_path / "cache"))
    for name, value in {"STARTS": 1, "WIRE_BYTES": 2**20}.items():
        monkeypatch.setattr(calibration, name, value)
    for name, value in {"PARAMETERS": 50_000, "REPETITIONS": 2}.items():
        monkeypatch.setattr(gauge, name, value)
    return tmp_path / "cache"


def file_in(folder: Path) -> Path:
    """The one file there."""
    (path,) = folder.iterdir()
    return path


def test_default_is_there_at_once(folder: Path) -> None:
    """Nothing is measured or written, so a Node starts without waiting."""
    assert calibration.costs() == calibration.default_costs()
    assert not folder.exists()


def test_measured_costs_are_remembered(folder: Path) -> None:
    """The next process reads them."""
    measured = calibration.costs(measure=True)
    assert measured.cores == len(os.sched_getaffinity(0))
    assert 1 <= measured.parallel <= measured.cores
    assert calibration.costs() == measured
    assert calibration.costs(measure=True) == measured
    assert calibration.calibrate() != calibration.default_costs()


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"machine": 1}', b"[" * 100_000], ids=lambda b: repr(b[:9])
)
def test_damaged_file_is_as_good_as_none(folder: Path, damage: bytes) -> None:
    """It is measured again, and then there is a good one."""
    calibration.calibrate()
    file_in(folder).write_bytes(damage)
    assert calibration.costs() == calibration.default_costs()
    measured = calibration.costs(measure=True)
    assert calibration.costs() == measured


@pytest.mark.parametrize("wrong", [{"fold_bytes_s": -1.0}, {"fold_bytes_s": "fast"}, {"more": 1.0}, {"cores": 1e400}])
def test_values_that_are_no_costs_are_not_believed(folder: Path, wrong: dict[str, object]) -> None:
    """Whoever wrote them."""
    calibration.calibrate()
    path = file_in(folder)
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"costs": content["costs"] | wrong}))
    assert calibration.costs() == calibration.default_costs()


def test_other_machines_and_versions_have_files_of_their_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home that several machines share; and a file that was copied is not believed."""
    calibration.calibrate()
    path = file_in(folder)
    monkeypatch.setattr(calibration, "version", lambda _: "99.0")
    assert calibration.costs() == calibration.default_costs()
    calibration.calibrate()
    assert len(list(folder.iterdir())) == 2
    other = next(one for one in folder.iterdir() if one != path)
    other.write_bytes(path.read_bytes())
    assert calibration.costs() == calibration.default_costs()


def test_folder_that_cannot_be_used_is_done_without(folder: Path) -> None:
    """Here it is a file."""
    folder.write_text("not a folder")
    assert isinstance(calibration.calibrate(), Costs)
    assert calibration.costs() == calibration.default_costs()


def test_nothing_is_left_half_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that fails leaves the old file, and no other."""
    calibration.calibrate()
    before = file_in(folder).read_bytes()

    def fail(*_: object) -> None:
        raise OSError("no space is left")

    monkeypatch.setattr(os, "replace", fail)
    calibration.calibrate()
    assert file_in(folder).read_bytes() == before


def test_what_cannot_be_measured_is_assumed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without processes and sockets."""

    def refuse(*_: object) -> None:
        raise PeerGoneError("none may be started")

    monkeypatch.setattr(calibration, "Spawner", refuse)
    monkeypatch.setattr(calibration.socket, "create_server", lambda *_: refuse())
    measured, assumed = calibration.calibrate(), calibration.default_costs()
    for name in ("cold_start_s", "dispatch_s", "wire_bytes_s", "wire_cpu_bytes_s"):
        assert getattr(measured, name) == getattr(assumed, name)
    assert measured.fold_bytes_s != assumed.fold_bytes_s


def test_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """LIFL_CACHE, else the desktop's rule, else the home."""
    monkeypatch.setenv("LIFL_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    monkeypatch.setenv("HOME", "/c")
    assert calibration.cache_folder() == Path("/a")
    monkeypatch.delenv("LIFL_CACHE")
    assert calibration.cache_folder() == Path("/b/lifl")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert calibration.cache_folder() == Path("/c/.cache/lifl")


def test_without_a_home_nothing_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is an error, which costs a Node nothing but the file."""

    def refuse(_: int) -> None:
        raise KeyError("no such user")

    for name in ("LIFL_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", refuse)
    with pytest.raises(RuntimeError, match="home"):
        calibration.cache_folder()
    assert calibration.known() is None
