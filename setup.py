"""Only what pyproject.toml cannot say: the cffi module, its limited API, and Linux only."""

import sys

from setuptools import setup

# Elsewhere `import lifl` works and making a Node says what is missing, so there is nothing to build.
LINUX = sys.platform.startswith("linux")

setup(
    cffi_modules=["lifl/_shm_build.py:ffibuilder"] if LINUX else [],
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if LINUX else {},
)
