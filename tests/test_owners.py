"""Owners take turns in front of the submit slots, within their limits."""

import asyncio
import gc
import linecache
import sys
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import anyio
import anyio.lowlevel
import attrs
import pytest

from nanobanana_async import (
    GenerationRequest,
    InvalidRequest,
    Limits,
    NanoBananaClient,
    NotSent,
    OwnerLimits,
    Transport,
    WireRequest,
    WireResponse,
)
from nanobanana_async.simulator import FAST_POLLING, FAST_PROFILE, Simulator, SimulatorProfile
from tests.batches import nth_post
from tests.fakes import InterceptingTransport, rejected

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time, pytest.mark.usefixtures("no_threads")]

LIMITS = Limits(max_submits=4, requests_per_s=10_000, burst=10_000)


@attrs.define
class Service:
    """A simulator whose exchanges take a second, and the prompts and times of its submits."""

    inner: Transport
    gate: anyio.Event | None = None
    """Event that every response waits for; None for none."""
    posts: list[str] = attrs.field(factory=list)
    times_s: list[float] = attrs.field(factory=list)

    async def send(self, request: WireRequest, *, timeout_s: float) -> WireResponse:
        """Record and pass on."""
        if request.method == "POST":
            body = (request.body or b"").decode()
            self.posts.append(next(name for name in ("A", "B", "C") if f'"{name}' in body))
            self.times_s.append(anyio.current_time())
        if self.gate is not None:
            await self.gate.wait()
        return await self.inner.send(request, timeout_s=timeout_s)

    async def aclose(self) -> None:
        """Close nothing."""


@asynccontextmanager
async def client_of(
    service: Transport, owner_limits: OwnerLimits = OwnerLimits(), limits: Limits = LIMITS
) -> AsyncIterator[NanoBananaClient]:
    """Yield a client with four submit slots."""
    async with NanoBananaClient(
        "dk-test", transport=service, limits=limits, polling=FAST_POLLING, owner_limits=owner_limits
    ) as client:
        yield client


async def submit_all(client: NanoBananaClient, *wanted: tuple[str, int]) -> None:
    """Submit so many requests of each owner at once, in this order."""
    async with anyio.create_task_group() as group:
        for owner, count in wanted:
            for number in range(count):

                async def submit(owner: str = owner, number: int = number) -> None:
                    await client.submit(f"{owner}{number}", owner=owner)

                group.start_soon(submit)
            for _ in range(10):
                await anyio.lowlevel.checkpoint()


async def test_one_submit_of_an_owner_leaves_in_the_next_round_beside_500_of_another() -> None:
    """A user who submits a file of prompts does not starve the others."""
    service = Service(Simulator(delay_s=1))
    async with client_of(service) as client:
        await submit_all(client, ("A", 500), ("B", 1))
    assert service.posts.index("B") < 2 * LIMITS.max_submits
    assert len(service.posts) == 501


async def test_owners_take_turns() -> None:
    """After the first submit, which finds a free slot, each owner gets every third one."""
    service = Service(Simulator(delay_s=1))
    async with client_of(service, limits=attrs.evolve(LIMITS, max_submits=1)) as client:
        await submit_all(client, ("A", 12), ("B", 6), ("C", 6))
    later = service.posts[1:]
    assert all(set(later[at : at + 3]) == {"A", "B", "C"} for at in range(0, 18, 3))


async def test_submits_without_an_owner_share_one_turn() -> None:
    """They are first come, first served among themselves."""
    service = Service(Simulator(delay_s=1))
    async with client_of(service) as client, anyio.create_task_group() as group:
        for number in range(20):
            group.start_soon(client.submit, f"A{number}")
            await anyio.lowlevel.checkpoint()
    assert len(service.posts) == 20


async def test_max_in_flight_counts_tasks_until_they_are_final() -> None:
    """An owner has two at a time, also if nothing waits for them."""
    simulator = Simulator(SimulatorProfile(median_s=30, sigma=0.1, visibility_delay_s=0))
    service = Service(simulator)
    async with client_of(service, OwnerLimits(max_in_flight=2)) as client:
        await submit_all(client, ("A", 4))
    first, second, third, fourth = service.times_s
    assert second - first < 1
    assert 20 < third - first < 60
    assert 20 < fourth - first < 60


async def test_a_failed_submit_and_a_cancelled_wait_give_the_place_back() -> None:
    """Otherwise an owner would be locked out for good."""
    service = Service(Simulator(FAST_PROFILE))
    transport = InterceptingTransport(service, nth_post(lambda number: rejected(400) if number == 0 else None))
    async with client_of(transport, OwnerLimits(max_in_flight=1)) as client:
        with pytest.raises(InvalidRequest):
            await client.submit("A", owner="A")
        with anyio.move_on_after(0):
            await client.submit("A", owner="A")
        await (await client.submit("A", owner="A")).result()
        await client.submit("A", owner="A")


