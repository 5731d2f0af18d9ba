"""The simulated service: a pure, seeded state machine that records what was charged.

It shares no code with the client's codec, so that a mistake in one shows in the other. No sockets and no sleeping; the
time is an argument.
"""

import json
import math
from base64 import b64encode
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from random import Random
from typing import Final, cast
from urllib.parse import parse_qs, urlsplit
from uuid import UUID

import attrs

from nanobanana_async.simulator.profile import FLAWS, RESULTS, SimulatorProfile
from nanobanana_async.simulator.specs import ImageSpec, requested_spec

_EPOCH: Final = datetime(2026, 1, 1, tzinfo=UTC)
_NGINX_404: Final = b"<html><head><title>404 Not Found</title></head><body><center>nginx</center></body></html>"
_NGINX_502: Final = b"<html><head><title>502 Bad Gateway</title></head><body><center>nginx</center></body></html>"
_LIBRARY_AGENTS: Final = ("python-httpx", "python-httpx2", "python-requests", "aiohttp", "python-urllib", "curl")


@attrs.frozen(kw_only=True)
class Charge:
    """One submit that was charged.

    Attributes:
        task_id: Task that was charged.
        prompt: Its prompt.
        credits: Amount.
        at_s: When, on the service's clock.
    """

    task_id: str
    prompt: str
    credits: Decimal
    at_s: float


@attrs.frozen(kw_only=True)
class SimulatedResponse:
    """One HTTP response of the service."""

    status: int
    body: bytes
    media_type: str = "application/json"
    headers: Mapping[str, str] = attrs.field(factory=dict[str, str])


@attrs.frozen(kw_only=True)
class SimulatedTask:
    """One task in the service. All of it is fixed when it is accepted. Only the visible status depends on the time."""

    task_id: str
    image: ImageSpec
    accepted_s: float
    latency_s: float
    result_kind: str
    """`"image"`, `"inline"`, `"text"`, `"empty"`, `"failed"` or `"refused"`."""
    flaw: str | None
    """In what its image is not as requested: a rate of `SimulatorProfile`, or None."""
    callback_url: str | None
    price: Decimal
    consumed: str | None
    """What the service states when it is final; None for null."""
    account: str

    @property
    def final_s(self) -> float:
        """When it becomes final, on the service's clock."""
        return self.accepted_s + self.latency_s

    def status(self, now_s: float) -> str:
        """Return the status at *now_s*: pending, submitted and in_progress take 10, 10 and 80 % of the latency."""
        share = (now_s - self.accepted_s) / self.latency_s
        if share >= 1:
            return "failed" if self.result_kind in ("failed", "refused") else "success"
        return "pending" if share < 0.1 else "submitted" if share < 0.2 else "in_progress"


