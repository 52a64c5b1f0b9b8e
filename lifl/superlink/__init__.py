"""lifl-superlink: Flower's SuperLink with lifl's data plane, for unmodified SuperNodes."""
