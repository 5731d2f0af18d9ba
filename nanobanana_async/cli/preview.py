"""What is said about a file of rows before the first submit, and `nanobanana batch --dry-run`."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import aclosing
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Final, Protocol

import anyio.to_thread
import attrs
import click

from nanobanana_async._text import format_credits, sanitize_line
from nanobanana_async.batch.preview import BatchPreview
from nanobanana_async.batch.row_file import RowFile
from nanobanana_async.batch.rows import digest
from nanobanana_async.cli.runtime import EXIT_OK, print_json, print_result
from nanobanana_async.cli.summary import BatchOptions
from nanobanana_async.client import NanoBananaClient
from nanobanana_async.errors import NanoBananaError
from nanobanana_async.ledger.batch_ledger import BatchLedger
from nanobanana_async.ledger.budget import Budget, PricedAs
from nanobanana_async.ledger.restored import has_ledger
from nanobanana_async.ledger.schema import RowState

_PROGRESS_INTERVAL_S: Final = 2.0
_MAX_COLUMNS: Final = 10


class Read(Protocol):
    """Reads a file of rows. A partial `read_rows`."""

    def __call__(self, *, on_progress: Callable[[int], None]) -> RowFile:
        """Return the rows of the file."""
        ...


async def read_file(path: Path, read: Read, *, is_quiet: bool) -> RowFile:
    """Return what *read* returns, the rows of *path*. While it is read, a line is printed every two seconds."""
    shown_s = time.monotonic()

    def show(count: int) -> None:
        nonlocal shown_s
        if not is_quiet and time.monotonic() - shown_s >= _PROGRESS_INTERVAL_S:
            shown_s = time.monotonic()
            click.echo(f"reading {sanitize_line(str(path))}: {count:,} rows", err=True)

    return await anyio.to_thread.run_sync(lambda: read(on_progress=show))


class PreviewOptions(BatchOptions, Protocol):
    """The options of a run that are compared with earlier runs."""

    @property
    def limit(self) -> int | None:
        """Number of rows to run; None for all."""
        ...

    @property
    def regenerate(self) -> int:
        """How often a row is submitted again at most."""
        ...

    @property
    def is_confirmed(self) -> bool:
        """Whether rows that seem to replace charged ones are submitted."""
        ...

    @property
    def as_json(self) -> bool:
        """Whether only JSON is printed."""
        ...


def check_preview(rows: RowFile, preview: BatchPreview, options: PreviewOptions) -> None:
    """Print what is unusual about *rows*. Exit if they seem to replace charged rows, unless that is confirmed."""
    if not options.as_json and preview.new:
        for line in _notes(rows):
            click.echo(line, err=True)
    if preview.replaces_charged_rows and not options.is_confirmed:
        raise click.UsageError(f"{_replaced(preview)} To submit them, pass --yes.")


def _replaced(preview: BatchPreview) -> str:
    return (
        f"{preview.unlisted} charged rows of earlier runs are not in the file, and {preview.new} of its rows are new. "
        "Another option, key, text or image path makes a row a new one, which is charged again."
    )


def _notes(rows: RowFile) -> list[str]:
    notes: list[str] = []
    if rows.copies:
        advice = "left out" if rows.once else "each is charged. To leave copies out, add --once"
        notes.append(f"{_count(rows.copies, 'row')} with the content of an earlier row: {advice}")
    notes += [
        f"{_count(count, 'row')} with an image size for {sanitize_line(model)}, which is not known to honour it: "
        "another size may be delivered and charged"
        for model, count in rows.unhonoured_sizes.items()
    ]
    if rows.extra_columns:
        names = [sanitize_line(name)[:40] for name in rows.extra_columns[:_MAX_COLUMNS]]
        names += ["..."] if len(rows.extra_columns) > _MAX_COLUMNS else []
        notes.append(f"columns kept for the results, and not sent: {', '.join(names)}")
    return notes


async def dry_run(rows: RowFile, options: PreviewOptions) -> int:
    """Print what a run would do, and what it would cost as far as that is known. Submits nothing."""
    plan = await _plan(rows, options)
    balance: Decimal | str
    try:
        async with NanoBananaClient() as client:
            balance = await client.balance()
    except NanoBananaError as exc:
        balance = f"not known: {sanitize_line(str(exc))}"
    if options.as_json:
        print_json(
            {
                **attrs.asdict(plan.preview),
                "to_submit": plan.to_submit.total(),
                "copies": rows.copies,
                "references": rows.references,
                "extra_columns": list(rows.extra_columns),
                "max_cost": plan.max_cost,
                "balance": balance if isinstance(balance, Decimal) else None,
                "needs_yes": plan.preview.replaces_charged_rows,
            }
        )
    else:
        for line in [*plan.lines(rows, options.regenerate), *_means(plan, balance, options.budget)]:
            print_result(line)
        print_result("nothing was submitted")
    return EXIT_OK


def _means(plan: "_Plan", balance: Decimal | str, budget: Decimal | None) -> Iterator[str]:
    """Yield what there is to pay with, and whether it is enough."""
    cost = plan.max_cost
    text = _credits(balance) if isinstance(balance, Decimal) else balance
    is_short = isinstance(balance, Decimal) and cost is not None and cost > balance
    yield f"balance: {text}{', which is not enough for all of them' if is_short else ''}"
    if budget is not None:
        left = budget - plan.spent
        is_short = cost is not None and cost > left
        yield f"budget left: {_credits(left)}{', which is not enough for all of them' if is_short else ''}"


@attrs.frozen
class _Plan:
    """What a run would submit."""

    preview: BatchPreview
    to_submit: Counter[PricedAs]
    prices: dict[PricedAs, Decimal | None]
    spent: Decimal
    """Credits that earlier runs have spent or may have spent."""

    @property
    def max_cost(self) -> Decimal | None:
        """Cost at the largest known prices; None if a price is not known."""
        cost = Decimal(0)
        for kind, count in self.to_submit.items():
            price = self.prices[kind]
            if price is None:
                return None
            cost += price * count
        return cost

    def lines(self, rows: RowFile, regenerate: int) -> list[str]:
        """Return the plan as text. Each row is submitted up to *regenerate* more times."""
        preview, total = self.preview, self.to_submit.total()
        unfinished = f", {preview.unfinished} charged and to be downloaded" if preview.unfinished else ""
        lines = [f"{_count(preview.rows, 'row')}: {total} to submit, {preview.saved} saved{unfinished}"]
        if preview.replaces_charged_rows:
            lines.append(f"{_replaced(preview)} A run needs --yes.")
        elif preview.unlisted:
            lines.append(f"{preview.unlisted} charged rows of earlier runs not in the file")
        lines += [_count(rows.references, "reference image")] if rows.references else []
        lines += _notes(rows)
        for kind, count in self.to_submit.items():
            price, name = self.prices[kind], kind[0] if kind[1] is None else f"{kind[0]} at {kind[1]}"
            text = "price not known before the first image" if price is None else f"{_credits(price)} each"
            lines.append(f"{_count(count, 'image')} of {sanitize_line(name)}: {text}")
        if self.max_cost is not None and total:
            more = f", and {_credits(self.max_cost * (1 + regenerate))} with --regenerate" if regenerate else ""
            lines.append(f"cost: up to {_credits(self.max_cost)}{more}")
        return lines


async def _plan(rows: RowFile, options: PreviewOptions) -> _Plan:
    budget, done, counts = Budget(), set[int](), None
    if has_ledger(options.out, options.ledger):
        opening = BatchLedger.open(options.out, ledger_folder=options.ledger, create=False)
        async with aclosing(await opening) as ledger:
            budget.add_attempts(await ledger.attempt_costs())
            counts = await ledger.count_states(rows)
            async for page in ledger.pages():
                done.update(digest(record.key) for record in page if not _is_submitted(record.state, options))
    selected = islice(rows, options.limit)
    to_submit = Counter((row.request.model, row.request.image_size) for row in selected if digest(row.key) not in done)
    prices = {kind: budget.price(kind) for kind in to_submit}
    status = budget.status()
    return _Plan(BatchPreview.of(len(rows), counts or {}), to_submit, prices, status.spent + status.reserved)


def _is_submitted(state: RowState, options: PreviewOptions) -> bool:
    """Return whether a run submits a row in this state."""
    return state.is_submittable if options.retry_failed else state.is_ready


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


def _credits(amount: Decimal) -> str:
    return f"{format_credits(amount)} credits"
