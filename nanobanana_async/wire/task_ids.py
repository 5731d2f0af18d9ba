"""Find the task id in a response, wherever it is. A charged task without its id is lost."""

import json
import re
from collections.abc import Iterator
from typing import Final

from nanobanana_async.models import JsonValue

_NAMES: Final = frozenset({"task_id", "taskid"})
"""Names of the field in lower case. `taskId` is that of other services with the same code."""
_MAX_DEPTH: Final = 50
_SALVAGED: Final = re.compile(
    r'"task_?id"\s*:\s*(?:"([!#-\[\]-~]{1,200})"|(\d{1,200})(?=\s*[,}\]]))', re.IGNORECASE | re.ASCII
)


def find_task_id(documented: JsonValue, document: JsonValue) -> str | None:
    """Return the task id in the *documented* field, else the only one anywhere in *document*.

    Several different ids are of several tasks, and say nothing.
    """
    if (task_id := _to_task_id(documented)) is not None:
        return task_id
    found = set(_task_ids(document, 0))
    return found.pop() if len(found) == 1 else None


def salvage_task_id(body: bytes) -> str | None:
    """Return the only complete task id in a body that is truncated or not JSON; None if there are several."""
    text = body.replace(b"\0", b"").decode("latin-1").replace('\\"', '"')  # UTF-16 without its zeros is ASCII
    found = {first or second for first, second in _SALVAGED.findall(text)}
    return found.pop() if len(found) == 1 else None


def _task_ids(value: JsonValue, depth: int) -> Iterator[str]:
    if depth > _MAX_DEPTH:
        return
    if isinstance(value, list):
        for entry in value:
            yield from _task_ids(entry, depth + 1)
    elif isinstance(value, dict):
        for name, entry in value.items():
            if name.lower() in _NAMES and (task_id := _to_task_id(entry)) is not None:
                yield task_id
            else:
                yield from _task_ids(entry, depth + 1)
    elif isinstance(value, str) and value.lstrip()[:1] in ("{", "["):  # JSON inside a string
        try:
            yield from _task_ids(json.loads(value), depth + 1)
        except (ValueError, RecursionError):
            return


def _to_task_id(value: JsonValue) -> str | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value) if value > 0 else None  # undocumented, but the task is charged
    text = value.strip() if isinstance(value, str) else ""
    return None if text in ("", "0") else text
