"""One round, seen from the process that owns it: its updates, its workers' parts, its mean, its end."""
