"""Builds the extension module ``lifl._shm_ffi`` from ``_shm.c``, ``_link.c`` and ``_fold.c``.

The module is not named ``lifl._shm``: cffi would then write its generated code over ``_shm.c``.
"""

from pathlib import Path

from cffi import FFI

HERE = Path(__file__).parent
DECLARATIONS = "\n".join(line for line in (HERE / "_shm.h").read_text().splitlines() if not line.startswith("#"))

ffibuilder = FFI()
ffibuilder.cdef(DECLARATIONS)
ffibuilder.set_source(
    "lifl._shm_ffi",
    '#include "_shm.h"',
    sources=["lifl/_shm.c", "lifl/_link.c", "lifl/_fold.c"],
    include_dirs=["lifl"],
    # No -march=native: the kernels choose their vector width at run time. No contraction: the same
    # bits on every machine.
    extra_compile_args=["-std=c11", "-O3", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wextra"],
    libraries=["m"],
    py_limited_api=True,
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
