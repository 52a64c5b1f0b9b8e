"""The checks of Flower's middlewares and dependencies, made by Flower's own functions on the head of a request.

Owns no rule: every decision is Flower's. Belongs to no thread; nothing here is shared but caches.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

from starlette.requests import Request

from lifl.superlink import flower

_names = flower.part("gateway")

ENDED = ("PENDING", "STARTING", "FINISHED")

KNOWN_MIDDLEWARE = {
    "BaseHTTPMiddleware": "with http_error_translator: errors are answered by it here too",
    "ControlAuthenticationMiddleware": "the Control API",
    "ControlEventLogMiddleware": "the Control API",
    "ControlLicenseMiddleware": "the Control API",
    "ControlSensitiveResponseMiddleware": "the Control API",
    "FleetEventLogMiddleware": "only if an event log was asked for: then the routes are left to Flower",
    "NodeAuthMiddleware": "its check is made here",
    "ProtobufTranslationMiddleware": "the media type is checked, and what is no protobuf refused, here too",
    "RuntimeTracingMiddleware": "of flwr 1.41: a trace of each request, which the gateway's do not leave",
}
"""Flower's middlewares, each with the reason why a request that goes past it is checked all the same."""

RUN_CHECK_S = 0.1
"""Time for which a run that was found to be running is taken to be running."""


def why_not(app: Any) -> str | None:
    """The reason why requests to this app must not be taken past ASGI, or None."""
    unknown = sorted({one.cls.__name__ for one in app.user_middleware} - KNOWN_MIDDLEWARE.keys())
    if unknown:
        return f"Flower has middleware that lifl does not know: {', '.join(unknown)}"
    if app.state.fleet_event_log_plugin is not None:
        return "an event log was asked for, which Flower's routes write"
    return None


class _Headers(Mapping[str, str]):
    """Headers of a request. The first header of a name wins; ``getlist`` has all of them.

    They are decoded when they are asked for: most never are.
    """

    __slots__ = ("_first", "_raw")

    def __init__(self, raw: Any) -> None:
        self._raw, self._first = raw, dict(reversed(raw))

    def __getitem__(self, name: str) -> str:
        value: bytes = self._first[name.lower().encode("latin-1")]
        return value.decode("latin-1")

    def __iter__(self) -> Iterator[str]:
        return (name.decode("latin-1") for name in self._first)

    def __len__(self) -> int:
        return len(self._first)

    def getlist(self, name: str) -> list[str]:
        """All values of a name, in order."""
        wanted = name.lower().encode("latin-1")
        return [value.decode("latin-1") for found, value in self._raw if found == wanted]


class _Request:
    """A request with no more than Flower's checks look at: a whole one for each object costs more than the check."""

    __slots__ = ("app", "headers", "state")

    def __init__(self, headers: Any, app: Any, message: Any) -> None:
        self.headers, self.app, self.state = _Headers(headers), app, SimpleNamespace(protobuf_request=message)


class _AnyNode:
    """A message in the name of any node, which learns the node that has the key.

    Flower's check compares the message's ``node.node_id`` with the id of the node that has the key. The body of this
    request has not come, so there is no id yet: this object stands in for the message, its node and the id, is equal
    to every id, and keeps the one that it was compared with in ``found``.
    """

    found = 0

    @property
    def node_id(self) -> _AnyNode:
        return self

    def __eq__(self, node_id: object) -> bool:
        if isinstance(node_id, int):  # it is None if no node has the key
            self.found = node_id
        return isinstance(node_id, int)

    __hash__ = None  # type: ignore[assignment]


class Checks:
    """The checks for one app."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._version = _names.VersionDependency(
            component_name="SuperLink", connection_name="Caller <-> SuperLink Runtime API"
        )
        self._running: dict[int, float] = {}  # run -> time until which it is taken to be running
        self._statuses = [getattr(_names.Status, name) for name in ENDED]
        # A caller names the same version in all of its requests. The cache keeps no refusal, which is an exception.
        self._accept_version = lru_cache(maxsize=256)(self._check_version)

    @property
    def _state(self) -> Any:
        return self._app.state.linkstate_factory.state()

    def _request(self, headers: Any, path: str = "/") -> Request:
        scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "query_string": b""}
        return Request({**scope, "app": self._app, "state": {}})

    def fleet(self, headers: Any, message: Any) -> None:
        """Checks a SuperNode's signature: NodeAuthMiddleware's check. Raises Flower's error."""
        _names.authenticate_node(_Request(headers, self._app, message))

    def sender(self, headers: Any) -> int:
        """The node whose key has signed a head; the node that its body names is checked when that has come."""
        any_node = _AnyNode()
        _names.authenticate_node(_Request(headers, self._app, any_node))
        return any_node.found

    def run_of_late(self, message: Any) -> None:
        """Checks the run as :meth:`run` does, at most once in ``RUN_CHECK_S``."""
        until_s = self._running.get(message.run_id, 0.0)
        if until_s < (now_s := time.monotonic()):
            self.run(message)
            self._running.clear()
            self._running[message.run_id] = now_s + RUN_CHECK_S

    def run(self, message: Any) -> None:
        """Checks that the run takes objects, as Flower's object handlers do. Raises Flower's error."""
        reason = _names.check_abort(message.run_id, self._statuses, self._state)
        if reason:
            about = f"SuperNode {message.node.node_id}, run_id={message.run_id}, exception: {reason}"
            details = f"Object_id: {message.object_id}"
            raise _names.FlowerError(_names.ApiErrorCode.FLEET_RUN_STATUS_NOT_ALLOWED, about, public_details=details)

    def runtime(self, headers: Any, message: Any) -> Any:
        """Checks a ServerApp's version and token, as Flower's Runtime router does; returns its task."""
        name_of_token = _names.TASK_TOKEN_HEADER.lower().encode()
        self._accept_version(tuple(p for p in headers if p[0].startswith(b"flwr-") and p[0] != name_of_token))
        token = [value for name, value in headers if name == name_of_token]
        text = token[0].decode("latin-1") if token else None
        return _names.authenticate_task(_Request(headers, self._app, message), text, self._state)

    def _check_version(self, headers: tuple[tuple[bytes, bytes], ...]) -> None:
        self._version(self._request(list(headers)))

    def is_superlink(self, message: Any) -> None:
        """Checks that a ServerApp pushes as the SuperLink's node, as Flower's Runtime handlers do."""
        if message.node.node_id != _names.SUPERLINK_NODE_ID:
            raise _names.FlowerError(_names.ApiErrorCode.RUNTIME_UNEXPECTED_NODE_ID, "Unexpected node ID.")

    def answer_error(self, error: BaseException, path: str, headers: Any, answer: Callable[..., None]) -> None:
        """Calls `answer` in the event loop with the body, status and headers of Flower's outermost middleware."""

        async def raise_it(_: Request) -> Any:
            raise error

        async def translate() -> None:
            response = await _names.translate_error(self._request(headers, path), raise_it)
            kept = [(name, value) for name, value in response.raw_headers if name != b"content-length"]
            answer(bytes(response.body), response.status_code, kept)

        # The loop itself keeps only weak references to its tasks.
        task = asyncio.get_running_loop().create_task(translate())
        _pending.add(task)
        task.add_done_callback(_pending.discard)


_pending: set[asyncio.Task[None]] = set()
