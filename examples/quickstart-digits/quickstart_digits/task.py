"""The learning task: the digits, their split among the nodes, and the model.

Owns the data and the arithmetic; knows nothing of Flower or lifl. Everything is
deterministic: the same seed, node and round give the same numbers on every run.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

Floats = NDArray[np.float32]
Labels = NDArray[np.int64]
# Images, float32 (n, 64), and their digits, int64 (n,).
Examples = tuple[Floats, Labels]
# "weight": float32 (10, 64), "bias": float32 (10,).
Model = dict[str, Floats]

SEED = 2024
CLASSES, PIXELS = 10, 64
EPOCHS, BATCH, LEARNING_RATE = 10, 16, 0.5


def initial_model() -> Model:
    """A model of zeros, so that every run starts from the same point."""
    return {
        "weight": np.zeros((CLASSES, PIXELS), np.float32),
        "bias": np.zeros(CLASSES, np.float32),
    }


def load_central_test() -> Examples:
    """A fifth of the digits, which no node ever sees."""
    images, labels, is_test = _digits()
    return images[is_test], labels[is_test]


def load_partition(partition_id: int, num_partitions: int) -> tuple[Examples, Examples]:
    """The training part and the local test part (a fifth of the node's examples) of a node.

    The nodes differ as real ones do: for each digit the shares are drawn from a
    Dirichlet distribution, so both the number of examples and the mix of labels are
    uneven. A tenth of the data is split evenly, so that every node has examples.
    """
    images, labels, is_test = _digits()
    rng = np.random.default_rng(SEED)
    mine = []
    for digit in range(CLASSES):
        indices = rng.permutation(np.flatnonzero((labels == digit) & ~is_test))
        shares = 0.1 / num_partitions + 0.9 * rng.dirichlet([0.5] * num_partitions)
        cuts = np.round(np.cumsum(shares)[:-1] * len(indices)).astype(int)
        mine.append(np.split(indices, cuts)[partition_id])
    indices = rng.permutation(np.concatenate(mine))
    test, train = np.split(indices, [len(indices) // 5])
    return (images[train], labels[train]), (images[test], labels[test])


def train(model: Model, images: Floats, labels: Labels, seed: list[int]) -> tuple[Model, float]:
    """Mini-batch gradient descent from `model`; returns the new model and its loss."""
    weight, bias = model["weight"].copy(), model["bias"].copy()
    rng = np.random.default_rng([SEED, *seed])
    for _ in range(EPOCHS):
        order = rng.permutation(len(images))
        for start in range(0, len(order), BATCH):
            batch = order[start : start + BATCH]
            error = _probabilities(weight, bias, images[batch])
            error[np.arange(len(batch)), labels[batch]] -= 1
            error *= np.float32(LEARNING_RATE / len(batch))
            weight -= error.T @ images[batch]
            bias -= error.sum(axis=0)
    right = _probabilities(weight, bias, images)[np.arange(len(labels)), labels]
    loss = float(-np.log(np.maximum(right, 1e-12)).mean())
    return {"weight": weight, "bias": bias}, loss


def accuracy(model: Model, images: Floats, labels: Labels) -> float:
    """The share of images whose most likely digit is the right one."""
    guesses = _probabilities(model["weight"], model["bias"], images).argmax(axis=1)
    return float((guesses == labels).mean())


def _digits() -> tuple[Floats, Labels, NDArray[np.bool_]]:
    """Images scaled to 0..1, their labels, and a mask that is true for the central test set."""
    images, labels = load_digits(return_X_y=True)
    is_test = np.zeros(len(labels), bool)
    is_test[np.random.default_rng(SEED).permutation(len(labels))[: len(labels) // 5]] = True
    return (images / 16).astype(np.float32), labels.astype(np.int64), is_test


def _probabilities(weight: Floats, bias: Floats, images: Floats) -> Floats:
    """Softmax of the linear scores, shape (images, 10)."""
    scores = images @ weight.T + bias
    # The largest score is subtracted first, because exp would overflow.
    odds: Floats = np.exp(scores - scores.max(axis=1, keepdims=True))
    odds /= odds.sum(axis=1, keepdims=True)
    return odds
