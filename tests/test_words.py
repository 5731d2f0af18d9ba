"""Code and texts use the words of the field, and no words with a private meaning."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Each of these had a private meaning here, or names a person where a program acts. What to write instead:
DENIED = {
    "agenda": "delay queue, schedule",
    "anew": "again",
    "announced": "callback",
    "anybody": "name the actor",
    "bell": "event",
    "caution": "outage, backoff",
    "dice": "random number",
    "errand": "request kind",
    "everybody": "name the actor",
    "goodbye": "close timeout",
    "heed": "observe",
    "hopeless": "permanent",
    "hush": "pause",
    "lane": "connection",
    "meddle": "intercept",
    "meddler": "interceptor",
    "nobody": "name the actor",
    "pacer": "rate limiter",
    "paid": "charged",
    "parted": "separated",
    "patience": "timeout, deadline",
    "picture": "image",
    "poverty": "budget",
    "printable": "name the characters",
    "quicken": "record a success",
    "resend": "resubmit",
    "rung": "set",
    "somebody": "name the actor",
    "strangers": "unmatched",
    "told": "reported, logged, raised",
    "trouble": "error",
    "unread": "not consumed",
    "vendor": "service",
    "whoever": "name the actor",
    "whomever": "name the actor",
}
ENDINGS = ("", "s", "es", "d", "ed", "ing")
DENIED_PHRASES = ("by itself", "the like", "of its own accord", "; and", "at no cost", "by the book")


def words_of(text: str) -> set[str]:
    """Return the lower-case words of *text*, with identifiers split at underscores and capitals."""
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", text)}


def denied_in(text: str) -> list[str]:
    """Return the denied words and phrases in *text*. An inflected form counts as its word."""
    line = " ".join(text.lower().split())
    stems = {word.removesuffix(ending) for word in words_of(text) for ending in ENDINGS}
    return sorted(stems & DENIED.keys()) + [phrase for phrase in DENIED_PHRASES if phrase in line]


def texts() -> list[str]:
    """Return the paths of all files that people read, except this one."""
    rooms = ("nanobanana_async", "tests", "benchmarks")
    found = [ROOT / name for name in ("CHANGELOG.md", "README.md", "pyproject.toml")]
    for pattern in ("*.py", "*.md", "*.html"):
        found += [path for room in rooms for path in (ROOT / room).rglob(pattern)]
    return sorted(path.relative_to(ROOT).as_posix() for path in found if path.name != Path(__file__).name)


@pytest.mark.parametrize("name", texts())
def test_no_file_has_a_word_with_a_private_meaning(name: str) -> None:
    """Identifiers, docstrings, messages and guides use the vocabulary of the field."""
    found = denied_in((ROOT / name).read_text(encoding="utf-8"))
    assert {word: DENIED.get(word, "rephrase") for word in found} == {}


@pytest.mark.parametrize(
    "text", ["def hush(): ...", "class NobodyWaits: ...", "It is sent\nby itself.", "PAID", "quickens"]
)
def test_a_denied_word_is_found_in_code_and_in_text(text: str) -> None:
    """The check splits identifiers and joins lines."""
    assert denied_in(text)
