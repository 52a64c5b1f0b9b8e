"""Faster checks of SuperNodes' signatures: keys are parsed once, and AWS-LC checks where it is installed.

A SuperNode signs each request, and OpenSSL needs half a millisecond for a signature on P-384. A signature that AWS-LC
finds good is good; in every other case Flower's own check decides. So the same requests are refused as by Flower.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from functools import lru_cache
from typing import Any

MAX_KEYS = 4096


def hasten(parse: Callable[..., Any], verify: Callable[..., Any]) -> tuple[Any, Any, str]:
    """Faster functions in the place of Flower's ``bytes_to_public_key`` and ``verify_signature``.

    Also returns the name of the library that checks signatures: "AWS-LC" or "OpenSSL".
    """
    parse_once = lru_cache(maxsize=MAX_KEYS)(parse)
    try:
        from awscrt.crypto import EC
        from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
    except ImportError:
        return parse_once, verify, "OpenSSL"

    # By identity, since Flower's keys cannot be hashed. Each key is kept beside, so that no other gets its identity.
    fast: dict[int, tuple[Any, Any]] = {}

    def fast_key(public_key: Any) -> Any:
        known = fast.get(id(public_key))
        if known is None:
            if len(fast) >= MAX_KEYS:
                fast.clear()
            made = None  # stays None for a curve that AWS-LC does not have
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

    return parse_once, verify_fast, "AWS-LC"
