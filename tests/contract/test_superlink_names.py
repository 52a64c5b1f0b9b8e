"""The parts of Flower's server on which lifl-superlink relies, one test each; a failure names the part.

The names are in lifl/superlink/flower.py. The server starts without them, on Flower's own path; here they must be.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import pytest

from lifl.superlink import flower
from lifl.superlink.http.checks import KNOWN_MIDDLEWARE

ALL = [(part, ours) for part, names in flower.NAMES.items() for ours in names]


def broke(what: str, where: str) -> str:
    """The message of a contract that does not hold any more."""
    return f"flwr {version('flwr')}: {what}; lifl/superlink/{where} relies on it"


def parameters(function: Callable[..., Any]) -> list[str]:
    """The names of a function's parameters."""
    return list(inspect.signature(function).parameters)


@pytest.mark.parametrize(("part", "ours"), ALL)
def test_a_name_exists(part: str, ours: str) -> None:
    """Each name of each part is there."""
    dotted = flower.NAMES[part][ours]
    try:
        assert flower.resolve(dotted) is not None
    except flower.MissingNameError as error:
        pytest.fail(broke(str(error), f"flower.py ({part}: {ours})"))


def test_a_missing_name_is_told_with_its_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the missing name."""
    monkeypatch.setitem(flower.NAMES["store"], "gone", "flwr.supercore.object_store.Gone")
    with pytest.raises(flower.MissingNameError, match=r"flwr\.supercore\.object_store\.Gone"):
        flower.part("store")


@pytest.mark.parametrize("module", ["in_memory_corestate.InMemoryCoreState", "sql_corestate.SqlCoreState"])
def test_a_push_session_can_be_ended(module: str) -> None:
    """By its id, and its messages stay."""
    state = flower.resolve("flwr.supercore.corestate." + module)
    ended = getattr(state, "_cleanup_push_session", None)
    assert ended is not None, broke("_cleanup_push_session is gone: sessions stay until the run ends", "rounds.py")
    assert parameters(ended) == ["self", "session_id", "cleanup_messages"], broke(str(parameters(ended)), "rounds.py")


def test_no_middleware_is_unknown() -> None:
    """The gateway replaces all middleware of Flower's around its routes; with any other it takes no requests."""
    server = flower.part("server")
    names = {one.cls.__name__ for one in server.main._get_middleware()}
    assert names <= KNOWN_MIDDLEWARE.keys(), broke(f"new middleware {names - KNOWN_MIDDLEWARE.keys()}", "checks.py")
    assert "NodeAuthMiddleware" in names, broke("SuperNodes are authenticated elsewhere", "checks.py")


HASHES = {
    "authenticate_node": "checks.py calls it with no more of a request than it looks at",
    "authenticate_task": "checks.py calls it with no more of a request than it looks at",
}


def test_the_checks_look_at_what_they_did() -> None:
    """Flower's two checks are called with a request that has only what they look at."""
    gateway = flower.part("gateway")
    for name, why in HASHES.items():
        source = inspect.getsource(getattr(gateway, name))
        looked_at = {word.strip("(),:") for word in source.replace("\n", " ").split() if word.startswith("request.")}
        known = ("request.headers", "request.state.protobuf_request", "request.app")
        assert all(word.startswith(known) for word in looked_at), broke(f"{name} looks at {looked_at}", why)


@pytest.mark.parametrize(
    ("handler", "expected"),
    [
        ("fleet.push_object", ["request", "state"]),
        ("fleet.pull_object", ["request", "state"]),
        ("fleet.push_messages", ["request", "state"]),
        ("fleet.pull_messages", ["request", "state", "store"]),
        ("fleet.confirm_message_received", ["request", "state", "store"]),
        ("runtime.push_object", ["request", "state", "task"]),
        ("runtime.pull_object", ["request", "state", "task"]),
    ],
)
def test_handlers(handler: str, expected: list[str]) -> None:
    """Flower's handlers are called as its routes call them."""
    api, _, name = handler.partition(".")
    function = getattr(getattr(flower.part("gateway"), api), name)
    assert parameters(function) == expected, broke(f"{handler} has parameters {parameters(function)}", "exchanges.py")


