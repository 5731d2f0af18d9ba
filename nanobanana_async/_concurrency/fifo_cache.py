"""`FifoCache`: a bounded mapping that forgets its oldest entries."""

from typing import Generic, TypeVar

T = TypeVar("T")


class FifoCache(Generic[T]):
    """The last *maxsize* values, by key."""

    def __init__(self, maxsize: int) -> None:
        self._maxsize = maxsize
        self._items: dict[str, T] = {}

    def __len__(self) -> int:
        return len(self._items)

    def add(self, key: str, value: T) -> None:
        """Add *value* unless the key is present. The oldest value is dropped if the cache is full."""
        if key in self._items:
            return
        if len(self._items) >= self._maxsize:
            del self._items[next(iter(self._items))]
        self._items[key] = value

    def get(self, key: str) -> T | None:
        """Return the value of *key*, or None."""
        return self._items.get(key)

    def pop(self, key: str) -> T | None:
        """Remove and return the value of *key*, or None."""
        return self._items.pop(key, None)
