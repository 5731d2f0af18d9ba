"""The client on the httpx level, as in a user's tests that mock httpx with respx."""

import json

import anyio
import httpx
import pytest
import respx

from nanobanana_async import HttpxTransport, NanoBananaClient, NotSent, PollPolicy, SubmissionUnknown
from tests.fakes import PNG, accepted, finished

pytestmark = pytest.mark.anyio

QUICK = PollPolicy.backoff(first_poll_s=0.01, initial_s=0.01, max_s=0.01)
API = "https://api.defapi.org"


@pytest.fixture
def service() -> respx.MockRouter:
    """Mock the three endpoints and a file host."""
    router = respx.mock(assert_all_called=False)
    router.post(f"{API}/api/image/gen").respond(200, content=accepted().body)
    router.get(f"{API}/api/task/query", params={"task_id": "ta-1"}).respond(
        200, content=finished(url="https://1.1.1.1/fox.png?sig=s").body
    )
    router.get(f"{API}/api/user").respond(200, json={"code": 0, "message": "ok", "data": {"credit": "7.25"}})
    router.get("https://1.1.1.1/fox.png").respond(200, content=PNG)
    return router


async def test_an_image_is_submitted_queried_and_downloaded(service: respx.MockRouter) -> None:
    """Each request has the headers that the service and the file host expect."""
    async with service, NanoBananaClient("dk-1", polling=QUICK) as client:
        task = await client.generate("a fox", aspect_ratio="16:9")
        assert await client.download(task.images[0]) == PNG
        assert str(await client.balance()) == "7.25"
        calls = list(service.calls)
    submit, query, fetch, balance = (call.request for call in calls)
    assert json.loads(submit.content) == {"model": "google/gempix2", "prompt": "a fox", "aspect_ratio": "16:9"}
    for request in (submit, query, balance):
        assert request.headers["authorization"] == "Bearer dk-1"
        assert request.headers["accept-encoding"] == "identity"
    assert "authorization" not in fetch.headers
    assert "cookie" not in fetch.headers
    assert all(call.request.headers["user-agent"].startswith("nanobanana-async/") for call in calls)


async def test_a_client_that_was_passed_in_is_used_and_not_closed(service: respx.MockRouter) -> None:
    """The client works the same over the user's httpx client."""
    async with service, httpx.AsyncClient() as mine:
        async with NanoBananaClient("dk-1", polling=QUICK, transport=HttpxTransport(mine)) as client:
            assert (await client.generate("a fox")).is_final
        assert not mine.is_closed


@pytest.mark.parametrize(
    ("error", "expected", "posts"),
    [
        (httpx.ConnectError, NotSent, 3),
        (httpx.ConnectTimeout, NotSent, 3),
        (httpx.PoolTimeout, NotSent, 3),
        (httpx.ProxyError, NotSent, 3),
        (httpx.WriteTimeout, SubmissionUnknown, 1),
        (httpx.WriteError, SubmissionUnknown, 1),
        (httpx.ReadError, SubmissionUnknown, 1),
        (httpx.ReadTimeout, SubmissionUnknown, 1),
        (httpx.RemoteProtocolError, SubmissionUnknown, 1),
        (httpx.DecodingError, SubmissionUnknown, 1),
        (ValueError, SubmissionUnknown, 1),
    ],
)
async def test_only_failures_that_prove_it_was_not_sent_are_retried(
    error: type[Exception], expected: type[Exception], posts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every exception that httpx raises for a submit is listed."""

    async def no_sleep(_: float) -> None:
        await anyio.lowlevel.checkpoint()

    monkeypatch.setattr("nanobanana_async.api.operations.anyio.sleep", no_sleep)
    async with respx.mock as router, NanoBananaClient("dk-1") as client:
        route = router.post(f"{API}/api/image/gen").mock(side_effect=error("boom"))
        with pytest.raises(expected) as caught:
            await client.submit("a fox")
    assert (type(caught.value), route.call_count) == (expected, posts)
