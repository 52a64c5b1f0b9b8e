"""Makes of lifl/_shm.c what relacy can check: the same functions, over relacy's atomics and variables.

Only the form changes: types and calls are renamed by macros, and a plain access to a slot becomes one that relacy
sees. Orders, fences and the sequence of accesses are those of the source.
"""

from __future__ import annotations

import re

TYPES = (
    "struct header",
    "struct peer",
    "struct ring",
    "struct entry",
    "struct end",
    "struct line",
    "struct lifl_arena",
)
FUNCTIONS = (
    "pack",
    "word_generation",
    "word_owner",
    "word_state",
    "bit",
    "mark",
    "is_generation",
    "lifl_block_reclaim",
    "lifl_block_move",
    "lifl_peer_wake",
    "has_line",
    "ring_at",
    "lifl_ring_push",
    "lifl_ring_pop",
    "lifl_ring_reset",
    "lifl_inbox_pop",
    "is_ready",
    "park",
    "lifl_inbox_arm",
    "lifl_inbox_wait",
)


def translate(source: str) -> str:
    """The named types and functions of the source, in C++ for relacy.

    Raises ``ValueError`` if one is not there: then the model is to be changed with the code.
    """
    found = [_find(rf"^{name} {{.*?^}};$", name, source) for name in TYPES]
    enum = _find(r"^enum {[^}]*PARKED_EVENTFD[^}]*};$", "enum of the parked word", source)
    found.insert(0, enum)
    found += [
        _find(rf"^(?:static )?(?:struct )?\w+ {name}\([^;{{]*\) {{(?:[^\n]*}}|\n.*?^}})$", name, source)
        for name in FUNCTIONS
    ]
    code = "\n\n".join(found)
    code = re.sub(r"/\*.*?\*/", "", code, flags=re.DOTALL)
    code = re.sub(r"alignas\(\w+\) ", "", code)
    code = re.sub(r"_Atomic (\w+)", r"rl::atomic<\1>", code)
    code = code.replace("lifl_desc slots[RING_SLOTS]", "rl::var<Slot> slots[RING_SLOTS]")
    code, n = re.subn(r"r->slots\[([^\]]*)\]", r"(r->slots[\1])($)", code)
    if n != 2:
        raise ValueError(f"{n} accesses to slots, 2 are known: look at the model")
    return code


def _find(pattern: str, name: str, source: str) -> str:
    match = re.search(pattern, source, re.MULTILINE | re.DOTALL)
    if match is None:
        raise ValueError(f"_shm.c has no {name} any more: change the model with it")
    return match[0]
