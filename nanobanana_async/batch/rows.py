"""Rows of a batch with stable keys: a row is the same in each run, wherever it is, and however its text is stored."""

import contextlib
import hashlib
import io
import json
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterable, Iterable
from pathlib import Path
from typing import Final, TypeAlias

import anyio.to_thread
import attrs

from nanobanana_async._concurrency.map_unordered import iter_any
from nanobanana_async._text import normalize
from nanobanana_async.ledger.schema import BatchRow
from nanobanana_async.models import GenerationRequest, ImageSource, SupportsSave

_MAX_KEY_CHARS: Final = 200

Rows: TypeAlias = Iterable[BatchRow | GenerationRequest | str] | AsyncIterable[BatchRow | GenerationRequest | str]


class RowKeys:
    """Assigns keys to rows: the given key, else a hash of the content with an ordinal for equal rows.

    The order of rows does not matter, rows may be added anywhere, and an edited row is a new row.
    """

    def __init__(self) -> None:
        self._seen: Counter[int] = Counter()
        """Rows by digest: a million take a third of the memory of their texts."""
        self.copies = 0
        """Rows with the content of an earlier row."""

    def row(
        self,
        request: GenerationRequest,
        *,
        key: str | None = None,
        name: str | None = None,
        images: Iterable[str] | None = None,
    ) -> BatchRow:
        """Return the row of *request*. *images* are its references as written by the user. Raises as `assign` does."""
        key, fingerprint = self.assign(request, key, images)
        return BatchRow(key=key, request=request, name=name, fingerprint=fingerprint)

    def assign(
        self,
        request: GenerationRequest,
        key: str | None = None,
        images: Iterable[str] | None = None,
        *,
        is_variant: bool = False,
    ) -> tuple[str, str]:
        """Return key and fingerprint of the row of *request*. A variant is no copy of the row before it.

        Raises:
            ValueError: The key is invalid, or another row has it.
        """
        content = _fingerprint(request, list(map(_image_identity, request.images) if images is None else images))
        number = int(content, 16)
        self._seen[number] += 1
        self.copies += self._seen[number] > 1 and not is_variant
        if key is None:
            ordinal = self._seen[number]
            key = content if ordinal == 1 else f"{content}-{ordinal}"
        elif not key.strip() or not key.isprintable() or len(key) > _MAX_KEY_CHARS:
            raise ValueError(f"key: expected 1 to {_MAX_KEY_CHARS} visible characters, got {key!r:.80}")
        else:
            number = digest(f"key {key}")
            self._seen[number] += 1
            if self._seen[number] > 1:
                raise ValueError(f"key: {key!r} is also the key of an earlier row. Use another key.")
        return key, content

    def is_copy(self, row: BatchRow) -> bool:
        """Return whether *row*, the last one, has the content of an earlier row."""
        return self._seen[int(row.fingerprint, 16)] > 1


def digest(text: str) -> int:
    """Return 64 bits of a hash of *text*."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


async def with_keys(rows: Rows) -> AsyncGenerator[BatchRow | Exception]:
    """Yield each of *rows* with a key. An error of the source is yielded last, after the rows before it."""
    keys = RowKeys()
    try:
        async with contextlib.aclosing(iter_any(rows)) as source:
            async for one in source:
                if isinstance(one, BatchRow):
                    yield one if one.fingerprint else await _with_fingerprint(one)
                    continue
                request = one if isinstance(one, GenerationRequest) else GenerationRequest(one)
                yield keys.row(request, images=await _image_identities(request))
    except Exception as exc:  # noqa: BLE001 - raised by the consumer
        yield exc


async def _with_fingerprint(row: BatchRow) -> BatchRow:
    return attrs.evolve(row, fingerprint=_fingerprint(row.request, await _image_identities(row.request)))


def _fingerprint(request: GenerationRequest, images: list[str]) -> str:
    """Return 16 hex digits of everything the image depends on. A file counts by its path, not its content.

    Blanks and line breaks count as one blank each, so that text is the same however it is wrapped.
    """
    prompt = " ".join(normalize(request.prompt).split())
    content = [prompt, images, request.model, request.aspect_ratio, request.image_size, dict(request.extra)]
    return hashlib.sha256(_encode(content).encode()).hexdigest()[:16]


_encode: Final = json.JSONEncoder(sort_keys=True, default=str).encode


async def _image_identities(request: GenerationRequest) -> list[str]:
    """Return `_image_identity` of each image, computed in a thread: it takes seconds for a large image."""
    return [
        _image_identity(image)
        if isinstance(image, str | Path)
        else await anyio.to_thread.run_sync(_image_identity, image)
        for image in request.images
    ]


def _image_identity(image: ImageSource) -> str:
    if isinstance(image, str | Path):
        return str(image)
    if isinstance(image, SupportsSave):
        file = io.BytesIO()
        image.save(file, format="PNG")
        image = file.getvalue()
    return hashlib.sha256(image).hexdigest()
