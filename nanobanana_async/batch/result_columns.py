"""The columns that a table of results adds to those of the file."""

from typing import Final

RESULT_COLUMNS: Final = ("file", "width", "height", "mismatch", "state", "credits", "reason")
"""Columns that a table of results adds at its end."""


def is_result_header(cells: list[str]) -> bool:
    """Return whether *cells* end as the header of a table of results."""
    last = [cell.strip().removeprefix("nanobanana_") for cell in cells[-len(RESULT_COLUMNS) :]]
    return last == list(RESULT_COLUMNS)
