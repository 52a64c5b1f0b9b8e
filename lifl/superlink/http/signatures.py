"""SuperNodes' signatures, checked faster: keys are parsed once, and AWS-LC checks them where it is installed.

A SuperNode signs each request, and OpenSSL needs half a millisecond for a signature on P-384. What AWS-LC finds good
is good; whatever else it finds, Flower's own check decides. Who is refused does not change.
"""

from __future__ import annotations

import contextlib
import hashlib
from functools import lru_cache
from typing import Any

KEYS = 4096


def hasten(node_auth: Any) -> str:
    """Puts the faster functions into Flower's module; the name of what checks signatures."""
    parse, verify = node_auth.bytes_to_public_key, node_auth.verify_signature
    if hasattr(parse, "cache_info"):  # it has been done: a process may serve twice
        return str(node_auth.lifl_verifier)
    node_auth.bytes_to_public_key = lru_cache(maxsize=KEYS)(parse)
    node_auth.lifl_verifier = "OpenSSL"
    try:
        from awscrt.crypto import EC
        from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
    except ImportError:
        return "OpenSSL"

    fast: dict[int, tuple[Any, Any]] = {}  # by identity: Flower's keys cannot be hashed; kept, so that none is reused

    def fast_key(public_key: Any) -> Any:
        known = fast.get(id(public_key))
        if known is None:
            if len(fast) >= KEYS:
                fast.clear()
            made = None  # for a curve that it does not have
            with contextlib.suppress(Exception):
                made = EC.new_key_from_der_data(
                    public_key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
                )
            known = fast[id(public_key)] = (public_key, made)
        return known[1]

    def verify_fast(public_key: Any, message: bytes, signature: bytes) -> bool:
        key = fast_key(public_key)
        if key is not None:
            with contextlib.suppress(Exception):
                if key.verify(hashlib.sha256(message).digest(), signature):
                    return True
        return bool(verify(public_key, message, signature))

    node_auth.verify_signature = verify_fast
    node_auth.lifl_verifier = "AWS-LC"
    return "AWS-LC"
