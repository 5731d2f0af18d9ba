"""What a person sees while many tasks run: a live bar on a terminal, plain lines elsewhere. All of it on stderr."""

from collections import Counter
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

import click

if TYPE_CHECKING:
    from rich.progress import Progress

_ORDER: Final = ("waiting", "submitting", "pending", "submitted", "in_progress", "saving", "done", "failed", "unknown")


class Board:
    """Counts jobs by where they stand. Use it with `with`; silent when *quiet*."""

    def __init__(self, total: int, *, quiet: bool = False) -> None:
        self._total = total
        self._quiet = quiet
        self._states: dict[int, str] = dict.fromkeys(range(total), "waiting")
        self._progress: Progress | None = None

    def __enter__(self) -> Self:
        if not self._quiet:
            self._progress = _live_progress(self._total)
        if self._progress is not None:
            self._progress.start()
            self._show()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def move(self, job: int, state: str) -> None:
        """Note that job number *job* now is in *state*."""
        self._states[job] = state
        if self._progress is not None:
            self._show()

    def say(self, line: str) -> None:
        """Print a line that stays, above the bar if there is one."""
        if self._progress is not None:
            self._progress.console.print(line, markup=False, highlight=False, soft_wrap=True)
        elif not self._quiet:
            click.echo(line, err=True)

    def _show(self) -> None:
        assert self._progress is not None  # noqa: S101 - both callers looked
        counts = Counter(self._states.values())
        ended = counts["done"] + counts["failed"] + counts["unknown"]
        words = "  ".join(f"{counts[state]} {state.replace('_', ' ')}" for state in _ORDER if counts[state])
        self._progress.update(self._progress.task_ids[0], completed=ended, counts=words)


def _live_progress(total: int) -> "Progress | None":
    """Return a started bar with one task; None where nobody would see it move."""
    from rich.console import Console  # noqa: PLC0415 - costs 50 ms, and only commands that wait need it
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: PLC0415

    console = Console(stderr=True)
    if not console.is_terminal:
        return None
    progress = Progress(
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[counts]}", markup=False),
        console=console,
    )
    progress.add_task("", total=total, counts="")
    return progress
