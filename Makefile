# `make demo` shows lifl, `make test` tests it, `make check` tests all of it. Each works from a clean clone with
# Python 3.11+ (venv, headers), a C compiler and make.
PYTHON ?= python3
BIN := .venv/bin
BUILT_FROM := pyproject.toml setup.py lifl/_shm_build.py lifl/_shm.h lifl/_steps.h lifl/_shm.c lifl/_link.c lifl/_fold.c lifl/ebpf/record.h

JOBS ?= 3
PYTEST = $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder
SOAK_MINUTES ?= 30
FUZZ_SECONDS ?= 300

.PHONY: demo test check ladder install lint types docs bench clean
.PHONY: crash model sanitize fuzz faults soak seeded

demo: .venv/demo
	$(BIN)/lifl demo

# A contributor's command, before each commit: everything but the tests that are marked as the ladder's.
# Files of tests beside each other, in their order: the long ones, which mostly wait, come first.
test: lint types
	$(PYTEST) -m 'not ladder'
	$(MAKE) --no-print-directory docs

# The whole ladder: `make test`, what it leaves out, and the bugs that are put in, each of which must be found.
# The bugs are one long file: it comes first.
check: test ladder

ladder: .venv/dev
	$(PYTEST) -m ladder tests/seeded tests

# The ladder (docs/reliability.md). `make check` has all seven, in part or short; here they are one by one, and longer.
crash: .venv/dev
	LIFL_CRASH=all $(BIN)/python -m pytest -s tests/crash tests/process/test_many_deaths.py tests/process/test_hostile.py

model: .venv/dev
	$(BIN)/python -m pytest tests/model

sanitize: .venv/dev
	$(BIN)/python -m pytest tests/c

fuzz: .venv/dev
	FUZZ_SECONDS=$(FUZZ_SECONDS) $(BIN)/python -m pytest -s tests/fuzz

faults: .venv/dev
	$(BIN)/python -m pytest tests/faults

soak: .venv/dev
	$(BIN)/python tests/soak/soak.py --minutes $(SOAK_MINUTES) --json soak.json

seeded: .venv/dev
	$(BIN)/python -m pytest tests/seeded

install: .venv/dev

lint: .venv/dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: .venv/dev
	$(BIN)/mypy

docs: .venv/dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

bench: .venv/dev
	$(BIN)/lifl bench limits
	$(BIN)/lifl bench fold
	$(BIN)/lifl bench handoff
	$(BIN)/lifl bench recovery
	$(BIN)/lifl bench fold --updates 32
	$(BIN)/lifl bench trickle
	$(BIN)/lifl bench roles
	$(BIN)/lifl bench idle --seconds 5

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lifl needs Python 3.11 or newer, this is " + sys.version)'
	$(PYTHON) -m venv .venv

# The stamps are files in the environment, so that removing it removes them.
.venv/demo: .venv/bin/python $(BUILT_FROM)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[demo]'
	@touch $@

.venv/dev: .venv/bin/python $(BUILT_FROM)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@ .venv/demo

clean:
	rm -rf .venv build dist site *.egg-info lifl/*.so lifl/_shm_ffi.c soak.json
