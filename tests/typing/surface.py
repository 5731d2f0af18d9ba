"""The types of the public names, as a user's type checker sees them. Every public class is named here."""

from collections.abc import AsyncGenerator
from decimal import Decimal
from pathlib import Path
from typing import assert_type

import httpx
import httpx2

import nanobanana_async as nb
from nanobanana_async.simulator import Charge, Simulator


async def surface(client: nb.NanoBananaClient, image: nb.GeneratedImage) -> None:
    """Call every method once."""
    task = await client.generate("a fox", images=[Path("a.png"), b"..."], aspect_ratio="16:9", timeout_s=300)
    assert_type(task, nb.Task)
    assert_type(task.status, nb.TaskStatus)
    assert_type(task.images, tuple[nb.GeneratedImage, ...])
    assert_type(task.consumed, Decimal | None)
    handle = await client.submit(nb.GenerationRequest("a fox"), extra={"seed": 1})
    assert_type(handle, nb.TaskHandle)
    assert_type(handle.task_id, str)
    assert_type(await handle.query(), nb.Task)
    assert_type(await handle.wait(timeout_s=1), nb.Task)
    assert_type(await handle.result(), nb.Task)
    assert_type(handle.updates(), AsyncGenerator[nb.Task, None])
    assert_type(client.task("ta-1"), nb.TaskHandle)
    assert_type(await client.balance(), Decimal)
    assert_type(await client.download(image), bytes)
    assert_type(await client.save(task, "out/"), list[Path])
    await client.submit("a fox", ratio="16:9")  # type: ignore[call-arg]
    await client.submit("a fox", images=[1])  # type: ignore[list-item]


def transports(one: httpx.AsyncClient, other: httpx2.AsyncClient) -> list[nb.Transport]:
    """Pass in every kind of transport."""
    return [nb.HttpxTransport(), nb.HttpxTransport(one), nb.HttpxTransport(other), Simulator()]


def errors(error: nb.TaskError, unknown: nb.SubmissionUnknown, api: nb.ApiError) -> None:
    """Read the attributes of errors."""
    assert_type(error.task, nb.Task | None)
    assert_type(error.task_id, str | None)
    assert_type(unknown.status, int | None)
    assert_type(api.retry_after_s, float | None)


def truth(simulator: Simulator) -> None:
    """Read the charges."""
    assert_type(simulator.charges, list[Charge])
