"""`nanobanana batch`: generate an image for each row of a file, and resume after any interruption."""

import contextlib
import logging
import shlex
import statistics
import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, asynccontextmanager
from datetime import timedelta
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, Final

import anyio
import anyio.to_thread
import click
from anyio.abc import TaskGroup

from nanobanana_async._text import format_credits, sanitize_line
from nanobanana_async.batch import report
from nanobanana_async.batch.rows import read_rows
from nanobanana_async.batch.runner import Batch
from nanobanana_async.cli.generate import check_writable, poll_option, poll_policy, timeout_option
from nanobanana_async.cli.progress import ProgressBar
from nanobanana_async.cli.resolve import ledger_option, resolve
from nanobanana_async.cli.runtime import (
    EXIT_FAILED,
    EXIT_OK,
    EXIT_UNKNOWN,
    CommandContext,
    error_record,
    json_option,
    one_line,
    print_json,
    print_result,
    run,
    task_record,
)
from nanobanana_async.cli.summary import Account, BatchSummary
from nanobanana_async.client import NanoBananaClient
from nanobanana_async.errors import NanoBananaError
from nanobanana_async.ledger.restored import MANIFEST_NAME
from nanobanana_async.outcomes import Failed, Outcome, Succeeded, Unknown

_REFRESH_INTERVAL_S: Final = 0.5
_PLAIN_INTERVAL_S: Final = 10.0
_BALANCE_TIMEOUT_S: Final = 2.0
_MAX_DIGITS: Final = 15
_MAX_REPORTED: Final = 20
"""Number of failures that are printed as they happen."""
_FIRST_MEDIAN_S: Final = 20.0
"""Assumed latency before the first image: the median of the prior."""


class _BatchGroup(click.Group):
    """`batch FILE` beside `batch resolve`: an argument that is not a command is the file to run."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args if args and args[0] in self.commands else ["run", *args])


class _Credits(click.ParamType[Decimal]):
    name = "credits"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Decimal:  # noqa: ANN401 - click's signature
        try:
            amount = Decimal(value)
        except InvalidOperation:
            self.fail(f"expected a number, got {value!r}.", param, ctx)
        if not amount.is_finite() or amount <= 0 or abs(amount.adjusted()) > _MAX_DIGITS:
            self.fail(f"expected more than 0, and at most {_MAX_DIGITS} digits, got {value:.20}.", param, ctx)
        return amount


@click.group(cls=_BatchGroup)
def batch() -> None:
    """Generate an image for each row of a file."""


batch.add_command(resolve)


@batch.command(name="run")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "-o", "--out", required=True, metavar="DIR", type=click.Path(path_type=Path), help="Folder, created if missing."
)
@click.option(
    "--max-in-flight",
    default=200,
    show_default=True,
    type=click.IntRange(1, 100_000),
    help="Images in flight at once.",
)
@click.option("--budget", type=_Credits(), metavar="CREDITS", help="Do not send a submit that could exceed this.")
@click.option("--max-price", type=_Credits(), metavar="CREDITS", help="Upper bound of a price that is not known yet.")
@ledger_option
@click.option("--new-account", is_flag=True, help="Accept a key of another account than in earlier runs.")
@click.option("--format", "file_format", type=click.Choice(["txt", "csv", "jsonl"]), help="[default: by suffix]")
@click.option("--retry-failed", is_flag=True, help="Submit failed rows again. Each may be charged again.")
@click.option("--model", metavar="MODEL", help="For rows without a model.")
@click.option("--aspect-ratio", metavar="N:M", help="For rows without an aspect ratio.")
@click.option("--image-size", metavar="SIZE", help="For rows without an image size.")
@timeout_option
@poll_option
@json_option
def run_batch(  # noqa: PLR0913 - one parameter per option
    file: Path,
    out: Path,
    max_in_flight: int,
    budget: Decimal | None,
    max_price: Decimal | None,
    ledger: Path | None,
    *,
    file_format: str | None,
    new_account: bool,
    retry_failed: bool,
    timeout_s: float | None,
    poll_s: float | None,
    as_json: bool,
    **defaults: str | None,
) -> None:
    """Generate an image for each row of FILE: nanobanana batch FILE --out DIR.

    FILE is a .txt with one prompt per line, or a .csv, .tsv, .jsonl or .ndjson with the columns prompt, images, model,
    aspect_ratio, image_size, key, name. Lines of a .txt that begin with # are comments. FILE - is standard input.

    To resume after an interruption, run the same command again. Charged images are downloaded, and saved ones are
    left alone. Rows that may have been charged are not resubmitted. To resolve them, run: nanobanana batch resolve
    --out DIR.
    """
    command = shlex.join(["nanobanana", *sys.argv[1:]])

    async def work(context: CommandContext) -> int:
        rows = await anyio.to_thread.run_sync(lambda: read_rows(file, file_format=file_format, **defaults))
        check_writable(out, is_folder=True)
        keys = {row.key for row in rows}
        summary = BatchSummary(out, ledger, command, keys, budget, max_price, retry_failed)
        async with NanoBananaClient(polling=poll_policy(poll_s)) as client:
            if not as_json:
                context.print_summary = summary.print
            opened = Batch.open(
                out, client, budget=budget, max_price=max_price, ledger_folder=ledger, new_account=new_account
            )
            async with opened as batch:
                summary.before = await _account(client, batch)
                outcomes = batch.run(rows, max_in_flight=max_in_flight, retry_failed=retry_failed, timeout_s=timeout_s)
                reporter = _ProgressReporter(batch, client, len(rows), max_in_flight, as_json=as_json)
                try:
                    await reporter.run(outcomes, context)
                finally:
                    summary.after = await _account(client, batch)
                if (batch.progress().budget.remaining or 0) < 0:  # a price has risen
                    context.code = max(context.code, EXIT_FAILED)
        if not as_json:
            print_result(out / report.GALLERY_NAME)
        return context.code

    run(work, as_json=as_json)


async def _account(client: NanoBananaClient, batch: Batch) -> Account | None:
    """Return the state of the account; None if the service does not say at once."""
    with anyio.move_on_after(_BALANCE_TIMEOUT_S), contextlib.suppress(NanoBananaError):
        return Account(await client.balance(), batch.progress().budget.spent)
    return None


class _WarningHandler(logging.Handler):
    """Passes the library's warnings to a function."""

    def __init__(self, handle_record: Callable[[logging.LogRecord], None]) -> None:
        super().__init__(logging.WARNING)
        self._handle_record = handle_record

    def emit(self, record: logging.LogRecord) -> None:
        self._handle_record(record)


