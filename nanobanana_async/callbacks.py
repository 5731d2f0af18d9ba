"""Callbacks of the service: parsed, checked, and taken for what they are, a hint that one query confirms.

The service signs nothing, so anybody may post anything. Each submit therefore gets a path of its own that nobody can
guess, and what a callback claims is never believed: it makes the tracker look.
"""

import base64
import hashlib
import hmac
import logging
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final, TypeAlias

import anyio

from nanobanana_async.client import NanoBananaClient
from nanobanana_async.errors import ConfigurationError, NanoBananaError, ProtocolError
from nanobanana_async.models import CallbackPayload, url_problem
from nanobanana_async.tracking.state import FifoCache
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
"""Of chance, and of proof, in a token: 128 bits each."""
_MAX_PENDING: Final = 100_000
"""Submits that are remembered; what comes for an older one is passed on, and the poll sees to it."""


def parse_callback(body: bytes, *, content_encoding: str = "") -> CallbackPayload:
    """Return what the body of a callback claims, whatever its content type. It proves nothing: query the task.

    Raises:
        ProtocolError: It claims nothing about a task.
    """
    return codec.decode_callback(decompress(body, content_encoding, _MAX_BODY_BYTES))


class _RegisteredCallback:
    """One submit whose end will be announced: the URL it gives the service, and the task id once it is known."""

    def __init__(self, nonce: str, url: str) -> None:
        self.nonce: Final = nonce
        self.url: Final = url
        self.task_id: str | None = None
        self._claimed: str | None = None
        self._event = anyio.Event()
        self._received = False

    def bind(self, task_id: str) -> bool:
        """Note which task the submit became; True when a callback has come already."""
        self.task_id = task_id
        return self._received

    def record_callback(self, task_id: str) -> bool:
        """Note which task a callback says it became; False when it is known to be another one."""
        if self.task_id is not None:
            return self.task_id == task_id
        self._received = True
        self._claimed = task_id
        self._event.set()
        return True

    async def wait_task_id(self) -> str:
        """Return the task id that a callback brings, when one comes."""
        while self._claimed is None:
            await self._event.wait()
        claimed, self._claimed, self._event = self._claimed, None, anyio.Event()
        return claimed


class CallbackReceiver:
    """Takes the service's callbacks: a plain ASGI app, to be mounted anywhere, on any number of worker processes.

    Pass it to `client.submit(..., callback=receiver)`. Whichever comes first, the callback or a poll, ends the wait;
    while a callback is expected, polls are rare. Any worker that has the secret can tell a true path from a forged one.

    Args:
        client: Whose tasks these are.
        public_url: Where the service reaches this app from the internet, without the token.
        secret: What the paths are made with, at least 16 bytes. The same on all workers, and after a restart.
        previous_secret: Still accepted, while the secret is being changed.
        forward: Called with the path's token and the body when the submit is not one of this process: pass them to
            the workers that may know it, for their `deliver`.

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
        self.unmatched_hooks: list[Callable[[str, str], Awaitable[None]]] = []
        """Told of nonce and claimed task id when a callback is about a submit whose task is not known here."""

    def __repr__(self) -> str:
        return f"CallbackReceiver(public_url={self._public_url!r})"

    def register(self) -> _RegisteredCallback:
        """Return the expectation of one submit, with a URL of its own."""
        nonce = secrets.token_urlsafe(_TOKEN_BYTES)
        pending = _RegisteredCallback(nonce, f"{self._public_url}/{nonce}{_signature(self._secrets[0], nonce)}")
        self._pending.add(nonce, pending)
        return pending

    def verify(self, path: str) -> str | None:
        """Return the nonce of a path that was made here, with the present secret or the one before; else None.

        Looks at the last part of *path*. Takes the same time for all forgeries.
        """
        token = path.rpartition("/")[2]
        nonce, proof = token[:_NONCE_CHARS], token[_NONCE_CHARS:]
        given = proof.encode("utf-8", "replace")
        matches = [hmac.compare_digest(_signature(secret, nonce).encode(), given) for secret in self._secrets]
        return nonce if any(matches) else None

    async def deliver(self, path: str, body: bytes, *, content_encoding: str = "", may_forward: bool = False) -> bool:
        """Take a callback; True asks for an answer of 2xx, False for 404. For other frameworks, and for `forward`.

        Args:
            path: The path it was posted to, or its last part, the token.
            body: As it came.
            content_encoding: That header's value.
            may_forward: Call `forward` when the submit is not one of this process.
        """
        nonce = self.verify(path)
        if nonce is None:
            return False
        body = decompress(body, content_encoding, _MAX_BODY_BYTES)
        try:
            claimed: str | None = codec.decode_callback(body).task_id
        except ProtocolError as exc:
            _log.warning("a callback came that nobody can read: %s", exc)
            claimed = None
        pending = self._pending.get(nonce)
        if claimed is not None and (pending is None or pending.task_id is None):
            for tell in list(self.unmatched_hooks):
                try:
                    await tell(nonce, claimed)
                except NanoBananaError as exc:
                    _log.warning("the callback about task %s was lost on a batch: %s", claimed, exc)
        if pending is None:
            if may_forward and self._forward is not None:
                await self._forward_to_workers(path.rpartition("/")[2], body)
            return True
        if claimed is not None and not pending.record_callback(claimed):
            _log.info("a callback for task %s claims to be about another one; refused", pending.task_id)
            return False
        if pending.task_id is not None:
            self._client.notify(pending.task_id)
        return True

    async def _forward_to_workers(self, token: str, body: bytes) -> None:
        assert self._forward is not None  # noqa: S101 - the caller looked
        try:
            await self._forward(token, body)
        except Exception:  # noqa: BLE001 - the user's code; the poll sees to the task
            _log.exception("forward failed")

    # --- ASGI -------------------------------------------------------------------------------------------------------

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection of the ASGI server."""
        if scope["type"] == "http":
            await _send_response(send, await self._response_status(scope, receive))
        elif scope["type"] == "lifespan":
            await _run_lifespan(receive, send)
        else:
            await send({"type": "websocket.close"})

    async def _response_status(self, scope: Scope, receive: Receive) -> int:
        """Return the status to answer with."""
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
            known = await self.deliver(scope["path"], bytes(body), content_encoding=coding, may_forward=True)
            return 204 if known else 404
        return 408


async def _send_response(send: Send, status: int) -> None:
    headers = [(b"allow", b"POST")] if status == 405 else []
    if status >= 400:
        headers.append((b"connection", b"close"))  # there may be more of the body
    if status != 204:
        headers.append((b"content-length", b"0"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


async def _run_lifespan(receive: Receive, send: Send) -> None:
    """Take part in the server's start and end, when this is the whole app."""
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
