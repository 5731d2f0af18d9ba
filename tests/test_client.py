"""The public client: generate, submit, handles, closing, and where it may be used."""

import gc
import logging
import os
import shutil
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import AsyncIterator, Awaitable
from functools import partial
from pathlib import Path

import anyio
import anyio.from_thread
import anyio.to_thread
import attrs
import pytest

import nanobanana_async
from nanobanana_async import (
    AuthenticationError,
    ClientClosed,
    GenerationRequest,
    ImageError,
    NanoBananaClient,
    NanoBananaError,
    NoImage,
    RateLimited,
    SavedImage,
    TaskFailed,
    TaskHandle,
    TaskNotFound,
    TaskStatus,
    TaskTimeout,
    Timeouts,
    WrongEventLoop,
)
from nanobanana_async.simulator import FAST_LIMITS, FAST_POLLING, FAST_PROFILE, Simulator, SimulatorProfile
from tests.fakes import PNG, accepted, finished, rejected, script, submits

pytestmark = [pytest.mark.anyio, pytest.mark.virtual_time]


async def paths(saving: Awaitable[list[SavedImage]]) -> list[Path]:
    """Return the paths of the files that are saved."""
    return [file.path for file in await saving]


@pytest.fixture
async def client(nanobanana_simulator: Simulator) -> AsyncIterator[NanoBananaClient]:
    """Yield a client of the in-memory service."""
    async with nanobanana_simulator.client() as client:
        yield client


async def test_generate_returns_a_finished_task_with_an_image(client: NanoBananaClient) -> None:
    """A prompt becomes a finished task with an image."""
    task = await client.generate("a fox in snow", aspect_ratio="16:9")
    assert task.status is TaskStatus.SUCCESS
    assert (await client.download(task.images[0])).startswith(b"\x89PNG")


async def test_options_replace_fields_of_a_request(nanobanana_simulator: Simulator) -> None:
    """One request object serves for several variants."""
    request = GenerationRequest("a fox", aspect_ratio="1:1", image_size="2k")
    async with nanobanana_simulator.client() as client:
        await client.generate(request, aspect_ratio="16:9")
    (simulated,) = nanobanana_simulator.service.tasks.values()
    assert (simulated.image.width, simulated.image.height) == (2736, 1536)


async def test_an_unknown_option_is_a_type_error(client: NanoBananaClient) -> None:
    """An unknown keyword raises TypeError, as in any Python call."""
    with pytest.raises(TypeError, match="ratio"):
        await client.submit("a fox", ratio="16:9")  # type: ignore[call-arg]


@pytest.mark.real_time
async def test_an_invalid_request_costs_nothing(nanobanana_simulator: Simulator, tmp_path: Path) -> None:
    """Neither an invalid value nor an unreadable file reaches the service."""
    async with nanobanana_simulator.client() as client:
        with pytest.raises(ValueError, match="prompt"):
            await client.generate("")
        with pytest.raises(ImageError, match="No such file"):
            await client.generate("a fox", images=[tmp_path / "none.png"])
    assert nanobanana_simulator.service.requests == []


async def test_submit_returns_a_handle_that_can_be_created_again(client: NanoBananaClient) -> None:
    """A handle can be created from the id in any process."""
    handle = await client.submit("a red bicycle")
    again = client.task(handle.task_id)
    assert handle.submitted_at is not None
    assert again.submitted_at is None
    assert (await again.result()).task_id == (await handle.result()).task_id == handle.task_id


async def test_updates_end_with_the_final_snapshot(client: NanoBananaClient) -> None:
    """The last update is final, also for a second call."""
    handle = await client.submit("a fox")
    for _ in range(2):
        seen = [task.status async for task in handle.updates()]
        assert seen[-1] is TaskStatus.SUCCESS


async def test_query_is_one_request(client: NanoBananaClient) -> None:
    """A query does not wait."""
    handle = await client.submit("a fox")
    assert not (await handle.query()).is_final
    assert (await handle.wait()) == (await handle.query())


async def test_a_new_task_that_is_not_visible_yet_is_pending() -> None:
    """The service returns 404 for its own new ids; a foreign id with a 404 is not found."""
    simulator = Simulator(SimulatorProfile(median_s=0.02, visibility_delay_s=60))
    async with simulator.client() as client:
        handle = await client.submit("a fox")
        assert (await handle.query()).status is TaskStatus.PENDING
        with pytest.raises(TaskNotFound):
            await client.task("ta-typo").query()


