"""What `lifl bench` measures: the machine's limits, the fold, the hand-off. Figures come back as dicts."""
