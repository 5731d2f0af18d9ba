"""Report a run of `nanobanana batch`: a bar, the rows that have failed, warnings, and the exit code."""

import logging
import statistics
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, asynccontextmanager
from datetime import timedelta
from typing import Final

import anyio
from anyio.abc import TaskGroup

from nanobanana_async._text import format_credits, sanitize_line
from nanobanana_async.batch.runner import Batch
from nanobanana_async.calls import UNHONOURED_SIZE
from nanobanana_async.cli.progress import ProgressBar
from nanobanana_async.cli.runtime import (
    EXIT_FAILED,
    EXIT_OK,
    EXIT_UNKNOWN,
    CommandContext,
    error_record,
    files_record,
    one_line,
    print_json,
    task_record,
)
from nanobanana_async.client import NanoBananaClient
from nanobanana_async.errors import TaskTimeout
from nanobanana_async.ledger.restored import MANIFEST_NAME
from nanobanana_async.outcomes import Failed, Outcome, Succeeded, Unknown

_REFRESH_INTERVAL_S: Final = 0.5
_PLAIN_INTERVAL_S: Final = 10.0
_MAX_REPORTED: Final = 20
"""Number of failures that are printed as they happen."""
_MAX_DETAIL_CHARS: Final = 70
_MAX_PROMPT_CHARS: Final = 40
_FIRST_MEDIAN_S: Final = 20.0
"""Assumed latency before the first image: the median of the prior."""


class _WarningHandler(logging.Handler):
    """Passes the library's warnings to a function."""

    def __init__(self, handle_record: Callable[[logging.LogRecord], None]) -> None:
        super().__init__(logging.WARNING)
        self._handle_record = handle_record

    def emit(self, record: logging.LogRecord) -> None:
        self._handle_record(record)


class BatchReporter:
    """Reports a run on the terminal."""

    def __init__(
        self, batch: Batch, client: NanoBananaClient, total: int, max_in_flight: int, *, as_json: bool
    ) -> None:
        self._batch = batch
        self._client = client
        self._total = total
        self._max_in_flight = max_in_flight
        self._as_json = as_json
        self._bar = ProgressBar(total, quiet=as_json, plain_every_s=_PLAIN_INTERVAL_S)
        self._started_s = anyio.current_time()
        self._reported = 0

    async def run(self, outcomes: AsyncGenerator[Outcome], context: CommandContext) -> None:
        """Report each of *outcomes*, and set the exit code of *context*."""
        if not self._as_json:  # with JSON there is no bar that a log line could break
            logging.getLogger("nanobanana_async").addHandler(_WarningHandler(self._report_warning))
        with self._bar:
            async with _background_tasks() as group, aclosing(outcomes):
                group.start_soon(self._refresh)
                try:
                    async for outcome in outcomes:
                        context.code = max(context.code, _exit_code(outcome))
                        self._report(outcome)
                except anyio.get_cancelled_exc_class():
                    self._bar.print_line("stopping: waiting for submits in flight (press Ctrl-C again to exit now)")
                    raise
            self._show()

    def _report(self, outcome: Outcome) -> None:
        if self._as_json:
            print_json(_record(outcome))
        elif not outcome.replayed:
            for line in _lines(outcome):
                self._report_limited(line)

    def _report_limited(self, line: str) -> None:
        self._reported += 1
        if self._reported <= _MAX_REPORTED:
            self._bar.print_line(line)
        elif self._reported == _MAX_REPORTED + 1:
            self._bar.print_line(f"see {MANIFEST_NAME} for further failures")

    def _report_warning(self, record: logging.LogRecord) -> None:
        if record.msg is UNHONOURED_SIZE:  # said of the file, with the number of rows
            return
        line = sanitize_line(record.getMessage())
        if record.levelno >= logging.ERROR:  # it may name a charged task, so it is always printed
            self._bar.print_line(line)
        else:
            self._report_limited(line)

    async def _refresh(self) -> None:
        while True:
            self._show()
            await anyio.sleep(_REFRESH_INTERVAL_S)

    def _show(self) -> None:
        progress = self._batch.progress()
        ended = progress.succeeded + progress.failed + progress.unknown + progress.running
        rate = (ended - progress.replayed) / max(anyio.current_time() - self._started_s, 1e-3)
        median_s = statistics.median(self._client.statistics().median_latency_s.values() or [_FIRST_MEDIAN_S])
        left = self._total - ended
        parts = [f"{progress.succeeded} succeeded", f"{progress.in_flight} in flight"]
        parts += [f"{progress.failed} failed"] if progress.failed else []
        parts += [f"{progress.unknown} unknown"] if progress.unknown else []
        parts += [f"{progress.running} still running"] if progress.running else []
        parts += ["finding out the price with the first image"] if progress.is_learning_price else []
        parts += [f"{format_credits(progress.budget.spent)} credits"] if progress.budget.spent else []
        parts += [f"{rate * 60:.0f}/min"] if rate else []
        # The rate is more accurate than the learned median once every slot has finished one image.
        is_warming_up = ended - progress.replayed < self._max_in_flight
        if progress.last_error is not None:
            parts.append(f"waiting: {sanitize_line(progress.last_error)[:50]}")
        if ended > progress.replayed or not left:
            left_s = eta_s(left, median_s, self._max_in_flight, None if is_warming_up else rate)
            parts.append(f"{timedelta(seconds=round(left_s))} left")
        self._bar.show(ended, "  ".join(parts))


