"""`BatchPreview`: what a run over a file would submit, compared with what earlier runs have charged."""

from collections.abc import Mapping
from typing import Final

import attrs

from nanobanana_async.ledger.schema import RowState

_CHARGED: Final = (
    RowState.SUBMITTING,
    RowState.UNKNOWN,
    RowState.SUBMITTED,
    RowState.SUCCEEDED,
    RowState.SAVED,
)
_FEW_ROWS: Final = 2
"""Fewer rows than these are a correction."""
_MANY_ROWS: Final = 10
_MANY_SHARE: Final = 5


@attrs.frozen(kw_only=True)
class BatchPreview:
    """What a run over the rows of a file would do.

    Attributes:
        rows: Rows of the file.
        new: Rows that no earlier run has seen.
        saved: Rows whose image is saved.
        unfinished: Rows of the file that are charged, and whose image is still to be saved.
        unlisted: Charged rows of earlier runs that are not in the file.
        charged: Charged rows of earlier runs.
    """

    rows: int
    new: int
    saved: int
    unfinished: int
    unlisted: int
    charged: int

    @classmethod
    def of(cls, rows: int, counts: Mapping[tuple[RowState, bool], int]) -> "BatchPreview":
        """Return the preview for *rows* rows. *counts*: rows of the ledger, by state and whether the file has them."""
        known = sum(count for (_, is_listed), count in counts.items() if is_listed)
        charged = {flag: sum(counts.get((state, flag), 0) for state in _CHARGED) for flag in (True, False)}
        return cls(
            rows=rows,
            new=rows - known,
            saved=counts.get((RowState.SAVED, True), 0),
            unfinished=sum(counts.get((state, True), 0) for state in (RowState.SUBMITTED, RowState.SUCCEEDED)),
            unlisted=charged[False],
            charged=charged[True] + charged[False],
        )

    @property
    def replaces_charged_rows(self) -> bool:
        """Whether about as many rows are new as charged ones have gone, and these are ten, or a fifth of the batch.

        Another option, encoding or column of keys makes rows new ones, which are charged again.
        """
        are_many = self.unlisted >= _MANY_ROWS or _MANY_SHARE * self.unlisted >= self.charged
        are_as_many = self.unlisted <= 2 * self.new and self.new <= 2 * self.unlisted
        return self.unlisted >= _FEW_ROWS and are_many and are_as_many
