"""`RunState`: what the rows of one run have in common: how many are where, and what has stopped it."""

from pathlib import Path
from typing import Protocol

import anyio
import attrs

from nanobanana_async.client import NanoBananaClient
from nanobanana_async.errors import NanoBananaError
from nanobanana_async.ledger.budget import BudgetStatus
from nanobanana_async.models import GeneratedImage, SavedImage


class ImageStore(Protocol):
    """Who writes the pictures: the client, or something that lets other machines do it."""

    async def put(self, image: GeneratedImage, stem: Path) -> SavedImage:
        """Write one picture, durably, to *stem* plus the suffix of its type. Raises `ImageError`."""
        ...


class ClientImageStore:
    """An `ImageStore` that downloads and writes through the client."""

    def __init__(self, client: NanoBananaClient) -> None:
        self._client = client

    async def put(self, image: GeneratedImage, stem: Path) -> SavedImage:
        """See `ImageStore.put`."""
        return await self._client.save_image(image, stem)


@attrs.frozen(kw_only=True)
class BatchProgress:
    """How a run stands, at one moment."""

    succeeded: int
    failed: int
    unknown: int
    replayed: int
    """Those of the three above that an earlier run had come to."""
    in_flight: int
    """Submitted, and not on disk."""
    budget: BudgetStatus
    last_error: str | None
    """What the last submit met, while fewer are tried because of it; None when all is well."""


class RunStopped(Exception):
    """The run takes nothing more on; why stands in `RunState.stop_reason`."""


class RunState:
    """Counts, and wakes whoever waits for them to change."""

    def __init__(self) -> None:
        self.pending = 0
        """Rows between clearance and their end: they may be or are paid."""
        self.task_ids: dict[str, str] = {}
        """Row key to task id of those whose id is known, whether or not the ledger would take it."""
        self.saving = 0
        """Those of them whose picture is on its way to the disk."""
        self.stop_reason: NanoBananaError | None = None
        """What has stopped the run; None while it takes rows on."""
        self._changed = anyio.Event()

    def stop(self, cause: NanoBananaError) -> None:
        """Take nothing more on. The first cause stands."""
        self.stop_reason = self.stop_reason or cause
        self.notify_all()

    def raise_if_stopped(self) -> None:
        """Raise `RunStopped` if it is."""
        if self.stop_reason is not None:
            raise RunStopped

    def notify_all(self) -> None:
        """Wake all who wait: a count has changed."""
        self._changed.set()
        self._changed = anyio.Event()

    async def wait_change(self) -> None:
        """Return at the next change; raise `RunStopped` if there is nothing to wait for any more."""
        self.raise_if_stopped()
        await self._changed.wait()
        self.raise_if_stopped()
