"""`nanobanana batch resolve`: what to do about rows that may have been paid, and for which nothing says so."""

import re
import shlex
from collections import Counter
from collections.abc import Iterator
from contextlib import aclosing
from decimal import Decimal
from functools import partial
from pathlib import Path

import click

from nanobanana_async.cli.generate import json_option
from nanobanana_async.cli.runtime import EXIT_OK, CommandContext, print_json, print_result, run
from nanobanana_async.errors import ConfigurationError
from nanobanana_async.ledger.budget import Budget
from nanobanana_async.ledger.schema import LedgerRow, RowState
from nanobanana_async.ledger.sqlite import Ledger
from nanobanana_async.wire.body import sanitize_line

_DONE = (RowState.SAVED,)
_FAILED = (RowState.FAILED, RowState.ABANDONED)


@click.command()
@click.argument("keys", metavar="[KEY]...", nargs=-1)
@click.option("-o", "--out", required=True, metavar="DIR", type=click.Path(path_type=Path), help="Of the batch.")
@click.option("--list", "list_rows", is_flag=True, help="Show them, and what they may cost. The default.")
@click.option("--resubmit", is_flag=True, help="Have the next run submit them again: they may be paid twice.")
@click.option("--abandon", is_flag=True, help="Give them up; they count as failed.")
@click.option("--bind", "task_id", metavar="TASK_ID", help="Tell which task the one KEY is; the next run fetches it.")
@click.option("--all", "all_rows", is_flag=True, help="All unknown rows, instead of KEYs.")
@click.option("--adopt", is_flag=True, help="Take a ledger that was copied or restored for the true one.")
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
    """Decide about rows whose submit was sent, and never answered. Works without a key, and sends nothing."""
    if sum((list_rows, resubmit, abandon, task_id is not None)) > 1:
        raise click.UsageError("--list, --resubmit, --abandon, --bind: one at a time.")
    if task_id is not None and (len(keys) != 1 or not re.fullmatch(r"[!-~]{1,200}", task_id)):
        raise click.UsageError("--bind: name a task id without blanks, and the one KEY that it is.")
    if (resubmit or abandon) and bool(keys) is all_rows:
        raise click.UsageError("name KEYs (see --list), or say --all.")
    decided = task_id is not None or resubmit or abandon

    async def work(_: CommandContext) -> int:
        async with aclosing(await Ledger.open(out, adopt=adopt, create=False)) as ledger:
            unknown = await ledger.query_rows(list, RowState.UNKNOWN)
            account = Budget.from_attempts(await ledger.attempt_costs())
            chosen = keys or tuple(record.key for record in unknown)
            if unlisted := set(chosen) - {record.key for record in unknown}:
                raise ConfigurationError(f"{min(unlisted)!r} is the key of no unknown row; --list shows them")
            for key in chosen if decided else ():
                if task_id is not None:
                    await ledger.bind(key, task_id)
                else:
                    await ledger.transition(key, RowState.REQUEUED if resubmit else RowState.ABANDONED)
        if decided:
            click.echo(f"changed: {len(chosen)}; run the batch again to act on it", err=True)
        else:
            if adopt:
                click.echo("adopted: the next run of the batch goes on here", err=True)
            _show(unknown, account, as_json=as_json)
        return EXIT_OK

    run(work, as_json=as_json)


def _show(unknown: list[LedgerRow], account: Budget, *, as_json: bool) -> None:
    total: Decimal | None = Decimal(0)
    for record in unknown:
        price = account.max_price(record.model)
        max_cost = None if price is None else price * record.submit_count
        total = None if total is None or max_cost is None else total + max_cost
        if as_json:
            line = {"key": record.key, "prompt": record.prompt, "task_id": record.task_id, "max_cost": max_cost}
            print_json({**line, "reason": record.reason})
        else:
            cost = "price unknown" if max_cost is None else f"up to {max_cost.normalize():f} credits"
            facts = (record.key, cost, repr(record.prompt[:60]), record.task_id or "", record.reason or "")
            print_result("  ".join(filter(None, map(sanitize_line, facts))))
    if not as_json:
        most = "at a price nobody knows" if total is None else f"{total.normalize():f} credits at worst"
        click.echo(f"{len(unknown)} may have been paid: {most}", err=True)


async def print_summary(out: Path, command: str, keys: set[str], budget: Decimal | None) -> None:
    """Say on stderr how the batch in *out* stands, and what to type next. *keys* are those of the rows asked for.

    Raises:
        LedgerError: It cannot be read.
    """
    async with aclosing(await Ledger.open(out, create=False)) as ledger:
        states, unlisted = await ledger.query_rows(partial(_count, keys))
        funds = Budget.from_attempts(await ledger.attempt_costs(), budget).status()
    done, failed = (sum(states[state] for state in group) for group in (_DONE, _FAILED))
    unknown = states[RowState.UNKNOWN]
    paid = states[RowState.SUBMITTED] + states[RowState.SUCCEEDED]
    to_go = len(keys) - done - failed - unknown
    parts = [f"{done} of {len(keys)} done"]
    parts += [
        f"{number} {word}" for number, word in ((failed, "failed"), (unknown, "unknown"), (to_go, "to go")) if number
    ]
    parts[-1] += f" ({paid} of them submitted)" if paid else ""
    money = f"{funds.spent.normalize():f} credits spent"
    if funds.reserved:
        money += f", up to {funds.reserved.normalize():f} more may be or become charged"
    elif paid:
        money += f", {paid} at a price nobody knows yet"
    money += "" if funds.remaining is None else f", {funds.remaining.normalize():f} of the budget left"
    click.echo(f"{', '.join(parts)}; {money}", err=True)
    place = shlex.quote(str(out))
    if unlisted:
        click.echo(f"besides, {unlisted} of earlier runs that the file does not have (any more)", err=True)
    if unknown:
        click.echo(
            f"{unknown} may have been paid; to decide about them: nanobanana batch resolve --out {place}", err=True
        )
    if failed:
        click.echo("to submit failed rows again, which may be paid again: add --retry-failed", err=True)
    if to_go:
        click.echo(f"to go on: {command}", err=True)
        if budget is not None:
            click.echo("if the budget is used up, with a larger --budget", err=True)


def _count(keys: set[str], records: Iterator[LedgerRow]) -> tuple[Counter[RowState], int]:
    """Return how many of *keys* are in which state, and how many records have other keys."""
    states: Counter[RowState] = Counter()
    unlisted = 0
    for record in records:
        if record.key in keys:
            states[record.state] += 1
        else:
            unlisted += 1
    return states, unlisted
