"""The system call bpf(2): maps and programs by their file descriptors. Does not know their purpose.

Every call raises the ``OSError`` of the kernel. The caller closes what it makes here. The kernel frees a program and
its maps when no process has a descriptor any more, so nothing outlives a process that was killed.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Iterator, Sequence

_SYS_BPF = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "ppc64le": 361, "s390x": 351}

_MAP_CREATE, _LOOKUP, _UPDATE, _DELETE, _NEXT_KEY, _PROG_LOAD, _PROG_ATTACH = 0, 1, 2, 3, 4, 5, 8
PERCPU_HASH, SOCKHASH = 5, 18
_SK_MSG, _SK_MSG_VERDICT = 16, 7
_LOG_BYTES = 2**16

Bytes = ctypes.Array[ctypes.c_char]

_libc = ctypes.CDLL(None, use_errno=True)


def bpf(command: int, attributes: bytes) -> int:
    """Makes the system call; returns its result, a file descriptor for commands that make an object."""
    number = _SYS_BPF.get(platform.machine())
    if number is None:
        raise OSError(errno.ENOSYS, f"bpf(2) has no number that lifl knows on {platform.machine()}")
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    result: int = _libc.syscall(ctypes.c_long(number), ctypes.c_int(command), buffer, ctypes.c_uint(len(attributes)))
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result


def possible_cpus() -> int:
    """The number of values that a per-CPU map has for a key."""
    with open("/sys/devices/system/cpu/possible") as file:
        last = file.read().strip().split(",")[-1].split("-")[-1]
    return int(last) + 1


class Map:
    """A map of fixed-size keys and values. Owns its file descriptor."""

    def __init__(self, fd: int, value_bytes: int) -> None:
        self.fd = fd
        self.value_bytes = value_bytes

    @classmethod
    def create(cls, kind: int, key_bytes: int, value_bytes: int, most: int, name: str) -> Map:
        """A new map."""
        values = possible_cpus() if kind == PERCPU_HASH else 1  # before the map: it needs a file descriptor too
        fd = bpf(_MAP_CREATE, struct.pack("=5I2I16s", kind, key_bytes, value_bytes, most, 0, 0, 0, name.encode()[:15]))
        os.set_inheritable(fd, False)
        return cls(fd, value_bytes * values)

    def _call(self, command: int, key: Bytes | None, value: Bytes | None, flags: int = 0) -> int:
        pointers = (ctypes.addressof(one) if one is not None else 0 for one in (key, value))
        return bpf(command, struct.pack("=IIQQQ", self.fd, 0, *pointers, flags))

    def update(self, key: int, value: int) -> None:
        """Sets the value of a 32-bit key, atomically for every reader."""
        data = ctypes.create_string_buffer(struct.pack("=I", value), 4)
        self._call(_UPDATE, _key(key), data)

    def delete(self, key: int) -> None:
        """Removes a key; raises ``FileNotFoundError`` if it is not there."""
        self._call(_DELETE, _key(key), None)

    def lookup(self, key: int) -> bytes | None:
        """The bytes of a key's value, of all CPUs one after another; None if the key is not there."""
        data = ctypes.create_string_buffer(self.value_bytes)
        try:
            self._call(_LOOKUP, _key(key), data)
        except FileNotFoundError:
            return None
        return data.raw

    def __iter__(self) -> Iterator[int]:
        """The keys; a key that is added meanwhile may be left out."""
        key: Bytes | None = None
        while True:
            following = ctypes.create_string_buffer(4)
            try:
                self._call(_NEXT_KEY, key, following)
            except FileNotFoundError:
                return
            yield struct.unpack("=I", following.raw)[0]
            key = following

    def close(self) -> None:
        """Closes the file descriptor."""
        os.close(self.fd)


def _key(key: int) -> Bytes:
    return ctypes.create_string_buffer(struct.pack("=I", key), 4)


def load_sk_msg(instructions: bytes, license_text: str = "Apache-2.0", name: str = "lifl_route") -> int:
    """Loads an SK_MSG program; returns its file descriptor. The error's text has the verifier's objections."""
    code = ctypes.create_string_buffer(instructions, len(instructions))
    licensed = ctypes.create_string_buffer(license_text.encode())
    log = ctypes.create_string_buffer(_LOG_BYTES)

    def attributes(level: int) -> bytes:
        pointers = (ctypes.addressof(code), ctypes.addressof(licensed))
        logged = (level, _LOG_BYTES, ctypes.addressof(log)) if level else (0, 0, 0)
        named = (name.encode()[:15], 0, _SK_MSG_VERDICT)
        return struct.pack("=IIQQIIQII16sII", _SK_MSG, len(instructions) // 8, *pointers, *logged, 0, 0, *named)

    try:
        fd = bpf(_PROG_LOAD, attributes(0))
    except PermissionError:
        raise
    except OSError as error:
        try:
            fd = bpf(_PROG_LOAD, attributes(1))
        except OSError:
            lines = log.value.decode(errors="replace").strip().splitlines()[-3:]
            raise OSError(error.errno, f"{error.strerror}: {' / '.join(lines)}") from None
    os.set_inheritable(fd, False)
    return fd


def attach_sk_msg(program: int, sockets: Map) -> None:
    """Attaches the program to a map: it sees each message sent through a socket in the map from now on."""
    bpf(_PROG_ATTACH, struct.pack("=IIII", sockets.fd, program, _SK_MSG_VERDICT, 0))


def linked(instructions: bytes, uses: Sequence[tuple[int, int]]) -> bytes:
    """The instructions with file descriptors in place of map names; `uses` has pairs of instruction and descriptor."""
    code = bytearray(instructions)
    for index, fd in uses:
        at = index * 8
        opcode, registers, offset, _ = struct.unpack_from("=BBhi", code, at)
        # BPF_PSEUDO_MAP_FD stands in the source register of the 64-bit load.
        struct.pack_into("=BBhi", code, at, opcode, registers & 0x0F | 1 << 4, offset, fd)
    return bytes(code)
