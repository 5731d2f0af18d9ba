"""One client of `outstanding.py`: many concurrent jobs through one package with its default settings.

    python -m benchmarks.contestant NAME URL JOBS LIMIT_S

Prints one JSON object: when each job was noticed to be finished (machine's clock), the exceptions, and the cost. Stops
after LIMIT_S seconds.
"""

import asyncio
import json
import os
import resource
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import TypeAlias

from benchmarks.server import KEY
from benchmarks.stall import StallMeter

Job: TypeAlias = Callable[[], Awaitable[str]]


def nanobanana_async(url: str) -> Job:
    """This package."""
    from nanobanana_async import NanoBananaClient

    client = NanoBananaClient(KEY, base_url=url)

    async def job() -> str:
        return (await client.generate("a job", timeout_s=3600)).task_id

    return job


def nanobanana_async_aiohttp(url: str) -> Job:
    """This package over aiohttp."""
    from nanobanana_async import AiohttpTransport, NanoBananaClient

    client = NanoBananaClient(KEY, base_url=url, transport=AiohttpTransport())

    async def job() -> str:
        return (await client.generate("a job", timeout_s=3600)).task_id

    return job


def fal_client(url: str) -> Job:
    """Use `AsyncClient.subscribe`, which submits and polls. Its constant https:// is patched."""
    import fal_client
    import fal_client.client

    fal_client.client.QUEUE_URL_FORMAT = f"{url}/"
    client = fal_client.AsyncClient(key="id:secret")

    async def job() -> str:
        return str((await client.subscribe("fal-ai/model", arguments={"prompt": "a job"}))["job"])

    return job


def replicate(url: str) -> Job:
    """Use `predictions.async_create`, then `async_wait`."""
    from replicate.client import Client

    client = Client(api_token="x", base_url=url)  # noqa: S106 - a fake

    async def job() -> str:
        prediction = await client.predictions.async_create(model="o/m", input={"prompt": "a job"})
        await prediction.async_wait()
        return str(prediction.id)

    return job


def runwayml(url: str) -> Job:
    """Use `text_to_image.create`, then `wait_for_task_output`."""
    from runwayml import AsyncRunwayML

    client = AsyncRunwayML(api_key="x", base_url=url)

    async def job() -> str:
        task = await client.text_to_image.create(model="gen4_image", prompt_text="a job", ratio="1920:1080")
        return str((await task.wait_for_task_output()).id)

    return job


def openai(url: str) -> Job:
    """Use `videos.create_and_poll`, its only way to submit and wait."""
    from openai import AsyncOpenAI

    client = AsyncOpenAI(api_key="x", base_url=f"{url}/v1")

    async def job() -> str:
        return str((await client.videos.create_and_poll(model="sora-2", prompt="a job")).id)

    return job


def nanobanana_async_no_bound(url: str) -> Job:
    """This package, as no setting allows: all jobs are submitted at once."""
    from nanobanana_async import Limits, NanoBananaClient
    from nanobanana_async.api import concurrency

    concurrency._START = 10_000  # type: ignore[misc]
    client = NanoBananaClient(KEY, base_url=url, limits=Limits(max_submits=10_000))

    async def job() -> str:
        return (await client.generate("a job", timeout_s=3600)).task_id

    return job


CLIENTS = {
    client.__name__: client
    for client in (nanobanana_async, nanobanana_async_aiohttp, openai, runwayml, replicate, fal_client)
}


_VARIANTS = {**CLIENTS, "nanobanana_async_no_bound": nanobanana_async_no_bound}


async def compete(name: str, url: str, jobs: int, limit_s: float, stalls: StallMeter) -> None:
    """Run all jobs concurrently, print the record, and exit."""
    one = _VARIANTS[name](url)
    noticed_s: dict[str, float] = {}
    errors: Counter[str] = Counter()
    cpu_s, began_s, wall_s = time.process_time(), time.time(), time.monotonic()

    async def run() -> None:
        try:
            task_id = await one()
            noticed_s[task_id] = time.time()
        except Exception as exc:  # noqa: BLE001 - every exception is counted
            errors[type(exc).__name__] += 1

    def report() -> None:
        record = {
            "began_s": began_s,
            "noticed_s": noticed_s.copy(),
            "errors": dict(errors),
            "cpu_s": time.process_time() - cpu_s,
            "wall_s": time.monotonic() - wall_s,
            "rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "stall_s": stalls.longest_s,
        }
        print(json.dumps(record), flush=True)
        os._exit(0)  # without closing a thousand connections

    timer = threading.Timer(limit_s, report)
    timer.start()
    started = []
    for number in range(jobs):
        started.append(asyncio.ensure_future(run()))
        if number % 100 == 99:  # a loop over ten thousand jobs would itself be a stall
            await asyncio.sleep(0)
    await asyncio.gather(*started)
    report()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    contestant, service, many, limit = sys.argv[1:]
    meter = StallMeter()
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(meter)) as runner:
        runner.run(compete(contestant, service, int(many), float(limit), meter))
