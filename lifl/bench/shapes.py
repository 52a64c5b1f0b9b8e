"""The models of the benchmarks: every tensor's name, shape and dtype, and no weights.

Owns the three ResNets as torchvision's ``state_dict()`` lists them, generated from the architecture
(He et al., CVPR 2016, table 1), a model of very many small arrays, and the random numbers that stand for updates.
Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import numpy as np

from lifl.tensor import Array, Tensor, TensorSpec

RUNNING = ("running_mean", "running_var", "num_batches_tracked")
"""Tensors of a batch normalisation that are no parameters."""


@attrs.frozen
class Architecture:
    """A ResNet for ImageNet.

    Attributes
    ----------
    depths : tuple of int
        Blocks in each of the four stages.
    is_bottleneck : bool
        Blocks of three convolutions (1x1, 3x3, 1x1, four times as wide at the end), else two of 3x3.
    """

    depths: tuple[int, int, int, int]
    is_bottleneck: bool


@attrs.frozen
class Many:
    """A model of many float32 vectors of one length."""

    arrays: int
    length: int


MODELS: dict[str, Architecture | Many] = {
    "resnet18": Architecture((2, 2, 2, 2), False),
    "resnet34": Architecture((3, 4, 6, 3), False),
    "resnet152": Architecture((3, 8, 36, 3), True),
    "small2000": Many(2000, 200),
}
SEED = 20240501
WIDTHS = (64, 128, 256, 512)
CLASSES = 1000


def model_spec(model: str) -> TensorSpec:
    """The state dict of a model in ``MODELS``, in torchvision's order.

    Raises ``ValueError`` for another name.
    """
    if model not in MODELS:
        raise ValueError(f"model {model!r} is not known: choose one of {', '.join(MODELS)}")
    architecture = MODELS[model]
    if isinstance(architecture, Many):
        return TensorSpec(
            tuple(Tensor(f"layer{k}", "float32", (architecture.length,)) for k in range(architecture.arrays))
        )
    tensors = [*_convolution("conv1", 3, WIDTHS[0], 7), *_normalisation("bn1", WIDTHS[0])]
    channels = WIDTHS[0]
    for stage, (width, depth) in enumerate(zip(WIDTHS, architecture.depths, strict=True), 1):
        out = 4 * width if architecture.is_bottleneck else width
        for block in range(depth):
            tensors += _block(f"layer{stage}.{block}", channels, width, out, stage, block)
            channels = out
    tensors.append(Tensor("fc.weight", "float32", (CLASSES, channels)))
    tensors.append(Tensor("fc.bias", "float32", (CLASSES,)))
    return TensorSpec(tuple(tensors))


def random_update(spec: TensorSpec, seed: int) -> dict[str, Array]:
    """An update of random numbers, the same for the same seed.

    float32 tensors are between -0.5 and 0.5. All other tensors, the counters, have one equal number below 100, as in a
    trained model, of which each layer has seen the same batches.
    """
    random = np.random.default_rng(SEED + seed)
    count = int(random.integers(0, 100))
    return {t.name: _numbers(random, t, count) for t in spec.tensors}


def _numbers(random: np.random.Generator, tensor: Tensor, count: int) -> Array:
    if tensor.dtype == "float32":
        return random.random(tensor.shape, np.float32) - np.float32(0.5)
    return np.full(tensor.shape, count, tensor.dtype)


def tensors_of(spec: TensorSpec) -> list[list[Any]]:
    """A spec as values that JSON can hold, for another process; see :func:`spec_of`."""
    return [[t.name, t.dtype, list(t.shape)] for t in spec.tensors]


def spec_of(tensors: Sequence[Sequence[Any]]) -> TensorSpec:
    """The spec from which :func:`tensors_of` made `tensors`."""
    return TensorSpec(tuple(Tensor(name, dtype, tuple(shape)) for name, dtype, shape in tensors))


def _block(name: str, channels: int, width: int, out: int, stage: int, block: int) -> list[Tensor]:
    lengths: tuple[tuple[int, int, int], ...]
    if out == width:
        lengths = ((channels, width, 3), (width, out, 3))
    else:
        lengths = ((channels, width, 1), (width, width, 3), (width, out, 1))
    tensors = []
    for i, (before, after, kernel) in enumerate(lengths, 1):
        tensors += _convolution(f"{name}.conv{i}", before, after, kernel)
        tensors += _normalisation(f"{name}.bn{i}", after)
    # The shortcut needs a convolution if the block halves the image or changes its channels.
    if block == 0 and (stage > 1 or channels != out):
        tensors += _convolution(f"{name}.downsample.0", channels, out, 1)
        tensors += _normalisation(f"{name}.downsample.1", out)
    return tensors


def _convolution(name: str, channels: int, out: int, kernel: int) -> list[Tensor]:
    return [Tensor(f"{name}.weight", "float32", (out, channels, kernel, kernel))]


def _normalisation(name: str, width: int) -> list[Tensor]:
    vectors = ("weight", "bias", *RUNNING[:2])
    counter = Tensor(f"{name}.{RUNNING[2]}", "int64", ())
    return [*(Tensor(f"{name}.{vector}", "float32", (width,)) for vector in vectors), counter]
