"""The parts of Flower's internals on which lifl relies, one test each; a failure names the part and the file of lifl.

Everything that lifl knows of Flower is in lifl/strategy/. When Flower moves something, this file names the place.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import textwrap
import tomllib
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp import strategy as flowers
from packaging.requirements import Requirement

import lifl.strategy as ours
from lifl.strategy.exchange import EventGrid
from lifl.strategy.fedavg import Mean

ROOT = Path(__file__).parents[2]

DOCUMENTED = ("flwr.app", "flwr.serverapp", "flwr.serverapp.strategy")
"""Modules whose names Flower documents; what is imported from others is in the table below."""

PRIVATE = {
    "flwr.app.error.Error": "landing.py: the error reply in the place of a refused one",
    "flwr.app.message.make_message": "landing.py and pulling.py: the error reply in the place of a refused one",
    "flwr.app.message.remove_content_from_message": "superlink/prebuilt.py: a reply as it is pushed",
    "flwr.common.constant.ErrorCode": "landing.py and pulling.py: the code of that error",
    "flwr.common.constant.HEARTBEAT_DEFAULT_INTERVAL": "superlink/virtual_node.py: what a SuperNode promises",
    "flwr.common.constant.SType": "landing.py: which serialisation is NumPy's",
    "flwr.common.constant.TIMESTAMP_HEADER": "superlink/caller.py: signed calls",
    "flwr.common.serde.message_from_proto": "superlink/virtual_node.py: what is polled; served.py: what a server tells",
    "flwr.common.serde.message_to_proto": "superlink/prebuilt.py: what is pushed",
    "flwr.proto.fab_pb2": "superlink/virtual_node.py: the Fleet API",
    "flwr.proto.fleet_pb2": "superlink/virtual_node.py: the Fleet API",
    "flwr.proto.heartbeat_pb2": "superlink/virtual_node.py: the Fleet API",
    "flwr.proto.message_pb2": "superlink/virtual_node.py and prebuilt.py: the Fleet API",
    "flwr.proto.message_pb2.ConfirmMessageReceivedRequest": "pulling.py: the SuperLink may delete a reply's objects",
    "flwr.proto.message_pb2.Message": "served.py: a reply's metadata",
    "flwr.proto.message_pb2.ObjectTree": "pulling.py: the ids of a reply's objects",
    "flwr.proto.node_pb2": "superlink/virtual_node.py: the Fleet API",
    "flwr.proto.run_pb2": "superlink/virtual_node.py: the Fleet API",
    "flwr.proto.runtime_pb2.PullAppMessagesRequest": "pulling.py: which replies are there (else Flower pulls)",
    "flwr.serverapp.strategy.strategy_utils.aggregate_arrayrecords": "reference.py: what benchmarks compare with",
    "flwr.serverapp.strategy.strategy_utils.aggregate_metricrecords": "fedavg.py: the default function for metrics",
    "flwr.supercore.constant.FLEET_HTTP_PUBLIC_KEY_HEADER": "superlink/caller.py: signed calls",
    "flwr.supercore.constant.FLEET_HTTP_SIGNATURE_HEADER": "superlink/caller.py: signed calls",
    "flwr.supercore.constant.FLWR_PRIVATE_MAX_CONCURRENT_OBJ_PULLS": "superlink/virtual_node.py: how many at a time",
    "flwr.supercore.constant.SYSTEM_MESSAGE_TYPE": "pulling.py: an error reply of nobody's (else Flower pulls)",
    "flwr.supercore.date.now": "superlink/caller.py: the time that is signed",
    "flwr.supercore.inflatable.inflatable_object.get_all_nested_objects": "superlink/prebuilt.py: a reply's objects",
    "flwr.supercore.inflatable.inflatable_object.get_object_head_values_from_object_content": "served.py: a record",
    "flwr.supercore.inflatable.inflatable_object.get_object_tree": "superlink/prebuilt.py: a reply's objects",
    "flwr.supercore.inflatable.inflatable_object.iterate_object_tree": "superlink/: an object's parts before it",
    "flwr.supercore.inflatable.inflatable_object.no_object_id_recompute": "superlink/prebuilt.py: ids made once",
    "flwr.supercore.inflatable.inflatable_utils.inflatable_class_registry": "served.py: a record of a reply",
    "flwr.supercore.inflatable.inflatable_protobuf_utils.make_pull_object_fn_protobuf": "pulling.py: one object",
    "flwr.supercore.inflatable.inflatable_utils.ObjectPullError": "pulling.py: an object is gone",
    "flwr.supercore.inflatable.inflatable_utils.ObjectPushError": "exchange.py: a SuperLink has it already",
    "flwr.supercore.inflatable.inflatable_utils.ObjectUnavailableError": "pulling.py: an object is not there yet",
    "flwr.supercore.inflatable.inflatable_utils.get_num_workers": "superlink/virtual_node.py: how many at a time",
    "flwr.supercore.inflatable.inflatable_utils.inflate_object_from_contents": "pulling.py: a Message of its objects",
    "flwr.supercore.inflatable.inflatable_utils.pull_objects": "pulling.py: a reply's objects, several at a time",
    "flwr.supercore.log": "fedavg.py and exchange.py: lines in Flower's log",
    "flwr.supercore.primitives.asymmetric.generate_key_pairs": "superlink/caller.py: a node's identity",
    "flwr.supercore.primitives.asymmetric.public_key_to_bytes": "superlink/caller.py: a node's identity",
    "flwr.supercore.primitives.asymmetric.sign_message": "superlink/caller.py: signed calls",
    "flwr.supercore.protobuf.constants.PROTOBUF_MEDIA_TYPE": "superlink/caller.py: the kind of body",
    "flwr.supercore.runtime_version_compatibility.RuntimeVersionMetadata": "superlink/caller.py: version headers",
    "flwr.superlink.grid.http_grid.HttpGrid": "served.py and pulling.py: the grid of a SuperLink",
}


def resolve(name: str) -> Any:
    """The object behind a dotted name; fails with the name and who needs it."""
    module, _, attribute = name.rpartition(".")
    try:
        found = importlib.import_module(module)
        return getattr(found, attribute) if hasattr(found, attribute) else importlib.import_module(name)
    except (ImportError, AttributeError) as error:
        pytest.fail(
            f"{name} is gone from flwr {version('flwr')} ({error}); needed by lifl/strategy/{PRIVATE.get(name)}"
        )


def broke(what: str, where: str) -> str:
    """The message of a contract that does not hold any more."""
    return f"flwr {version('flwr')}: {what}; lifl/strategy/{where} relies on it"


def metadata(message_id: str = "", to: str = "") -> Any:
    """A message's metadata."""
    from flwr.app.metadata import Metadata

    return Metadata(1, message_id, 7, 1, to, "", 1.0, 3600.0, "train")


