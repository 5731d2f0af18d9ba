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
from typing import Final, Literal, cast
from urllib.parse import parse_qs, urlsplit
from uuid import UUID

import attrs
from attrs.validators import and_, ge, gt, in_, le

_EPOCH: Final = datetime(2026, 1, 1, tzinfo=UTC)
_NGINX_404: Final = b"<html><head><title>404 Not Found</title></head><body><center>nginx</center></body></html>"
_NGINX_502: Final = b"<html><head><title>502 Bad Gateway</title></head><body><center>nginx</center></body></html>"
_LIBRARY_AGENTS: Final = ("python-httpx", "python-httpx2", "python-requests", "aiohttp", "python-urllib", "curl")


def _rate() -> float:
    return attrs.field(default=0.0, validator=and_(ge(0), le(1)))


@attrs.frozen(kw_only=True)
class SimulatorProfile:
    """Behaviour of the simulated service. Rates are fractions of submits, in [0, 1].

    Attributes:
        median_s: Median of the lognormal latency of a task (the real service: 8 to 60 s).
        sigma: Spread of the latency: the standard deviation of its logarithm.
        visibility_delay_s: Time for which a new id returns 404 (the real service: up to 30 s).
        failed_tasks: Rate of tasks that end as failed.
        text_only: Rate of tasks that end as success, with text and without an image.
        inline_images: Rate of tasks whose image is a data URI.
        server_errors: Rate of submits that get the service's own 500 and are not charged.
        rate_limited: Rate of submits that get a 429 with Retry-After: 1.
        lost_responses: Rate of submits that are charged and get a gateway's 502.
        charged_errors: Rate of submits that are charged and get the service's own 500.
        charged_timeouts: Rate of submits that are charged and get a gateway's 408.
        captive_portals: Rate of submits that get a redirect to a login page and are not charged.
        unstated_charges: Rate of tasks with an image whose `consumed` is null.
        price: Price of an image, in credits.
        size_prices: Price by `image_size`; `price` for others.
        failed_charge: `consumed` of tasks without an image. They are charged, except with `"zero"`, which gives
            the credits back.
        balance: Credits of the account at first.
        keys: API keys that are accepted.
        accounts: Account by key, whose tasks only its own keys can query. Keys that are not listed share one.
    """

    median_s: float = attrs.field(default=20.0, validator=gt(0))
    sigma: float = attrs.field(default=0.5, validator=ge(0))
    visibility_delay_s: float = attrs.field(default=1.0, validator=ge(0))
    failed_tasks: float = _rate()
    text_only: float = _rate()
    inline_images: float = _rate()
    server_errors: float = _rate()
    rate_limited: float = _rate()
    lost_responses: float = _rate()
    charged_errors: float = _rate()
    charged_timeouts: float = _rate()
    captive_portals: float = _rate()
    unstated_charges: float = _rate()
    price: Decimal = Decimal("0.5")
    size_prices: Mapping[str, Decimal] = attrs.field(factory=dict[str, Decimal])
    failed_charge: Literal["null", "missing", "zero", "price"] = attrs.field(
        default="null", validator=in_(("null", "missing", "zero", "price"))
    )
    balance: Decimal = Decimal(100_000)
    keys: frozenset[str] = frozenset({"dk-test"})
    accounts: Mapping[str, str] = attrs.field(factory=dict[str, str])

    @classmethod
    def from_faults(cls, text: str, **settings: object) -> "SimulatorProfile":
        """Return a profile with rates from text such as `"failed_tasks=0.05,inline_images=0.2"`.

        Raises:
            ValueError: A name is unknown, or a rate is not a number in [0, 1].
        """
        known = (*_ERRORS, "failed_tasks", "text_only", "inline_images", "unstated_charges")
        rates: dict[str, float] = {}
        for part in filter(None, (item.strip() for item in text.split(","))):
            name, _, value = part.partition("=")
            if name not in known:
                raise ValueError(f"faults: expected one of {', '.join(sorted(known))}, got {name!r}")
            rates[name] = float(value or 1)
        return cls(**rates, **settings)  # type: ignore[arg-type]  # both are float fields


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
class ImageSpec:
    """Prompt and size of an image to render."""

    prompt: str
    width: int
    height: int


