"""The server of all clients of `outstanding.py`: the simulator, which also speaks the protocols of four other services.

    python benchmarks/server.py --latency 12 --seed 0

One simulated service draws the latencies for all protocols, so the nth submit takes the same time for every client.
`GET /truth` returns when each task was accepted and final, by the machine's clock, and how often it was polled. Prints
the port, and serves until its stdin ends.
"""

import argparse
import json
import random
import struct
import sys
import threading
import time
import zlib
from collections import Counter

import anyio
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from nanobanana_async.simulator import SimulatorProfile
from nanobanana_async.simulator.in_memory import tiny_png
from nanobanana_async.simulator.server import make_app, open_listener
from nanobanana_async.simulator.service import SimulatedService

KEY = "dk-test"


class Protocols:
    """Submit and poll in the formats of fal, Replicate, Runway and OpenAI, as their packages require."""

    def __init__(self, service: SimulatedService) -> None:
        self.service = service
        self.polls: Counter[str] = Counter()

    def routes(self) -> list[Route]:
        """Return the paths of the other services."""
        return [
            Route("/truth", self.truth),
            Route("/fal-ai/model", self.fal_submit, methods=["POST"]),
            Route("/fal-ai/model/requests/{id}/status", self.fal_status),
            Route("/fal-ai/model/requests/{id}", self.fal_result),
            Route("/v1/models/{owner}/{name}/predictions", self.replicate_submit, methods=["POST"]),
            Route("/v1/predictions/{id}", self.replicate_query),
            Route("/v1/text_to_image", self.runway_submit, methods=["POST"]),
            Route("/v1/tasks/{id}", self.runway_query),
            Route("/v1/videos", self.openai_submit, methods=["POST"]),
            Route("/v1/videos/{id}", self.openai_query),
        ]

    async def truth(self, _: Request) -> Response:
        """Return what happened."""
        began_s = time.time() - time.monotonic()  # the monotonic clocks of two processes may differ
        return JSONResponse(
            {
                task.task_id: [began_s + task.accepted_s, began_s + task.final_s, self.polls[task.task_id]]
                for task in self.service.tasks.values()
            }
        )

    def accept(self) -> str:
        """Submit a job to the simulated service and return its id."""
        body = json.dumps({"prompt": "a job", "model": "m"}).encode()
        response = self.service.handle("POST", "http://x/api/image/gen", {"authorization": f"Bearer {KEY}"}, body)
        return str(json.loads(response.body)["data"]["task_id"])

    def is_done(self, request: Request, *, poll: bool = True) -> tuple[str, bool]:
        """Return the queried id, and whether it is final."""
        task = self.service.tasks[request.path_params["id"]]
        self.polls[task.task_id] += poll
        return task.task_id, time.monotonic() >= task.final_s

    async def fal_submit(self, request: Request) -> Response:
        """POST to the queue."""
        job = self.accept()
        url = f"{str(request.base_url).rstrip('/')}/fal-ai/model/requests/{job}"
        urls = {"response_url": url, "status_url": f"{url}/status", "cancel_url": f"{url}/cancel"}
        return JSONResponse({"status": "IN_QUEUE", "request_id": job, "queue_position": 0, **urls})

    async def fal_status(self, request: Request) -> Response:
        """GET the status."""
        job, done = self.is_done(request)
        return JSONResponse({"status": "COMPLETED" if done else "IN_PROGRESS", "request_id": job, "logs": None})

    async def fal_result(self, request: Request) -> Response:
        """GET the result."""
        return JSONResponse({"job": self.is_done(request, poll=False)[0], "images": []})

    async def replicate_submit(self, _: Request) -> Response:
        """POST a prediction."""
        return JSONResponse(self.prediction(self.accept(), done=False), 201)

    async def replicate_query(self, request: Request) -> Response:
        """GET a prediction."""
        job, done = self.is_done(request)
        return JSONResponse(self.prediction(job, done=done))

    @staticmethod
    def prediction(job: str, *, done: bool) -> dict[str, object]:
        """Return a prediction."""
        status = "succeeded" if done else "processing"
        return {
            "id": job,
            "model": "o/m",
            "version": "v",
            "input": {},
            "output": [] if done else None,
            "status": status,
        }

    async def runway_submit(self, _: Request) -> Response:
        """POST a task."""
        return JSONResponse({"id": self.accept(), "estimatedCost": {"credits": 5}})

    async def runway_query(self, request: Request) -> Response:
        """GET a task."""
        job, done = self.is_done(request)
        state: dict[str, object] = {"status": "RUNNING", "progress": 0.5}
        if done:
            state = {"status": "SUCCEEDED", "output": ["https://files.example/x.png"], "cost": {"credits": 5}}
        return JSONResponse({"id": job, "createdAt": "2026-01-01T00:00:00.000Z", **state})

    async def openai_submit(self, request: Request) -> Response:
        """POST a video, as multipart form data."""
        await request.body()
        return JSONResponse(self.video(self.accept(), "queued"))

    async def openai_query(self, request: Request) -> Response:
        """GET a video."""
        job, done = self.is_done(request)
        return JSONResponse(self.video(job, "completed" if done else "in_progress"))

    @staticmethod
    def video(job: str, status: str) -> dict[str, object]:
        """Return a video."""
        fixed = {"object": "video", "created_at": 0, "model": "sora-2", "seconds": "4", "size": "720x1280"}
        return {"id": job, "status": status, "progress": 0, "prompt": "p", **fixed}