def test_what_a_push_needs_of_its_request() -> None:
    """push_object uses of a request what exchanges.py gives it, and passes the content on untouched."""
    gateway = flower.part("gateway")
    for function in (gateway.fleet.push_object, gateway.runtime.push_object):
        source = inspect.getsource(function)
        used = {part.split(")")[0].split(",")[0].split("}")[0].strip() for part in source.split("request.")[1:]}
        known = {"node.node_id", "run_id", "object_id", "session_id", "object_content", "node.node_id !"}
        assert {u.split(" ")[0] for u in used} <= {k.split(" ")[0] for k in known}, broke(
            f"it uses {used}", "exchanges.py"
        )


def test_the_link_states() -> None:
    """Both kinds of state have the methods that are called or listened to."""
    from flwr.server.superlink.linkstate.in_memory_linkstate import InMemoryLinkState
    from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState

    for state in (InMemoryLinkState, SqlLinkState):
        where = f"rounds.py ({state.__name__})"
        found = parameters(state.store_message_and_object_tree)
        assert found == ["self", "message", "object_tree", "session_id"], broke(str(found), where)
        assert parameters(state.get_message_res) == ["self", "message_ids", "run_id"], broke("get_message_res", where)
        assert parameters(state.delete_messages) == ["self", "message_ins_ids"], broke("delete_messages", where)
        assert "object_content" in parameters(state.store_object), broke("store_object", "exchanges.py")
    name = InMemoryLinkState.__name__
    assert name.startswith("InMemory"), broke("the state in memory has another name", "gateway.py (is_quick)")


def test_the_factories() -> None:
    """A store that is set before it is asked for is the one that is used."""
    from flwr.supercore.object_store import ObjectStoreFactory

    factory = ObjectStoreFactory()
    factory.store_instance = mine = object()  # type: ignore[assignment]
    assert factory.store() is mine, broke("store_instance is not what store() gives", "plane.py")
    source = inspect.getsource(flower.part("server").main.create_app)
    assert "get_objectstore_linkstate_factories(" in source, broke("create_app makes its state elsewhere", "plane.py")


def test_an_objects_form() -> None:
    """Heads, bodies and ids of objects are what lifl writes and reads."""
    from flwr.app import Array, ArrayRecord
    from flwr.app.message.arraychunk import ArrayChunk

    where = "content.py, geometry.py and derived.py"
    chunk = ArrayChunk(memoryview(b"abc"))
    assert chunk.deflate() == b"ArrayChunk  3\x00abc", broke("an ArrayChunk's form", where)
    assert chunk.object_id == hashlib.sha256(chunk.deflate()).hexdigest(), broke("an object's id", where)
    import numpy as np

    from lifl.superlink.rounds.model_objects import array_object, record_object

    array = Array(np.arange(6, dtype=np.float32).reshape(2, 3))
    described = array_object([i for i, _ in array.slice_array()], "float32", (2, 3))
    assert array.deflate() == described, broke("an Array's form", where)
    record = ArrayRecord({"x": array, "y": Array(np.zeros(2))})
    written = record_object({name: one.object_id for name, one in record.items()})
    assert record.deflate() == written, broke("an ArrayRecord's form", where)


def test_what_uvicorn_gives() -> None:
    """uvicorn's protocol has the attributes that are used, and calls the methods that are overridden."""
    protocol = flower.part("gateway").HttpProtocol
    for name in ("on_headers_complete", "on_body", "on_message_complete", "on_response_complete", "data_received"):
        assert callable(getattr(protocol, name, None)), broke(f"uvicorn's protocol has no {name}", "protocol.py")
    source = inspect.getsource(protocol)
    for name in ("self.flow", "self.transport", "self.parser", "self.cycle", "self.server_state", "self.access_logger"):
        assert name in source, broke(f"uvicorn's protocol has no {name}", "protocol.py")
    cycle = inspect.getsource(inspect.getmodule(protocol).RequestResponseCycle)  # type: ignore[union-attr]
    for name in ("response_started", "response_complete", "chunked_encoding", "expected_content_length", "keep_alive"):
        assert f"self.{name}" in cycle, broke(f"uvicorn's cycle has no {name}", "protocol.py (_is_free)")
