"""Flower asks for a ClientApp; the nodes of the measurement are played by `lifl.bench.load`, which needs none."""

from __future__ import annotations

from flwr.clientapp import ClientApp

app = ClientApp()
