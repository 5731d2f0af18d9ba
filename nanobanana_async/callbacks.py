"""Receive callbacks. They are not signed, so a callback only triggers a query. Its contents are never trusted.

Each submit has a callback path of its own that cannot be guessed.
"""

import base64
import hashlib
import hmac
import logging
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final, TypeAlias

import anyio
import attrs

from nanobanana_async._concurrency.fifo_cache import FifoCache
from nanobanana_async.client import NanoBananaClient
from nanobanana_async.errors import ConfigurationError, NanoBananaError, ProtocolError
from nanobanana_async.models import CallbackPayload, url_problem
from nanobanana_async.wire import codec
from nanobanana_async.wire.body import decompress

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]

_log: Final = logging.getLogger("nanobanana_async")

_MAX_BODY_BYTES: Final = 2**20
_BODY_TIMEOUT_S: Final = 10.0
_MIN_SECRET_BYTES: Final = 16
_TOKEN_BYTES: Final = 16
"""Size of the nonce and of the signature in a token: 128 bits each."""
_FORWARDED: Final = "~"
"""End of a token that another worker has forwarded. It is not forwarded again, so that workers do not pass it around.
"""
_MAX_PENDING: Final = 100_000
"""Number of submits remembered. A callback for an older one is forwarded, and polling finds the result."""


def parse_callback(body: bytes, *, content_encoding: str = "") -> CallbackPayload:
    """Return the contents of a callback body, whatever its content type. It is not authenticated: query the task.

    Raises:
        ProtocolError: The body names no task.
    """
    return codec.decode_callback(decompress(body, content_encoding, _MAX_BODY_BYTES))


@attrs.define(eq=False)
class _RegisteredCallback:
    """The callback of one submit: the URL given to the service, and the task id once it is known.

    It takes 300 bytes: a hundred thousand are remembered.
    """

    _public_url: str
    _token: str
    task_id: str | None = None
    _claimed: str | None = None
    _others: tuple[str, ...] = ()
    """Further ids that callbacks have named before the submit had its own."""
    _event: anyio.Event | None = None
    """Set by a callback; None until one is waited for."""
    _received: bool = False

    @property
    def nonce(self) -> str:
        """Identifier of the submit."""
        return self._token[:_NONCE_CHARS]

    @property
    def url(self) -> str:
        """URL given to the service."""
        return f"{self._public_url}/{self._token}"

    def bind(self, task_id: str) -> bool:
        """Record the task id of the submit. Return True if a callback has already arrived."""
        self.task_id = task_id
        return self._received

    def record_callback(self, task_id: str) -> bool:
        """Record the task id in a callback. Return False if the submit is known to have another id."""
        if self.task_id is not None:
            return self.task_id == task_id
        self._received = True
        if self._claimed not in (None, task_id):
            self._others += (str(self._claimed),)
        self._claimed = task_id
        if self._event is not None:
            self._event.set()
        return True

    def duplicates(self) -> list[str]:
        """Return the ids of other tasks that callbacks have named."""
        named = {*self._others, *([self._claimed] if self._claimed is not None else [])}
        return sorted(named - {self.task_id})

    async def wait_task_id(self) -> str:
        """Wait for a callback and return the task id in it."""
        while self._claimed is None:
            self._event = anyio.Event()
            await self._event.wait()
        claimed, self._claimed = self._claimed, None
        return claimed


