"""`nanobanana batch`: generate an image for each row of a file, and resume after any interruption."""

import contextlib
import shlex
import sys
from collections.abc import AsyncGenerator, Container, Iterable
from decimal import Decimal, InvalidOperation
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Final

import anyio
import attrs
import click

from nanobanana_async.batch import report
from nanobanana_async.batch.row_file import RowFile, read_rows
from nanobanana_async.batch.runner import Batch
from nanobanana_async.cli.batch_reporter import BatchReporter
from nanobanana_async.cli.generate import (
    check_writable,
    poll_option,
    poll_policy,
    reference_policy,
    regenerate_option,
    shrink_option,
    timeout_option,
)
from nanobanana_async.cli.preview import check_preview, dry_run, read_file
from nanobanana_async.cli.resolve import ledger_option, resolve
from nanobanana_async.cli.runtime import EXIT_FAILED, CommandContext, json_option, print_result, run
from nanobanana_async.cli.summary import Account, BatchSummary
from nanobanana_async.client import NanoBananaClient
from nanobanana_async.errors import ConfigurationError, NanoBananaError
from nanobanana_async.ledger.schema import BatchRow
from nanobanana_async.policies import RegeneratePolicy

_BALANCE_TIMEOUT_S: Final = 2.0
_MAX_DIGITS: Final = 15


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


@attrs.frozen(kw_only=True)
class _Options:
    """The arguments and options of the command."""

    file: Path
    out: Path
    max_in_flight: int
    budget: Decimal | None
    max_price: Decimal | None
    limit: int | None
    once: bool
    is_confirmed: bool
    is_dry_run: bool
    ledger: Path | None
    file_format: str | None
    new_account: bool
    retry_failed: bool
    regenerate: int
    shrink_references: bool
    timeout_s: float | None
    poll_s: float | None
    as_json: bool
    template: str | None
    variants: int
    model: str | None
    aspect_ratio: str | None
    image_size: str | None

    async def read_rows(self) -> RowFile:
        """Return the rows of the file."""
        read = partial(
            read_rows,
            self.file,
            file_format=self.file_format,
            once=self.once,
            template=self.template,
            variants=self.variants,
            references=reference_policy(shrink=self.shrink_references),
            model=self.model,
            aspect_ratio=self.aspect_ratio,
            image_size=self.image_size,
        )
        return await read_file(self.file, read, is_quiet=self.as_json)


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
@click.option("--dry-run", "is_dry_run", is_flag=True, help="Check the file, print the cost if it is known, and stop.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Run only the first N rows.")
@click.option("--template", metavar="TEXT", help="Prompt with columns of FILE in braces: 'photo of {name}, {colour}'.")
@click.option(
    "--n", "variants", type=click.IntRange(1, 1000), default=1, metavar="N", help="Images per row: name-1 to name-N."
)
@click.option("--once", is_flag=True, help="Leave out copies: rows with the content of an earlier row.")
@click.option("--yes", "is_confirmed", is_flag=True, help="Submit rows that seem to replace charged ones.")
@ledger_option
@click.option("--new-account", is_flag=True, help="Accept a key of another account than in earlier runs.")
@click.option("--format", "file_format", type=click.Choice(["txt", "csv", "jsonl"]), help="[default: by suffix]")
@click.option("--retry-failed", is_flag=True, help="Submit failed rows again. Each may be charged again.")
@regenerate_option
@shrink_option
@click.option("--model", metavar="MODEL", help="For rows without a model.")
@click.option("--aspect-ratio", metavar="N:M", help="For rows without an aspect ratio.")
@click.option("--image-size", metavar="SIZE", help="For rows without an image size.")
@timeout_option
@poll_option
@json_option
def run_batch(**given: Any) -> None:  # noqa: ANN401 - the arguments and options above
    """Generate an image for each row of FILE: nanobanana batch FILE --out DIR.

    FILE is a .txt with one prompt per line, or a .csv, .tsv, .jsonl or .ndjson with the columns prompt, images, model,
    aspect_ratio, image_size, key, name. Other columns are kept for the results. Lines of a .txt that begin with # are
    comments. FILE - is standard input.

    To resume after an interruption, run the same command again. Charged images are downloaded, and saved ones are
    left alone. Rows that may have been charged are not resubmitted. To resolve them, run: nanobanana batch resolve
    --out DIR.
    """
    options = _Options(**given)
    command = shlex.join(["nanobanana", *sys.argv[1:]])

    async def work(context: CommandContext) -> int:
        rows = await options.read_rows()
        if options.is_dry_run:
            return await dry_run(rows, options)
        if options.file.exists() and options.file.resolve() == report.results_path(options.out).resolve():
            raise click.UsageError(f"{options.file}: is the table of this batch, which is rewritten. Run a copy of it.")
        check_writable(options.out, is_folder=True)
        await _run(rows, options, command, context)
        if not options.as_json:
            print_result(report.gallery_path(options.out))
            if (table := report.results_path(options.out)).name.startswith("nanobanana-"):
                click.echo(f"results.csv is not of this batch and was left alone. Results: {table}", err=True)
        return context.code

    run(work, as_json=options.as_json)


async def _run(rows: RowFile, options: _Options, command: str, context: CommandContext) -> None:
    total, selected, keys = _select(rows, options.limit)
    summary = BatchSummary(options, rows, keys, total, command)
    if not options.as_json:
        context.print_summary = summary.print
    async with (
        NanoBananaClient(
            polling=poll_policy(options.poll_s),
            regenerate=RegeneratePolicy(attempts=options.regenerate),
            references=reference_policy(shrink=options.shrink_references),
        ) as client,
        _opened(client, options, context) as batch,
    ):
        check_preview(rows, await batch.preview(rows), options)
        summary.before = await _account(client, batch)
        outcomes = batch.run(
            selected,
            max_in_flight=options.max_in_flight,
            retry_failed=options.retry_failed,
            timeout_s=options.timeout_s,
        )
        reporter = BatchReporter(batch, client, total, options.max_in_flight, as_json=options.as_json)
        try:
            await reporter.run(outcomes, context)
        finally:
            summary.after = await _account(client, batch)
        if (batch.progress().budget.remaining or 0) < 0:  # a price has risen
            context.code = max(context.code, EXIT_FAILED)


@contextlib.asynccontextmanager
async def _opened(client: NanoBananaClient, options: _Options, context: CommandContext) -> AsyncGenerator[Batch]:
    """Open the batch. If it is about another service or account, the same command would fail again."""
    opening = Batch.open(
        options.out,
        client,
        budget=options.budget,
        max_price=options.max_price,
        ledger_folder=options.ledger,
        new_account=options.new_account,
    )
    async with contextlib.AsyncExitStack() as stack:
        try:
            batch = await stack.enter_async_context(opening)
        except ConfigurationError:
            context.print_summary = None
            raise
        yield batch


def _select(rows: RowFile, limit: int | None) -> tuple[int, Iterable[BatchRow], Container[str]]:
    """Return number, rows and keys of the run."""
    if limit is None or limit >= len(rows):
        return len(rows), rows, rows
    return limit, islice(rows, limit), {row.key for row in islice(rows, limit)}


async def _account(client: NanoBananaClient, batch: Batch) -> Account | None:
    """Return the state of the account; None if the service does not say at once."""
    with anyio.move_on_after(_BALANCE_TIMEOUT_S), contextlib.suppress(NanoBananaError):
        return Account(await client.balance(), batch.progress().budget.spent)
    return None
