"""A call cancelled at any point releases its resources and loses no task id."""

import asyncio
import contextlib
import logging
import math
import random
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import anyio
import anyio.lowlevel
import attrs
import pytest

from nanobanana_async import GeneratedImage, NanoBananaClient
from nanobanana_async.simulator import FAST_LIMITS, Simulator, SimulatorProfile
from nanobanana_async.simulator.subprocess import simulator_process
from tests.fakes import PNG

PROFILE = SimulatorProfile(median_s=0.03, sigma=0, visibility_delay_s=0.005)
DELAY_S = 0.004
MOMENTS_S = [0.0, 0.001, 0.003, 0.005, 0.009, 0.014, 0.02, 0.03, 0.05]
STEPS = range(12)


async def updates(client: NanoBananaClient) -> None:
    """Follow a task to its end."""
    handle = await client.submit("a fox")
    async with contextlib.aclosing(handle.updates()) as snapshots:
        async for _ in snapshots:
            pass


CALLS: dict[str, Callable[[NanoBananaClient], Awaitable[object]]] = {
    "submit": lambda client: client.submit("a fox"),
    "generate": lambda client: client.generate("a fox"),
    "balance": lambda client: client.balance(),
    "updates": updates,
    "wait": lambda client: client.task("ta-none").wait(),
    "fetch": lambda client: client.download(GeneratedImage(data=PNG)),
}


def assert_all_is_released(client: NanoBananaClient) -> None:
    """Assert that every slot is free, and nothing is tracked or running."""
    assert client._session.slots.free == client._session.slots.size
    assert client._session.api._poll_slots.free == FAST_LIMITS.max_polls
    assert client._session.downloader._slots.value == FAST_LIMITS.max_downloads
    assert client._session.tracker._tasks == {}
    assert client._session.background._shielded == 0


@pytest.mark.anyio
@pytest.mark.virtual_time
@pytest.mark.parametrize("name", CALLS)
async def test_a_call_cancelled_at_any_checkpoint_releases_all_and_loses_no_id(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """At each moment and checkpoint, every charged task was returned or logged."""
    caplog.set_level(logging.WARNING, "nanobanana_async")
    simulator = Simulator(PROFILE, delay_s=DELAY_S)
    returned: list[object] = []
    async with simulator.client() as client:
        for moment_s in MOMENTS_S:
            for steps in STEPS:
                async with anyio.create_task_group() as group:

                    async def call() -> None:
                        with contextlib.suppress(Exception):
                            returned.append(await CALLS[name](client))

                    group.start_soon(call)
                    await anyio.sleep(moment_s)
                    for _ in range(steps):
                        await anyio.lowlevel.checkpoint()
                    group.cancel_scope.cancel()
                await anyio.sleep(1)
                assert_all_is_released(client)
        assert (await client.generate("a fox")).images
    record = caplog.text + repr(returned) + repr(client)
    if name != "updates":  # its caller holds the handle
        assert [charge.task_id for charge in simulator.charges[:-1] if charge.task_id not in record] == []


@pytest.mark.asyncio
@pytest.mark.parametrize("steps", range(0, 40, 3))
async def test_native_cancellation_at_any_step_loses_no_id(steps: int, caplog: pytest.LogCaptureFixture) -> None:
    """`task.cancel()` passes every shield, so the POST runs in a task of its own."""
    caplog.set_level(logging.WARNING, "nanobanana_async")
    simulator = Simulator(PROFILE)
    async with simulator.client() as client:
        task = asyncio.create_task(client.submit("a fox"))
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        returned = repr(await asyncio.gather(task, return_exceptions=True))
        await asyncio.sleep(0.01)
        assert_all_is_released(client)
    assert [charge.task_id for charge in simulator.charges if charge.task_id not in caplog.text + returned] == []


@pytest.mark.slow
@pytest.mark.anyio
async def test_ten_thousand_random_cancels_leave_the_throughput_as_it_was(caplog: pytest.LogCaptureFixture) -> None:
    """Over real sockets the throughput is unchanged. httpx's own pool fails after ten cancels."""
    caplog.set_level(logging.ERROR, "nanobanana_async")
    rng = random.Random(7)
    async with (
        simulator_process("--latency", "0.05") as server,
        NanoBananaClient(server.key, base_url=server.url, limits=FAST_LIMITS) as client,
    ):

        async def impatient() -> None:
            with anyio.move_on_after(rng.uniform(0, 0.005)), contextlib.suppress(Exception):
                await (client.balance() if rng.random() < 0.95 else client.submit("a fox"))

        async def hundred_calls_s() -> float:
            start_s = time.perf_counter()
            for _ in range(100):
                await client.balance()
            return time.perf_counter() - start_s

        await hundred_calls_s()
        before_s = await hundred_calls_s()
        for _ in range(50):
            async with anyio.create_task_group() as group:
                for _ in range(200):
                    group.start_soon(impatient)
        await anyio.sleep(0.2)
        assert_all_is_released(client)
        after_s = math.inf
        for _ in range(20):  # another process may have used the CPU meanwhile
            after_s = min(after_s, await hundred_calls_s())
            if after_s < 2 * before_s + 0.05:
                break
    assert after_s < 2 * before_s + 0.05


@pytest.mark.anyio
async def test_a_save_cancelled_at_any_moment_leaves_a_complete_file_or_none(tmp_path: Path) -> None:
    """Disk access runs in threads, which cannot be interrupted."""
    async with Simulator(PROFILE).client() as client:
        task = await client.generate("a fox")
        for number in range(40):
            with anyio.move_on_after(number * 0.0004):
                await client.save(task, tmp_path, name=f"{number}")
        assert_all_is_released(client)
    files = list(tmp_path.iterdir())
    assert all(path.suffix == ".png" and path.read_bytes().endswith(b"IEND\xaeB`\x82") for path in files)


@pytest.mark.anyio
@pytest.mark.virtual_time
@pytest.mark.parametrize("name", ["submit", "balance"])
async def test_a_call_cancelled_in_the_rate_limiter_gives_its_slot_back(name: str) -> None:
    """The call holds a slot at that point and has sent nothing."""
    simulator = Simulator(PROFILE)
    slow = attrs.evolve(FAST_LIMITS, requests_per_s=0.1, burst=1)
    async with simulator.client(limits=slow) as client:
        await client.balance()
        sent = len(simulator.service.requests)
        for _ in range(2 * FAST_LIMITS.max_polls):
            with anyio.move_on_after(0.01):
                await CALLS[name](client)
        assert_all_is_released(client)
    assert len(simulator.service.requests) == sent
