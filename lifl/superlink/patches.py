"""All replacing of Flower's names in a running server: each replaced function, and why subclassing cannot do it.

Owns no behaviour. The replacements are handed in by the rooms that know what they do, which also call the originals.
Nothing else of lifl assigns to a name of Flower's; a contract test looks for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

_MARK = "_is_replaced_by_lifl"


@contextlib.contextmanager
def replaced_store(main: Any, store: Any) -> Iterator[None]:
    """Gives `store` to the app that is created inside; `main` is the module of ``create_app``.

    ``create_app`` has no parameter for a store. It asks this function for its factories, and a factory gives
    everybody the instance that it has.
    """
    original = main.get_objectstore_linkstate_factories

    def with_our_store(*args: Any) -> Any:
        objects, states = original(*args)
        objects.store_instance = store
        return objects, states

    main.get_objectstore_linkstate_factories = with_our_store
    try:
        yield
    finally:
        main.get_objectstore_linkstate_factories = original


def replace_push_messages(handlers: Any, wrap: Callable[[Any], Any]) -> None:
    """Replaces the Fleet API's ``push_messages`` by `wrap` of it, once: a process may serve twice.

    Flower's route and lifl's gateway both look the function up in its module, so both call the replacement.
    """
    if not hasattr(handlers.push_messages, _MARK):
        made = wrap(handlers.push_messages)
        setattr(made, _MARK, True)
        handlers.push_messages = made


def replace_signature_checks(node_auth: Any, hasten: Callable[[Any, Any], tuple[Any, Any, str]]) -> str:
    """Replaces the two functions that read keys and check signatures, once; returns the name of the checking library.

    `hasten` gets Flower's ``bytes_to_public_key`` and ``verify_signature``, and returns two others and that name.
    Flower's middleware and lifl's checks call ``authenticate_node``, which looks both up in its module.
    """
    if not hasattr(node_auth, _MARK):
        parse, verify, name = hasten(node_auth.bytes_to_public_key, node_auth.verify_signature)
        node_auth.bytes_to_public_key = parse
        node_auth.verify_signature = verify
        setattr(node_auth, _MARK, name)
    return str(getattr(node_auth, _MARK))


# The LinkState is made by Flower's factory, in memory or over a database, so the methods of the one instance are
# replaced. Two rooms may replace one method: the later replacement calls the earlier one.


def replace_store_message(state: Any, store_message: Callable[..., Any]) -> None:
    """Replaces the method through which every message and reply is announced: rounds learn of theirs there."""
    state.store_message_and_object_tree = store_message


def replace_store_object(state: Any, store_object: Callable[..., Any]) -> None:
    """Replaces the method through which every object is pushed, by whichever route it came."""
    state.store_object = store_object


def replace_get_message_ins(state: Any, get_message_ins: Callable[..., Any]) -> None:
    """Replaces the method that gives a SuperNode its messages: interrupted deliveries are repeated there."""
    state.get_message_ins = get_message_ins


def replace_get_message_res(state: Any, get_message_res: Callable[..., Any]) -> None:
    """Replaces the method that gives a ServerApp its replies: a reply that has not come whole is withheld there."""
    state.get_message_res = get_message_res
