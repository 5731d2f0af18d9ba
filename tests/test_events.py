"""A bell wakes the one who waits for it, on asyncio and on trio."""

import sys
from types import ModuleType

import anyio
import anyio.lowlevel
import pytest

from nanobanana_async._concurrency.events import OneShotEvent

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]


async def test_ringing_wakes_who_waits() -> None:
    """And rings once, however often it is rung."""
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


async def test_a_bell_that_has_rung_keeps_nobody() -> None:
    """Who comes late has missed nothing."""
    event = OneShotEvent()
    event.set()
    with anyio.fail_after(1):
        await event.wait()


async def test_cancelling_ends_the_waiting_and_leaves_the_bell_harmless() -> None:
    """It may be rung afterwards, by somebody who does not know."""
    event = OneShotEvent()
    with anyio.move_on_after(1) as scope:
        await event.wait()
    assert scope.cancelled_caught
    event.set()


async def test_rung_and_cancelled_in_one_breath_is_fine() -> None:
    """Whichever of the two is heard."""
    event = OneShotEvent()
    async with anyio.create_task_group() as group:
        group.start_soon(event.wait)
        await anyio.sleep(1)
        event.set()
        group.cancel_scope.cancel()
    with anyio.fail_after(1):
        await anyio.lowlevel.checkpoint()


@pytest.mark.parametrize("anyio_backend", ["asyncio"], indirect=True)
async def test_a_trio_that_another_thread_is_importing_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is in `sys.modules` long before it can answer."""
    monkeypatch.setitem(sys.modules, "trio", ModuleType("trio"))
    event = OneShotEvent()
    async with anyio.create_task_group() as group:
        group.start_soon(event.wait)
        await anyio.sleep(1)
        event.set()
