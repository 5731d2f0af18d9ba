"""`nanobanana batch resolve`: decide about rows that may have been charged."""

import re
import shlex
from collections import Counter
from collections.abc import Iterator
from contextlib import aclosing
from decimal import Decimal
from functools import partial
from pathlib import Path

import click

from nanobanana_async._text import format_credits, sanitize_line
from nanobanana_async.cli.generate import json_option
from nanobanana_async.cli.runtime import EXIT_OK, CommandContext, print_json, print_result, run
from nanobanana_async.errors import ConfigurationError
from nanobanana_async.ledger.budget import Budget
from nanobanana_async.ledger.schema import LedgerRow, RowState
from nanobanana_async.ledger.sqlite import Ledger

_SAVED = (RowState.SAVED,)
_FAILED = (RowState.FAILED, RowState.ABANDONED)


@click.command()
@click.argument("keys", metavar="[KEY]...", nargs=-1)
@click.option("-o", "--out", required=True, metavar="DIR", type=click.Path(path_type=Path), help="Folder of the batch.")
@click.option("--list", "list_rows", is_flag=True, help="List the rows and their largest cost. The default.")
@click.option("--resubmit", is_flag=True, help="Submit them again in the next run. They may be charged twice.")
@click.option("--abandon", is_flag=True, help="Give them up. They count as failed.")
@click.option("--bind", "task_id", metavar="TASK_ID", help="Record the task id of one KEY. The next run downloads it.")
@click.option("--all", "all_rows", is_flag=True, help="Select all unknown rows instead of KEYs.")
@click.option("--adopt", is_flag=True, help="Accept a copied or restored ledger as the original.")
@json_option
def resolve(  # noqa: PLR0913 - one parameter per option
    keys: tuple[str, ...],
    out: Path,
    task_id: str | None,
    *,
    list_rows: bool,
    resubmit: bool,
    abandon: bool,
    all_rows: bool,
    adopt: bool,
    as_json: bool,
) -> None:
    """Resolve rows whose submit got no response. Needs no API key and sends no requests."""
    if sum((list_rows, resubmit, abandon, task_id is not None)) > 1:
        raise click.UsageError("expected one of --list, --resubmit, --abandon and --bind.")
    if task_id is not None and (len(keys) != 1 or not re.fullmatch(r"[!-~]{1,200}", task_id)):
        raise click.UsageError("--bind: expected a task id without spaces, and one KEY.")
    if (resubmit or abandon) and bool(keys) is all_rows:
        raise click.UsageError("expected KEYs or --all. To list the keys, pass --list.")
    decided = task_id is not None or resubmit or abandon

    async def work(_: CommandContext) -> int:
        async with aclosing(await Ledger.open(out, adopt=adopt, create=False)) as ledger:
            unknown = await ledger.query_rows(list, RowState.UNKNOWN)
            budget = Budget.from_attempts(await ledger.attempt_costs())
            chosen = keys or tuple(record.key for record in unknown)
            if unlisted := set(chosen) - {record.key for record in unknown}:
                raise ConfigurationError(
                    f"key: expected that of an unknown row, got {min(unlisted)!r}. To list the keys, pass --list."
                )
            for key in chosen if decided else ():
                if task_id is not None:
                    await ledger.bind(key, task_id)
                else:
                    await ledger.transition(key, RowState.REQUEUED if resubmit else RowState.ABANDONED)
        if decided:
            click.echo(f"{len(chosen)} changed. To apply it, run the batch again.", err=True)
        else:
            if adopt:
                click.echo("ledger adopted. To resume, run the batch again.", err=True)
            _show(unknown, budget, as_json=as_json)
        return EXIT_OK

    run(work, as_json=as_json)


def _show(unknown: list[LedgerRow], budget: Budget, *, as_json: bool) -> None:
    total: Decimal | None = Decimal(0)
    for record in unknown:
        price = budget.max_price(record.model)
        max_cost = None if price is None else price * record.submit_count
        total = None if total is None or max_cost is None else total + max_cost
        if as_json:
            line = {"key": record.key, "prompt": record.prompt, "task_id": record.task_id, "max_cost": max_cost}
            print_json({**line, "reason": record.reason})
        else:
            cost = "price unknown" if max_cost is None else f"up to {format_credits(max_cost)} credits"
            facts = (record.key, cost, repr(record.prompt[:60]), record.task_id or "", record.reason or "")
            print_result("  ".join(filter(None, map(sanitize_line, facts))))
    if not as_json:
        largest = "price not yet known" if total is None else f"up to {format_credits(total)} credits"
        click.echo(f"{len(unknown)} may have been charged: {largest}", err=True)


async def print_summary(out: Path, command: str, keys: set[str], budget: Decimal | None) -> None:
    """Print the state of the batch in *out*, and the next commands, on stderr. *keys* are those of the file.

    Raises:
        LedgerError: The ledger cannot be read.
    """
    async with aclosing(await Ledger.open(out, create=False)) as ledger:
        states, unlisted = await ledger.query_rows(partial(_count, keys))
        budget_status = Budget.from_attempts(await ledger.attempt_costs(), budget).status()
    saved, failed = (sum(states[state] for state in group) for group in (_SAVED, _FAILED))
    unknown = states[RowState.UNKNOWN]
    charged = states[RowState.SUBMITTED] + states[RowState.SUCCEEDED]
    remaining = len(keys) - saved - failed - unknown
    parts = [f"{saved} of {len(keys)} saved"]
    parts += [
        f"{number} {word}"
        for number, word in ((failed, "failed"), (unknown, "unknown"), (remaining, "remaining"))
        if number
    ]
    parts[-1] += f" ({charged} submitted)" if charged else ""
    money = f"{format_credits(budget_status.spent)} credits spent"
    if budget_status.reserved:
        money += f", up to {format_credits(budget_status.reserved)} more may be charged"
    elif charged:
        money += f", price of {charged} not yet known"
    money += (
        "" if budget_status.remaining is None else f", {format_credits(budget_status.remaining)} of the budget left"
    )
    click.echo(f"{', '.join(parts)}; {money}", err=True)
    folder = shlex.quote(str(out))
    if unlisted:
        click.echo(f"{unlisted} rows of earlier runs are not in the file", err=True)
    if unknown:
        click.echo(
            f"{unknown} may have been charged. To resolve them, run: nanobanana batch resolve --out {folder}", err=True
        )
    if failed:
        click.echo("To submit failed rows again, add --retry-failed. Each may be charged again.", err=True)
    if remaining:
        click.echo(f"To resume, run: {command}", err=True)
        if budget is not None:
            click.echo("If the budget is used up, pass a larger --budget.", err=True)


def _count(keys: set[str], records: Iterator[LedgerRow]) -> tuple[Counter[RowState], int]:
    """Return the number of *keys* in each state, and the number of rows with other keys."""
    states: Counter[RowState] = Counter()
    unlisted = 0
    for record in records:
        if record.key in keys:
            states[record.state] += 1
        else:
            unlisted += 1
    return states, unlisted
