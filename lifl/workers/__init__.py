"""The processes that aggregate: their code, their start, their supervision, and the way to them."""