@pytest.mark.parametrize(
    ("profile", "error"),
    [
        pytest.param(SimulatorProfile(median_s=0.02, visibility_delay_s=0, failed_tasks=1), TaskFailed, id="failed"),
        pytest.param(SimulatorProfile(median_s=0.02, visibility_delay_s=0, text_only=1), NoImage, id="words-only"),
    ],
)
async def test_an_end_without_an_image_is_an_error_with_the_task(
    profile: SimulatorProfile, error: type[TaskFailed]
) -> None:
    """`wait` returns the task; `result` and `generate` raise with the service's words."""
    async with Simulator(profile).client() as client:
        with pytest.raises(error) as caught:
            await client.generate("a fox")
        assert caught.value.task is not None
        assert str(caught.value.task.reason or caught.value.task.texts[0]) in str(caught.value)
        assert (await client.task(str(caught.value.task_id)).wait()) == caught.value.task


async def test_a_timeout_leaves_a_task_that_can_be_awaited_again() -> None:
    """The error carries the id, and a second wait costs nothing."""
    simulator = Simulator(SimulatorProfile(median_s=0.3, sigma=0, visibility_delay_s=0))
    async with simulator.client() as client:
        with pytest.raises(TaskTimeout) as caught:
            await client.generate("a fox", timeout_s=0.1)
        assert (await client.task(str(caught.value.task_id)).result()).images
    assert len(simulator.charges) == 1


async def test_cancelling_generate_logs_the_task_id(
    nanobanana_simulator: Simulator, caplog: pytest.LogCaptureFixture
) -> None:
    """A cancelled caller does not lose the id of a charged task."""
    caplog.set_level(logging.WARNING, "nanobanana_async")
    simulator = Simulator(SimulatorProfile(median_s=30))
    async with simulator.client() as client, anyio.create_task_group() as group:
        group.start_soon(client.generate, "a fox")
        while not simulator.charges:
            await anyio.sleep(0.01)
        await anyio.sleep(0.05)
        group.cancel_scope.cancel()
    assert simulator.charges[0].task_id in caplog.text


async def test_two_hundred_concurrent_calls_are_two_hundred_charges(nanobanana_simulator: Simulator) -> None:
    """Each call gets the image of its own prompt."""
    got = {}
    async with nanobanana_simulator.client() as nb, anyio.create_task_group() as group:

        async def one(prompt: str) -> None:
            got[prompt] = (await nb.generate(prompt)).task_id

        for number in range(200):
            group.start_soon(one, f"image {number}")
    assert {charge.prompt: charge.task_id for charge in nanobanana_simulator.charges} == got


async def test_a_wrong_key_is_an_authentication_error(nanobanana_simulator: Simulator) -> None:
    """The error does not contain the key."""
    async with NanoBananaClient("dk-CANARY", transport=nanobanana_simulator) as client:
        with pytest.raises(AuthenticationError) as caught:
            await client.generate("a fox")
    assert "CANARY" not in repr(caught.value)


async def test_closing_ends_waits_and_refuses_new_work(nanobanana_simulator: Simulator) -> None:
    """Waiters get the task id, and a second close has no effect."""
    client = Simulator(SimulatorProfile(median_s=60)).client()
    handle = await client.submit("a fox")
    errors: list[Exception] = []

    async def wait() -> None:
        try:
            await handle.wait()
        except TaskTimeout as exc:
            errors.append(exc)

    async with anyio.create_task_group() as group:
        group.start_soon(wait)
        await anyio.sleep(0.05)
        await client.aclose()
        await client.aclose()
    assert [getattr(error, "task_id", None) for error in errors] == [handle.task_id]
    for call in (client.submit("a fox"), client.balance(), handle.wait(), client.download(None)):  # type: ignore[arg-type]
        with pytest.raises(ClientClosed, match="closed"):
            await call


async def test_a_client_that_was_never_used_can_be_closed_anywhere() -> None:
    """An unused client has started nothing."""
    await NanoBananaClient("dk-1").aclose()


async def test_a_transport_that_was_passed_in_stays_open() -> None:
    """The caller closes its own transport."""
    transport = script(accepted(), finished())
    async with NanoBananaClient("dk-1", transport=transport) as client:
        await client.submit("a fox")
    assert not transport.closed


