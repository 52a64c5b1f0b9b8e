"""FedProx, FedAvgM, FedAdagrad, FedAdam and FedYogi over lifl's mean against Flower's own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import flwr.serverapp.strategy as flowers
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message
from flwr.serverapp.exception import AggregationError
from scripted import MODEL, Client, Clock, failing, metrics_of, nudge, plain, record, replies_of, run

import lifl
import lifl.strategy as ours
from lifl.strategy.fedavg import Mean, RoundOptions

NAMES = ["FedProx", "FedAvgM", "FedAdagrad", "FedAdam", "FedYogi"]
KEEPING = NAMES[1:]
ARGUMENTS: dict[str, dict[str, Any]] = {
    "FedProx": {"proximal_mu": 0.5},
    "FedAvgM": {"server_learning_rate": 0.7, "server_momentum": 0.9},
    "FedAdagrad": {"eta": 0.3, "tau": 1e-2},
    "FedAdam": {"eta": 0.3, "beta_1": 0.8, "beta_2": 0.95},
    "FedYogi": {"eta": 0.3, "beta_1": 0.8, "beta_2": 0.95},
}
CLIENTS: dict[int, Client] = {3: nudge(3), 1: nudge(1), 2: nudge(2), 9: failing}
FLOAT32: dict[int, Client] = {n: nudge(n, "float32") for n in (3, 1, 2)}
ROUNDS = 4


def make(module: Any, name: str, **options: Any) -> Any:
    """A strategy of Flower's or of lifl's, with arguments that make a difference."""
    return getattr(module, name)(**ARGUMENTS[name], **options)


def models(strategy: Any, clients: dict[int, Client], clock: Clock, **start: Any) -> tuple[Any, list[ArrayRecord]]:
    """A run's Result and the model after every round."""
    seen: list[ArrayRecord] = []
    result, _ = run(strategy, clients, ROUNDS, clock, evaluate_fn=lambda _, arrays: seen.append(arrays), **start)
    return result, seen[1:]


@pytest.mark.parametrize("clients", [CLIENTS, FLOAT32], ids=["the model's dtypes", "float32 clients"])
@pytest.mark.parametrize("name", NAMES)
def test_flowers_bits_and_dtypes(node: lifl.Node, clock: Clock, name: str, clients: dict[int, Client]) -> None:
    """With keep_dtype=False and order="flower" every round's model has Flower's object id."""
    options = {"keep_dtype": False} if name in KEEPING else {}
    # A float32 does not fit into the model's float16.
    start = record({k: v for k, v in MODEL.items() if clients is not FLOAT32 or v.dtype != np.float16})
    expected, theirs = models(make(flowers, name), clients, Clock(), initial_arrays=start)
    strategy = make(ours, name, node=node, order="flower", **options)
    result, own = models(strategy, clients, clock, initial_arrays=start)
    assert [m.object_id for m in own] == [m.object_id for m in theirs]
    assert metrics_of(result) == metrics_of(expected)
    refused = {r.client_id for report in result.reports.values() for r in report.rejected}
    assert refused <= {"9"}


def rounding(base: type[Any]) -> type[Any]:
    """Flower's own class with one line more: after every round the model is rounded to the dtypes it had."""

    class Rounding(base):  # type: ignore[misc]
        def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
            arrays, metrics = super().aggregate_train(server_round, replies)
            for key, array in arrays.items():
                values, dtype = array.numpy(), MODEL[key].dtype
                arrays[key] = Array(np.asarray(np.rint(values) if dtype.kind == "i" else values, dtype))
            return arrays, metrics

    return Rounding


@pytest.mark.parametrize("name", KEEPING)
def test_keeping_dtypes_is_one_rounding_a_round(node: lifl.Node, clock: Clock, name: str) -> None:
    """By default the model keeps its dtypes, and is Flower's rounded to them after every round, bit by bit."""
    theirs = models(rounding(getattr(flowers, name))(**ARGUMENTS[name]), CLIENTS, Clock())[1]
    own = models(make(ours, name, node=node, order="flower"), CLIENTS, clock)[1]
    for model in own:
        assert {key: array.dtype for key, array in model.items()} == {k: str(a.dtype) for k, a in MODEL.items()}
    assert [m.object_id for m in own] == [m.object_id for m in theirs]


@pytest.mark.parametrize("name", KEEPING)
def test_without_it_the_model_grows(clock: Clock, name: str) -> None:
    """Without keep_dtype Flower sends float64 from the second round on, FedAdam the weights too."""
    sent = models(make(flowers, name), CLIENTS, clock)[1][0]
    assert sent["weight"].dtype == ("float64" if name == "FedAdam" else "float32")
    assert sent["num_batches_tracked"].dtype == "float64"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("timing", ["eager", "lazy"])
