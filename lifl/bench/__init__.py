"""The measurements of `lifl bench`: the machine's limits, the fold, the hand-off and more. Figures are dicts."""
