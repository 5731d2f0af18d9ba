"""The simulator behaves as documented, and records what was charged."""

import io
import json
from decimal import Decimal
from typing import Any

import anyio
import pytest
from PIL import Image

from nanobanana_async import NanoBananaClient, TaskStatus
from nanobanana_async.simulator import FAST_POLLING, FAST_PROFILE, Simulator, SimulatorProfile
from nanobanana_async.simulator.in_memory import tiny_png
from nanobanana_async.simulator.render import render_png
from nanobanana_async.simulator.server import SimulatorServer
from nanobanana_async.simulator.service import SimulatedResponse, SimulatedService
from nanobanana_async.simulator.specs import ImageSpec
from tests.raw_server import response, sending, serving

pytestmark = pytest.mark.other_clients

KEY = {"authorization": "Bearer dk-test"}


class ManualService:
    """A simulated service with a manual clock."""

    def __init__(self, *, seed: int = 0, **profile: Any) -> None:  # noqa: ANN401 - any field of the profile
        self.now_s = 0.0
        settings = {"median_s": 10.0, "sigma": 0.0, "visibility_delay_s": 1.0, **profile}
        self.service = SimulatedService(
            SimulatorProfile(**settings), seed=seed, now_s=lambda: self.now_s, render=tiny_png
        )

    def submit(self, fields: dict[str, object] | None = None, *, key: dict[str, str] = KEY) -> SimulatedResponse:
        """Submit a request, by default a valid one."""
        body = json.dumps({"model": "google/gempix2", "prompt": "a fox", **(fields or {})}).encode()
        return self.service.handle("POST", "https://api.example/api/image/gen", key, body)

    def query(self, task_id: str, key: dict[str, str] = KEY) -> SimulatedResponse:
        """Query a task."""
        return self.service.handle("GET", f"https://api.example/api/task/query?task_id={task_id}", key, b"")


def data(received: SimulatedResponse) -> dict[str, object]:
    """Return the `data` of a response."""
    document: dict[str, dict[str, object]] = json.loads(received.body)
    return document["data"]


def test_a_task_goes_through_all_its_states() -> None:
    """A task is invisible, pending, submitted, in_progress and success. Only the last state has a result."""
    simulated = ManualService()
    task_id = str(data(simulated.submit())["task_id"])
    assert simulated.query(task_id).status == 404
    seen = []
    for simulated.now_s in (1.0, 1.5, 5.0, 9.9, 10.0):
        seen.append((data(simulated.query(task_id))["status"], data(simulated.query(task_id))["result"] is None))
    assert seen == [
        ("submitted", True),
        ("submitted", True),
        ("in_progress", True),
        ("in_progress", True),
        ("success", False),
    ]


@pytest.mark.parametrize(
    ("fields", "detail"),
    [
        ({"prompt": ""}, "prompt is required"),
        ({"prompt": None}, "prompt is required"),
        ({"model": ""}, "model is required"),
        ({"images": ["https://a.example/1.png"] * 5}, "at most 4"),
        ({"images": ["fox.png"]}, "a URL or a data URI"),
    ],
)
def test_invalid_requests_get_a_400_and_cost_nothing(fields: dict[str, object], detail: str) -> None:
    """The body is the documented envelope."""
    simulated = ManualService()
    received = simulated.submit(fields)
    assert received.status == 400
    assert json.loads(received.body)["code"] == 1
    assert detail in json.loads(received.body)["detail"]
    assert simulated.service.charges == []


def test_a_wrong_key_is_code_1_at_submit_and_code_401_at_query() -> None:
    """The codes are those of the documentation."""
    simulated = ManualService()
    responses = [simulated.submit(key={}), simulated.query("ta-1", key={})]
    assert [(received.status, json.loads(received.body)["code"]) for received in responses] == [
        (401, 1),
        (401, 401),
    ]


def test_every_accepted_submit_is_charged_until_the_account_is_empty() -> None:
    """`charges` lists every charge."""
    simulated = ManualService(balance=Decimal("1.2"), price=Decimal("0.5"))
    assert [simulated.submit().status for _ in range(4)] == [200, 200, 402, 402]
    assert (len(simulated.service.charges), simulated.service.balance) == (2, Decimal("0.2"))


@pytest.mark.parametrize(
    ("rate", "status"),
    [({"failed_tasks": 1.0}, "failed"), ({"text_only": 1.0}, "success"), ({"inline_images": 1.0}, "success")],
)
def test_result_rates_are_applied(rate: dict[str, Any], status: str) -> None:
    """Failures, text without images, and inline images occur at the given rates."""
    simulated = ManualService(**rate)
    task_id = str(data(simulated.submit())["task_id"])
    simulated.now_s = 20
    state = data(simulated.query(task_id))
    assert state["status"] == status
    assert ("image" in str(state["result"])) is ("inline_images" in rate)