def test_near_flowers_in_any_order(node: lifl.Node, clock: Clock, name: str, timing: str) -> None:
    """The default order's mean goes through Flower's arithmetic: one rounding of float32 moves it little."""
    start = record({"weight": MODEL["weight"], "bias": MODEL["bias"]})
    _, theirs = models(make(flowers, name), CLIENTS, Clock(), initial_arrays=start)
    _, own = models(make(ours, name, node=node, timing=timing), CLIENTS, clock, initial_arrays=start)
    # Round 1 starts from the same model: a mean of float32s is off by an ulp at most, and the adaptive step
    # divides that by at least tau. Later rounds start where the one before ended.
    for server_round, (mine, other) in enumerate(zip(own, theirs, strict=True), 1):
        for key, array in plain(mine).items():
            assert array.dtype == MODEL[key].dtype
            np.testing.assert_allclose(array, plain(other)[key], atol=1e-4 * server_round)


@pytest.mark.parametrize("name", NAMES)
def test_a_round_without_a_result_changes_no_state(node: lifl.Node, clock: Clock, name: str) -> None:
    """After a round in which all failed, momentum and model go on from where they were, as in Flower."""

    def flaky(client: Client) -> Client:
        return lambda m: failing(m) if m.content["config"]["server-round"] == 2 else client(m)  # type: ignore[index]

    clients = {n: flaky(nudge(n)) for n in (1, 2)}
    options = {"keep_dtype": False} if name in KEEPING else {}
    theirs = models(make(flowers, name), clients, Clock())[1]
    result, own = models(make(ours, name, node=node, order="flower", **options), clients, clock)
    assert [m.object_id for m in own] == [m.object_id for m in theirs]
    assert result.reports[2].error is not None
    assert sorted(result.reports) == [1, 2, 3, 4]


@pytest.mark.parametrize("name", NAMES)
def test_a_users_subclass(node: lifl.Node, clock: Clock, name: str) -> None:
    """Subclasses of these work as those of FedAvg do."""

    def doubled(base: type[Any]) -> type[Any]:
        class Doubled(base):  # type: ignore[misc]
            def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
                replies = [r for r in replies if not r.has_error()]
                for reply in replies:
                    arrays = {k: v * np.asarray(2, v.dtype) for k, v in plain(reply.content["arrays"]).items()}  # type: ignore[arg-type]
                    reply.content["arrays"] = record(arrays)
                return super().aggregate_train(server_round, replies)

        return Doubled

    options = {"keep_dtype": False} if name in KEEPING else {}
    theirs = models(doubled(getattr(flowers, name))(**ARGUMENTS[name]), CLIENTS, Clock())[1]
    strategy = doubled(getattr(ours, name))(**ARGUMENTS[name], node=node, order="flower", **options)
    own = models(strategy, CLIENTS, clock)[1]
    assert [m.object_id for m in own] == [m.object_id for m in theirs]


@pytest.mark.parametrize("name", NAMES)
def test_arguments_and_signature(name: str) -> None:
    """Flower's arguments come first, of the same kinds and defaults; lifl's follow by name."""
    theirs, own = inspect.signature(getattr(flowers, name)), inspect.signature(getattr(ours, name))
    for parameter in theirs.parameters.values():
        assert own.parameters[parameter.name] == parameter
    by_place = [p.name for p in theirs.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [p.name for p in own.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD] == by_place
    extra = set(own.parameters) - set(theirs.parameters)
    added = {"quorum", "deadline", "timing", "order", "node", "max_weight", "clipping_norm"}
    added |= {"client_bytes", "total_bytes", "checkpoint", "resume", "tensorboard", "stop_if_all_refused"}
    assert extra == added | ({"keep_dtype"} if name in KEEPING else set())


@pytest.mark.parametrize("name", NAMES)
def test_positional_arguments(name: str) -> None:
    """Arguments by place mean what they mean in Flower, and are refused where Flower refuses them."""
    theirs, own = getattr(flowers, name), getattr(ours, name)
    places = sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in inspect.signature(theirs).parameters.values())
    values = (0.5, 0.25, 3, 4, 5, "weight", "model", "settings")
    if places == 0:
        for cls in (theirs, own):
            with pytest.raises(TypeError):
                cls(*values)
        return
    stock, strategy = theirs(*values), own(*values, quorum=3)
    assert {key: vars(strategy)[key] for key in vars(stock)} == vars(stock)
    assert strategy.quorum == 3