def message() -> Message:
    """A message to a node."""
    made: Message = resolve("flwr.app.message.make_message")(metadata=metadata(), content=RecordDict())
    return made


# ---------------------------------------------------------------- versions and names


def test_the_installed_flwr_is_in_the_supported_range() -> None:
    """The flwr that runs these tests is one that pyproject.toml allows."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (required,) = [r for r in map(Requirement, project["dependencies"]) if r.name == "flwr"]
    assert required.specifier.contains(version("flwr")), f"flwr {version('flwr')} is not in {required.specifier}"


def imported() -> dict[str, str]:
    """Every name that lifl imports from flwr, and the file that does."""
    names = {}
    for path in sorted((ROOT / "lifl").rglob("*.py")):
        if {"_demo_app", "_round_app"} & set(path.parts):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "flwr":
                names.update({f"{node.module}.{alias.name}": str(path.relative_to(ROOT)) for alias in node.names})
            elif isinstance(node, ast.Import):
                names.update(
                    {a.name: str(path.relative_to(ROOT)) for a in node.names if a.name.split(".")[0] == "flwr"}
                )
    return names


def test_the_table_of_private_names_is_complete() -> None:
    """Each undocumented name that lifl imports is in the table, none is in it for nothing."""
    private = {name for name in imported() if name.rpartition(".")[0] not in DOCUMENTED}
    assert private == set(PRIVATE)


@pytest.mark.parametrize("name", sorted(imported()))
def test_a_name_exists(name: str) -> None:
    """Each name that lifl imports from flwr is there."""
    assert resolve(name) is not None


# ---------------------------------------------------------------- messages and records


def test_make_message_and_error() -> None:
    """An error reply can be made from a reply's own metadata."""
    make_message, error = resolve("flwr.app.message.make_message"), resolve("flwr.app.error.Error")
    where = "landing.py (error_reply)"
    assert list(inspect.signature(make_message).parameters) == ["metadata", "content", "error"], broke(
        "make_message has other parameters", where
    )
    reply = make_message(metadata=metadata("a", "b"), error=error(3, "why"))
    assert reply.has_error(), broke("has_error is not true of an error reply", where)
    assert (reply.error.code, reply.error.reason) == (3, "why"), broke("Error's fields have changed", where)
    assert reply.metadata.reply_to_message_id == "b", broke("Metadata has no reply_to_message_id", "exchange.py")
    assert reply.metadata.src_node_id == 7, broke("Metadata has no src_node_id", "exchange.py and landing.py")
    assert reply.metadata.dst_node_id == 1, broke("Metadata has no dst_node_id", "exchange.py")


