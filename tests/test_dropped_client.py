"""Clients that are dropped without closing, callers that are cancelled, and calls from the wrong place."""

import asyncio
import contextvars
import gc
import os
import threading
import weakref
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from nanobanana_async import (
    CallbackReceiver,
    NanoBananaClient,
    SqliteLedger,
    Succeeded,
    TaskHandle,
    WireRequest,
    WireResponse,
    WrongEventLoop,
)
from nanobanana_async.simulator import FAST_POLLING, FAST_PROFILE, Simulator, SimulatorProfile
from nanobanana_async.simulator.server import SimulatorServer
from tests.fakes import InterceptingTransport

pytestmark = pytest.mark.anyio

SLOW = SimulatorProfile(median_s=3600, sigma=0.1, visibility_delay_s=0)
unclosed = pytest.mark.filterwarnings("ignore:unclosed NanoBananaClient:ResourceWarning")


def sockets() -> int:
    """Return the number of open sockets of this process."""
    links = Path("/proc/self/fd").iterdir()
    return sum(str(link.readlink()).startswith("socket:") for link in links if os.path.lexists(link))


async def settle() -> None:
    """Collect garbage, and let the event loop run what it leads to."""
    gc.collect()
    for _ in range(20):
        await anyio.sleep(0.01)


# --- dropped clients --------------------------------------------------------------------------------------------------


@unclosed
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
async def test_a_hundred_unclosed_clients_leave_no_task_and_no_socket(shared_server: SimulatorServer) -> None:
    """A bot that makes a client for each command does not fill up."""
    await settle()
    tasks, open_sockets = len(asyncio.all_tasks()), sockets()
    for _ in range(100):
        client = NanoBananaClient()
        await client.balance()
        del client
    await settle()
    assert (len(asyncio.all_tasks()), sockets()) == (tasks, open_sockets)


@unclosed
async def test_a_dropped_client_stops_its_work_on_both_backends() -> None:
    """Nothing of it stays alive."""
    client = Simulator(FAST_PROFILE).client()
    await client.generate("a fox")
    session = weakref.ref(client._session)  # noqa: SLF001 - what holds the background work
    background = client._session.background  # noqa: SLF001
    del client
    await settle()
    assert session() is None
    assert not background.is_open
    assert background._tasks is None  # noqa: SLF001


@unclosed
async def test_submits_in_flight_of_a_dropped_client_still_settle(tmp_path: Path) -> None:
    """The charge is in the ledger, and the orphan is reported."""
    simulator = Simulator(FAST_PROFILE, delay_s=0.2)
    orphans: list[str] = []
    client = NanoBananaClient(
        "dk-test",
        transport=simulator,
        ledger=SqliteLedger(tmp_path),
        on_orphan=lambda handle: orphans.append(handle.task_id),
    )
    with anyio.move_on_after(0.15):
        await client.submit("a fox")
    del client
    gc.collect()
    await anyio.sleep(0.5)
    assert orphans == [charge.task_id for charge in simulator.charges]
    assert len(orphans) == 1
    await settle()
    async with SqliteLedger(tmp_path) as ledger:
        assert [task.task_id for task in await ledger.all_tasks()] == orphans


@unclosed
async def test_a_handle_keeps_the_work_of_its_client_alive() -> None:
    """A function may return a handle of a client of its own."""

    async def submit() -> TaskHandle:
        client = Simulator(FAST_PROFILE).client()
        return await client.submit("a fox")

    handle = await submit()
    gc.collect()
    assert (await handle.result()).images
    del handle
    await settle()


async def test_background_work_keeps_no_context_of_the_first_caller() -> None:
    """The trace id of one web request is not on the polls of all later ones."""
    trace = contextvars.ContextVar("trace", default="none")
    seen: set[tuple[str, str]] = set()

    def look(request: WireRequest) -> WireResponse | None:
        seen.add((request.method, trace.get()))
        return None

    client = Simulator(FAST_PROFILE).client(wrap=lambda inner: InterceptingTransport(inner, look))
    async with client:
        trace.set("request 1")
        handle = await client.submit("a fox")
        trace.set("request 2")
        await handle.result()
    assert seen == {("POST", "request 1"), ("GET", "none")}


