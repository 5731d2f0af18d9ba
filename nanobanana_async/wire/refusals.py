"""What a rejection means, by its words."""

import re
from typing import Final

_MEANS: Final = r"(?:credits?|balance|funds|quota)"
_EMPTY_ACCOUNT: Final = re.compile(
    rf"insufficient[ _-]+(?:\w+[ _-]+)?{_MEANS}\b"
    rf"|not enough (?:\w+ )?{_MEANS}\b"
    rf"|(?:out of|ran out of|run out of|exceeded your|exhausted your) (?:\w+ )?{_MEANS}\b"
    rf"|(?<!white )\b{_MEANS}(?: balance)? (?:is |are |has been |have been )?"
    r"(?:too low|insufficient|not enough|not sufficient|exhausted|used up|depleted|exceeded)\b"
    rf"|\bno (?:more )?{_MEANS} (?:left|remaining|available)\b"
    rf"|n[o']t have (?:a |any |enough |sufficient )?(?:\w+ )?{_MEANS}\b"
    r"|余额不足|额度不足|积分不足|点数不足",
    re.IGNORECASE,
)
"""Whole phrases, because single words such as "balance" occur in prompts and in rejections of prompts.

No status is documented for an empty account. Source: the messages of this and similar services in public clients.
"""


def says_empty_account(message: str) -> bool:
    """Return whether the service says that the account is empty."""
    # An error may quote a prompt about a credit card. The apostrophes of "doesn't" and "it's" are not quotes.
    return _EMPTY_ACCOUNT.search(re.sub(r"(?<!\w)'[^']*'(?!\w)|\"[^\"]*\"", "", message)) is not None