def test_constants() -> None:
    """The values that lifl compares with or sends."""
    s_type, code = resolve("flwr.common.constant.SType"), resolve("flwr.common.constant.ErrorCode")
    assert s_type.NUMPY == "numpy.ndarray", broke("SType.NUMPY has changed", "landing.py (_views)")
    assert isinstance(code.MOD_FAILED_PRECONDITION, int), broke("the error code is gone", "landing.py (error_reply)")
    assert isinstance(code.MESSAGE_UNAVAILABLE, int), broke("the error code is gone", "pulling.py (Puller)")
    assert MessageType.TRAIN == "train", broke("MessageType.TRAIN has changed", "fedavg.py (_send_and_receive)")


def test_the_log_is_flowers() -> None:
    """Flower's log function writes to the logger that users know."""
    from flwr.supercore import logger

    assert logger.LOGGER_NAME == "flwr", broke("the logger has another name", "fedavg.py and exchange.py")
    assert resolve("flwr.supercore.log").__self__ is logger.FLOWER_LOGGER, broke("log is no method of it", "fedavg.py")


def test_records() -> None:
    """Records give their arrays and metrics as lifl reads them, and are copied without copying arrays."""
    where = "landing.py"
    array = Array(np.arange(3.0))
    content = RecordDict({"a": ArrayRecord({"x": array}), "m": MetricRecord({"n": 1}), "c": ConfigRecord()})
    assert list(content.array_records) == ["a"], broke("RecordDict.array_records", f"{where} (_read)")
    assert list(content.metric_records) == ["m"], broke("RecordDict.metric_records", f"{where} (_read)")
    assert content["a"]["x"].data is array.data, broke(
        "Array.data is not the same bytes every time", f"{where} (_Said)"
    )
    assert isinstance(array.data, bytes), broke("Array.data is not bytes", f"{where} (_Said)")
    copy = RecordDict(dict(content))
    assert copy["a"] is content["a"], broke("RecordDict(dict) copies its records", f"{where} (_without_arrays)")
    empty = Array(dtype="float64", shape=(3,), stype="numpy.ndarray", data=b"")
    assert empty.data == b"", broke("Array wants data that fits", f"{where} (_without_arrays)")
    reply = message()
    reply.content = content
    assert reply.content is content, broke("Message.content cannot be set", f"{where} (_settle)")
    assert content["m"].get("none") is None, broke("MetricRecord.get", f"{where} (_Said)")


def test_arrays_are_npy_streams() -> None:
    """An Array's data is what np.save writes, and reading it is np.load."""
    from lifl.strategy import npy

    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert Array(values).data == npy.encode(values), broke("Array's data is no .npy stream", "landing.py (to_record)")
    made = Array(dtype="float32", shape=(2, 3), stype="numpy.ndarray", data=npy.encode(values))
    assert made.object_id == Array(values).object_id, broke("Array's id depends on more", "landing.py (to_record)")


# ---------------------------------------------------------------- Flower's FedAvg and its loop


def tree_of(function: Any) -> ast.AST:
    """A function's syntax tree."""
    return ast.parse(textwrap.dedent(inspect.getsource(function)))


def test_start_takes_the_same_arguments() -> None:
    """Mean.start can be called as Strategy.start."""
    theirs, own = (inspect.signature(cls.start).parameters for cls in (flowers.Strategy, Mean))
    assert [(p.name, p.default, p.kind) for p in own.values()] == [
        (p.name, p.default, p.kind) for p in theirs.values()
    ], broke("Strategy.start has other arguments", "fedavg.py (Mean.start)")


def test_start_exchanges_messages_in_one_way_only() -> None:
    """Flower's loop calls nothing of the grid but send_and_receive(messages=..., timeout=...), twice."""
    where = "exchange.py (EventGrid.send_and_receive)"
    uses = [
        node.attr
        for node in ast.walk(tree_of(flowers.Strategy.start))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "grid"
    ]
    assert uses == ["send_and_receive"] * 2, broke(f"Strategy.start uses {uses} of the grid", where)
    calls = [
        sorted(str(keyword.arg) for keyword in node.keywords)
        for node in ast.walk(tree_of(flowers.Strategy.start))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "send_and_receive"
    ]
    assert calls == [["messages", "timeout"]] * 2, broke("send_and_receive is called with other arguments", where)