@asynccontextmanager
async def _background_tasks() -> AsyncGenerator[TaskGroup]:
    """Yield a task group that is cancelled with the block. An error of the block is raised unwrapped."""
    error = None
    async with anyio.create_task_group() as group:
        try:
            yield group
        except Exception as exc:  # noqa: BLE001 - raised below, because the group would wrap it
            error = exc
        group.cancel_scope.cancel()
    if error is not None:
        raise error


def eta_s(left: int, median_s: float, max_in_flight: int, rate_per_s: float | None) -> float:
    """Return the estimated seconds until *left* images are finished.

    Each slot finishes an image per *median_s* (Little's law), until a rate is known. The last image takes its full
    latency.
    """
    if not left:
        return 0.0
    return max(median_s, left / (rate_per_s or max_in_flight / median_s))


def _lines(outcome: Outcome) -> list[str]:
    """Return one short line about a row without an image, or about each way in which an image is not as requested."""
    prompt = sanitize_line(outcome.request.prompt)
    prompt = prompt if len(prompt) <= _MAX_PROMPT_CHARS else f"{prompt[: _MAX_PROMPT_CHARS - 3]}..."
    where = repr(prompt) if outcome.line is None else f"line {outcome.line} {prompt!r}"
    if isinstance(outcome, Succeeded):
        return [f"{where}: {one.message}" for file in outcome.files for one in file.mismatch]
    return [_line(outcome, where)]


def _line(outcome: Failed | Unknown, where: str) -> str:
    if isinstance(outcome, Unknown):
        detail = one_line(outcome.error).removeprefix("submit outcome unknown: ").split(". ")[0]
        return f"{where}: may have been charged, key {outcome.key}: {detail[:_MAX_DETAIL_CHARS]}"
    if isinstance(outcome.error, TaskTimeout):
        return f"{where}: still running. The next run waits for it again"
    return f"{where}: {one_line(outcome.error)}"


def _exit_code(outcome: Outcome) -> int:
    match outcome:
        case Succeeded():
            return EXIT_OK
        case Failed():
            return EXIT_UNKNOWN if outcome.may_be_charged else EXIT_FAILED
        case Unknown():
            return EXIT_UNKNOWN


def _record(outcome: Outcome) -> dict[str, object]:
    record = {"key": outcome.key, "line": outcome.line, "prompt": outcome.request.prompt, "replayed": outcome.replayed}
    record["attempts"] = outcome.attempts
    if isinstance(outcome, Succeeded):
        files = files_record(outcome.files)
        task = {**task_record(outcome.task), "consumed": outcome.consumed}
        return {**record, "outcome": "succeeded", **files, **task, "error": None}
    kind = "failed" if isinstance(outcome, Failed) else "unknown"
    return {**record, "outcome": kind, **files_record(()), **task_record(None), **error_record(outcome.error)}