def test_closing_after_the_event_loop_has_ended_is_harmless() -> None:
    """A bot framework may close things late."""
    clients: list[NanoBananaClient] = []

    async def use() -> None:
        clients.append(Simulator().client())
        await clients[0].balance()

    async def close() -> None:
        await clients[0].aclose()

    loop = asyncio.new_event_loop()
    loop.run_until_complete(use())
    loop.close()
    asyncio.run(close())
    clients.clear()
    asyncio.run(use())
    asyncio.run(close())


# --- orphans ----------------------------------------------------------------------------------------------------------


async def cancel_generate(client: NanoBananaClient) -> None:
    """Cancel a caller that waits for the image."""
    with anyio.move_on_after(0.3):
        await client.generate("a fox")


async def cancel_generate_many(client: NanoBananaClient) -> None:
    """Cancel a run while its requests are in flight."""
    with anyio.move_on_after(0.3):
        async for _ in client.generate_many(["a fox"]):
            pass


async def leave_generate_many(client: NanoBananaClient) -> None:
    """Stop after the first outcome, while the others have finished and are not consumed."""
    async with aclosing(client.generate_many(["a fox", "a hare", "an owl"])) as outcomes:
        async for outcome in outcomes:
            assert isinstance(outcome, Succeeded)
            await client.task(outcome.task.task_id).ack()
            await anyio.sleep(0.3)
            break


@pytest.mark.parametrize(
    ("call", "profile"),
    [(cancel_generate, SLOW), (cancel_generate_many, SLOW), (leave_generate_many, FAST_PROFILE)],
)
async def test_every_charged_task_that_no_caller_waits_for_is_an_orphan(
    call: Callable[[NanoBananaClient], Awaitable[None]], profile: SimulatorProfile, tmp_path: Path
) -> None:
    """`on_orphan` gets each once, and the ledger has it for `resume`."""
    simulator = Simulator(profile)
    orphans: list[str] = []
    async with NanoBananaClient(
        "dk-test",
        transport=simulator,
        polling=FAST_POLLING,
        ledger=SqliteLedger(tmp_path),
        on_orphan=lambda handle: orphans.append(handle.task_id),
    ) as client:
        await call(client)
        await anyio.sleep(0.05)
        resumed = [handle.task_id async for handle in client.resume()]
    assert sorted(orphans) == sorted(resumed)
    assert len(orphans) == max(1, len(simulator.charges) - 1)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_the_cancellation_carries_the_task_id() -> None:
    """A caller that catches it knows what was charged."""
    simulator = Simulator(SLOW)
    caught: list[BaseException] = []

    async def call(client: NanoBananaClient) -> None:
        try:
            await client.generate("a fox")
        except asyncio.CancelledError as exc:
            caught.append(exc)
            raise

    async with simulator.client() as client:
        task = asyncio.create_task(call(client))
        await anyio.sleep(0.2)
        task.cancel()
        await asyncio.wait([task])
    (charge,) = simulator.charges
    assert getattr(caught[0], "task_id", None) == charge.task_id
    assert charge.task_id in caught[0].__notes__[0]


# --- other threads and event loops ------------------------------------------------------------------------------------


async def test_calls_from_another_thread_work_or_say_what_to_do() -> None:
    """`statistics` works anywhere. What wakes waiters does not."""
    async with Simulator(FAST_PROFILE).client() as client:
        await client.generate("a fox")
        receiver = CallbackReceiver(client, public_url="https://app.example/nb", secret="s" * 32)
        figures = await anyio.to_thread.run_sync(client.statistics)
        assert figures.polls > 0
        with pytest.raises(WrongEventLoop, match="call_soon_threadsafe"):
            await anyio.to_thread.run_sync(client.notify, "ta-1")
        failed: list[BaseException] = []

        def deliver() -> None:
            try:
                asyncio.run(receiver.deliver("token", b"{}"))
            except WrongEventLoop as exc:
                failed.append(exc)

        thread = threading.Thread(target=deliver)
        thread.start()
        await anyio.to_thread.run_sync(thread.join)
        assert "another event loop" in str(failed[0])


async def test_statistics_in_another_thread_survive_a_busy_tracker() -> None:
    """A scrape endpoint may read them at any time."""
    async with Simulator(FAST_PROFILE).client() as client, anyio.create_task_group() as group:
        for number in range(100):
            group.start_soon(client.generate, f"fox {number}")
        for _ in range(50):
            await anyio.to_thread.run_sync(client.statistics)
