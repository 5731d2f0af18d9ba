"""The played service behaves as the wire notes say, and owns the truth about what was charged."""

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
from nanobanana_async.simulator.service import ImageSpec, SimulatedResponse, SimulatedService
from tests.raw_server import response, saying, serving

pytestmark = pytest.mark.other_clients

KEY = {"authorization": "Bearer dk-test"}


class ManualService:
    """A vendor with a clock that is moved by hand."""

    def __init__(self, *, seed: int = 0, **profile: Any) -> None:  # noqa: ANN401 - any field of the profile
        self.now_s = 0.0
        settings = {"median_s": 10.0, "sigma": 0.0, "visibility_delay_s": 1.0, **profile}
        self.service = SimulatedService(
            SimulatorProfile(**settings), seed=seed, now_s=lambda: self.now_s, render=tiny_png
        )

    def submit(self, fields: dict[str, object] | None = None, *, key: dict[str, str] = KEY) -> SimulatedResponse:
        """Submit; by default something good."""
        body = json.dumps({"model": "google/gempix2", "prompt": "a fox", **(fields or {})}).encode()
        return self.service.handle("POST", "https://api.example/api/image/gen", key, body)

    def query(self, task_id: str, key: dict[str, str] = KEY) -> SimulatedResponse:
        """Ask how it stands."""
        return self.service.handle("GET", f"https://api.example/api/task/query?task_id={task_id}", key, b"")


def data(answer: SimulatedResponse) -> dict[str, object]:
    """Return the `data` of an answer."""
    document: dict[str, dict[str, object]] = json.loads(answer.body)
    return document["data"]


def test_a_task_goes_through_all_its_states() -> None:
    """Invisible first, then pending, submitted, in_progress and success, with a result only at the end."""
    played = ManualService()
    task_id = str(data(played.submit())["task_id"])
    assert played.query(task_id).status == 404
    seen = []
    for played.now_s in (1.0, 1.5, 5.0, 9.9, 10.0):
        seen.append((data(played.query(task_id))["status"], data(played.query(task_id))["result"] is None))
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
def test_bad_requests_are_answered_with_400_and_cost_nothing(fields: dict[str, object], detail: str) -> None:
    """In the documented envelope."""
    played = ManualService()
    answer = played.submit(fields)
    assert answer.status == 400
    assert json.loads(answer.body)["code"] == 1
    assert detail in json.loads(answer.body)["detail"]
    assert played.service.charges == []


def test_a_wrong_key_is_code_1_at_submit_and_code_401_at_query() -> None:
    """As documented."""
    played = ManualService()
    answers = [played.submit(key={}), played.query("ta-1", key={})]
    assert [(answer.status, json.loads(answer.body)["code"]) for answer in answers] == [(401, 1), (401, 401)]


def test_every_accepted_submit_is_charged_once_and_the_account_runs_dry() -> None:
    """The truth that conformance tests compare with."""
    played = ManualService(balance=Decimal("1.2"), price=Decimal("0.5"))
    assert [played.submit().status for _ in range(4)] == [200, 200, 402, 402]
    assert (len(played.service.charges), played.service.balance) == (2, Decimal("0.2"))


@pytest.mark.parametrize(
    ("rate", "status"),
    [({"failed_tasks": 1.0}, "failed"), ({"text_only": 1.0}, "success"), ({"inline_images": 1.0}, "success")],
)
def test_scripted_ends_are_played(rate: dict[str, Any], status: str) -> None:
    """Failures without a reason, words without a picture, pictures without a URL."""
    played = ManualService(**rate)
    task_id = str(data(played.submit())["task_id"])
    played.now_s = 20
    state = data(played.query(task_id))
    assert state["status"] == status
    assert ("image" in str(state["result"])) is ("inline_images" in rate)


def test_scripted_troubles_are_played_and_not_charged() -> None:
    """The vendor's own 500, and 429 with Retry-After."""
    assert ManualService(server_errors=1.0).submit().status == 500
    busy = ManualService(rate_limited=1.0)
    assert (busy.submit().status, busy.submit().headers) == (429, {"retry-after": "1"})
    assert busy.service.charges == []


def test_the_same_seed_plays_the_same_service() -> None:
    """Ids, times and troubles."""
    runs = [
        [(ManualService(seed=seed, failed_tasks=0.5, sigma=0.5)).submit().body for _ in range(3)] for seed in (1, 1, 2)
    ]
    assert runs[0] == runs[1] != runs[2]


def test_the_file_host_refuses_library_user_agents_and_notes_leaked_keys() -> None:
    """As the real one does; and a test can prove that nothing leaked."""
    played = ManualService()
    task_id = str(data(played.submit())["task_id"])
    played.now_s = 20
    url = f"https://api.example/files/{task_id}.png"
    assert played.service.handle("GET", url, {"user-agent": "python-httpx/0.28.1"}, b"").status == 403
    assert played.service.handle("GET", url, {"user-agent": "mine/1", **KEY}, b"").status == 200
    assert played.service.credential_leaks == [f"/files/{task_id}.png"]


@pytest.mark.parametrize("text", ["nonsense=1", "failed_tasks=2", "failed_tasks=x"])
def test_a_fault_that_cannot_be_played_is_refused(text: str) -> None:
    """Instead of being ignored."""
    with pytest.raises(ValueError, match=r"faults|failed|could not convert"):
        SimulatorProfile.from_faults(text)


@pytest.mark.parametrize(("ratio", "size"), [("16:9", (1024, 576)), ("1:1", (1024, 1024)), ("9:16", (576, 1024))])
def test_a_painting_is_a_real_png_of_the_ordered_size(ratio: str, size: tuple[int, int]) -> None:
    """And shows more than one colour."""
    width, height = size
    image = Image.open(io.BytesIO(render_png(ImageSpec(prompt="a fox " * 60, width=width, height=height))))
    assert (image.format, image.size) == ("PNG", size)
    assert len(image.getcolors(maxcolors=2**24) or []) > 100


@pytest.mark.anyio
async def test_the_service_in_memory_speaks_the_same_wire(nanobanana_simulator: Simulator) -> None:
    """A client cannot tell the difference."""
    async with nanobanana_simulator.client() as client:
        assert (await client.generate("a fox")).status is TaskStatus.SUCCESS
    assert len(nanobanana_simulator.charges) == 1


@pytest.mark.anyio
async def test_the_service_on_a_port_is_found_through_the_environment(nanobanana_server: SimulatorServer) -> None:
    """The fixture sets what a program under test reads."""
    async with NanoBananaClient(polling=FAST_POLLING) as client:
        task = await client.generate("a fox")
        assert (await client.download(task.images[0])).startswith(b"\x89PNG")
    assert len(nanobanana_server.service.charges) == 1
    assert nanobanana_server.service.credential_leaks == []


@pytest.mark.anyio
async def test_callbacks_are_posted_when_a_task_is_final() -> None:
    """Flat JSON, final states only."""
    with serving(saying(response(b"ok"))) as hook, SimulatorServer(FAST_PROFILE) as server:
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
