"""Real Flower processes on this machine, started and ended together."""
