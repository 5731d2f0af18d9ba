"""`generate_many`: many requests with bounded concurrency, each with an outcome."""

import contextlib
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Iterable
from typing import TypeAlias

from nanobanana_async._concurrency.map_unordered import iter_any, map_unordered
from nanobanana_async.errors import NanoBananaError
from nanobanana_async.models import GenerationRequest
from nanobanana_async.outcomes import Outcome, Succeeded, log_unconsumed, outcome_from_error
from nanobanana_async.regenerate import Generated
from nanobanana_async.session import Session

Requests: TypeAlias = Iterable[str | GenerationRequest] | AsyncIterable[str | GenerationRequest]


async def generate_many(
    session: Session,
    requests: Requests,
    make: Callable[[GenerationRequest], Awaitable[Generated]],
    *,
    max_in_flight: int,
) -> AsyncGenerator[Outcome]:
    """Yield the outcome of *make* for each of *requests*. See `NanoBananaClient.generate_many`."""
    await session.start()

    async def numbered() -> AsyncGenerator[tuple[str, GenerationRequest]]:
        number = 0
        async with contextlib.aclosing(iter_any(requests)) as source:
            async for request in source:
                yield str(number), request if isinstance(request, GenerationRequest) else GenerationRequest(request)
                number += 1

    async def generate_one(row: tuple[str, GenerationRequest]) -> Outcome:
        key, request = row
        try:
            made = await make(request)
        except (NanoBananaError, ValueError) as exc:
            return outcome_from_error(exc, key=key, request=request)
        return Succeeded(key=key, request=request, task=made.task, earlier=made.earlier)

    def on_unconsumed(outcome: Outcome) -> None:
        log_unconsumed(outcome)
        if isinstance(outcome, Succeeded):
            session.report_orphan(session.handle(outcome.task.task_id))

    outcomes: AsyncGenerator[Outcome] = map_unordered(
        session.background, numbered(), generate_one, max_in_flight=max_in_flight, on_unconsumed=on_unconsumed
    )
    async with contextlib.aclosing(outcomes):
        async for outcome in outcomes:
            yield outcome
