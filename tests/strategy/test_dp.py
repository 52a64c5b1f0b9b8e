"""Flower's differential-privacy wrappers around lifl's FedAvg: the same model as around Flower's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from flwr.app import Message
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
)
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
from flwr.supercore.differential_privacy import KEY_CLIPPING_NORM, KEY_NORM_BIT
from flwr.supercore.privacy_accounting import NeighboringRelation, PrivacyAccountant, PrivacyConfig, SamplingMethod
from scripted import Client, Clock, failing, metrics_of, nudge, plain, record, run

import lifl
from lifl.strategy import FedAvg

START = {"weight": np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3), "bias": np.zeros(3)}


def clipped(seed: int) -> Client:
    """A client that says whether it clipped, as Flower's adaptiveclipping_mod does."""

    def client(message: Message) -> Any:
        said = nudge(seed)(message)
        if message.metadata.message_type == "train" and KEY_CLIPPING_NORM in message.content["config"]:  # type: ignore[operator]
            said["metrics"][KEY_NORM_BIT] = seed % 2  # type: ignore[index]
        return said

    return client


CLIENTS: dict[int, Client] = {n: clipped(n) for n in (1, 2, 3)}
WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "server, fixed": lambda inner: DifferentialPrivacyServerSideFixedClipping(inner, 1.0, 0.5, 3),
    "client, fixed": lambda inner: DifferentialPrivacyClientSideFixedClipping(inner, 1.0, 0.5, 3),
    "server, adaptive": lambda inner: DifferentialPrivacyServerSideAdaptiveClipping(
        inner, 1.0, 3, clipped_count_stddev=1.0
    ),
    "client, adaptive": lambda inner: DifferentialPrivacyClientSideAdaptiveClipping(
        inner, 1.0, 3, clipped_count_stddev=1.0
    ),
    "no noise": lambda inner: DifferentialPrivacyServerSideFixedClipping(inner, 0.0, 0.5, 3),
}


def noisy_run(strategy: Any, clients: dict[int, Client] = CLIENTS) -> Any:
    """A run whose noise is the same every time: Flower draws it from NumPy's global generator."""
    np.random.seed(5)
    result, _ = run(strategy, clients, 3, Clock(), initial_arrays=record(START))
    return result


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_same_bits_with_the_same_noise(node: lifl.Node, wrapper: str) -> None:
    """With order="flower" and the same seed, model and metrics are those around Flower's FedAvg."""
    expected = noisy_run(WRAPPERS[wrapper](FlowerFedAvg()))
    strategy = FedAvg(node=node, order="flower")
    result = noisy_run(WRAPPERS[wrapper](strategy))
    assert result.arrays.object_id == expected.arrays.object_id
    assert metrics_of(result) == metrics_of(expected)
    assert sorted(strategy.reports) == [1, 2, 3]
    assert len(strategy.reports[3].accepted) == 3
    assert not node.has_rounds


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_nearly_the_same_in_any_order(node: lifl.Node, wrapper: str) -> None:
    """Without it, to the precision of float32."""
    expected = noisy_run(WRAPPERS[wrapper](FlowerFedAvg()))
    result = noisy_run(WRAPPERS[wrapper](FedAvg(node=node)))
    for name, array in plain(result.arrays).items():
        np.testing.assert_allclose(array, plain(expected.arrays)[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_failed_client_skips_the_round_as_in_flower(node: lifl.Node, wrapper: str) -> None:
    """These wrappers aggregate nothing in a round with an error, whatever is inside."""
    clients = {**CLIENTS, 2: failing}
    expected = noisy_run(WRAPPERS[wrapper](FlowerFedAvg()), clients)
    result = noisy_run(WRAPPERS[wrapper](FedAvg(node=node)), clients)
    assert not result.arrays
    assert not expected.arrays


def test_flowers_accounting_wants_flowers_method(node: lifl.Node) -> None:
    """A known limit: with an accountant, Flower insists on its own aggregate_train and refuses lifl's class."""
    accountant = Mock(spec=PrivacyAccountant)
    accountant.config = PrivacyConfig(1e-5, 3, NeighboringRelation.ADD_OR_REMOVE_ONE, SamplingMethod.NO_AMPLIFICATION)

    def accounted(inner: Any) -> Any:
        return DifferentialPrivacyServerSideFixedClipping(inner, 1.0, 0.5, 3, accountant=accountant)

    accounted(FlowerFedAvg())
    with pytest.raises(ValueError, match=r"requires a strategy using FedAvg\.aggregate_train"):
        accounted(FedAvg(node=node))