def test_start_calls_these_hooks_and_no_others() -> None:
    """Flower's `start` calls the hooks that a checkpoint must note and play back."""
    where = "journal.py (Journal, which the loop calls in the place of the strategy)"
    tree = ast.parse(textwrap.dedent(inspect.getsource(flowers.Strategy.start)))
    used = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and getattr(n.value, "id", "") == "self"}
    hooks = {f"{verb}_{kind}" for verb in ("configure", "aggregate") for kind in ("train", "evaluate")}
    assert used == hooks | {"__class__", "summary"}, broke(f"Strategy.start uses {used} of the strategy", where)
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "evaluate_fn"]
    assert [len(call.args) for call in calls] == [2, 2], broke("evaluate_fn is called otherwise", where)


@pytest.mark.parametrize("name", ours.__all__)
def test_start_is_the_loop_itself(name: str) -> None:
    """Strategy.start is a plain function that no strategy overrides: its frame tells a round from a hook's message."""
    if name == "Result":
        return
    where = "exchange.py (EventGrid.send_and_receive looks at the caller's frame)"
    start = getattr(flowers, name).start
    assert start is flowers.Strategy.start, broke(f"{name} has a start of its own", where)
    assert inspect.isfunction(start), broke("Strategy.start is no plain function", where)
    assert not hasattr(start, "__wrapped__"), broke("Strategy.start is decorated", where)
    assert start.__code__.co_name == "start", broke("Strategy.start is wrapped", where)


def test_results_fields() -> None:
    """Flower's Result has the fields that lifl copies, and reports is none of them."""
    names = [field.name for field in fields(flowers.Result)]
    assert names == [
        "arrays",
        "train_metrics_clientapp",
        "evaluate_metrics_clientapp",
        "evaluate_metrics_serverapp",
    ], broke(f"Result has the fields {names}", "fedavg.py (Result, Mean.start)")
    assert set(vars(flowers.Result())) == set(names), broke(
        "Result keeps more than its fields", "fedavg.py (Mean.start)"
    )


def test_check_and_log_replies() -> None:
    """Flower's check of replies can be asked not to validate, and gives two lists."""
    where = "fedavg.py (Mean.aggregate_train)"
    method = flowers.FedAvg._check_and_log_replies
    assert list(inspect.signature(method).parameters) == ["self", "replies", "is_train", "validate"], broke(
        "FedAvg._check_and_log_replies has other parameters", where
    )
    given = method(flowers.FedAvg(), [message()], is_train=True, validate=False)
    assert [len(part) for part in given] == [1, 0], broke("_check_and_log_replies returns something else", where)


def test_attributes_of_fedavg() -> None:
    """The attributes that lifl reads, and the identity of the default function for metrics."""
    default = resolve("flwr.serverapp.strategy.strategy_utils.aggregate_metricrecords")
    strategy = flowers.FedAvg()
    for name in ("weighted_by_key", "arrayrecord_key", "train_metrics_aggr_fn"):
        assert hasattr(strategy, name), broke(f"FedAvg has no {name}", "fedavg.py (Mean)")
    assert strategy.train_metrics_aggr_fn is default, broke(
        "the default train_metrics_aggr_fn is another function", "fedavg.py (_is_looked_at, _conclude)"
    )


@pytest.mark.parametrize("name", ["FedAvgM", "FedAdagrad", "FedAdam", "FedYogi"])
def test_current_arrays(name: str) -> None:
    """The strategies whose dtypes are kept hold the model that was sent in current_arrays, and begin with None."""
    where = "optimizers.py (DtypeKept)"
    strategy = getattr(flowers, name)()
    assert vars(strategy).get("current_arrays", "gone") is None, broke(f"{name}.current_arrays has changed", where)
    config, grid = ConfigRecord(), SimpleNamespace(get_node_ids=lambda: [1, 2])
    strategy._construct_messages = lambda *_: []
    strategy.configure_train(1, ArrayRecord({"x": Array(np.zeros(2, np.float32))}), config, grid)
    dtypes = [str(array.dtype) for array in strategy.current_arrays.values()]
    assert dtypes == ["float32"], broke(f"{name}.configure_train does not keep the model", where)