@attrs.frozen(kw_only=True)
class SimulatedTask:
    """One task in the service. All of it is fixed when it is accepted. Only the visible status depends on the time."""

    task_id: str
    image: ImageSpec
    accepted_s: float
    latency_s: float
    result_kind: str
    """`"image"`, `"inline"`, `"text"` or `"failed"`."""
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
            return "failed" if self.result_kind == "failed" else "success"
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
        task = SimulatedTask(
            task_id=task_id,
            image=_image_spec(request),
            accepted_s=self._now_s(),
            latency_s=profile.median_s * math.exp(profile.sigma * spread),
            result_kind=kind,
            callback_url=request.get("callback_url"),
            price=price,
            consumed=self._draw_consumed(kind, price),
            account=account,
        )
        self.tasks[task_id] = task
        is_free = kind in ("failed", "text") and profile.failed_charge == "zero"
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
        for name, rate in (
            ("failed", self.profile.failed_tasks),
            ("text", self.profile.text_only),
            ("inline", self.profile.inline_images),
        ):
            if draw < rate:
                return name
            draw -= rate
        return "image"

    def _query(self, task_id: str, account: str, files_url: str) -> SimulatedResponse:
        task = self.tasks.get(task_id)
        if task is None or task.account != account or self._now_s() - task.accepted_s < self.profile.visibility_delay_s:
            return _error_response(404, 1, "task not found")
        return _json_response(200, {"code": 0, "message": "ok", "data": self._state(task, files_url)})

    def _state(self, task: SimulatedTask, files_url: str) -> dict[str, object]:
        status = task.status(self._now_s())
        result: list[dict[str, str]] | None = None
        if status == "success":
            result = [self._item(task, files_url)]
        state: dict[str, object] = {
            "task_id": task.task_id,
            "status": status,
            "result": result,
            "consumed": None if result is None and status != "failed" else task.consumed,
            "created_at": (_EPOCH + timedelta(seconds=task.accepted_s)).isoformat(),
            "status_reason": {"message": "the prompt was rejected" if status == "failed" else None},
        }
        if task.result_kind in ("failed", "text") and self.profile.failed_charge == "missing":
            del state["consumed"]
        return state

    def _item(self, task: SimulatedTask, files_url: str) -> dict[str, str]:
        if task.result_kind == "text":
            return {"text": "I would rather describe it in words."}
        if task.result_kind == "inline":
            return {"image": f"data:image/png;base64,{b64encode(self._render(task.image)).decode()}"}
        return {"image": f"{files_url}/files/{task.task_id}.png"}

    def _file(self, path: str, headers: Mapping[str, str]) -> SimulatedResponse:
        if "authorization" in headers or "cookie" in headers:
            self.credential_leaks.append(path)
        if headers.get("user-agent", "curl").lower().startswith(_LIBRARY_AGENTS):
            return SimulatedResponse(status=403, body=b"error code: 1010", media_type="text/plain")
        task = self.tasks.get(path.removeprefix("/files/").removesuffix(".png"))
        if task is None or task.status(self._now_s()) != "success":
            return SimulatedResponse(status=404, body=_NGINX_404, media_type="text/html")
        return SimulatedResponse(status=200, body=self._render(task.image), media_type="image/png")


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


def _image_spec(request: Mapping[str, object]) -> ImageSpec:
    """Return prompt and size: 1k, 2k or 4k is the longer side, and the ratio is N:M."""
    longer = {"2k": 2048, "4k": 4096}.get(str(request.get("image_size")), 1024)
    wide, _, high = str(request.get("aspect_ratio", "1:1")).partition(":")
    ratio = int(wide) / int(high) if wide.isdigit() and high.isdigit() and int(high) else 1.0
    ratio = min(max(ratio, 0.25), 4.0)
    width, height = (longer, round(longer / ratio)) if ratio >= 1 else (round(longer * ratio), longer)
    return ImageSpec(prompt=str(request["prompt"]), width=width, height=height)


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
