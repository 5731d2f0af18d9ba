"""Nothing that can be printed, logged, pickled or sent contains the key."""

import base64
import contextlib
import gzip
import io
import logging
import pickle
import time
import traceback
from pathlib import Path
from urllib.parse import quote

import aiohttp
import anyio
import attrs
import httpx
import pytest

from nanobanana_async import AiohttpTransport, ConfigurationError, HttpxTransport, NanoBananaClient, NanoBananaError
from nanobanana_async.simulator import FAST_POLLING, SimulatorProfile
from nanobanana_async.simulator.server import SimulatorServer
from tests.faults.table import FAULTS
from tests.faults.trial import DEADLINES, QUICK, TRANSPORTS, fault_server
from tests.raw_server import response, sending, serving

SECRET = "CANARY5hJ2kQ9"
KEY = f"dk-{SECRET}"
BRISK = attrs.evolve(DEADLINES, submit_s=0.8, query_s=1.2)
FORMS = (SECRET, base64.b64encode(SECRET.encode()).decode().rstrip("="), quote(SECRET))


def shown(exc: BaseException) -> str:
    """Return everything that can be shown of an exception: itself, its attributes, its chain, local variables."""
    trace = traceback.TracebackException.from_exception(exc, capture_locals=True)
    package_frames = [frame for frame in trace.stack if "tests" not in Path(frame.filename).parts]
    text = [repr(exc), str(exc), repr(vars(exc)), repr(exc.__cause__), repr(exc.__context__)]
    text += [repr(frame.locals) for frame in package_frames]
    if isinstance(exc, NanoBananaError):
        text.append(pickle.dumps(exc).decode("latin-1"))
    return "\n".join(text)


def parts_of(client: NanoBananaClient) -> list[object]:
    """Return the objects of the package that the client consists of."""
    return [part for part in vars(client).values() if type(part).__module__.startswith("nanobanana_async.")]


def assert_secret(text: str) -> None:
    """Fail if *text* contains the key in any encoding."""
    found = next((form for form in FORMS if form in text), None)
    assert found is None, text[max(0, text.find(str(found)) - 300) :][:400]


@pytest.mark.slow
@pytest.mark.anyio
@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_no_fault_shows_the_key(
    transport: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Every fault of the table is tried with all loggers at DEBUG, also those of httpx and aiohttp."""
    caplog.set_level(logging.DEBUG)
    texts: list[str] = []
    slots = anyio.Semaphore(12)

    async def one(index: int) -> None:
        url = server.url(FAULTS[index], times=99, nonce=f"secret{index}")
        async with (
            slots,
            contextlib.aclosing(TRANSPORTS[transport]()) as sender,
            NanoBananaClient(KEY, base_url=url, retry=QUICK, timeouts=BRISK, transport=sender) as client,
        ):
            texts.append(
                repr(client)
                + repr(vars(client))
                + "".join(repr(getattr(part, "__dict__", part)) for part in parts_of(client))
            )
            for call in (client.submit("a fox"), client.balance()):
                try:
                    texts.append(repr(await call))
                except NanoBananaError as exc:
                    texts.append(shown(exc))

    with fault_server() as server:
        async with anyio.create_task_group() as group:
            for index, fault in enumerate(FAULTS):
                if fault.number not in ("F9", "F19"):
                    group.start_soon(one, index)
    assert len(texts) > 150
    assert_secret("\n".join(texts))
    assert_secret(caplog.text)
    assert_secret("".join(capfd.readouterr()))


@pytest.mark.anyio
@pytest.mark.parametrize("lent", ["none", "httpx", "aiohttp"])
async def test_downloads_and_callbacks_carry_no_credentials(lent: str) -> None:
    """The user's client does not pass its own credentials to the file host either."""
    own = {"headers": {"X-Api-Key": KEY}, "cookies": {"session": KEY}}
    async with contextlib.AsyncExitStack() as stack:
        server = stack.enter_context(
            SimulatorServer(SimulatorProfile(median_s=0.05, visibility_delay_s=0, keys=frozenset({KEY})))
        )
        transport: HttpxTransport | AiohttpTransport | None = None
        if lent == "httpx":
            transport = HttpxTransport(await stack.enter_async_context(httpx.AsyncClient(**own)))  # type: ignore[arg-type]
        elif lent == "aiohttp":
            transport = AiohttpTransport(await stack.enter_async_context(aiohttp.ClientSession(**own)))  # type: ignore[arg-type]
        if transport is not None:
            await stack.enter_async_context(contextlib.aclosing(transport))
        async with NanoBananaClient(KEY, base_url=server.url, polling=FAST_POLLING, transport=transport) as client:
            task = await client.generate("a fox")
            assert await client.download(task.images[0])
        assert server.service.credential_leaks == []


@pytest.mark.parametrize(
    "key", [f"dk {SECRET}", f"dk-{SECRET}\u20ac", f"dk-{SECRET}\0", f"{KEY}\nX-Evil: 1", f"{KEY}\r\n\r\nGET /"]
)
def test_a_rejected_key_is_not_shown(key: str) -> None:
    """A traceback with local variables does not contain it."""
    try:
        NanoBananaClient(key)
    except ConfigurationError as exc:
        assert_secret(shown(exc))
        assert_secret(
            "".join(traceback.TracebackException.from_exception(exc, capture_locals=True).format()).replace(
                repr(key), ""
            )
        )
    else:
        pytest.fail("it was taken")


def test_the_canary_would_be_found() -> None:
    """The check finds a key that is really shown."""
    with pytest.raises(AssertionError):
        assert_secret(shown(NanoBananaError(f"Bearer {KEY}")))
    with contextlib.redirect_stdout(io.StringIO()) as out:
        print(base64.b64encode(SECRET.encode()).decode())  # noqa: T201 - the test's subject
    with pytest.raises(AssertionError):
        assert_secret(out.getvalue())


@pytest.mark.anyio
async def test_a_key_that_the_server_quotes_is_redacted() -> None:
    """Some servers quote the key in an error; a task id beside it is kept."""
    message = f'{{"code":401,"message":"Invalid API key: {KEY}","data":{{"task_id":"ta-1"}}}}'.encode()
    with serving(sending(response(message, status="401 No"))) as server:
        async with NanoBananaClient(KEY, base_url=server.url) as client:
            assert (await client.submit("a fox")).task_id == "ta-1"
            with pytest.raises(NanoBananaError, match=r"Invalid API key: \[API key\]") as caught:
                await client.balance()
    assert_secret(shown(caught.value))


ECHO = f'{{"code":401,"message":"Invalid API key: {KEY}"}}'


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("body", "headers"),
    [
        pytest.param(gzip.compress(ECHO.encode()), {"Content_Encoding": "gzip"}, id="gzip"),
        pytest.param(ECHO.encode("utf-16"), {}, id="utf-16"),
        pytest.param(ECHO.encode("utf-16-be"), {}, id="utf-16-without-mark"),
        pytest.param(ECHO.replace("d", "\\u0064").encode(), {}, id="unicode-escapes"),
        pytest.param(ECHO.replace(KEY, KEY.replace("-", "\\u002D")).encode(), {}, id="one-escape"),
        pytest.param(ECHO.replace(KEY, quote(KEY).replace("5", "%35")).encode(), {}, id="url"),
        pytest.param(ECHO.replace(KEY, KEY.replace("5", "&#53;")).encode(), {}, id="html-in-json"),
        pytest.param(f"<p>{KEY.replace('-', '&#45;')}".encode(), {}, id="html"),
        pytest.param(ECHO.encode()[:-1], {}, id="cut"),
        pytest.param(gzip.compress(ECHO.replace("5", "\\u0035").encode()), {"Content_Encoding": "gzip"}, id="both"),
    ],
)
async def test_s1_a_key_that_the_server_quotes_in_another_encoding_is_redacted(
    body: bytes, headers: dict[str, str]
) -> None:
    """Bodies are decoded before they are quoted, so the key is removed after that, too."""
    with serving(sending(response(body, status="401 No", length=len(body), **headers))) as server:
        async with NanoBananaClient(KEY, base_url=server.url) as client:
            with pytest.raises(NanoBananaError) as caught:
                await client.balance()
    assert_secret(shown(caught.value))
    assert "[API key]" in str(caught.value)


