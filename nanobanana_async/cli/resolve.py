"""`nanobanana batch resolve`: decide about rows that may have been charged."""

import os
import re
from contextlib import aclosing
from decimal import Decimal
from pathlib import Path
from typing import Any

import click

from nanobanana_async._text import format_credits, sanitize_line
from nanobanana_async.cli.runtime import EXIT_OK, CommandContext, json_option, print_json, print_result, run
from nanobanana_async.client import NanoBananaClient
from nanobanana_async.errors import ConfigurationError
from nanobanana_async.ledger.batch_ledger import BatchLedger
from nanobanana_async.ledger.budget import Budget
from nanobanana_async.ledger.schema import LedgerRow, RowState
from nanobanana_async.wire.endpoint import KEY_VARIABLES

_TASK_ID = r"[\w.:-]{16,200}"
"""Ids are opaque. Those of the service have 36 or 38 characters, so much shorter ones are typing errors."""


class _ResolveGroup(click.Group):
    """`resolve --out DIR` lists the rows."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        is_named = bool(args) and (args[0] in self.commands or args[0] in ctx.help_option_names)
        return super().parse_args(ctx, args if is_named else ["list", *args])


@click.group(cls=_ResolveGroup)
def resolve() -> None:
    """Decide about rows that may have been charged.

    Without a command, list them.
    """


out_option = click.option(
    "-o", "--out", required=True, metavar="DIR", type=click.Path(path_type=Path), help="Folder of the batch."
)
ledger_option = click.option(
    "--ledger", metavar="DIR", type=click.Path(path_type=Path), help="Folder of the ledger.  [default: that of --out]"
)
_keys_argument = click.argument("keys", metavar="[KEY]...", nargs=-1)
_all_option = click.option("--all", "all_rows", is_flag=True, help="Select all unknown rows instead of KEYs.")


@resolve.command(name="list")
@out_option
@ledger_option
@json_option
def list_rows(out: Path, ledger: Path | None, *, as_json: bool) -> None:
    """List the rows and their largest cost."""

    async def work(_: CommandContext) -> int:
        async with aclosing(await BatchLedger.open(out, ledger_folder=ledger, create=False)) as opened:
            await _show(opened, as_json=as_json)
        return EXIT_OK

    run(work, as_json=as_json)


@resolve.command()
@_keys_argument
@out_option
@ledger_option
@_all_option
def resubmit(keys: tuple[str, ...], out: Path, ledger: Path | None, *, all_rows: bool) -> None:
    """Submit rows again in the next run. They may be charged again."""
    _decide(RowState.REQUEUED, keys, out, ledger, all_rows=all_rows)


@resolve.command()
@_keys_argument
@out_option
@ledger_option
@_all_option
def abandon(keys: tuple[str, ...], out: Path, ledger: Path | None, *, all_rows: bool) -> None:
    """Give rows up. They count as failed."""
    _decide(RowState.ABANDONED, keys, out, ledger, all_rows=all_rows)


@resolve.command()
@click.argument("key")
@click.argument("task_id")
@out_option
@ledger_option
def bind(key: str, task_id: str, out: Path, ledger: Path | None) -> None:
    """Record the task id of a row. The next run downloads its image.

    If the environment has an API key, the service is asked whether it knows the task.
    """
    if not re.fullmatch(_TASK_ID, task_id, re.ASCII):
        raise click.UsageError(f"TASK_ID: expected at least 16 letters, digits and dashes, got {task_id!r:.80}.")

    async def work(_: CommandContext) -> int:
        if any(map(os.getenv, KEY_VARIABLES)):
            async with NanoBananaClient() as client:
                await client.task(task_id).query()
        async with aclosing(await BatchLedger.open(out, ledger_folder=ledger, create=False)) as opened:
            await _unknown_keys(opened, (key,))
            await opened.bind(key, task_id)
        click.echo("1 changed. To apply it, run the batch again.", err=True)
        return EXIT_OK

    run(work)


@resolve.command()
@out_option
@ledger_option
@json_option
def adopt(out: Path, ledger: Path | None, *, as_json: bool) -> None:
    """Accept a copied or restored ledger. Rows that it has lost become unknown."""

    async def work(_: CommandContext) -> int:
        async with aclosing(await BatchLedger.open(out, ledger_folder=ledger, create=False, adopt=True)) as opened:
            click.echo("ledger adopted. To resume, run the batch again.", err=True)
            await _show(opened, as_json=as_json)
        return EXIT_OK

    run(work, as_json=as_json)


def _decide(state: RowState, keys: tuple[str, ...], out: Path, ledger: Path | None, *, all_rows: bool) -> None:
    if bool(keys) is all_rows:
        raise click.UsageError("expected KEYs or --all. To list the keys, run: nanobanana batch resolve --out DIR")

    async def work(_: CommandContext) -> int:
        async with aclosing(await BatchLedger.open(out, ledger_folder=ledger, create=False)) as opened:
            chosen = await _unknown_keys(opened, keys)
            for key in chosen:
                await opened.resolve(key, state)
        click.echo(f"{len(chosen)} changed. To apply it, run the batch again.", err=True)
        return EXIT_OK

    run(work)


async def _unknown_keys(ledger: BatchLedger, keys: tuple[str, ...]) -> tuple[str, ...]:
    """Return *keys*, or those of all unknown rows if there are none.

    Raises:
        ConfigurationError: A key is not that of an unknown row.
    """
    known = {record.key for record in await ledger.list_rows(RowState.UNKNOWN)}
    if unlisted := set(keys) - known:
        raise ConfigurationError(
            f"key: expected that of an unknown row, got {min(unlisted)!r}. To list the keys, run: nanobanana batch "
            f"resolve --out {ledger.folder}"
        )
    return tuple(dict.fromkeys(keys)) or tuple(known)


async def _show(ledger: BatchLedger, *, as_json: bool) -> None:
    unknown: list[LedgerRow] = await ledger.list_rows(RowState.UNKNOWN)
    budget = Budget()
    budget.add_attempts(await ledger.attempt_costs())
    total: Decimal | None = Decimal(0)
    for record in unknown:
        price = budget.price((record.model, record.image_size))
        max_cost = None if price is None else price * record.held_charges
        total = None if total is None or max_cost is None else total + max_cost
        if as_json:
            print_json(_record(record, max_cost))
        else:
            cost = "price unknown" if max_cost is None else f"up to {format_credits(max_cost)} credits"
            facts = (record.key, cost, repr(record.prompt[:60]), record.task_id or "", record.reason or "")
            print_result("  ".join(filter(None, map(sanitize_line, facts))))
    if not as_json:
        largest = "price not yet known" if total is None else f"up to {format_credits(total)} credits"
        click.echo(f"{len(unknown)} may have been charged: {largest}", err=True)


def _record(record: LedgerRow, max_cost: Decimal | None) -> dict[str, Any]:
    return {
        "key": record.key,
        "prompt": record.prompt,
        "task_id": record.task_id,
        "max_cost": max_cost,
        "possible_duplicates": record.possible_duplicates,
        "reason": record.reason,
    }
