"""An empty ClientApp, which Flower demands; the virtual nodes of `lifl.bench.load` do not use it."""

from __future__ import annotations

from flwr.clientapp import ClientApp

app = ClientApp()