class CallbackReceiver:
    """Receives the service's callbacks. A plain ASGI app, to be mounted in any number of worker processes.

    Pass it to `client.submit(..., callback=receiver)`. A callback or a poll ends the wait, whichever comes first. While
    a callback is pending, polls are rare. Every worker with the secret can verify a path.

    Args:
        client: The client that submits the tasks.
        public_url: URL of this app on the internet, without the token.
        secret: Key that signs the paths, at least 16 bytes. Use the same one in all workers and after a restart.
        previous_secret: Also accepted, while the secret is being changed.
        forward: Awaited with token and body if the submit is not from this process. Pass them to the other workers,
            for their `deliver`, or post the body to their path of the token. The token says that it was forwarded.

    Raises:
        ConfigurationError: The URL or the secret cannot be used.
    """

    def __init__(
        self,
        client: NanoBananaClient,
        *,
        public_url: str,
        secret: str | bytes,
        previous_secret: str | bytes | None = None,
        forward: Callable[[str, bytes], Awaitable[None]] | None = None,
    ) -> None:
        if problem := url_problem(public_url):
            raise ConfigurationError(f"public_url: {public_url!r} {problem}")
        self._client = client
        self._public_url = public_url.rstrip("/")
        self._secrets = [_to_hmac_key(given) for given in (secret, previous_secret) if given is not None]
        self._forward = forward
        self._pending: FifoCache[_RegisteredCallback] = FifoCache(_MAX_PENDING)
        self.unmatched_hooks: list[Callable[[str, str], Awaitable[None]]] = [client.on_unmatched_callback]
        """Functions awaited with nonce and task id when a callback names a task whose submit is not known to have it.
        """

    def __repr__(self) -> str:
        return f"CallbackReceiver(public_url={self._public_url!r})"

    def register(self) -> _RegisteredCallback:
        """Register a callback for one submit, with its own URL, and return it."""
        nonce = secrets.token_urlsafe(_TOKEN_BYTES)
        pending = _RegisteredCallback(self._public_url, nonce + _signature(self._secrets[0], nonce))
        self._pending.add(nonce, pending)
        return pending

    def verify(self, path: str) -> str | None:
        """Return the nonce of a path signed with the current or the previous secret; None for any other path.

        Only the last segment of *path* counts. The comparison takes constant time.
        """
        token = path.rpartition("/")[2].removesuffix(_FORWARDED)
        nonce, proof = token[:_NONCE_CHARS], token[_NONCE_CHARS:]
        given = proof.encode("utf-8", "replace")
        matches = [hmac.compare_digest(_signature(secret, nonce).encode(), given) for secret in self._secrets]
        return nonce if any(matches) else None

    async def deliver(self, path: str, body: bytes, *, content_encoding: str = "", may_forward: bool = False) -> bool:
        """Handle a callback from another framework or worker. True stands for a 2xx response, False for 404.

        Raises `WrongEventLoop` on another event loop than that of the client.

        Args:
            path: The path it was posted to, or only the token.
            body: The body as received.
            content_encoding: Value of the `Content-Encoding` header.
            may_forward: Whether to call `forward` if the submit is not from this process.
        """
        self._client.check_event_loop()
        nonce = self.verify(path)
        if nonce is None:
            return False
        body = decompress(body, content_encoding, _MAX_BODY_BYTES)
        try:
            claimed: str | None = codec.decode_callback(body).task_id
        except ProtocolError as exc:
            _log.warning("callback could not be decoded: %s", exc)
            claimed = None
        pending = self._pending.get(nonce)
        if claimed is not None and (pending is None or pending.task_id != claimed):
            for hook in list(self.unmatched_hooks):
                try:
                    await hook(nonce, claimed)
                except NanoBananaError as exc:
                    _log.warning("callback for task %s could not be recorded: %s", claimed, exc)
        if pending is None:
            token = path.rpartition("/")[2]
            if may_forward and self._forward is not None and not token.endswith(_FORWARDED):
                await self._forward_to_workers(token + _FORWARDED, body)
            return True
        if claimed is not None and not pending.record_callback(claimed):
            _log.info("callback for task %s names task %s; rejected", pending.task_id, claimed)
            return False
        if pending.task_id is not None:
            self._client.notify(pending.task_id)
        return True

    async def _forward_to_workers(self, token: str, body: bytes) -> None:
        assert self._forward is not None  # noqa: S101 - checked by the caller
        try:
            await self._forward(token, body)
        except Exception:  # noqa: BLE001 - user code; polling still finds the result
            _log.exception("forward failed")

    # --- ASGI -------------------------------------------------------------------------------------------------------

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] == "http":
            await _send_response(send, await self._response_status(scope, receive))
        elif scope["type"] == "lifespan":
            await _run_lifespan(receive, send)
        else:
            await send({"type": "websocket.close"})

    async def _response_status(self, scope: Scope, receive: Receive) -> int:
        """Return the HTTP status of the response."""
        if scope["method"] != "POST":
            return 405
        if self.verify(scope["path"]) is None:
            return 404
        with anyio.move_on_after(_BODY_TIMEOUT_S):
            body = bytearray()
            while True:
                message = await receive()
                body += message.get("body") or b""
                if message["type"] == "http.disconnect":
                    return 400
                if len(body) > _MAX_BODY_BYTES:
                    return 413
                if not message.get("more_body"):
                    break
            headers = {name.lower(): value for name, value in scope["headers"]}
            coding = headers.get(b"content-encoding", b"").decode("latin-1")
            is_known = await self.deliver(scope["path"], bytes(body), content_encoding=coding, may_forward=True)
            return 204 if is_known else 404
        return 408


async def _send_response(send: Send, status: int) -> None:
    headers = [(b"allow", b"POST")] if status == 405 else []
    if status >= 400:
        headers.append((b"connection", b"close"))  # the rest of the body may not have been read
    if status != 204:
        headers.append((b"content-length", b"0"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


async def _run_lifespan(receive: Receive, send: Send) -> None:
    """Complete the ASGI lifespan protocol, for an app that is served alone."""
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return


def _to_hmac_key(secret: str | bytes) -> bytes:
    key = secret.encode() if isinstance(secret, str) else bytes(secret)
    if len(key) < _MIN_SECRET_BYTES:
        raise ConfigurationError(
            f"secret: expected at least {_MIN_SECRET_BYTES} bytes, got {len(key)}. "
            "To make one, run: python -c 'import secrets; print(secrets.token_hex())'"
        )
    return key


def _signature(key: bytes, nonce: str) -> str:
    digest = hmac.digest(key, nonce.encode("utf-8", "replace"), hashlib.sha256)
    return base64.urlsafe_b64encode(digest[:_TOKEN_BYTES]).decode("ascii").rstrip("=")


_NONCE_CHARS: Final = len(secrets.token_urlsafe(_TOKEN_BYTES))