class _ProgressReporter:
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
        elif not isinstance(outcome, Succeeded) and not outcome.replayed:
            self._report_limited(f"{sanitize_line(outcome.request.prompt)[:60]!r}: {one_line(outcome.error)}")

    def _report_limited(self, line: str) -> None:
        self._reported += 1
        if self._reported <= _MAX_REPORTED:
            self._bar.print_line(line)
        elif self._reported == _MAX_REPORTED + 1:
            self._bar.print_line(f"see {MANIFEST_NAME} for further failures")

    def _report_warning(self, record: logging.LogRecord) -> None:
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
        ended = progress.succeeded + progress.failed + progress.unknown
        rate = (ended - progress.replayed) / max(anyio.current_time() - self._started_s, 1e-3)
        median_s = statistics.median(self._client.statistics().median_latency_s.values() or [_FIRST_MEDIAN_S])
        left = self._total - ended
        parts = [f"{progress.succeeded} succeeded", f"{progress.in_flight} in flight"]
        parts += [f"{progress.failed} failed"] if progress.failed else []
        parts += [f"{progress.unknown} unknown"] if progress.unknown else []
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


def _exit_code(outcome: Outcome) -> int:
    match outcome:
        case Succeeded():
            return EXIT_OK
        case Failed():
            return EXIT_UNKNOWN if outcome.may_be_charged else EXIT_FAILED
        case Unknown():
            return EXIT_UNKNOWN


def _record(outcome: Outcome) -> dict[str, object]:
    record = {"key": outcome.key, "prompt": outcome.request.prompt, "replayed": outcome.replayed}
    if isinstance(outcome, Succeeded):
        files = [str(file.path) for file in outcome.files]
        return {**record, "outcome": "succeeded", "files": files, **task_record(outcome.task), "error": None}
    kind = "failed" if isinstance(outcome, Failed) else "unknown"
    return {**record, "outcome": kind, "files": [], **task_record(None), **error_record(outcome.error)}