class Throttle:
    """Allows so many submits in each second of the clock; 0 allows any number."""

    def __init__(self, per_s: float, *, states_wait: bool) -> None:
        self._per_s = per_s
        self._states_wait = states_wait
        self._windows: Counter[int] = Counter()
        self.throttled_s: list[float] = []

    def refusal(self) -> Response | None:
        """Return a 429, or None if the submit is allowed."""
        now_s = time.time()
        if not self._per_s or self._windows[int(now_s)] < self._per_s:
            self._windows[int(now_s)] += 1
            return None
        self.throttled_s.append(now_s)
        headers = {"Retry-After": f"{1 - now_s % 1:.3f}"} if self._states_wait else {}
        return JSONResponse({"code": 1, "message": "slow down"}, 429, headers)

    async def report(self, _: Request) -> Response:
        """Return when submits were throttled."""
        return JSONResponse(self.throttled_s)


class Weather:
    """Delays, throttles and fails the submits and polls of all protocols, as a distant and busy service does."""

    def __init__(self, app: ASGIApp, throttle: Throttle, options: argparse.Namespace) -> None:
        self._app = app
        self._throttle = throttle
        self._delays_s = {"POST": options.submit_delay, "GET": options.delay}
        self._fail = options.fail
        self._random = random.Random(0)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http" or scope["path"].startswith(("/truth", "/throttled", "/files/")):
            await self._app(scope, receive, send)
            return
        response = self._throttle.refusal() if scope["method"] == "POST" else None
        if response is None and self._random.random() < self._fail:
            response = JSONResponse({"code": 1, "message": "overloaded"}, 503)
        if response is not None:
            await _drain(receive)
            await response(scope, receive, send)
            return
        await anyio.sleep(self._delays_s[scope["method"]])
        await self._app(scope, receive, send)


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


async def _drain(receive: Receive) -> None:
    while (await receive()).get("more_body"):
        pass


def counted(app: Starlette, protocols: Protocols, throttle: Throttle) -> Starlette:
    """Return an app with all protocols that also counts this package's polls."""

    async def query(request: Request) -> Response:
        protocols.polls[request.query_params["task_id"]] += 1
        handle = protocols.service.handle("GET", str(request.url), dict(request.headers), b"")
        return Response(handle.body, handle.status, dict(handle.headers), handle.media_type)

    return Starlette(
        routes=[
            Route("/throttled", throttle.report),
            Route("/api/task/query", query),
            *protocols.routes(),
            Mount("/", app),
        ],
        lifespan=app.router.lifespan_context,
    )


def main() -> None:
    """Parse the options and serve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latency", type=float, default=12.0)
    parser.add_argument("--delay", type=float, default=0.0, help="delay of a response to a poll, in seconds")
    parser.add_argument("--submit-delay", type=float, default=0.0, help="the same for submits")
    parser.add_argument("--allow", type=float, default=0.0, help="submits that are allowed per second")
    parser.add_argument("--fail", type=float, default=0.0, help="share of requests that are answered 503")
    parser.add_argument("--tls", metavar="FILE", help="certificate and key, for https")
    parser.add_argument("--image-bytes", type=int, default=0, help="size of the images; 0 for small ones")
    parser.add_argument("--no-retry-after", action="store_true", help="state no wait in a 429")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    profile = SimulatorProfile(median_s=options.latency)
    padding = _chunk(b"ruNd", bytes(options.image_bytes))  # rendering would use the CPU
    render = (lambda spec: tiny_png(spec)[:-12] + padding + tiny_png(spec)[-12:]) if options.image_bytes else tiny_png
    service = SimulatedService(profile, seed=options.seed, now_s=time.monotonic, render=render)
    socket = open_listener("127.0.0.1", 0)
    # Idle connections are kept longer than by any client; otherwise both sides close at the same time.
    throttle = Throttle(options.allow, states_wait=not options.no_retry_after)
    config = uvicorn.Config(
        Weather(counted(make_app(service), Protocols(service), throttle), throttle, options),
        log_level="error",
        ssl_certfile=options.tls,
        access_log=False,
        backlog=4096,
        timeout_keep_alive=75,
    )
    server = uvicorn.Server(config)
    print(socket.getsockname()[1], flush=True)

    def until_eof() -> None:
        sys.stdin.read()
        server.should_exit = True

    threading.Thread(target=until_eof, daemon=True).start()
    server.run(sockets=[socket])


if __name__ == "__main__":
    main()
