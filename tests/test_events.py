"""`OneShotEvent` wakes its waiter on asyncio and trio."""

import sys
from types import ModuleType

import anyio
import anyio.lowlevel
import pytest

from nanobanana_async._concurrency.events import OneShotEvent

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]


async def test_setting_wakes_the_waiter() -> None:
    """Setting it again has no effect."""
    event, woken_s = OneShotEvent(), []

    async def sleeper() -> None:
        await event.wait()
        woken_s.append(anyio.current_time() - start_s)

    start_s = anyio.current_time()
    async with anyio.create_task_group() as group:
        group.start_soon(sleeper)
        await anyio.sleep(5)
        event.set()
        event.set()
    assert woken_s == [5]


async def test_waiting_for_a_set_event_returns_at_once() -> None:
    """A late waiter does not block."""
    event = OneShotEvent()
    event.set()
    with anyio.fail_after(1):
        await event.wait()


async def test_a_cancelled_wait_leaves_an_event_that_can_be_set() -> None:
    """Setting the event after a cancelled wait has no effect."""
    event = OneShotEvent()
    with anyio.move_on_after(1) as scope:
        await event.wait()
    assert scope.cancelled_caught
    event.set()


async def test_an_event_may_be_set_and_cancelled_at_the_same_time() -> None:
    """The wait ends either way."""
    event = OneShotEvent()
    async with anyio.create_task_group() as group:
        group.start_soon(event.wait)
        await anyio.sleep(1)
        event.set()
        group.cancel_scope.cancel()
    with anyio.fail_after(1):
        await anyio.lowlevel.checkpoint()


@pytest.mark.parametrize("anyio_backend", ["asyncio"], indirect=True)
async def test_a_partly_imported_trio_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module named trio is in `sys.modules` long before it can be used."""
    monkeypatch.setitem(sys.modules, "trio", ModuleType("trio"))
    event = OneShotEvent()
    async with anyio.create_task_group() as group:
        group.start_soon(event.wait)
        await anyio.sleep(1)
        event.set()