def test_error_rates_are_applied_and_not_charged() -> None:
    """The service's own 500, and a 429 with Retry-After, cost nothing."""
    assert ManualService(server_errors=1.0).submit().status == 500
    busy = ManualService(rate_limited=1.0)
    assert (busy.submit().status, busy.submit().headers) == (429, {"retry-after": "1"})
    assert busy.service.charges == []


def test_the_same_seed_gives_the_same_service() -> None:
    """Ids, latencies and errors are equal."""
    runs = [
        [(ManualService(seed=seed, failed_tasks=0.5, sigma=0.5)).submit().body for _ in range(3)] for seed in (1, 1, 2)
    ]
    assert runs[0] == runs[1] != runs[2]


def test_the_file_host_rejects_library_user_agents_and_records_leaks() -> None:
    """A test can assert that no credentials were sent."""
    simulated = ManualService()
    task_id = str(data(simulated.submit())["task_id"])
    simulated.now_s = 20
    url = f"https://api.example/files/{task_id}.png"
    assert simulated.service.handle("GET", url, {"user-agent": "python-httpx/0.28.1"}, b"").status == 403
    assert simulated.service.handle("GET", url, {"user-agent": "mine/1", **KEY}, b"").status == 200
    assert simulated.service.credential_leaks == [f"/files/{task_id}.png"]


@pytest.mark.parametrize("text", ["nonsense=1", "failed_tasks=2", "failed_tasks=x"])
def test_an_unknown_fault_is_rejected(text: str) -> None:
    """A misspelt name is an error."""
    with pytest.raises(ValueError, match=r"faults|failed|could not convert"):
        SimulatorProfile.from_faults(text)


@pytest.mark.parametrize(("ratio", "size"), [("16:9", (1024, 576)), ("1:1", (1024, 1024)), ("9:16", (576, 1024))])
def test_a_rendered_image_is_a_png_of_the_requested_size(ratio: str, size: tuple[int, int]) -> None:
    """The image has more than one colour."""
    width, height = size
    image = Image.open(io.BytesIO(render_png(ImageSpec(prompt="a fox " * 60, width=width, height=height))))
    assert (image.format, image.size) == ("PNG", size)
    assert len(image.getcolors(maxcolors=2**24) or []) > 100


@pytest.mark.anyio
async def test_the_in_memory_service_has_the_same_wire_format(nanobanana_simulator: Simulator) -> None:
    """A client cannot tell it from the server."""
    async with nanobanana_simulator.client() as client:
        assert (await client.generate("a fox")).status is TaskStatus.SUCCESS
    assert len(nanobanana_simulator.charges) == 1


@pytest.mark.anyio
async def test_the_service_on_a_port_is_found_through_the_environment(nanobanana_server: SimulatorServer) -> None:
    """The fixture sets the variables that a program reads."""
    async with NanoBananaClient(polling=FAST_POLLING) as client:
        task = await client.generate("a fox")
        assert (await client.download(task.images[0])).startswith(b"\x89PNG")
    assert len(nanobanana_server.service.charges) == 1
    assert nanobanana_server.service.credential_leaks == []


@pytest.mark.anyio
async def test_callbacks_are_posted_when_a_task_is_final() -> None:
    """The body is flat JSON with a final status."""
    with serving(sending(response(b"ok"))) as hook, SimulatorServer(FAST_PROFILE) as server:
        async with NanoBananaClient("dk-test", base_url=server.url, polling=FAST_POLLING) as client:
            task = await client.generate("a fox", callback_url=f"{hook.url}/hook/token")
            with anyio.fail_after(5):
                while not hook.requests:
                    await anyio.sleep(0.01)
    head, _, body = hook.requests[0].partition(b"\r\n\r\n")
    assert head.startswith(b"POST /hook/token")
    posted = json.loads(body)
    assert (posted["task_id"], posted["status"]) == (task.task_id, "success")
    assert set(posted) == {"result", "status", "task_id", "consumed", "status_reason"}


def test_a_wrap_that_returns_nothing_is_an_error() -> None:
    """Without a transport the client would use the network."""
    with pytest.raises(TypeError, match="wrap: expected"):
        Simulator().client(wrap=lambda _: None)  # type: ignore[arg-type,return-value]