class SimulatedService:
    """The state of the service. `charges` is what tests compare with what a client believes."""

    def __init__(
        self,
        profile: SimulatorProfile,
        *,
        seed: int = 0,
        now_s: Callable[[], float],
        render: Callable[[ImageSpec], bytes],
    ) -> None:
        self.profile = profile
        self.charges: list[Charge] = []
        self.tasks: dict[str, SimulatedTask] = {}
        self.requests: list[str] = []
        """Every request as `"POST /api/image/gen"`, in order of arrival."""
        self.credential_leaks: list[str] = []
        """File requests that carried credentials. It has to stay empty."""
        self._spent = Decimal(0)
        self._rng = Random(seed)
        self._now_s = now_s
        self._render = render

    @property
    def balance(self) -> Decimal:
        """Credits left in the account."""
        return self.profile.balance - self._spent

    def handle(self, method: str, url: str, headers: Mapping[str, str], body: bytes) -> SimulatedResponse:
        """Return the response to one HTTP request. *url* is absolute. Header names are lower case."""
        parts = urlsplit(url)
        self.requests.append(f"{method} {parts.path}")
        if method == "GET" and parts.path.startswith("/files/"):
            return self._file(parts.path, headers)
        key = headers.get("authorization", "").removeprefix("Bearer ")
        known, account = key in self.profile.keys, self.profile.accounts.get(key, "")
        match method, parts.path:
            case "POST", "/api/image/gen":
                return self._submit(body, account) if known else _error_response(401, 1, "Invalid API key")
            case "GET", "/api/task/query" if known:
                task_id = parse_qs(parts.query).get("task_id", [""])[0]
                return self._query(task_id, account, f"{parts.scheme}://{parts.netloc}")
            case "GET", "/api/user" if known:
                return _json_response(200, {"code": 0, "message": "ok", "data": {"credit": str(self.balance)}})
            case "GET", "/api/task/query" | "/api/user":
                return _error_response(401, 401, "Invalid API key")
            case _:
                return SimulatedResponse(status=404, body=_NGINX_404, media_type="text/html")

    def callback_body(self, task: SimulatedTask, files_url: str) -> bytes:
        """Return the body of a callback: the fields of the task without envelope, in final states only."""
        state = self._state(task, files_url)
        keys = ("result", "status", "task_id", "consumed", "status_reason")
        return json.dumps({key: state[key] for key in keys if key in state}).encode()

    def _submit(self, body: bytes, account: str) -> SimulatedResponse:
        # Draw every random number for every submit, so that changing one rate does not shift the others.
        error_draw, kind_draw, spread = self._rng.random(), self._rng.random(), self._rng.gauss(0.0, 1.0)
        task_id = f"ta{UUID(int=self._rng.getrandbits(128), version=4)}"
        profile = self.profile
        try:
            request = json.loads(body)
        except ValueError:
            return _error_response(400, 1, "invalid JSON")
        if problem := _request_error(request):
            return _error_response(400, 1, problem)
        error = self._draw_error(error_draw)
        if error is not None and error not in _CHARGED_ERRORS:
            return _ERRORS[error]
        price = profile.size_prices.get(str(request.get("image_size")), profile.price)
        if self.balance < price:
            return _error_response(402, 1, "insufficient credit")
        kind = self._draw_result_kind(kind_draw)
        flaw = self._draw_flaw()
        task = SimulatedTask(
            task_id=task_id,
            image=requested_spec(request).with_flaw(flaw),
            accepted_s=self._now_s(),
            latency_s=profile.median_s * math.exp(profile.sigma * spread),
            result_kind=kind,
            flaw=flaw,
            callback_url=request.get("callback_url"),
            price=price,
            consumed=self._draw_consumed(kind, price),
            account=account,
        )
        self.tasks[task_id] = task
        is_free = kind in _WITHOUT_IMAGE and profile.failed_charge == "zero"
        cost = Decimal(0) if is_free else price
        charge = Charge(task_id=task_id, prompt=task.image.prompt, credits=cost, at_s=task.accepted_s)
        self.charges.append(charge)
        self._spent += charge.credits
        if error is not None:
            return _ERRORS[error]
        return _json_response(200, {"code": 0, "message": "ok", "data": {"task_id": task_id}})

    def _draw_error(self, draw: float) -> str | None:
        """Return the name of the rate that *draw* falls into, or None."""
        for name in _ERRORS:
            rate: float = getattr(self.profile, name)
            if draw < rate:
                return name
            draw -= rate
        return None

    def _draw_consumed(self, kind: str, price: Decimal) -> str | None:
        if kind in ("image", "inline"):
            is_unstated = self.profile.unstated_charges and self._rng.random() < self.profile.unstated_charges
            return None if is_unstated else f"{price:.6f}"
        return {"zero": "0.000000", "price": f"{price:.6f}"}.get(self.profile.failed_charge)

    def _draw_result_kind(self, draw: float) -> str:
        for name, kind in RESULTS.items():
            rate: float = getattr(self.profile, name)
            if draw < rate:
                return kind
            draw -= rate
        return "image"

    def _draw_flaw(self) -> str | None:
        rates: list[float] = [getattr(self.profile, name) for name in FLAWS]
        if not any(rates):
            return None
        draw = self._rng.random()
        for name, rate in zip(FLAWS, rates, strict=True):
            if draw < rate:
                return name
            draw -= rate
        return None

    def _query(self, task_id: str, account: str, files_url: str) -> SimulatedResponse:
        task = self.tasks.get(task_id)
        if task is None or task.account != account or self._now_s() - task.accepted_s < self.profile.visibility_delay_s:
            return _error_response(404, 1, "task not found")
        return _json_response(200, {"code": 0, "message": "ok", "data": self._state(task, files_url)})

    def _state(self, task: SimulatedTask, files_url: str) -> dict[str, object]:
        status = task.status(self._now_s())
        result: list[dict[str, str]] | None = None
        if status == "success":
            result = [] if task.result_kind == "empty" else [self._item(task, files_url)]
        state: dict[str, object] = {
            "task_id": task.task_id,
            "status": status,
            "result": result,
            "consumed": None if result is None and status != "failed" else task.consumed,
            "created_at": (_EPOCH + timedelta(seconds=task.accepted_s)).isoformat(),
            "status_reason": {"message": _REASONS[task.result_kind] if status == "failed" else None},
        }
        if task.result_kind in _WITHOUT_IMAGE and self.profile.failed_charge == "missing":
            del state["consumed"]
        return state

    def _item(self, task: SimulatedTask, files_url: str) -> dict[str, str]:
        if task.result_kind == "text":
            return {"text": "I would rather describe it in words."}
        if task.result_kind == "inline":
            return {"image": f"data:image/png;base64,{b64encode(self._rendered(task)).decode()}"}
        return {"image": f"{files_url}/files/{task.task_id}.png"}

    def _file(self, path: str, headers: Mapping[str, str]) -> SimulatedResponse:
        if "authorization" in headers or "cookie" in headers:
            self.credential_leaks.append(path)
        if headers.get("user-agent", "curl").lower().startswith(_LIBRARY_AGENTS):
            return SimulatedResponse(status=403, body=b"error code: 1010", media_type="text/plain")
        task = self.tasks.get(path.removeprefix("/files/").removesuffix(".png"))
        if task is None or task.status(self._now_s()) != "success":
            return SimulatedResponse(status=404, body=_NGINX_404, media_type="text/html")
        return SimulatedResponse(status=200, body=self._rendered(task), media_type="image/png")

    def _rendered(self, task: SimulatedTask) -> bytes:
        data = self._render(task.image)
        return data[: len(data) * 3 // 4] if task.flaw == "truncated_images" else data


def _request_error(request: object) -> str | None:
    """Return the `detail` of a 400 for an invalid request, or None."""
    if not isinstance(request, dict):
        return "a JSON object is required"
    fields = cast("dict[str, object]", request)
    for name in ("prompt", "model"):
        text = fields.get(name)
        if not isinstance(text, str) or not text.strip():
            return f"{name} is required"
    images = fields.get("images", [])
    if not isinstance(images, list) or len(cast("list[object]", images)) > 4:
        return "images: at most 4 are allowed"
    if not all(
        isinstance(image, str) and image.startswith(("https://", "http://", "data:"))
        for image in cast("list[object]", images)
    ):
        return "images: a URL or a data URI is required"
    return None


def _json_response(status: int, document: object) -> SimulatedResponse:
    return SimulatedResponse(status=status, body=json.dumps(document).encode())


def _error_response(status: int, code: int, detail: str) -> SimulatedResponse:
    return _json_response(status, {"code": code, "message": "failed", "detail": detail})


_ERRORS: Final[Mapping[str, SimulatedResponse]] = {
    "rate_limited": attrs.evolve(_error_response(429, 1, "too many requests"), headers={"retry-after": "1"}),
    "server_errors": _error_response(500, 1, "internal error"),
    "lost_responses": SimulatedResponse(status=502, body=_NGINX_502, media_type="text/html"),
    "charged_errors": _error_response(500, 1, "internal error"),
    "charged_timeouts": SimulatedResponse(status=408, body=b"", media_type="text/html"),
    "captive_portals": SimulatedResponse(
        status=302, body=b"", media_type="text/html", headers={"location": "https://login.portal.example/"}
    ),
}
"""Responses by the name of their rate, in the order in which they are drawn."""
_CHARGED_ERRORS: Final = ("lost_responses", "charged_errors", "charged_timeouts")
_WITHOUT_IMAGE: Final = ("failed", "text", "refused", "empty")
_REASONS: Final = {
    "failed": "the image could not be generated, please try again later",
    "refused": "The prompt was blocked: PROHIBITED_CONTENT, it violates our content policy",
}