@pytest.mark.parametrize("name", ["FedProx", "FedAvgM", "FedAdagrad", "FedAdam", "FedYogi"])
def test_flowers_classes_pass_on_to_the_class_before_fedavg(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower's strategies reach FedAvg's methods through super(), where lifl's Mean stands."""
    cls = getattr(ours, name)
    order = cls.__mro__
    theirs = getattr(flowers, name)
    assert order.index(theirs) < order.index(Mean) < order.index(flowers.FedAvg), broke(
        f"{name} is not derived from FedAvg as it was", "optimizers.py"
    )
    reached: list[int] = []
    monkeypatch.setattr(Mean, "aggregate_train", lambda _, number, __: reached.append(number) or (None, None))
    cls().aggregate_train(5, [])
    assert reached == [5], broke(f"{name}.aggregate_train does not call super().aggregate_train", "optimizers.py")


def test_hooks_have_flowers_parameters() -> None:
    """A hook that lifl overrides has the parameters with which Flower calls it."""
    for cls in (Mean, ours.FedAvgM):
        own = inspect.signature(cls.aggregate_train).parameters
        theirs = inspect.signature(flowers.FedAvg.aggregate_train).parameters
        assert list(own) == list(theirs), broke("aggregate_train has other parameters", "fedavg.py and optimizers.py")


# ---------------------------------------------------------------- grids


def test_the_event_grid_is_a_whole_grid() -> None:
    """Whatever Flower's Grid offers, the grid that hooks get passes on to the user's."""
    public = {name for name in vars(Grid) if not name.startswith("_")}
    missing = public - vars(EventGrid).keys()
    assert not missing, broke(f"Grid has got {sorted(missing)}", "exchange.py (EventGrid)")
    assert not getattr(EventGrid, "__abstractmethods__", ()), broke("Grid has new abstract methods", "exchange.py")


def http_grid(**client: Any) -> Any:
    """An HttpGrid without a server."""
    from flwr.superlink.grid import HttpGrid

    grid = HttpGrid(token="none")
    grid._run = SimpleNamespace(run_id=1)
    grid._client = SimpleNamespace(**client)
    return grid


def in_memory_grid(**state: Any) -> Any:
    """An InMemoryGrid without a simulation."""
    from flwr.superlink.grid import InMemoryGrid

    grid = InMemoryGrid(SimpleNamespace(state=lambda: SimpleNamespace(**state)))
    grid._run = SimpleNamespace(run_id=1)
    return grid


@pytest.mark.parametrize("grid_class", ["HttpGrid", "InMemoryGrid"])
def test_pushing_sets_each_messages_id(grid_class: str) -> None:
    """push_messages writes metadata.message_id and returns the ids of what it pushed, None or nothing for the rest."""
    where = "exchange.py (exchange)"
    if grid_class == "HttpGrid":
        grid = http_grid()
        grid._try_push_messages = lambda _, messages: [messages[0].metadata.message_id, None]
    else:
        stored: list[str] = []
        grid = in_memory_grid(
            store_message_ins=lambda m: None if stored else stored.append("") or m.metadata.message_id
        )
    messages = [message(), message()]
    ids = list(grid.push_messages(messages))
    given = [m.metadata.message_id for m in messages]
    assert all(given), broke(f"{grid_class}.push_messages does not set metadata.message_id", where)
    assert [i for i in ids if i] == given[:1], broke(f"{grid_class}.push_messages returns other ids", where)


def test_an_http_grid_pulls_just_what_it_is_asked_for() -> None:
    """HttpGrid.pull_messages asks the SuperLink for the ids in the list, and only those."""
    from flwr.proto.runtime_pb2 import PullAppMessagesResponse

    asked: list[Any] = []
    grid = http_grid(PullMessages=lambda request: asked.append(request) or PullAppMessagesResponse())
    assert list(grid.pull_messages(["a", "b"])) == []
    assert [list(request.message_ids) for request in asked] == [["a", "b"]], broke(
        "HttpGrid.pull_messages asks for other ids", "exchange.py (exchange)"
    )


def test_an_http_grid_pulls_in_these_steps() -> None:
    """HttpGrid.pull_messages does what lifl does in its place, of the same grid: these calls, and no others."""
    from flwr.superlink.grid import HttpGrid

    where = "pulling.py (Puller)"
    tree = tree_of(HttpGrid.pull_messages)
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    client = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self._runtime_client"
    }
    assert client == {"PullMessages", "PullObject", "ConfirmMessageReceived"}, broke(
        "it asks for something else", where
    )
    functions = {call.id for call in calls if isinstance(call, ast.Name)}
    expected = {"pull_objects", "iterate_object_tree", "make_pull_object_fn_protobuf", "inflate_object_from_contents"}
    more = {"PullAppMessagesRequest", "ConfirmMessageReceivedRequest", "make_message", "Metadata", "Error", "now"}
    assert functions == expected | more | {"cast", "zip", "log"}, broke("it calls other functions", where)
    grid = http_grid()
    assert grid._runtime_client is grid._client, broke("its client has another name", where)
    assert grid.node.node_id == 1, broke("its node has another name", where)