@pytest.mark.anyio
async def test_s1_a_slash_in_a_key_may_be_escaped() -> None:
    """PHP escapes slashes."""
    key = f"dk/{SECRET}"
    body = f'{{"code":401,"message":"Invalid API key: {key}"}}'.replace("/", "\\/").encode()
    with serving(sending(response(body, status="401 No"))) as server:
        async with NanoBananaClient(key, base_url=server.url) as client:
            with pytest.raises(NanoBananaError, match=r"\[API key\]") as caught:
                await client.balance()
    assert_secret(shown(caught.value))


@pytest.mark.anyio
@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_timeout_around_a_call_shows_no_key(transport: str) -> None:
    """`fail_after` raises inside an exchange whose frames are all in the traceback."""
    with serving(lambda *_: time.sleep(0.5)) as server:
        async with (
            contextlib.aclosing(TRANSPORTS[transport]()) as sender,
            NanoBananaClient(KEY, base_url=server.url, transport=sender) as client,
        ):
            for call in (client.balance, client.task("ta-1").query):
                with pytest.raises(TimeoutError) as caught, anyio.fail_after(0.1):
                    await call()
                cause: BaseException | None = caught.value
                while cause is not None:
                    assert_secret(shown(cause))
                    cause = cause.__context__


@pytest.mark.filterwarnings("ignore:Pickle, copy, and deepcopy support:DeprecationWarning")  # itertools, 3.12 on
def test_objects_with_the_key_cannot_be_pickled() -> None:
    """A pickle in a queue or cache would contain it."""
    client = NanoBananaClient(KEY)
    for thing in (client, *parts_of(client)):
        with contextlib.suppress(TypeError, AttributeError):  # what cannot be pickled leaks nothing
            assert KEY.encode() not in pickle.dumps(thing)


@pytest.mark.parametrize("url", ["ftp://a.example", "http://a.example"])
def test_a_rejected_base_url_shows_no_key(url: str) -> None:
    """The frames that reject the URL have no key in their local variables."""
    with pytest.raises(ConfigurationError) as caught:
        NanoBananaClient(KEY, base_url=url)
    assert_secret(shown(caught.value))
