"""Flower's strategies that compute the new model from the mean alone: Flower's classes over lifl's mean.

Nothing is computed here. Each class is Flower's own with :class:`lifl.strategy.fedavg.Mean` between it and Flower's
FedAvg, so that ``super().aggregate_train`` in Flower's class is lifl's method.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord
from flwr.serverapp.strategy import FedAdagrad as FlowerFedAdagrad
from flwr.serverapp.strategy import FedAdam as FlowerFedAdam
from flwr.serverapp.strategy import FedAvgM as FlowerFedAvgM
from flwr.serverapp.strategy import FedProx as FlowerFedProx
from flwr.serverapp.strategy import FedYogi as FlowerFedYogi

from lifl.strategy.fedavg import Mean
from lifl.strategy.options import RoundOptions


class DtypeKept:
    """Keeps the model's dtypes where Flower's arithmetic leaves float64.

    Parameters
    ----------
    keep_dtype : bool
        True: the new arrays have the dtypes of the mean, so the model does not double in size from the
        first round on. False: Flower's own dtypes (NumPy 2 promotes them to float64).
    """

    def __init__(self, *args: Any, keep_dtype: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.keep_dtype = keep_dtype

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Flower's ``aggregate_train``, then the conversion to the kept dtypes."""
        # The clients received the current arrays and reply in their dtypes; Flower's method replaces these arrays.
        kept = _dtypes(self.current_arrays)  # type: ignore[attr-defined]
        arrays, metrics = super().aggregate_train(server_round, replies)  # type: ignore[misc]
        if arrays is not None and self.keep_dtype and kept:
            for key, array in arrays.items():
                if array.dtype != kept[key]:
                    arrays[key] = Array(_as(array.numpy(), kept[key]))
        return arrays, metrics


def _as(values: Any, dtype: str) -> Any:
    """`values` in `dtype`; integers and booleans rounded to the nearest, as the mean is."""
    return np.asarray(np.rint(values) if np.dtype(dtype).kind in "biu" else values, dtype)


def _dtypes(current: Any) -> dict[str, str]:
    """The dtype of each current array; FedAvgM has an ArrayRecord, the others a dict, and all begin with None."""
    return {} if current is None else {key: str(array.dtype) for key, array in current.items()}


class FedProx(RoundOptions, FlowerFedProx, Mean):
    """Flower's FedProx (Li et al., 2018, https://arxiv.org/abs/1812.06127); options: RoundOptions."""


class FedAvgM(RoundOptions, DtypeKept, FlowerFedAvgM, Mean):
    """Flower's FedAvgM (Hsu et al., 2019, https://arxiv.org/abs/1909.06335); RoundOptions, DtypeKept."""


class FedAdagrad(RoundOptions, DtypeKept, FlowerFedAdagrad, Mean):
    """Flower's FedAdagrad (Reddi et al., 2020, https://arxiv.org/abs/2003.00295); RoundOptions, DtypeKept."""


class FedAdam(RoundOptions, DtypeKept, FlowerFedAdam, Mean):
    """Flower's FedAdam (Reddi et al., 2020, https://arxiv.org/abs/2003.00295); RoundOptions, DtypeKept."""


class FedYogi(RoundOptions, DtypeKept, FlowerFedYogi, Mean):
    """Flower's FedYogi (Reddi et al., 2020, https://arxiv.org/abs/2003.00295); RoundOptions, DtypeKept."""
