"""The closing lines of `nanobanana batch`: what was saved, what it cost, and what to run next."""

import shlex
from collections import Counter
from collections.abc import Iterator
from contextlib import aclosing
from decimal import Decimal
from functools import partial
from pathlib import Path

import attrs
import click

from nanobanana_async._text import format_credits
from nanobanana_async.ledger.batch_ledger import BatchLedger
from nanobanana_async.ledger.budget import Budget, BudgetStatus
from nanobanana_async.ledger.schema import LedgerRow, RowState

_FAILED = (RowState.FAILED, RowState.ABANDONED)


@attrs.define
class BatchSummary:
    """Prints the state of a batch on stderr, after its run has ended."""

    out: Path
    ledger: Path | None
    command: str
    """The command that resumes the batch."""
    keys: set[str]
    """Keys of the rows in the file."""
    budget: Decimal | None
    max_price: Decimal | None
    retries_failed: bool
    before: "Account | None" = None
    """The account when the run began; None if the service did not say."""
    after: "Account | None" = None
    """The account when it had ended."""

    async def print(self) -> None:
        """Print it.

        Raises:
            LedgerError: The ledger cannot be read.
        """
        budget = Budget(self.budget, max_price=self.max_price)
        async with aclosing(await BatchLedger.open(self.out, ledger_folder=self.ledger, create=False)) as ledger:
            counts = await ledger.query_rows(partial(_count, self.keys))
            budget.add_attempts(await ledger.attempt_costs())
        click.echo(f"{', '.join(self._rows(counts))}; {self._money(counts, budget.status())}", err=True)
        for line in self._hints(counts, budget.status()):
            click.echo(line, err=True)

    def _rows(self, counts: "_Counts") -> list[str]:
        numbers = ((counts.failed, "failed"), (counts.unknown, "unknown"), (self._remaining(counts), "remaining"))
        parts = [f"{counts.states[RowState.SAVED]} of {len(self.keys)} saved"]
        parts += [f"{number} {word}" for number, word in numbers if number]
        parts[-1] += f" ({counts.charged} submitted)" if counts.charged else ""
        return parts

    def _remaining(self, counts: "_Counts") -> int:
        return len(self.keys) - counts.states[RowState.SAVED] - counts.failed - counts.unknown

    def _money(self, counts: "_Counts", status: BudgetStatus) -> str:
        parts = [f"{format_credits(status.spent)} credits spent"]
        if status.reserved:
            parts.append(f"up to {format_credits(status.reserved)} more may be charged")
        if status.unpriced:
            parts.append(f"price of {status.unpriced} not yet known")
        if counts.duplicates:
            parts.append(f"{counts.duplicates} possible {_plural('duplicate', counts.duplicates)}")
        if status.remaining is not None:
            over = status.remaining < 0
            amount = format_credits(abs(status.remaining))
            parts.append(f"{amount} OVER the budget" if over else f"{amount} of the budget left")
        return ", ".join(parts)

    def _hints(self, counts: "_Counts", status: BudgetStatus) -> Iterator[str]:
        folder = f"--out {shlex.quote(str(self.out))}"
        folder += f" --ledger {shlex.quote(str(self.ledger))}" if self.ledger is not None else ""
        if (line := self._balance(counts)) is not None:
            yield line
        if counts.unlisted:
            yield f"{counts.unlisted} {_plural('row', counts.unlisted)} of earlier runs not in the file"
        if counts.unknown:
            yield f"{counts.unknown} may have been charged. To resolve them, run: nanobanana batch resolve {folder}"
        if counts.states[RowState.FAILED] and not self.retries_failed:
            yield "To submit failed rows again, add --retry-failed. Each may be charged again."
        if self._remaining(counts):
            yield f"To resume, run: {self.command}"
            if status.remaining is not None and status.remaining <= 0:
                yield "The budget is used up. Pass a larger --budget."

    def _balance(self, counts: "_Counts") -> str | None:
        """Return whether the account accounts for what may have been charged; None if it is not known."""
        if self.before is None or self.after is None or not (counts.unknown or counts.held):
            return None
        gone = self.before.credits - self.after.credits
        stated = self.after.spent - self.before.spent
        if gone == stated == 0:
            return None
        if gone == stated:
            return f"the balance fell by the {format_credits(stated)} credits that the service has stated in this run"
        return (
            f"the balance fell by {format_credits(gone)} credits in this run, of which the service has stated "
            f"{format_credits(stated)}. If nothing else used the account, the rest was charged without a statement."
        )


@attrs.frozen
class Account:
    """The account at one moment."""

    credits: Decimal
    """Credits left."""
    spent: Decimal
    """Credits that the service has stated as charged for the batch."""


@attrs.define
class _Counts:
    states: Counter[RowState] = attrs.field(factory=Counter[RowState])
    unlisted: int = 0
    """Rows that are not in the file."""
    duplicates: int = 0
    held: int = 0

    @property
    def failed(self) -> int:
        return sum(self.states[state] for state in _FAILED)

    @property
    def unknown(self) -> int:
        return self.states[RowState.UNKNOWN]

    @property
    def charged(self) -> int:
        return self.states[RowState.SUBMITTED] + self.states[RowState.SUCCEEDED]


def _count(keys: set[str], records: Iterator[LedgerRow]) -> _Counts:
    counts = _Counts()
    for record in records:
        counts.duplicates += record.possible_duplicates
        counts.held += record.held_charges
        if record.key in keys:
            counts.states[record.state] += 1
        else:
            counts.unlisted += 1
    return counts


def _plural(word: str, number: int) -> str:
    return word if number == 1 else f"{word}s"
