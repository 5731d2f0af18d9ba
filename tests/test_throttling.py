"""A service that allows so many submits a second and answers 429 to the rest: nothing fails, and the rate is used."""

from collections import Counter
from collections.abc import Callable
from random import Random

import anyio
import attrs
import pytest

from nanobanana_async import (
    Limits,
    NanoBananaClient,
    NanoBananaError,
    OwnerLimits,
    Transport,
    WireRequest,
    WireResponse,
)
from nanobanana_async.simulator import Simulator, SimulatorProfile
from tests.fakes import rejected

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]

PROFILE = SimulatorProfile(median_s=20, sigma=0.3, visibility_delay_s=0)


@attrs.define
class ThrottlingTransport:
    """Allows *limit* submits per second of its clock, in fixed windows or as a token bucket, each taking *post_s*."""

    inner: Transport
    limit: Callable[[float], float]
    is_bucket: bool
    states_wait: bool
    post_s: float
    accepted_s: list[float] = attrs.field(factory=list[float])
    throttled_s: list[float] = attrs.field(factory=list[float])
    windows: Counter[int] = attrs.field(factory=Counter[int])
    tokens: float = 0.0
    filled_s: float = 0.0

    async def send(self, request: WireRequest, *, timeout_s: float) -> WireResponse:
        """Throttle submits, and pass everything on."""
        if request.method != "POST":
            return await self.inner.send(request, timeout_s=timeout_s)
        await anyio.sleep(self.post_s * 0.4)
        now_s = anyio.current_time()
        if not self._is_allowed(now_s):
            self.throttled_s.append(now_s)
            await anyio.sleep(0.02)
            wait_s = 1 - now_s % 1
            return rejected(429, retry_after=f"{wait_s:.3f}") if self.states_wait else rejected(429)
        self.accepted_s.append(now_s)
        await anyio.sleep(self.post_s * 0.6)
        return await self.inner.send(request, timeout_s=timeout_s)

    def _is_allowed(self, now_s: float) -> bool:
        limit = self.limit(now_s)
        if self.is_bucket:
            self.tokens = min(limit, self.tokens + (now_s - self.filled_s) * limit)
            self.filled_s = now_s
            is_allowed = self.tokens >= 1
            self.tokens -= is_allowed
        else:
            is_allowed = self.windows[int(now_s)] < limit
            self.windows[int(now_s)] += is_allowed
        return is_allowed

    async def aclose(self) -> None:
        """Do nothing; the simulator needs no closing."""


async def generate(transport: ThrottlingTransport, jobs: int) -> list[NanoBananaError]:
    """Submit all *jobs* at once, and return the errors."""
    errors: list[NanoBananaError] = []

    async def one(number: int) -> None:
        try:
            await client.generate(f"a fox, number {number}")
        except NanoBananaError as exc:
            errors.append(exc)

    async with NanoBananaClient("dk-test", transport=transport) as client, anyio.create_task_group() as group:
        for number in range(jobs):
            group.start_soon(one, number)
    return errors


@pytest.mark.parametrize("post_s", [0.05, 0.8])
@pytest.mark.parametrize("states_wait", [True, False])
@pytest.mark.parametrize("is_bucket", [False, True])
async def test_all_are_done_at_the_allowed_rate(post_s: float, states_wait: bool, is_bucket: bool) -> None:  # noqa: FBT001 - a table
    """31 to 39 of 400 raised RateLimited, although a 429 is proven not charged and the deadline was far away."""
    service = ThrottlingTransport(Simulator(PROFILE), lambda _: 20.0, is_bucket, states_wait, post_s)
    began_s = anyio.current_time()
    assert await generate(service, 400) == []
    assert len(service.accepted_s) == 400
    took_s = service.accepted_s[-1] - began_s
    assert took_s < 400 / 20 / 0.85
    late = sum(at_s > began_s + 10 for at_s in service.throttled_s)
    assert late <= 0.05 * (late + sum(at_s > began_s + 10 for at_s in service.accepted_s))


@pytest.mark.parametrize("is_bucket", [False, True])
async def test_a_limit_that_falls_is_found_again(is_bucket: bool) -> None:  # noqa: FBT001 - a table
    """From 50 to 10 a second after ten seconds. The ten seconds after the change are excluded."""
    start_s = anyio.current_time()
    service = ThrottlingTransport(
        Simulator(PROFILE),
        lambda now_s: 50.0 if now_s < start_s + 10 else 10.0,
        is_bucket=is_bucket,
        states_wait=True,
        post_s=0.3,
    )
    assert await generate(service, 1000) == []
    from_s, to_s = start_s + 20, service.accepted_s[-1]
    used = sum(at_s > from_s for at_s in service.accepted_s) / (10 * (to_s - from_s))
    late = sum(at_s > from_s for at_s in service.throttled_s)
    assert used > 0.85
    assert late <= 0.05 * (late + sum(at_s > from_s for at_s in service.accepted_s))


@pytest.mark.parametrize("seed", range(8))
async def test_cancelled_and_throttled_submits_release_their_slots_and_lose_no_charge(seed: int) -> None:
    """429s, possible charges, lost responses and cancellations in any order. The audit compares the charges."""
    rng = Random(seed)
    profile = attrs.evolve(PROFILE, median_s=0.5, rate_limited=0.3, charged_errors=0.1, lost_responses=0.1)
    simulator = Simulator(profile, seed=seed, delay_s=0.05)
    limits = Limits(max_submits=3, requests_per_s=200, burst=20)
    owners = OwnerLimits(max_in_flight=4, per_minute=200)

    async def one(number: int) -> None:
        await anyio.sleep(rng.uniform(0, 2))
        with anyio.move_on_after(rng.choice([rng.uniform(0, 4), 900])):
            try:
                await client.generate(f"fox {number}", owner=f"user {number % 3}")
            except NanoBananaError:
                return

    async with NanoBananaClient("dk-test", transport=simulator, limits=limits, owner_limits=owners) as client:
        async with anyio.create_task_group() as group:
            for number in range(60):
                group.start_soon(one, number)
        await anyio.sleep(60)
        session = client._session  # noqa: SLF001 - nothing else shows a slot that is lost
        assert session.slots.free == session.slots.size
        assert all(owner.in_flight == 0 for owner in session.queue._owners.values())  # noqa: SLF001 - the same
