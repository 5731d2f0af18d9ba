"""`SubmitCall`: one call that submits a request, and the arguments that `generate`, `submit` and `stream` share."""

import json
import logging
from typing import Final, cast

import anyio
import attrs

from nanobanana_async._concurrency.fifo_cache import FifoCache
from nanobanana_async._concurrency.slots import SlotWaiter
from nanobanana_async.events import new_key
from nanobanana_async.handle import check_timeout_s
from nanobanana_async.models import GenerationRequest, JsonValue, RequestOptions, honours_image_size
from nanobanana_async.protocols import CallbackSource, SubmitRecord

_log: Final = logging.getLogger("nanobanana_async")


class SubmitOptions(RequestOptions, total=False):
    """Keyword arguments of `generate`, `submit` and `stream`: the fields of a request, and the following."""

    owner: str | None
    """Whom the image is for, such as `"discord:42"`. Owners take turns, within `owner_limits`."""
    note: JsonValue
    """Anything for the ledger, which `resume` and `unresolved` return."""
    callback: CallbackSource | None
    """A `CallbackReceiver`. The service posts the final state to it, and polls are rare meanwhile.

    If the response to the submit is lost, a callback within `Timeouts.recovery_s` provides the task id.
    """


_MAX_NOTE_CHARS: Final = 65_536
_OWN_OPTIONS: Final = SubmitOptions.__annotations__.keys() - RequestOptions.__annotations__.keys()


def _to_owner(owner: object) -> str | None:
    if owner is not None and not (isinstance(owner, str) and owner.strip()):
        raise ValueError(f"owner: expected text, got {owner!r:.80}")
    if owner is not None and not owner.isascii():
        owner.encode()  # raises UnicodeEncodeError, a ValueError, for a lone surrogate
    return owner


def _to_json_value(note: JsonValue) -> JsonValue:
    """Return *note* as it is after a restart: tuples are lists, and keys are text."""
    if note is None:
        return None
    try:
        text = json.dumps(note, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as exc:
        raise ValueError(f"note: expected a JSON value, got {type(note).__name__}: {exc}") from exc
    if len(text) > _MAX_NOTE_CHARS:
        raise ValueError(f"note: expected at most {_MAX_NOTE_CHARS} characters of JSON, got {len(text)}")
    value: JsonValue = json.loads(text)
    return value


@attrs.frozen(kw_only=True)
class SubmitCall:
    """One call that submits a request."""

    request: GenerationRequest
    deadline_s: float
    """When the caller gives up, on the event loop's clock."""
    key: str = attrs.field(factory=new_key)
    """Identifies the call in events and in the ledger."""
    owner: str | None = attrs.field(default=None, converter=_to_owner)
    note: JsonValue = attrs.field(default=None, converter=_to_json_value)
    callback: CallbackSource | None = None
    record: SubmitRecord | None = None
    """Records the attempts instead of the ledger of the client."""
    waiter: SlotWaiter = attrs.field(init=False, factory=SlotWaiter)
    """Its place in line."""

    def __attrs_post_init__(self) -> None:
        self.waiter.owner = self.owner


UNHONOURED_SIZE: Final = (
    "model %s is not known to honour image_size. It may deliver and charge another size. Models whose names end with "
    "-pro or -2 honour it."
)
"""Format of the warning. A display that has said it better compares `LogRecord.msg`."""
_MAX_MODELS: Final = 64


class SizeCheck:
    """Warns of an image size that the model may ignore, once per model."""

    def __init__(self) -> None:
        self._warned: FifoCache[bool] = FifoCache(_MAX_MODELS)

    def check(self, request: GenerationRequest) -> None:
        """Warn about *request* before it costs anything."""
        if request.image_size is None or honours_image_size(request.model) or self._warned.get(request.model):
            return
        self._warned.add(request.model, True)  # noqa: FBT003 - a set
        _log.warning(UNHONOURED_SIZE, request.model)


def make_call(
    prompt: str | GenerationRequest,
    options: SubmitOptions,
    *,
    timeout_s: float,
    record: SubmitRecord | None = None,
) -> SubmitCall:
    """Return the call for these arguments. *record* replaces the ledger."""
    check_timeout_s(timeout_s)
    own = cast("RequestOptions", {name: value for name, value in options.items() if name not in _OWN_OPTIONS})
    base = prompt if isinstance(prompt, GenerationRequest) else GenerationRequest(prompt)
    return SubmitCall(
        request=attrs.evolve(base, **own) if own else base,
        deadline_s=anyio.current_time() + timeout_s,
        owner=options.get("owner"),
        note=options.get("note"),
        callback=options.get("callback"),
        record=record,
    )