async def test_a_client_may_be_opened_in_one_task_and_closed_in_another(nanobanana_simulator: Simulator) -> None:
    """Bots open a client in one callback and close it in another."""
    clients: list[NanoBananaClient] = []

    async def open_it() -> None:
        clients.append(await nanobanana_simulator.client().__aenter__())
        await clients[0].generate("a fox")

    async def close_it() -> None:
        await clients[0].__aexit__(None, None, None)

    for step in (open_it, close_it):
        async with anyio.create_task_group() as group:
            group.start_soon(step)
    with pytest.raises(ClientClosed):
        await clients[0].balance()


@pytest.mark.real_time
async def test_another_event_loop_gets_a_clear_error(nanobanana_simulator: Simulator, anyio_backend_name: str) -> None:
    """Another event loop gets a `WrongEventLoop` instead of foreign futures."""
    async with nanobanana_simulator.client() as client:
        await client.balance()
        for use in (client.balance, client.aclose):
            with pytest.raises(WrongEventLoop, match="another event loop"):
                await anyio.to_thread.run_sync(partial(anyio.run, use, backend=anyio_backend_name))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.real_time
async def test_a_forked_child_gets_a_clear_error(nanobanana_simulator: Simulator) -> None:
    """Two processes on one connection would read each other's responses."""
    async with nanobanana_simulator.client() as client:
        await client.balance()
        child = os.fork()
        if child == 0:  # no event loop runs here, and the parent's clean-up must not
            try:
                client.balance().send(None)
            except WrongEventLoop as exc:
                os._exit(0 if "before a fork" in str(exc) else 1)
            finally:
                os._exit(2)
        _, status = await anyio.to_thread.run_sync(os.waitpid, child, 0)
        assert os.waitstatus_to_exitcode(status) == 0


async def test_an_unclosed_client_is_a_resource_warning() -> None:
    """Without the warning, connections would leak for the life of the process."""
    client = Simulator().client()
    await client.balance()
    background = client._session.background  # noqa: SLF001 - a deleted client cannot be closed
    kept = [client]
    del client
    with pytest.warns(ResourceWarning, match="unclosed NanoBananaClient"):
        kept.clear()
    await background.aclose(drain_s=1)


async def test_a_closed_or_unused_client_gives_no_warning() -> None:
    """There is nothing to release."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        NanoBananaClient("dk-1")
        async with Simulator().client() as client:
            await client.balance()
        del client
        gc.collect()


@pytest.mark.real_time
async def test_images_are_saved_under_safe_names(client: NanoBananaClient, tmp_path: Path) -> None:
    """In a folder the file is named after the task; a file path is used as it is."""
    task = await client.generate("a fox")
    assert await paths(client.save(task, tmp_path / "new" / "folder")) == [
        tmp_path / "new" / "folder" / f"{task.task_id}.png"
    ]
    assert await paths(client.save(task, tmp_path / "fox.png")) == [tmp_path / "fox.png"]
    assert await paths(client.save(task, tmp_path, name="../../etc/passwd")) == [tmp_path / "etc-passwd.png"]
    assert (tmp_path / "fox.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.real_time
async def test_several_images_get_numbers(nanobanana_simulator: Simulator, tmp_path: Path) -> None:
    """The service may return more than one image."""
    urls = [{"image": f"https://f.example/{n}.png"} for n in range(3)]
    body = finished().body.replace(
        b'[{"image": "https://files.example/fox.png"}]', str(urls).replace("'", '"').encode()
    )
    transport = script(
        accepted(), finished().__class__(status=200, body=body), finished().__class__(status=200, body=PNG)
    )
    async with NanoBananaClient("dk-1", transport=transport) as client:
        task = await (await client.submit("a fox")).query()
        names = [file.path.name for file in await client.save(task, tmp_path / "fox.png")]
    assert names == ["fox.png", "fox-2.png", "fox-3.png"]


async def test_a_rejected_submit_is_one_request() -> None:
    """An invalid request is not retried."""
    transport = script(rejected(400, 1, "prompt is required"))
    async with NanoBananaClient("dk-1", transport=transport) as client:
        with pytest.raises(Exception, match="prompt is required"):
            await client.submit("a fox")
    assert submits(transport.requests) == 1


async def test_a_hook_that_fails_does_not_stop_the_client(caplog: pytest.LogCaptureFixture) -> None:
    """An error in the user's hook is logged, and so is the task id."""

    def hook(*_: object) -> None:
        raise RuntimeError("boom")

    simulator = Simulator(FAST_PROFILE, delay_s=1)
    client = NanoBananaClient("dk-test", transport=simulator, polling=FAST_POLLING, on_orphan=hook, on_event=hook)
    async with client:
        with anyio.move_on_after(0.7):
            await client.submit("a fox")
        await anyio.sleep(1)
        assert (await client.generate("a hare")).images
    task_id = simulator.charges[0].task_id
    assert caplog.text.count(f"on_orphan failed for task {task_id}") == 1
    assert "on_event failed for Finished" in caplog.text


