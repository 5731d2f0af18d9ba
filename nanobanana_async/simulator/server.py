"""The simulated service on a port: an ASGI app, served by uvicorn."""

import contextlib
import itertools
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable
from functools import partial
from typing import Final, Self

import anyio
import anyio.to_thread
import uvicorn
from anyio.abc import TaskGroup
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from nanobanana_async.protocols import ExchangeError, RequestKind, WireRequest
from nanobanana_async.simulator.profile import SimulatorProfile
from nanobanana_async.simulator.render import render_png
from nanobanana_async.simulator.service import Charge, SimulatedService, SimulatedTask
from nanobanana_async.simulator.specs import ImageSpec
from nanobanana_async.transport.httpx import HttpxTransport

_CALLBACK_ATTEMPTS: Final = 3


def make_service(
    profile: SimulatorProfile, *, seed: int = 0, render: Callable[[ImageSpec], bytes] = render_png
) -> SimulatedService:
    """Return a simulated service in real time, by default with full-size images."""
    return SimulatedService(profile, seed=seed, now_s=time.monotonic, render=render)


def make_app(service: SimulatedService) -> Starlette:
    """Return the ASGI app: the API, the image files, and callbacks sent from its lifespan."""
    transport = HttpxTransport()
    background: list[TaskGroup] = []

    async def respond(request: Request) -> Response:
        try:
            body = await request.body()
        except ClientDisconnect:
            return Response()  # the peer has disconnected
        known = len(service.tasks)
        handle = partial(service.handle, request.method, str(request.url), dict(request.headers), body)
        # Rendering takes tens of milliseconds; everything else is faster than starting a thread.
        response = await anyio.to_thread.run_sync(handle) if request.url.path.startswith("/files/") else handle()
        for task in itertools.islice(reversed(service.tasks.values()), len(service.tasks) - known):
            if task.callback_url is not None and background:
                background[0].start_soon(_post_callback, service, task, str(request.base_url).rstrip("/"), transport)
        return Response(response.body, response.status, dict(response.headers), response.media_type)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncGenerator[None]:
        async with anyio.create_task_group() as tasks:
            background.append(tasks)
            yield
            background.clear()
            tasks.cancel_scope.cancel()
        await transport.aclose()

    return Starlette(routes=[Route("/{path:path}", respond, methods=["GET", "POST"])], lifespan=lifespan)


async def _post_callback(
    service: SimulatedService, task: SimulatedTask, files_url: str, transport: HttpxTransport
) -> None:
    while (left_s := task.final_s - time.monotonic()) > 0:  # noqa: ASYNC110 - uvloop may wake a millisecond early
        await anyio.sleep(left_s)
    request = WireRequest(
        kind=RequestKind.DOWNLOAD,
        method="POST",
        url=task.callback_url or "",
        headers={"Content-Type": "application/json"},
        body=service.callback_body(task, files_url),
    )
    for _ in range(_CALLBACK_ATTEMPTS):
        with contextlib.suppress(ExchangeError):
            if (await transport.send(request, timeout_s=10)).status < 300:
                return
        await anyio.sleep(1)


def open_listener(host: str, port: int) -> socket.socket:
    """Return a listening socket that asyncio treats as TCP.

    `socket.create_server` leaves the protocol at 0. asyncio then leaves Nagle's algorithm on, and each response takes
    40 ms.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(2048)
    except OSError:
        listener.close()
        raise
    return listener


class SimulatorServer:
    """The simulated service on a port, in a thread, for programs that take a base URL.

    Use it with `with`. `url` is the base URL, and `charges` has every charge.

    Args:
        profile: Behaviour of the service.
        seed: The same seed and the same calls give the same ids, latencies and errors.
        host: Address to listen on.
        port: Port to listen on; 0 selects a free one.
        render: Renders the images. `tiny_png` is fast, and the default gives full-size images.

    Raises:
        OSError: The port is in use.
    """

    def __init__(
        self,
        profile: SimulatorProfile,
        *,
        seed: int = 0,
        host: str = "127.0.0.1",
        port: int = 0,
        render: Callable[[ImageSpec], bytes] = render_png,
    ) -> None:
        self.service: Final = make_service(profile, seed=seed, render=render)
        self._socket = open_listener(host, port)
        name = f"[{host}]" if ":" in host else host
        self.url: Final = f"http://{name}:{self._socket.getsockname()[1]}"
        config = uvicorn.Config(make_app(self.service), log_level="error", access_log=False, backlog=2048)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self.run, name="nanobanana-simulator", daemon=True)

    @property
    def charges(self) -> list[Charge]:
        """Every charge in order, to compare with what a program believes."""
        return self.service.charges

    def run(self) -> None:
        """Serve in this thread until `stop` is called."""
        self._server.run(sockets=[self._socket])

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def stop(self) -> None:
        """Stop serving. Can be called from any thread."""
        self._server.should_exit = True

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._thread.join()
        self._socket.close()