def test_an_object_that_is_not_there_yet_is_told_from_one_that_is_gone() -> None:
    """The function that pulls an object raises these errors, and pull_objects raises the error of a pull."""
    where = "pulling.py (Puller._fetch)"
    names = "flwr.supercore.inflatable."
    make = resolve(f"{names}inflatable_protobuf_utils.make_pull_object_fn_protobuf")
    pull_objects = resolve(f"{names}inflatable_utils.pull_objects")
    for found, error in ((False, "ObjectPullError"), (True, "ObjectUnavailableError")):
        answer = SimpleNamespace(object_found=found, object_available=False)
        pull = make(lambda _, answer=answer: answer, http_grid().node, 1)
        with pytest.raises(resolve(f"{names}inflatable_utils.{error}")):
            pull("a")

    def raises(_: str) -> bytes:
        raise LookupError

    with pytest.raises(LookupError):
        pull_objects(["a", "b"], raises)
    assert pull_objects(["a"], lambda _: b"x") == {"a": b"x"}, broke("pull_objects gives something else", where)


def test_a_message_object_has_this_form() -> None:
    """A Message's object says in its head and body what pulling.py and extent.py read; inflating gives it back."""
    from lifl.strategy import extent

    where = "extent.py (built_bytes)"
    make_message = resolve("flwr.app.message.make_message")
    nested = resolve("flwr.supercore.inflatable.inflatable_object.get_all_nested_objects")
    inflate = resolve("flwr.supercore.inflatable.inflatable_utils.inflate_object_from_contents")
    content = RecordDict({"a": ArrayRecord({"x": Array(np.arange(3.0))}), "m": MetricRecord({"n": [1]})})
    made = make_message(metadata=metadata("", "b"), content=content)
    contents = {object_id: one.deflate() for object_id, one in nested(made).items()}
    assert extent.built_bytes(made.object_id, contents, 10**6) > 24, broke("a Message has another form", where)
    again = inflate(made.object_id, contents)
    assert again.content == content, broke("inflating gives something else", where)
    assert again.metadata.reply_to_message_id == "b", broke("a Message's object has other metadata", where)


def test_an_in_memory_grid_pulls_just_what_it_is_asked_for() -> None:
    """InMemoryGrid.pull_messages gives each reply once, with the id of the message that it answers."""
    make_message = resolve("flwr.app.message.make_message")
    asked: list[Any] = []
    deleted: list[Any] = []

    def get(message_ids: set[str], run_id: int) -> list[Message]:
        asked.append(message_ids)
        return [make_message(metadata=metadata("reply", "a"), content=RecordDict())]

    grid = in_memory_grid(get_message_res=get, delete_messages=lambda message_ins_ids: deleted.append(message_ins_ids))
    (reply,) = grid.pull_messages(["a", "b"])
    where = "exchange.py (exchange)"
    assert asked == [{"a", "b"}], broke("InMemoryGrid.pull_messages asks for other ids", where)
    assert deleted == [{"a"}], broke("InMemoryGrid.pull_messages keeps replies", where)
    assert reply.metadata.reply_to_message_id == "a", broke("a reply does not name its message", where)


def test_a_grids_own_errors_name_the_message() -> None:
    """HttpGrid makes an error reply for a reply whose objects are gone, and names the message that it answers."""
    from flwr.superlink.grid import HttpGrid

    where = "exchange.py (exchange names the node that was asked)"
    keywords = [
        {str(k.arg): ast.unparse(k.value) for k in node.keywords}
        for node in ast.walk(tree_of(HttpGrid.pull_messages))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Metadata"
    ]
    assert [k["reply_to_message_id"] for k in keywords] == ["msg_proto.metadata.reply_to_message_id"], broke(
        "HttpGrid.pull_messages makes its error replies in another way", where
    )
