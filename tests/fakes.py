"""Small real implementations of the protocols, scripted by the test."""

import json
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeAlias

import anyio
import attrs

from nanobanana_async import ExchangeError, Phase, Transport, WireRequest, WireResponse
from nanobanana_async.simulator.in_memory import tiny_png
from nanobanana_async.simulator.specs import ImageSpec

Step: TypeAlias = WireResponse | ExchangeError | Callable[[WireRequest], Awaitable[WireResponse]]

PNG = tiny_png(ImageSpec(prompt="a fox", width=8, height=8))


def response(status: int = 200, document: object = None, *, body: bytes | None = None, **headers: str) -> WireResponse:
    """Return a response with a JSON body, or with *body* unchanged."""
    raw = body if body is not None else json.dumps(document).encode()
    return WireResponse(
        status=status, body=raw, headers={name.replace("_", "-"): text for name, text in headers.items()}
    )


def accepted(task_id: str = "ta-1") -> WireResponse:
    """Return the service's response to a valid submit."""
    return response(200, {"code": 0, "message": "ok", "data": {"task_id": task_id}})


def state(status: object, task_id: str = "ta-1", **fields: object) -> WireResponse:
    """Return the service's response to a query."""
    data = {"task_id": task_id, "status": status, "result": None, **fields}
    return response(200, {"code": 0, "message": "ok", "data": data})


def finished(task_id: str = "ta-1", url: str = "https://files.example/fox.png") -> WireResponse:
    """Return the response to a query about a finished task."""
    return state("success", task_id, result=[{"image": url}], consumed="0.500000")


def rejected(status: int, code: int = 1, detail: str = "no", **headers: str) -> WireResponse:
    """Return one of the service's own errors."""
    return response(status, {"code": code, "message": "failed", "detail": detail}, body=None, **headers)


def lost(phase: Phase = Phase.SEND, *, permanent: bool = False, partial: WireResponse | None = None) -> ExchangeError:
    """Return an exchange that broke off."""
    return ExchangeError("ReadError: gone", phase=phase, permanent=permanent, response=partial)


@attrs.define
class ScriptedTransport:
    """Plays its steps in order, repeats the last one, and records the requests."""

    steps: list[Step]
    requests: list[WireRequest] = attrs.field(factory=list)
    times_s: list[float] = attrs.field(factory=list)
    in_flight: int = 0
    most_in_flight: int = 0
    closed: bool = False

    async def send(self, request: WireRequest, *, timeout_s: float) -> WireResponse:
        """Play the next step."""
        self.requests.append(request)
        self.times_s.append(anyio.current_time())
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        step = self.steps.pop(0) if len(self.steps) > 1 else self.steps[0]
        try:
            await anyio.lowlevel.checkpoint()
            if isinstance(step, ExchangeError):
                raise ExchangeError(step.reason, phase=step.phase, permanent=step.permanent, response=step.response)
            result = step if isinstance(step, WireResponse) else await step(request)
        finally:
            self.in_flight -= 1
        return result

    async def aclose(self) -> None:
        """Record that it was closed."""
        self.closed = True


def script(*steps: Step) -> ScriptedTransport:
    """Return a transport that plays *steps*."""
    return ScriptedTransport(list(steps))


Intercept: TypeAlias = Callable[[WireRequest], WireResponse | ExchangeError | None]


@attrs.define
class InterceptingTransport:
    """A transport that passes requests on, unless *intercept* returns a response or an error."""

    inner: Transport
    intercept: Intercept

    async def send(self, request: WireRequest, *, timeout_s: float) -> WireResponse:
        """Call *intercept* first."""
        result = self.intercept(request)
        if result is None:
            return await self.inner.send(request, timeout_s=timeout_s)
        await anyio.lowlevel.checkpoint()
        if isinstance(result, ExchangeError):
            raise result
        return result

    async def aclose(self) -> None:
        """Do nothing; the simulator needs no closing."""


def submits(requests: Iterable[WireRequest]) -> int:
    """Return the number of POSTs to the service."""
    return sum(request.method == "POST" for request in requests)
