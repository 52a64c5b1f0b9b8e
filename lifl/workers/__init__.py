"""The worker processes: their code, their start, their supervision, and the way to them."""
