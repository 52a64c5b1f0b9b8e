"""Requests of SuperNodes and ServerApps: bytes from a socket to an object in the arena, and back."""
