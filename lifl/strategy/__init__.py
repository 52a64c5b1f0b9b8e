"""Flower's strategies, aggregated in shared memory: same names, same arguments, same numbers.

Change ``from flwr.serverapp.strategy import FedAvg`` to ``from lifl.strategy import FedAvg``.
"""

from lifl.strategy.fedavg import FedAvg, Result
from lifl.strategy.optimizers import FedAdagrad, FedAdam, FedAvgM, FedProx, FedYogi

__all__ = ["FedAdagrad", "FedAdam", "FedAvg", "FedAvgM", "FedProx", "FedYogi", "Result"]
