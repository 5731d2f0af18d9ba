"""`CallbackRecovery`: find the task of a submit by its callback, after the response to the submit was lost."""

import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final

import anyio
import attrs

from nanobanana_async._concurrency.background import BackgroundTaskGroup
from nanobanana_async.errors import NanoBananaError

_log: Final = logging.getLogger("nanobanana_async")
_RETRY_AFTER_S: Final = (10.0, 20.0, 40.0, 80.0, 160.0, 300.0)
"""Waits before further queries of a task id. A new task may be invisible at first, and the service may be down."""
_MAX_PENDING: Final = 1000


@attrs.frozen
class DoubtfulSubmit:
    """A submit with a POST that may have been charged, and whose task only a callback can name."""

    task_id: str | None
    """The accepted task, of which another one would be a duplicate; None if there is none."""
    bind: Callable[[str], Awaitable[None]] | None
    """Records the task; None for a duplicate."""


class CallbackRecovery:
    """Confirms tasks that callbacks name, in the background.

    Callbacks are not authenticated, so nothing is believed that the service does not confirm. *query* queries a task.
    """

    def __init__(self, background: BackgroundTaskGroup, query: Callable[[str], Awaitable[object]]) -> None:
        self._background = background
        self._query = query
        self._pending: set[tuple[str, str]] = set()

    async def recover(self, nonce: str, task_id: str, bind: Callable[[str, str], Awaitable[object]]) -> None:
        """Query *task_id*, and call *bind* with both if the service knows it. Otherwise, go on in the background."""
        claim = (nonce, task_id)
        if claim in self._pending:
            return
        if len(self._pending) >= _MAX_PENDING:
            _log.warning("task %s was named by a callback, and too many others wait for a query", task_id)
            return
        await self._background.ensure_started()
        self._pending.add(claim)
        if await self._try(nonce, task_id, bind) is None:
            self._pending.discard(claim)
        else:
            self._background.start_soon(partial(self._retry, nonce, task_id, bind))

    async def _retry(self, nonce: str, task_id: str, bind: Callable[[str, str], Awaitable[object]]) -> None:
        error: NanoBananaError | None = None
        try:
            for wait_s in _RETRY_AFTER_S:
                await anyio.sleep(wait_s)
                if (error := await self._try(nonce, task_id, bind)) is None:
                    return
        finally:
            self._pending.discard((nonce, task_id))
        _log.warning("task %s was named by a callback for an unknown submit and is not confirmed: %s", task_id, error)

    async def _try(
        self, nonce: str, task_id: str, bind: Callable[[str, str], Awaitable[object]]
    ) -> NanoBananaError | None:
        try:
            await self._query(task_id)
            await bind(nonce, task_id)
        except NanoBananaError as exc:
            return exc
        return None