@pytest.mark.parametrize("name", NAMES)
def test_they_are_flowers_classes(name: str) -> None:
    """isinstance of Flower's class and of its FedAvg, with Flower's summary inside lifl's."""
    strategy = make(ours, name, deadline=30)
    assert isinstance(strategy, (getattr(flowers, name)))
    assert isinstance(strategy, (flowers.FedAvg))
    assert isinstance(strategy, Mean)
    assert isinstance(strategy, RoundOptions)
    assert strategy.deadline == 30
    assert type(strategy).__name__ == name


@pytest.mark.parametrize("name", NAMES)
def test_the_summary_names_both(caplog: pytest.LogCaptureFixture, name: str) -> None:
    """The strategy's own settings, Flower's and lifl's are in the log."""
    with caplog.at_level("INFO", "flwr"):
        make(ours, name, deadline=30.0).summary()
    assert "lifl settings" in caplog.text
    assert "deadline: 30s" in caplog.text
    assert "Sampling:" in caplog.text
    assert {"FedProx": "Proximal mu: 0.5", "FedAvgM": "Momentum: 0.9"}.get(name, "eta (0.3)") in caplog.text


@pytest.mark.parametrize("name", ["FedAdagrad", "FedAdam", "FedYogi"])
@pytest.mark.parametrize(
    "updates",
    [{"x": np.zeros(3)}, {"y": np.zeros(2)}],
    ids=["other shape", "other keys"],
)
def test_a_mean_that_does_not_fit_the_model_raises_as_in_flower(
    node: lifl.Node, name: str, updates: dict[str, Any]
) -> None:
    """Called outside a run, what Flower checks about the mean it checks here too."""
    for strategy in (make(flowers, name), make(ours, name, node=node)):
        with pytest.raises(AggregationError, match="Current arrays not set"):
            strategy.aggregate_train(1, replies_of([updates, updates], [1, 2]))
        strategy.current_arrays = {"x": np.zeros(2)}
        with pytest.raises(AggregationError, match=r"[Kk]eys|[Ss]hape"):
            strategy.aggregate_train(1, replies_of([updates, updates], [1, 2]))


def test_known_numbers_of_momentum(node: lifl.Node) -> None:
    """With a learning rate near 1 FedAvgM is the mean; with momentum the second step is longer."""
    strategy = ours.FedAvgM(node=node, server_learning_rate=0.5, server_momentum=0.5)
    strategy.current_arrays = record({"x": np.array([0.0, 8.0])})
    updates = [{"x": np.array([2.0, 8.0])}, {"x": np.array([5.0, 8.0])}]
    first = plain(strategy.aggregate_train(1, replies_of(updates, [1, 2]))[0])
    second = plain(strategy.aggregate_train(2, replies_of(updates, [1, 2]))[0])
    # The mean is 4: gradients -4, then 0.5 * -4 + (2 - 4).
    np.testing.assert_allclose(first["x"], [2.0, 8.0])
    np.testing.assert_allclose(second["x"], [4.0, 8.0])


@pytest.mark.parametrize(
    ("dtype", "values", "expected"), [("int64", [4.9, 5.5, -2.5], [5, 6, -2]), ("bool", [0.3, 0.7, 1.0], [0, 1, 1])]
)
def test_kept_integers_are_rounded(
    node: lifl.Node, monkeypatch: pytest.MonkeyPatch, dtype: str, values: list[float], expected: list[int]
) -> None:
    """A counter that Flower's arithmetic made a fraction of becomes the nearest integer, not the one below."""

    class Fixed(ours.FedAvgM):
        """Ends with the values."""

    def aggregate_train(*_: Any) -> Any:
        return record({"x": np.array(values)}), None

    monkeypatch.setattr(flowers.FedAvgM, "aggregate_train", aggregate_train)
    strategy = Fixed(node=node)
    strategy.current_arrays = record({"x": np.zeros(3, dtype)})
    kept = plain(strategy.aggregate_train(1, [])[0])["x"]
    assert kept.dtype == dtype
    assert kept.tolist() == expected


def test_every_strategy_is_covered() -> None:
    """The package exports FedAvg, those above, and Result."""
    assert sorted(ours.__all__) == sorted([*NAMES, "FedAvg", "Result"])
    pairs: list[Callable[..., Any]] = [getattr(ours, name) for name in NAMES]
    assert all(issubclass(cls, getattr(flowers, cls.__name__)) for cls in pairs)  # type: ignore[arg-type]
