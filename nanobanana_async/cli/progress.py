"""Progress on stderr: a live bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections import Counter
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

import click

from nanobanana_async.cli.runtime import print_result
from nanobanana_async.models import Eta

if TYPE_CHECKING:
    from rich.progress import Progress

_ORDER: Final = (
    "waiting",
    "pending",
    "submitted",
    "in_progress",
    "saving",
    "succeeded",
    "failed",
    "unknown",
)


_RUNNING: Final = ("waiting", "pending", "submitted", "in_progress", "unrecognized")


class ProgressBar:
    """Shows how many of *total* have ended. Use it with `with`. Prints nothing if *quiet*.

    Without a terminal, `show` prints a line every *plain_every_s* seconds, or never if None.
    """

    def __init__(self, total: int, *, quiet: bool = False, plain_every_s: float | None = None) -> None:
        self._total = total
        self._quiet = quiet
        self._plain_every_s = plain_every_s
        self._shown_s = time.monotonic()
        self._progress: Progress | None = None

    def __enter__(self) -> Self:
        if not self._quiet:
            self._progress = _live_progress(self._total)
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def show(self, ended: int, status: str) -> None:
        """Show that *ended* have ended, with *status* beside the bar."""
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=ended, words=status)
        elif not self._quiet and self._plain_every_s is not None:
            now_s = time.monotonic()
            if now_s - self._shown_s >= self._plain_every_s:
                self._shown_s = now_s
                click.echo(f"{ended}/{self._total}  {status}", err=True)

    def print_line(self, line: str) -> None:
        """Print a line that stays, above the bar if there is one."""
        if self._progress is not None:
            self._progress.console.print(line, markup=False, highlight=False, soft_wrap=True)
        elif not self._quiet:
            click.echo(line, err=True)

    def print_result(self, line: str) -> None:
        """Print a result on stdout. On a terminal that also shows the bar, print it above the bar."""
        if self._progress is not None and sys.stdout.isatty():
            self.print_line(line)
        else:
            print_result(line)


class JobProgressBar(ProgressBar):
    """Shows how many jobs are in each state."""

    def __init__(self, total: int, *, quiet: bool = False) -> None:
        super().__init__(total, quiet=quiet)
        self._states: dict[int, str] = dict.fromkeys(range(total), "waiting")
        self._ends: dict[int, tuple[float, float]] = {}
        """When jobs will have ended: median, and nine of ten."""

    def move(self, job: int, state: str, eta: Eta | None = None) -> None:
        """Set the state of job number *job*, and the time it will take."""
        self._states[job] = state
        now_s = time.monotonic()
        if eta is not None:
            self._ends[job] = (now_s + eta.median_s, now_s + eta.p90_s)
        elif state not in _RUNNING:
            self._ends.pop(job, None)
        self.refresh()

    def refresh(self) -> None:
        """Show the states and the time that is left."""
        counts = Counter(self._states.values())
        ended = counts["succeeded"] + counts["failed"] + counts["unknown"]
        words = "  ".join(f"{counts[state]} {state.replace('_', ' ')}" for state in _ORDER if counts[state])
        now_s = time.monotonic()
        left_s, most_s = (max((end[at] for end in self._ends.values()), default=now_s) - now_s for at in (0, 1))
        if most_s > 1:
            words += f"  about {max(1, left_s):.0f} s left, at most {most_s:.0f} s for 9 in 10"
        self.show(ended, words)


def _live_progress(total: int) -> "Progress | None":
    """Return a rich progress bar with one task; None without a terminal."""
    from rich.console import Console  # noqa: PLC0415 - takes 50 ms; only commands that wait need it
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: PLC0415
    from rich.table import Column  # noqa: PLC0415

    console = Console(stderr=True)
    if not sys.stderr.isatty() or console.is_dumb_terminal:  # FORCE_COLOR makes a log file look like a terminal
        return None
    progress = Progress(
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        BarColumn(bar_width=min(28, console.width // 6)),
        TextColumn(
            "{task.fields[words]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)
        ),
        console=console,
        expand=True,
    )
    progress.add_task("", total=total, words="")
    return progress
