"""The closing lines of `nanobanana batch`: what was saved, what it cost, and what to run next."""

import shlex
from collections import Counter
from collections.abc import Container, Iterator
from contextlib import aclosing
from decimal import Decimal
from pathlib import Path
from typing import Final, Protocol

import attrs
import click

from nanobanana_async._text import format_credits
from nanobanana_async.ledger.batch_ledger import BatchLedger
from nanobanana_async.ledger.budget import Budget, BudgetStatus
from nanobanana_async.ledger.schema import RowState

_PROBLEMS: Final = (RowState.FAILED, RowState.UNKNOWN)
"""States of rows that are not in the file which explain the exit code."""


class BatchOptions(Protocol):
    """The options of a run that its summary depends on."""

    @property
    def out(self) -> Path:
        """Folder of the batch."""
        ...

    @property
    def ledger(self) -> Path | None:
        """Folder of the ledger; None for that of the batch."""
        ...

    @property
    def budget(self) -> Decimal | None:
        """Credits that may be spent."""
        ...

    @property
    def max_price(self) -> Decimal | None:
        """Upper bound of a price that is not known."""
        ...

    @property
    def retry_failed(self) -> bool:
        """Whether failed rows are submitted again."""
        ...


@attrs.define
class BatchSummary:
    """Prints the state of a batch on stderr, after its run has ended."""

    options: BatchOptions
    file: Container[str]
    """Keys of the rows of the file."""
    keys: Container[str]
    """Keys of the rows of the run."""
    total: int
    """Number of rows of the run."""
    command: str
    """The command that resumes the batch."""
    before: "Account | None" = None
    """The account when the run began; None if the service did not say."""
    after: "Account | None" = None
    """The account when it had ended."""

    async def print(self) -> None:
        """Print it.

        Raises:
            LedgerError: The ledger cannot be read.
        """
        options = self.options
        budget = Budget(options.budget, max_price=options.max_price)
        opening = BatchLedger.open(options.out, ledger_folder=options.ledger, create=False)
        async with aclosing(await opening) as ledger:
            in_file = await ledger.count_states(self.file)
            counts = _Counts(await ledger.count_states(self.keys), in_file, *await ledger.doubts())
            mismatches, reasons = await ledger.count_mismatches(self.keys), await ledger.count_reasons(self.keys)
            budget.add_attempts(await ledger.attempt_costs())
        click.echo(f"{', '.join(self._rows(counts))}; {self._money(counts, budget.status())}", err=True)
        if mismatches:
            click.echo(
                f"not as requested: {_listed(mismatches)}. See the gallery, or mismatch in the manifest.", err=True
            )
        if reasons:
            click.echo(f"failed tasks by reason: {_listed(reasons)}", err=True)
        for line in self._hints(counts, budget.status()):
            click.echo(line, err=True)

    def _rows(self, counts: "_Counts") -> list[str]:
        numbers = ((counts.failed, "failed"), (counts.unknown, "unknown"), (self._remaining(counts), "remaining"))
        parts = [f"{counts.listed(RowState.SAVED)} of {self.total} saved"]
        parts += [f"{number} {word}" for number, word in numbers if number]
        parts[-1] += f" ({counts.charged} submitted)" if counts.charged else ""
        return parts

    def _remaining(self, counts: "_Counts") -> int:
        return self.total - counts.listed(RowState.SAVED) - counts.failed - counts.unknown

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
        out, home = self.options.out, self.options.ledger
        folder = f"--out {shlex.quote(str(out))}"
        folder += f" --ledger {shlex.quote(str(home))}" if home is not None else ""
        if (line := self._balance(counts)) is not None:
            yield line
        if counts.unlisted():
            parts = [f"{counts.unlisted()} {_plural('row', counts.unlisted())} of earlier runs not in the file"]
            parts += [f"{n} {state.value}" for state in _PROBLEMS if (n := counts.unlisted(state))]
            yield ", ".join(parts)
        if unknown := counts.unknown + counts.unlisted(RowState.UNKNOWN):
            yield f"{unknown} may have been charged. To resolve them, run: nanobanana batch resolve {folder}"
        if counts.listed(RowState.FAILED) and not self.options.retry_failed:
            yield "To submit failed rows again, add --retry-failed. Each may be charged again."
        if self._remaining(counts):
            is_spent = status.remaining is not None and status.remaining <= 0
            yield f"To resume, run{' with a larger --budget' if is_spent else ''}: {self.command}"

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


@attrs.frozen
class _Counts:
    states: Counter[tuple[RowState, bool]]
    """Rows by state and whether they are in the run."""
    in_file: Counter[tuple[RowState, bool]]
    """Rows by state and whether they are in the file."""
    duplicates: int
    held: int

    def listed(self, *states: RowState) -> int:
        return sum(self.states[state, True] for state in states)

    def unlisted(self, *states: RowState) -> int:
        return sum(self.in_file[state, False] for state in states or RowState)

    @property
    def failed(self) -> int:
        return self.listed(RowState.FAILED, RowState.ABANDONED)

    @property
    def unknown(self) -> int:
        return self.listed(RowState.UNKNOWN)

    @property
    def charged(self) -> int:
        return self.listed(RowState.SUBMITTED, RowState.SUCCEEDED)


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))


def _plural(word: str, number: int) -> str:
    return word if number == 1 else f"{word}s"
