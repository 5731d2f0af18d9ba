"""One client, one fault, one verdict, and its comparison with the server's record."""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from itertools import count
from typing import Final
from urllib.request import urlopen

import anyio
import attrs

from nanobanana_async import (
    AiohttpTransport,
    ApiError,
    ConfigurationError,
    HttpxTransport,
    NanoBananaClient,
    NanoBananaError,
    NotSent,
    RetryPolicy,
    SubmissionUnknown,
    Timeouts,
    Transport,
)
from tests.faults.table import FAULTS, Fault

QUICK: Final = RetryPolicy(initial_s=0.01, max_s=0.02)
DEADLINES: Final = Timeouts(connect_s=0.5, submit_s=1.9, query_s=6.0, task_s=2.0)
_DOGGED: Final = attrs.evolve(QUICK, attempts=6)
"""For queries: a busy machine may cost one or two tries besides those that the fault costs."""
_NONCES: Final = count()


@attrs.frozen
class Result:
    """What the client reports, and what happened."""

    fault: Fault
    verdict: str
    posts: int
    """Submits that the server read to their end."""
    charges: int
    possible_duplicates: int
    """Resubmits that the client declared as possible duplicates."""
    seconds: float
    message: str = ""

    @property
    def conforms(self) -> bool:
        """Whether accepted is one charge, rejected none, and unknown none or one, plus declared resubmits."""
        lowest, highest = {
            "accepted": (1, 1),
            "rejected": (0, 0),
            "not sent": (0, 0),
            "unknown": (0, 1),
        }.get(self.verdict, (0, -1))
        return (
            lowest
            <= self.charges
            <= highest + (self.possible_duplicates if self.verdict in ("accepted", "unknown") else 0)
        )

    @property
    def as_expected(self) -> bool:
        """Whether the verdict is the table's, the record agrees, and the deadline held."""
        return (
            self.conforms and self.verdict in self.fault.post.split(" or ") and self.seconds <= DEADLINES.submit_s + 1
        )


@attrs.frozen
class Query:
    """The result of a query."""

    fault: Fault
    ending: str
    message: str = ""

    @property
    def as_expected(self) -> bool:
        """Whether it ended as the table says."""
        return self.ending == self.fault.get


@attrs.frozen
class FaultServer:
    """The ports of the server."""

    ports: dict[str, int]

    def url(self, fault: Fault, *, times: int, nonce: str) -> str:
        """Return a base URL that plays *fault* for the first *times* requests of each method."""
        return f"http://127.0.0.1:{self.ports[fault.listener]}/{FAULTS.index(fault)}/{times}/{nonce}"

    def truth(self, nonce: str) -> tuple[int, list[str]]:
        """Return how many POSTs were read, and the ids that were charged."""
        with urlopen(f"http://127.0.0.1:{self.ports['main']}/truth/{nonce}") as response:
            known = json.load(response)
        return known["seen"].get("POST", 0), known["charged"]


@contextlib.contextmanager
def fault_server() -> Iterator[FaultServer]:
    """Run the server in a process of its own."""
    command = [sys.executable, "-m", "tests.faults.server"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            yield FaultServer(json.loads(process.stdout.readline()))
        finally:
            process.kill()


TRANSPORTS: Final[dict[str, Callable[[], Transport]]] = {
    "httpx": lambda: HttpxTransport(connect_s=DEADLINES.connect_s),
    "aiohttp": lambda: AiohttpTransport(connect_s=DEADLINES.connect_s),
}
RUNS: Final = (("httpx", "asyncio"), ("httpx", "trio"), ("aiohttp", "asyncio"))
"""Each transport on each event loop that it supports."""


@contextlib.asynccontextmanager
async def _client(name: str, url: str, retry: RetryPolicy) -> AsyncIterator[NanoBananaClient]:
    async with (
        contextlib.aclosing(TRANSPORTS[name]()) as transport,
        NanoBananaClient("dk-test", base_url=url, retry=retry, timeouts=DEADLINES, transport=transport) as client,
    ):
        yield client


async def try_post(server: FaultServer, fault: Fault, transport: str) -> Result:
    """Submit once, while the fault lasts."""
    nonce, possible_duplicates, message = f"n{next(_NONCES)}", 0, ""
    start_s = time.monotonic()
    async with _client(transport, server.url(fault, times=99, nonce=nonce), QUICK) as client:
        try:
            handle = await client.submit("a fox")
        except (NotSent, ConfigurationError) as exc:
            verdict, message = "not sent", str(exc)
        except SubmissionUnknown as exc:
            verdict, possible_duplicates, message = "unknown", exc.possible_duplicates, str(exc)
        except ApiError as exc:
            verdict, message = "rejected", str(exc)
        except Exception as exc:  # noqa: BLE001 - the result of the trial
            verdict, message = type(exc).__name__, str(exc)
        else:
            verdict, possible_duplicates = "accepted", handle.possible_duplicates
    seconds = time.monotonic() - start_s
    posts, charged = await anyio.to_thread.run_sync(server.truth, nonce)
    return Result(fault, verdict, posts, len(charged), possible_duplicates, seconds, message)


async def try_all(
    server: FaultServer, faults: Iterable[Fault] = FAULTS, transport: str = "httpx"
) -> dict[Fault, tuple[Result, Query]]:
    """Try every fault on POST and on GET, several at a time."""
    results: dict[Fault, tuple[Result, Query]] = {}
    slots = anyio.Semaphore(12)

    async def one(fault: Fault) -> None:
        async with slots:
            results[fault] = (
                await try_post(server, fault, transport),
                await try_get(server, fault, transport),
            )

    async with anyio.create_task_group() as group:
        for fault in faults:
            group.start_soon(one, fault)
    return results


async def try_get(server: FaultServer, fault: Fault, transport: str) -> Query:
    """Query once, with the fault for the first two requests."""
    url = server.url(fault, times=2, nonce=f"n{next(_NONCES)}")
    async with _client(transport, url, _DOGGED) as client:
        try:
            await client.task("ta-1").query()
        except NanoBananaError as exc:
            return Query(fault, "refused" if isinstance(exc, ApiError) else "fails", str(exc))
        return Query(fault, "recovers")
