"""A request for a message waits until there is one, or until the time is over; no message is missed."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

from lifl.superlink.http.long_poll import HOLD_S, LongPolls

Test = Callable[[], Coroutine[Any, Any, None]]


def on_loop(test: Test) -> Callable[[], None]:
    """Runs a test in an event loop of its own."""

    def run() -> None:
        asyncio.run(test())

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


def long_polls(hold_s: float = 5.0) -> LongPolls:
    """The long polls of the loop that runs."""
    made = LongPolls(hold_s)
    made.loop = asyncio.get_running_loop()
    return made


async def soon(is_true: Callable[[], object]) -> None:
    """Waits for something to become true."""
    end = time.monotonic() + 2
    while not is_true() and time.monotonic() < end:
        await asyncio.sleep(0.001)
    assert is_true()


@on_loop
async def test_news_wakes_all_who_wait_for_it() -> None:
    """Every request of that node, once, and nobody else's."""
    here, woken = long_polls(), list[str]()
    for name, node in (("a", 1), ("b", 1), ("c", 2)):
        here.hold(here.note(node), lambda name=name: woken.append(name))
    threading.Thread(target=here.news, args=(1,)).start()
    await soon(lambda: len(woken) == 2)
    here.news(1)
    await asyncio.sleep(0.01)
    assert sorted(woken) == ["a", "b"]
    assert list(here._by_node) == [2]


@on_loop
async def test_time_ends_the_wait() -> None:
    """Without news, and then nothing is left of it."""
    here, woken = long_polls(0.02), list[int]()
    begin = time.monotonic()
    here.hold(here.note(1), lambda: woken.append(1))
    assert not woken
    await soon(lambda: woken)
    assert time.monotonic() - begin > 0.015
    assert not here._by_node


@on_loop
async def test_what_comes_while_it_is_looked_for_is_not_missed() -> None:
    """Noted, then news, then held: it is woken at once."""
    here, woken = long_polls(), list[int]()
    held = here.note(1)
    here.news(1)
    await asyncio.sleep(0.01)
    assert not woken, "it was still looking"
    here.hold(held, lambda: woken.append(1))
    assert woken == [1]
    assert not here._by_node


@on_loop
async def test_who_is_gone_is_not_woken() -> None:
    """Forgotten while it waits, while it looks, or twice."""
    here, woken = long_polls(0.01), list[int]()
    held = here.note(1)
    here.hold(held, lambda: woken.append(1))
    here.forget(held)
    here.forget(here.note(1))
    here.forget(held)
    here.forget(None)
    here.news(1)
    await asyncio.sleep(0.03)
    assert not woken
    assert not here._by_node


@on_loop
async def test_the_end_of_the_server_ends_the_wait() -> None:
    """Released, it is woken at once, and once."""
    here, woken = long_polls(), list[int]()
    held = here.note(1)
    here.hold(held, lambda: woken.append(1))
    here.release(held)
    here.release(held)
    here.release(None)
    assert woken == [1]


@on_loop
async def test_nothing_is_held_if_it_is_off() -> None:
    """A time of nothing: the answer goes at once."""
    here, woken = long_polls(0), list[int]()
    assert not here.is_on
    here.hold(here.note(1), lambda: woken.append(1))
    assert woken == [1]


def test_news_before_there_is_a_loop_is_only_noted() -> None:
    """The server has not started: nobody can be woken yet."""
    here = LongPolls()
    held = here.note(1)
    here.news(1)
    assert held.has_news


@on_loop
async def test_no_news_is_lost_among_many_threads() -> None:
    """Each of a thousand messages wakes its node, however note, news and hold interleave."""
    here, woken = long_polls(2.0), list[int]()
    begun = threading.Barrier(2)

    def tell() -> None:
        begun.wait()
        for node in range(1000):
            here.news(node)

    notes = [here.note(node) for node in range(1000)]
    thread = threading.Thread(target=tell)
    thread.start()
    begun.wait()
    for held in notes:
        here.hold(held, lambda node=held.node_id: woken.append(node))
        if held.node_id % 100 == 0:
            await asyncio.sleep(0)
    await soon(lambda: len(woken) == 1000)
    thread.join()
    assert sorted(woken) == list(range(1000))
    assert not here._by_node


def test_it_is_over_before_a_supernode_gives_up() -> None:
    """The default leaves a second of the SuperNode's five for the way."""
    assert 0 < HOLD_S <= 4.0
    assert LongPolls().is_on
