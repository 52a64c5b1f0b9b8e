"""A round in the process that owns its Node: its updates, its workers' parts, its mean, its end."""