async def test_an_owner_whose_waiting_submit_was_cancelled_keeps_its_turns_and_limits() -> None:
    """It is not forgotten while it is in turn, so its later submits are sent and counted."""
    service = Service(Simulator(FAST_PROFILE, delay_s=0.3))
    limits = attrs.evolve(LIMITS, max_submits=1)
    async with client_of(service, OwnerLimits(max_in_flight=2), limits) as client, anyio.create_task_group() as group:
        group.start_soon(partial(client.submit, "A1", owner="A"))
        await anyio.sleep(0.05)
        group.start_soon(partial(client.submit, "B1", owner="B"))
        for number in range(4):  # others that leave before, so that A stays in turn
            group.start_soon(partial(client.submit, f"C{number}", owner=f"C{number}"))
        await anyio.sleep(0.01)
        with anyio.move_on_after(0.02):
            await client.submit("A2", owner="A")
        await anyio.sleep(1)  # A1 is final
        for number in range(3, 9):
            group.start_soon(partial(client.submit, f"A{number}", owner="A"))
    assert service.posts.count("A") == 7


async def test_submits_that_have_left_do_not_pile_up_behind_one_that_waits() -> None:
    """A user who presses a button again and again costs no memory."""
    service = Service(Simulator(SimulatorProfile(median_s=3600, sigma=0.1, visibility_delay_s=0)))
    async with client_of(service, OwnerLimits(max_in_flight=1)) as client, anyio.create_task_group() as group:
        await client.submit("A", owner="A")
        group.start_soon(partial(client.submit, "A", owner="A"))
        for _ in range(1000):
            with anyio.move_on_after(0.001):
                await client.submit("A", owner="A")
        queue = client._session.queue  # noqa: SLF001 - how many it keeps is not public
        assert len(queue._owners["A"].waiting) < 300  # noqa: SLF001
        group.cancel_scope.cancel()


async def test_per_minute_spreads_the_submits_of_an_owner() -> None:
    """Three leave at once, the next ones a minute after each. Another owner is not affected."""
    service = Service(Simulator(FAST_PROFILE))
    async with client_of(service, OwnerLimits(per_minute=3)) as client:
        await submit_all(client, ("A", 7), ("B", 1))
    times_s = [
        at_s - service.times_s[0] for at_s, owner in zip(service.times_s, service.posts, strict=True) if owner == "A"
    ]
    assert [round(at_s / 60) for at_s in times_s] == [0, 0, 0, 1, 1, 1, 2]
    assert service.posts.index("B") <= 3


async def test_a_waiting_submit_ends_by_its_deadline() -> None:
    """Nothing was sent for it."""
    service = Service(Simulator(SimulatorProfile(median_s=3600, sigma=0.1, visibility_delay_s=0)))
    async with client_of(service, OwnerLimits(max_in_flight=1)) as client:
        await client.submit("A", owner="A")
        with pytest.raises(NotSent, match="nothing was sent"):
            await client.generate("A", owner="A", timeout_s=5)
    assert len(service.posts) == 1


async def test_limits_may_depend_on_the_owner() -> None:
    """Some users may have more."""
    service = Service(Simulator(SimulatorProfile(median_s=30, sigma=0.1, visibility_delay_s=0)))
    options = {"A": OwnerLimits(max_in_flight=1), "B": OwnerLimits()}
    async with NanoBananaClient(
        "dk-test", transport=service, limits=LIMITS, polling=FAST_POLLING, owner_limits=options.__getitem__
    ) as client:
        await submit_all(client, ("A", 2), ("B", 3))
    assert service.posts == ["A", "B", "B", "B", "A"]


@pytest.mark.slow
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.real_time
@pytest.mark.other_clients
@pytest.mark.skipif(sys.gettrace() is not None, reason="a tracer allocates memory on our lines")
async def test_ten_thousand_waiting_submits_have_no_timer_each_and_take_little_memory() -> None:
    """Each takes less than 500 bytes of ours, and 900 for the frames of its three coroutines."""
    limits = OwnerLimits(max_in_flight=2, per_minute=100)
    request = GenerationRequest("A")
    gate = anyio.Event()
    async with client_of(Service(Simulator(), gate), limits) as client, anyio.create_task_group() as group:

        async def submit(number: int) -> None:
            await client.submit(request, owner=f"A{number % 1000}")

        for number in range(8):
            group.start_soon(submit, number)
        await anyio.sleep(0.1)
        gc.collect()
        timers = len(asyncio.get_running_loop()._scheduled)  # type: ignore[attr-defined]  # noqa: SLF001
        tracemalloc.start()
        before = tracemalloc.take_snapshot()
        for number in range(10_000):
            group.start_soon(submit, number)
        await anyio.sleep(1)
        gc.collect()
        after = tracemalloc.take_snapshot()
        tracemalloc.stop()
        assert len(asyncio.get_running_loop()._scheduled) < timers + 10  # type: ignore[attr-defined]  # noqa: SLF001
        group.cancel_scope.cancel()
        gate.set()
    sizes = after.compare_to(before, "lineno")
    ours = [diff for diff in sizes if "nanobanana_async" in diff.traceback[0].filename]
    # A line that awaits allocates the frame of the coroutine that it calls.
    frames = sum(diff.size_diff for diff in ours if "await" in linecache.getline(*_place(diff)))
    assert (sum(diff.size_diff for diff in ours) - frames) / 10_000 < 500
    assert frames / 10_000 < 900


def _place(diff: tracemalloc.StatisticDiff) -> tuple[str, int]:
    return diff.traceback[0].filename, diff.traceback[0].lineno
