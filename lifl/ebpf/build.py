"""Makes prebuilt.json from lifl.bpf.c, after a change of the program: ``python -m lifl.ebpf.build [--check]``.

Needs clang with its bpf target, and the kernel's UAPI headers. Owns the reading of the object file, so that the loader
of the program needs no ELF.
"""

from __future__ import annotations

import json
import platform
import re
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SOURCE, BYTECODE = HERE / "lifl.bpf.c", HERE / "prebuilt.json"


def compiled(clang: str = "clang", source: Path = SOURCE) -> dict[str, Any]:
    """The program as prebuilt.json has it: its maps, its instructions, and the places where these name a map."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "lifl.bpf.o"
        # Debian has the headers of an architecture in a folder that only the compiler for it knows.
        headers = [f"-I{HERE}", f"-I/usr/include/{platform.machine()}-linux-gnu"]
        command = [clang, "-O2", "-g0", "-mcpu=v2", "-target", "bpf", "-Wall", "-Wextra", "-Werror", *headers]
        subprocess.run([*command, "-c", str(source), "-o", str(target)], check=True)
        return {"compiler": _version(clang), **_read(target.read_bytes())}


def _version(clang: str) -> str:
    output = subprocess.run([clang, "--version"], check=True, capture_output=True, text=True).stdout
    found = re.search(r"clang version (\d+)", output)
    return f"clang {found[1]}" if found else output.splitlines()[0]


def _read(elf: bytes) -> dict[str, Any]:
    (offset,) = struct.unpack_from("<Q", elf, 0x28)
    size, count, names_index = struct.unpack_from("<HHH", elf, 0x3A)
    heads = [struct.unpack_from("<IIQQQQIIQQ", elf, offset + i * size) for i in range(count)]
    contents = [elf[head[4] : head[4] + head[5]] for head in heads]

    def text(strings: bytes, at: int) -> str:
        return strings[at : strings.index(b"\0", at)].decode()

    names = [text(contents[names_index], head[0]) for head in heads]
    sections = dict(zip(names, contents, strict=True))
    maps, symbols = {}, []
    for at, _info, _other, section, value, _size in struct.iter_unpack("<IBBHQQ", sections[".symtab"]):
        symbols.append(text(sections[".strtab"], at))
        if section == names.index("maps") and symbols[-1]:
            kind, key, held, most, _ = struct.unpack_from("<5I", sections["maps"], value)
            maps[symbols[-1]] = {"type": kind, "key_bytes": key, "value_bytes": held, "max_entries": most}
    uses = [[at // 8, symbols[what >> 32]] for at, what in struct.iter_unpack("<QQ", sections[".relsk_msg"])]
    return {"maps": dict(sorted(maps.items())), "uses": uses, "instructions": sections["sk_msg"].hex()}


def main(arguments: list[str]) -> int:
    """Writes the file; with ``--check`` only compares it with what the source makes."""
    made = json.dumps(compiled(), indent=1) + "\n"
    if "--check" in arguments:
        is_same = made == BYTECODE.read_text()
        print(f"{BYTECODE.name} is {'' if is_same else 'not '}what {SOURCE.name} makes")
        return int(not is_same)
    BYTECODE.write_text(made)
    print(f"{BYTECODE.name}: {len(json.loads(made)['instructions']) // 16} instructions")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
