"""`RunState`: what the rows of one run have in common: how many are where, and what has stopped it."""

from pathlib import Path
from typing import Protocol

import anyio
import attrs

from nanobanana_async.errors import NanoBananaError
from nanobanana_async.ledger.budget import BudgetStatus
from nanobanana_async.models import GeneratedImage, SavedImage


class ImageStore(Protocol):
    """Who writes the pictures: the client, or something that lets other machines do it."""

    async def save_picture(self, image: GeneratedImage, stem: Path) -> SavedImage:
        """Write one picture, durably, to *stem* plus the suffix of its type. Raises `ImageError`."""
        ...


@attrs.frozen(kw_only=True)
class BatchProgress:
    """How a run stands, at one moment."""

    done: int
    failed: int
    unknown: int
    earlier: int
    """Those of the three above that an earlier run had come to."""
    in_flight: int
    """Submitted, and not on disk."""
    funds: BudgetStatus
    trouble: str | None
    """What the last submit met, while fewer are tried because of it; None when all is well."""


class RunStopped(Exception):  # noqa: N818 - never leaves this folder
    """The run takes nothing more on; why stands in `RunState.cause`."""


class RunState:
    """Counts, and wakes whoever waits for them to change."""

    def __init__(self) -> None:
        self.pending = 0
        """Rows between clearance and their end: they may be or are paid."""
        self.tasks: dict[str, str] = {}
        """Row key to task id of those whose id is known, whether or not the ledger would take it."""
        self.saving = 0
        """Those of them whose picture is on its way to the disk."""
        self.cause: NanoBananaError | None = None
        """What has stopped the run; None while it takes rows on."""
        self._changed = anyio.Event()

    def stop(self, cause: NanoBananaError) -> None:
        """Take nothing more on. The first cause stands."""
        self.cause = self.cause or cause
        self.change()

    def check(self) -> None:
        """Raise `RunStopped` if it is."""
        if self.cause is not None:
            raise RunStopped

    def change(self) -> None:
        """Wake all who wait: a count has changed."""
        self._changed.set()
        self._changed = anyio.Event()

    async def changed(self) -> None:
        """Return at the next change; raise `RunStopped` if there is nothing to wait for any more."""
        self.check()
        await self._changed.wait()
        self.check()
