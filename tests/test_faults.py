"""Every fault of the table over real sockets, on POST and GET, on asyncio and trio, and its cost."""

import contextlib
import subprocess
import sys
from base64 import b64encode
from collections.abc import Iterator

import anyio
import pytest

from nanobanana_async import NanoBananaClient, SubmissionUnknown, Task
from nanobanana_async.models import GenerationRequest
from tests.fakes import PNG
from tests.faults.table import FAULTS
from tests.faults.trial import DEADLINES, QUICK, RUNS, FaultServer, fault_server, try_all
from tests.raw_server import response, serving


@pytest.fixture(scope="module")
def server() -> Iterator[FaultServer]:
    """Yield one server for the module."""
    with fault_server() as server:
        yield server


@pytest.mark.slow
@pytest.mark.parametrize(("transport", "backend"), RUNS)
def test_every_fault_ends_as_the_table_says(server: FaultServer, transport: str, backend: str) -> None:
    """The verdict, its agreement with the charges, the end of a query and the deadline are those of the table."""
    problems: list[str] = []
    for fault, (post, query) in anyio.run(try_all, server, FAULTS, transport, backend=backend).items():
        name = f"{fault.number} {fault.name}"
        if post.verdict not in fault.post.split(" or "):
            problems.append(f"{name}: submit ended as {post.verdict}, not as {fault.post}: {post.message}")
        if post.seconds > DEADLINES.submit_s + 1:
            problems.append(f"{name}: submit took {post.seconds} s")
        if not post.conforms:
            problems.append(f"{name}: {post.verdict} with {post.charges} charges")
        if query.ending != fault.get:
            problems.append(f"{name}: query ended as {query.ending}, not as {fault.get}: {query.message}")
    assert problems == []


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["httpx", "aiohttp"])
def test_no_response_takes_more_memory_than_its_limit(transport: str) -> None:
    """A gibibyte, an endless body and compression bombs need less than 64 MiB together."""
    code = (
        "import anyio, resource\n"
        "from tests.faults.trial import *\n"
        "wanted = [fault for fault in FAULTS if fault.number in ('F19', 'F20', 'F21')]\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
        "with fault_server() as server:\n"
        f"    anyio.run(try_all, server, wanted[-1:], {transport!r})\n"
        "    before = peak()\n"
        f"    anyio.run(try_all, server, [fault for fault in wanted if fault.number != 'F19'], {transport!r})\n"
        "    bombs = peak()\n"
        "    for fault in wanted:\n"
        f"        if fault.number == 'F19': anyio.run(try_post, server, fault, {transport!r})\n"
        "print(bombs - before, peak() - before)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)  # noqa: S603 - started here
    bombs_mib, all_mib = map(int, ran.stdout.split())
    assert bombs_mib < 32
    assert all_mib < 32


@pytest.mark.slow
@pytest.mark.anyio
async def test_an_upload_that_is_never_read_is_unknown_in_time(server: FaultServer) -> None:
    """A part of an upload that the server never reads may have arrived."""
    (hang,) = (fault for fault in FAULTS if fault.listener == "hang")
    url = server.url(hang, times=99, nonce="upload")
    request = GenerationRequest("a fox", images=[f"data:image/png;base64,{b64encode(PNG + bytes(4_000_000)).decode()}"])
    async with NanoBananaClient("dk-test", base_url=url, retry=QUICK, timeouts=DEADLINES) as client:
        with anyio.fail_after(DEADLINES.submit_s + 1), pytest.raises(SubmissionUnknown):
            await client.submit(request)


@pytest.mark.slow
@pytest.mark.anyio
async def test_idle_connections_that_the_server_closes_cost_nothing() -> None:
    """Submits use new connections and queries are retried, so there is no error."""
    good = response(b'{"code":0,"message":"ok","data":{"task_id":"ta-1","status":"pending"}}')

    def serve_with_idle_limit(peer: object, _: bytes) -> None:
        with contextlib.suppress(OSError):
            peer.sendall(good)  # type: ignore[attr-defined]
            peer.settimeout(0.02)  # type: ignore[attr-defined]  # the next read gives up, and the connection is closed

    with serving(serve_with_idle_limit) as idle:
        async with NanoBananaClient("dk-test", base_url=idle.url, retry=QUICK) as client:
            for round_ in range(40):
                assert (await client.submit("a fox")).task_id == "ta-1"
                assert isinstance(await client.task("ta-1").query(), Task)
                await anyio.sleep(0.0195 + 0.00005 * round_)
    assert sum(request.startswith(b"POST") for request in idle.requests) == 40
