"""B3: a process that was stopped (Ctrl-Z, `docker pause`, suspend) still takes the responses that arrived meanwhile."""

import os
import signal
import socket
import subprocess
import sys
import time

import anyio
import pytest

from nanobanana_async import NanoBananaClient, SubmissionUnknown, Timeouts, WireRequest, WireResponse
from nanobanana_async._concurrency.timeouts import run_within
from tests.fakes import accepted, script
from tests.raw_server import response, serving
from tests.virtual_time import jump

_BODY = b'{"code":0,"message":"ok","data":{"task_id":"ta-1"}}'
_CLIENT = """
import anyio, sys
from nanobanana_async import NanoBananaClient, NanoBananaError, Timeouts

async def main():
    async with NanoBananaClient("dk-1", base_url=sys.argv[1], timeouts=Timeouts(submit_s=1.0)) as client:
        try:
            print("accepted", (await client.submit("a fox")).task_id)
        except NanoBananaError as exc:
            print(type(exc).__name__, exc)

anyio.run(main, backend=sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_b3_a_response_that_arrived_while_the_process_was_stopped_is_taken(backend: str) -> None:
    """Its deadline has passed long ago, and the bytes are in the socket."""
    stopped: list[subprocess.Popen[str]] = []

    def stop_and_respond(peer: socket.socket, _: bytes) -> None:
        stopped[0].send_signal(signal.SIGSTOP)
        time.sleep(0.2)
        peer.sendall(response(_BODY))
        time.sleep(2.8)
        stopped[0].send_signal(signal.SIGCONT)

    with serving(stop_and_respond) as server:
        command = [sys.executable, "-c", _CLIENT, server.url, backend]
        with subprocess.Popen(command, env=dict(os.environ), stdout=subprocess.PIPE, text=True) as process:  # noqa: S603 - our own command
            stopped.append(process)
            out, _ = process.communicate(timeout=30)
    assert out == "accepted ta-1\n"


@pytest.mark.anyio
@pytest.mark.virtual_time
async def test_b3_a_deadline_that_fires_late_gives_one_more_look() -> None:
    """What has arrived meanwhile is processed, and what has not ends five seconds later."""
    arrived = anyio.Event()
    ended: list[str] = []

    async def wait(event: anyio.Event, name: str) -> None:
        await event.wait()
        ended.append(name)

    async with anyio.create_task_group() as group:
        group.start_soon(run_within, 10, lambda: wait(arrived, "arrived"))
        group.start_soon(run_within, 10, lambda: wait(anyio.Event(), "never"))
        await anyio.sleep(1)
        jump(60)
        await anyio.sleep(2)
        arrived.set()
        began_s = anyio.current_time()
    assert ended == ["arrived"]
    assert anyio.current_time() - began_s == pytest.approx(3, abs=0.1)


@pytest.mark.anyio
@pytest.mark.virtual_time
async def test_b3_a_deadline_in_time_is_kept() -> None:
    """A slow service gets no extra time."""

    async def slow(_: WireRequest) -> WireResponse:
        await anyio.sleep(70)
        return accepted()

    async with NanoBananaClient("dk-1", transport=script(slow), timeouts=Timeouts(submit_s=60)) as client:
        began_s = anyio.current_time()
        with pytest.raises(SubmissionUnknown):
            await client.submit("a fox")
    assert anyio.current_time() - began_s < 61
