"""pytest-asyncio fixtures, bots and web frameworks use a client on plain asyncio."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from nanobanana_async import GeneratedImage, NanoBananaClient, PollPolicy, Task, TaskStatus, TaskTimeout
from nanobanana_async.simulator import FAST_PROFILE, Simulator, SimulatorProfile
from nanobanana_async.simulator.server import SimulatorServer
from tests.fakes import PNG

pytestmark = pytest.mark.asyncio


@pytest_asyncio.fixture
async def client(nanobanana_simulator: Simulator) -> AsyncIterator[NanoBananaClient]:
    """Yield a client that is opened and closed in the fixture's task and used in the test's."""
    async with nanobanana_simulator.client() as client:
        yield client


async def test_a_client_works_across_the_tasks_of_a_fixture(client: NanoBananaClient) -> None:
    """Set-up, test and tear-down run in different tasks."""
    assert (await client.generate("a fox")).images


async def test_a_client_opened_by_one_bare_task_serves_others(nanobanana_simulator: Simulator) -> None:
    """A client opened in a `create_task` serves other tasks."""

    async def open_client() -> NanoBananaClient:
        client = nanobanana_simulator.client()
        await client.balance()
        return client

    client = await asyncio.create_task(open_client())
    tasks = [asyncio.create_task(client.generate(f"fox {n}")) for n in range(20)]
    assert len({(await task).task_id for task in tasks}) == 20
    await asyncio.create_task(client.aclose())


async def test_native_cancellation_does_not_interrupt_a_post(caplog: pytest.LogCaptureFixture) -> None:
    """`task.cancel()`, which web frameworks use, ignores anyio shields; the POST still runs to its end."""
    simulator = Simulator(FAST_PROFILE, delay_s=0.2)
    async with simulator.client() as client:
        task = asyncio.create_task(client.generate("a fox"))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert simulator.charges[0].task_id in caplog.text


async def test_a_shutdown_that_cancels_everything_ends_the_waits() -> None:
    """If a framework cancels all tasks of the loop, every wait ends."""
    # No poll is about to begin: asyncio complains of a coroutine whose task is cancelled before its first step.
    async with Simulator(SimulatorProfile(median_s=60)).client(polling=PollPolicy.fixed(30)) as client:
        handle = await client.submit("a fox")
        wait = asyncio.create_task(handle.wait())
        await asyncio.sleep(0.05)
        for task in asyncio.all_tasks() - {asyncio.current_task(), wait}:
            task.cancel()
        with pytest.raises(TaskTimeout):
            await asyncio.wait_for(wait, 1)


async def test_a_cancelled_save_leaves_no_partial_file(nanobanana_simulator: Simulator, tmp_path: Path) -> None:
    """`task.cancel()` does not wait for the writing thread, whose file is removed all the same."""
    image = GeneratedImage(data=PNG + bytes(3_000_000))
    async with nanobanana_simulator.client() as client:
        for number in range(60):
            task = Task(task_id=f"ta-{number}", status=TaskStatus.SUCCESS, images=(image,))
            saving = asyncio.create_task(client.save(task, tmp_path))
            await asyncio.sleep(number * 0.0001)
            saving.cancel()
            await asyncio.gather(saving, return_exceptions=True)
        await asyncio.sleep(0.2)
    assert [path for path in tmp_path.iterdir() if path.stat().st_size != 3_000_000 + len(PNG)] == []


async def test_wait_for_works_around_client_calls(client: NanoBananaClient) -> None:
    """`asyncio.wait_for` times out as usual."""
    assert (await asyncio.wait_for(client.generate("a fox"), 10)).images


async def test_the_event_loop_is_not_blocked_while_images_are_generated() -> None:
    """Over real sockets, no callback blocks the loop for 100 ms.

    The test makes up to five attempts, because a busy machine delays any process now and then.
    """
    pauses_s: list[float] = []

    async def heartbeat() -> None:
        loop = asyncio.get_running_loop()
        while True:
            before_s = loop.time()
            await asyncio.sleep(0.005)
            pauses_s[-1] = max(pauses_s[-1], loop.time() - before_s - 0.005)

    with SimulatorServer(FAST_PROFILE) as server:
        async with NanoBananaClient("dk-test", base_url=server.url) as client:
            await client.balance()
            beat = asyncio.create_task(heartbeat())
            while not pauses_s or (pauses_s[-1] >= 0.1 and len(pauses_s) < 5):
                pauses_s.append(0.0)
                handles = await asyncio.gather(*[client.submit(f"fox {n}") for n in range(30)])
                await asyncio.gather(*[handle.query() for handle in handles])
            beat.cancel()
    assert min(pauses_s) < 0.1
