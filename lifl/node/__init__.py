"""The wiring of a Node: arena, workers, rounds, forecasts and what watches them."""
