"""The loader "prebuilt", which needs nothing else: it loads the bytecode that ships with lifl by bpf(2)."""

from __future__ import annotations

import errno
import json
import os
import sys
from importlib import resources
from typing import Any

import attrs

from lifl.ebpf import bpf


@attrs.define
class Program:
    """The program with its maps, loaded and attached. Owns their file descriptors."""

    loader: str
    socks: bpf.Map
    routes: bpf.Map
    metrics: bpf.Map
    fd: int

    def close(self) -> None:
        """Closes all file descriptors, and with them the program and its maps."""
        for one in (self.socks, self.routes, self.metrics):
            one.close()
        os.close(self.fd)


def load() -> Program:
    """Loads the program that ships with lifl and attaches it; raises the ``OSError`` of the kernel."""
    if sys.byteorder != "little":
        raise OSError(errno.EOPNOTSUPP, "the bytecode that ships with lifl is for little-endian machines")
    return loaded(json.loads((resources.files("lifl.ebpf") / "prebuilt.json").read_text()))


def loaded(built: dict[str, Any]) -> Program:
    """Makes the maps of a program that ``build`` has made, loads the program and attaches it."""
    maps: dict[str, bpf.Map] = {}
    try:
        for name, what in built["maps"].items():
            sizes = what["key_bytes"], what["value_bytes"], what["max_entries"]
            maps[name] = bpf.Map.create(what["type"], *sizes, f"lifl_{name}")
        uses = [(index, maps[name].fd) for index, name in built["uses"]]
        program = bpf.load_sk_msg(bpf.linked(bytes.fromhex(built["instructions"]), uses))
        try:
            bpf.attach_sk_msg(program, maps["socks"])
        except OSError:
            os.close(program)
            raise
    except BaseException:
        for made in maps.values():
            made.close()
        raise
    return Program("prebuilt", maps["socks"], maps["routes"], maps["metrics"], program)
