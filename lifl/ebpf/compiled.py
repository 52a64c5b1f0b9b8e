"""The loader "bcc": the BPF Compiler Collection of the distribution compiles the same source at load time.

For machines that the bytecode shipped with lifl does not fit, and for changes of the program. Debian and Ubuntu have it
as python3-bpfcc. The PyPI project named bcc is a different one.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from lifl.ebpf import bpf
from lifl.ebpf.prebuilt import Program
from lifl.ebpf.record import METRICS_BYTES
from lifl.errors import EbpfUnavailableError

REMEDY = "apt-get install --no-install-recommends python3-bpfcc"
DISTRIBUTION = Path("/usr/lib/python3/dist-packages")

_TYPES = """
typedef unsigned char u8, __u8; typedef unsigned short u16, __u16, __be16, __le16, __sum16;
typedef unsigned int u32, __u32, __be32, __le32, __wsum; typedef unsigned long long u64, __u64, __be64, __le64;
typedef signed char s8, __s8; typedef short s16, __s16; typedef int s32, __s32; typedef long long s64, __s64;
typedef __u64 __aligned_u64 __attribute__((aligned(8)));
typedef _Bool bool; typedef unsigned long size_t, uintptr_t; typedef int pid_t;
"""
STUBS = {
    "include/linux/kconfig.h": "#define CONFIG_BPF_SYSCALL 1\n",
    "include/linux/types.h": _TYPES,
    "include/linux/version.h": "#define KERNEL_VERSION(a, b, c) ((a) << 16 | (b) << 8 | (c))\n"
    "#define LINUX_VERSION_CODE KERNEL_VERSION(5, 15, 0)\n",
    **dict.fromkeys(
        (
            *("include/linux/bpf_common.h", "include/linux/log2.h", "include/asm/page.h"),
            *("include/uapi/linux/types.h", "include/uapi/linux/bpf.h", "include/uapi/linux/if_packet.h"),
        ),
        "",
    ),
}
"""The headers of a kernel's source that bcc includes by itself, as stubs: the program needs only the types."""


def load() -> Program:
    """Compiles the program, loads it and attaches it.

    Raises :class:`EbpfUnavailableError` without bcc, ``OSError`` if the kernel refuses it.
    """
    module = find()
    # Without capabilities bcc reports a failure to compile: this map fails first, with the kernel's reason.
    bpf.Map.create(bpf.SOCKHASH, 4, 4, 1, "lifl_probe").close()
    with _sources() as (text, flags), _quiet() as output, contextlib.ExitStack() as stack:
        try:
            made = module.BPF(text=text.encode(), cflags=flags)
            stack.callback(made.cleanup)
            function = made.load_func(b"lifl_route", module.BPF.SK_MSG)
        except Exception as error:
            raise EbpfUnavailableError(f"bcc does not compile the program: {output() or error}", REMEDY) from error
        # Copies of the descriptors: bcc closes its own when it frees the compiler's memory.
        maps = {name: _map(module, made, name) for name in ("socks", "routes", "metrics")}
        program = Program("bcc", maps["socks"], maps["routes"], maps["metrics"], _copy(function.fd))
    try:
        bpf.attach_sk_msg(program.fd, program.socks)
    except OSError:
        program.close()
        raise
    return program


def find() -> ModuleType:
    """The bcc of the distribution, which a virtual environment does not see; raises :class:`EbpfUnavailableError`."""
    wrong = ""
    try:
        import bcc

        if hasattr(bcc, "BPF"):
            return cast(ModuleType, bcc)
        wrong = f"; the package bcc at {getattr(bcc, '__file__', '?')} is another project of that name"
    except Exception as error:  # a package of that name may raise anything when it is imported
        if getattr(error, "name", None) != "bcc":  # a package named bcc is there
            wrong = f"; the package bcc that is there cannot be imported ({error})"
    _forget()
    if not (DISTRIBUTION / "bcc" / "__init__.py").is_file():
        raise EbpfUnavailableError(f"bcc, the BPF Compiler Collection, is not installed{wrong}", REMEDY)
    # Only this package: other packages of the distribution would hide those of the environment.
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "bcc").symlink_to(DISTRIBUTION / "bcc")
        sys.path.insert(0, folder)
        try:
            import bcc
        except Exception as error:  # its library is missing, or the package is for another Python
            _forget()
            raise EbpfUnavailableError(f"the bcc in {DISTRIBUTION} cannot be imported: {error}", REMEDY) from error
        finally:
            sys.path.remove(folder)
    bcc.__path__ = [str(DISTRIBUTION / "bcc")]  # for its later imports, when the link is gone
    return cast(ModuleType, bcc)


def _forget() -> None:
    """Removes the modules of the wrong package, which would be taken for those of the right one."""
    for name in [name for name in sys.modules if name == "bcc" or name.startswith("bcc.")]:
        del sys.modules[name]


@contextlib.contextmanager
def _sources() -> Iterator[tuple[str, list[str]]]:
    """The program's text and flags. If kernel headers are missing, there is a stub of them during the compilation."""
    folder = resources.files("lifl.ebpf")
    header = (folder / "record.h").read_text()
    text = (folder / "lifl.bpf.c").read_text().replace('#include "record.h"', header)
    with tempfile.TemporaryDirectory(prefix="lifl-bcc-") as stub:
        before = os.environ.get("BCC_KERNEL_SOURCE")
        if before is None and not (Path("/lib/modules") / os.uname().release / "build").exists():
            for name, content in STUBS.items():
                (path := Path(stub) / name).parent.mkdir(parents=True, exist_ok=True)
                path.write_text(content)
            os.environ["BCC_KERNEL_SOURCE"] = stub
        try:
            yield text, ["-DLIFL_BCC"]
        finally:
            if before is None:
                os.environ.pop("BCC_KERNEL_SOURCE", None)


@contextlib.contextmanager
def _quiet() -> Iterator[Callable[[], str]]:
    """Catches the standard error of this process, to which the compiler writes itself; yields a reader of it."""
    with tempfile.TemporaryFile() as caught:
        sys.stderr.flush()
        before = os.dup(2)
        os.dup2(caught.fileno(), 2)
        try:

            def output() -> str:
                caught.seek(0)
                return " / ".join(caught.read().decode(errors="replace").split("\n")[:24]).strip(" /")

            yield output
        finally:
            os.dup2(before, 2)
            os.close(before)


def _map(module: ModuleType, made: Any, name: str) -> bpf.Map:
    """A table of bcc as a map with its own file descriptor; bcc has no object for a SOCKHASH."""
    sizes = {"metrics": METRICS_BYTES * bpf.possible_cpus()}
    return bpf.Map(_copy(module.lib.bpf_table_fd(made.module, name.encode())), sizes.get(name, 4))


def _copy(fd: int) -> int:
    copied = os.dup(fd)
    os.set_inheritable(copied, False)
    return copied
