"""The receiver over real sockets, served by uvicorn, in FastAPI and Starlette. The simulator posts the callbacks."""

import contextlib
import json
import socket
import urllib.request
from collections.abc import AsyncGenerator, AsyncIterator, Iterator

import anyio
import anyio.to_thread
import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.routing import Mount

from nanobanana_async import CallbackReceiver, NanoBananaClient, PollPolicy
from nanobanana_async.simulator import SimulatorProfile
from nanobanana_async.simulator.server import SimulatorServer, open_listener
from tests.commands import started

pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("anyio_backend", ["asyncio"])]

SECRET = "a secret of more than sixteen bytes"
PROFILE = SimulatorProfile(median_s=0.3, sigma=0.3, visibility_delay_s=0)


@pytest.fixture
def service() -> Iterator[SimulatorServer]:
    """Yield a simulated service that posts callbacks."""
    with SimulatorServer(PROFILE) as server:
        yield server


class Served:
    """An application with a client and its mounted receiver, served by uvicorn in this event loop."""

    def __init__(self, framework: str, service: SimulatorServer) -> None:
        self.socket = open_listener("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/nb"
        self.client = NanoBananaClient("dk-test", base_url=service.url, polling=PollPolicy())
        self.receiver = CallbackReceiver(self.client, public_url=self.url, secret=SECRET)
        self.started = anyio.Event()

        @contextlib.asynccontextmanager
        async def lifespan(_: object) -> AsyncGenerator[None]:
            async with self.client:
                self.started.set()
                yield

        if framework == "fastapi":
            self.app: object = FastAPI(lifespan=lifespan)
            self.app.mount("/nb", self.receiver)
        elif framework == "starlette":
            self.app = Starlette(routes=[Mount("/nb", self.receiver)], lifespan=lifespan)
        else:
            self.app = self.receiver
            self.started.set()

        config = uvicorn.Config(self.app, log_level="error", access_log=False, timeout_graceful_shutdown=1)
        self.server = uvicorn.Server(config)
        self.server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign,assignment]

    async def serve(self) -> None:
        """Serve until `should_exit` is set."""
        try:
            await self.server.serve(sockets=[self.socket])
        finally:
            self.socket.close()


@contextlib.asynccontextmanager
async def served(framework: str, service: SimulatorServer) -> AsyncIterator[Served]:
    """Serve an application during the block."""
    app = Served(framework, service)
    async with anyio.create_task_group() as group:
        group.start_soon(app.serve)
        await app.started.wait()
        await anyio.sleep(0.1)
        try:
            yield app
        finally:
            app.server.should_exit = True
    await app.client.aclose()


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["fastapi", "starlette", "alone"])
async def test_a_callback_wakes_its_waiters(service: SimulatorServer, framework: str) -> None:
    """Each image costs one query, long before its first poll."""
    async with served(framework, service) as app:
        handles = [await app.client.submit(f"fox {number}", callback=app.receiver) for number in range(5)]
        began_s = anyio.current_time()
        for handle in handles:
            assert (await handle.result(timeout_s=5)).images
        assert anyio.current_time() - began_s < 3
    assert service.service.requests.count("GET /api/task/query") == 5


async def test_a_thousand_forged_posts_change_nothing(service: SimulatorServer) -> None:
    """Forged posts at known ids trigger no extra query, and the image arrives as usual."""
    async with served("starlette", service) as app:
        handle = await app.client.submit("a fox", callback=app.receiver)
        other = await app.client.submit("a hare", callback=app.receiver)
        true_url = service.service.tasks[other.task_id].callback_url or ""
        body = json.dumps({"task_id": handle.task_id, "status": "failed"}).encode()
        async with anyio.create_task_group() as group, httpx.AsyncClient() as attacker:
            ends = []

            async def wait() -> None:
                began_s = anyio.current_time()
                await handle.result(timeout_s=10)
                ends.append(anyio.current_time() - began_s)

            group.start_soon(wait)
            responses = []
            for number in range(500):
                for url in (f"{app.url}/{'x' * 44}", true_url):
                    responses.append((await attacker.post(url, content=body)).status_code)  # noqa: PERF401 - two a turn
                if number > 50 and ends:
                    break
            assert set(responses) == {404}
        assert ends[0] < 3
    assert service.service.requests.count("GET /api/task/query") <= 3


async def test_an_endless_body_is_rejected(service: SimulatorServer) -> None:
    """The connection is closed after 1 MiB."""
    async with served("starlette", service) as app:
        url = app.receiver.register().url

        def pour() -> int:
            with socket.create_connection(app.socket.getsockname()) as peer:
                path = url.removeprefix(app.url)
                peer.sendall(f"POST /nb{path} HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000\r\n\r\n".encode())
                sent = 0
                with contextlib.suppress(OSError):
                    while sent < 100_000_000:
                        sent += peer.send(b" " * 65536)
                return sent

        sent = await anyio.to_thread.run_sync(pour)
    assert sent < 20_000_000


async def test_listen_prints_what_is_posted() -> None:
    """`nanobanana listen` accepts any body on any path."""
    with started("listen", "--port", "0") as process:
        assert process.stderr is not None
        assert process.stdout is not None
        url = process.stderr.readline().split()[2].rstrip(";")
        for body in (b'{"task_id": "ta-1", "status": "success"}', b"\x1b[2Jnonsense"):
            await anyio.to_thread.run_sync(_post, f"{url}/any/path", body)
        assert process.stdout.readline() == "POST /any/path: task ta-1 success\n"
        assert process.stdout.readline() == "POST /any/path: callback: expected a task_id, got [2Jnonsense\n"


def _post(url: str, body: bytes) -> None:
    with urllib.request.urlopen(url, data=body, timeout=5) as response:  # noqa: S310 - started here
        assert response.status == 204