async def test_on_orphan_gets_the_handle_of_an_abandoned_task() -> None:
    """The hook can store or await the charged task."""
    simulator = Simulator(delay_s=0.2)
    orphans: list[TaskHandle] = []
    async with NanoBananaClient(
        "dk-test", transport=simulator, polling=FAST_POLLING, on_orphan=orphans.append
    ) as client:
        with anyio.move_on_after(0.15):
            await client.generate("a fox")
        await anyio.sleep(0.2)
        assert [handle.task_id for handle in orphans] == [charge.task_id for charge in simulator.charges]
        assert (await orphans[0].result()).images


async def test_closing_rejects_queued_submits_and_finishes_the_others() -> None:
    """No submit begins after `aclose`, none hangs, and two concurrent closes take no longer than one."""
    simulator = Simulator(delay_s=0.1)
    client = simulator.client(limits=attrs.evolve(FAST_LIMITS, max_submits=2))
    ends: Counter[str] = Counter()

    async def one() -> None:
        try:
            await client.submit("a fox")
        except ClientClosed as exc:
            ends[str(exc)] += 1
        else:
            ends["accepted"] += 1

    with anyio.fail_after(2):
        async with anyio.create_task_group() as group:
            for _ in range(20):
                group.start_soon(one)
            await anyio.sleep(0.03)
            group.start_soon(client.aclose)
            await client.aclose()
    assert ends == {"accepted": 2, "client: is closed, or its event loop has ended. Create a new client.": 18}
    assert len(simulator.charges) == 2


async def test_generate_on_a_client_that_is_closed_meanwhile_carries_the_id() -> None:
    """The submit finishes, the wait ends, and the error carries the task id."""
    simulator = Simulator(delay_s=0.1)
    client = simulator.client()
    errors: list[NanoBananaError] = []

    async def one() -> None:
        try:
            await client.generate("a fox")
        except NanoBananaError as exc:
            errors.append(exc)

    async with anyio.create_task_group() as group:
        group.start_soon(one)
        await anyio.sleep(0.03)
        await client.aclose()
    assert [error.task_id for error in errors] == [charge.task_id for charge in simulator.charges]


async def test_a_submit_waits_for_a_bounded_time() -> None:
    """If the service asks for a longer pause than the time left, the submit ends at once, and nothing was charged."""
    transport = script(rejected(429, retry_after="300"))
    timeouts = Timeouts(query_s=0.1, task_s=0.3)
    async with NanoBananaClient("dk-1", transport=transport, timeouts=timeouts) as client:
        with pytest.raises(RateLimited):
            await client.balance()
        with pytest.raises(RateLimited) as caught:
            await client.submit("a fox")
    assert caught.value.retry_after_s == 300
    assert submits(transport.requests) == 1


@pytest.mark.parametrize("timeout_s", [float("nan"), float("inf"), -1.0])
async def test_t4_a_timeout_that_is_no_time_is_refused(client: NanoBananaClient, timeout_s: float) -> None:
    """It would wait for ever, or end at once."""
    handle = await client.submit("a fox")
    with pytest.raises(ValueError, match="timeout_s: expected"):
        await client.generate("a fox", timeout_s=timeout_s)
    with pytest.raises(ValueError, match="timeout_s: expected"):
        await anext(client.stream("a fox", timeout_s=timeout_s))
    with pytest.raises(ValueError, match="timeout_s: expected"):
        await handle.result(timeout_s=timeout_s)
    with pytest.raises(ValueError, match="must be"):
        Timeouts(task_s=timeout_s)


def test_g2_the_package_works_without_its_metadata(tmp_path: Path) -> None:
    """A copy inside another package has none. `python -m nanobanana_async` is the command."""
    shutil.copytree(Path(nanobanana_async.__file__).parent, tmp_path / "nanobanana_async")
    code = (
        "import importlib.metadata as m\n"
        "def missing(name): raise m.PackageNotFoundError(name)\n"
        "m.version = missing\n"
        "import sys, runpy; sys.argv = ['nanobanana', '--version']\n"
        "runpy.run_module('nanobanana_async', run_name='__main__')"
    )
    done = subprocess.run(  # noqa: S603 - this interpreter
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "version 0" in done.stdout
