"""The wiring of a Node: arena, workers, rounds, forecasts, calibration and telemetry."""
