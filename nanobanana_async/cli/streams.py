"""Standard streams that cannot fail. A terminal that is gone, or a full disk, ends the display and not the work."""

import io
import os
import sys
from typing import IO, cast


class _SafeStream(io.TextIOWrapper):
    """A text stream that discards what it cannot write, from the first error on."""

    def __init__(self, stream: io.TextIOWrapper, name: str) -> None:
        encoding, buffering, through = stream.encoding, stream.line_buffering, stream.write_through
        super().__init__(stream.detach(), encoding, "backslashreplace", None, buffering, through)
        self._name = name

    def write(self, text: str, /) -> int:
        """Write *text*, or discard it."""
        try:
            return super().write(text)
        except OSError as exc:
            self._discard(exc)
            return len(text)

    def flush(self) -> None:
        """Flush, or discard what is left."""
        try:
            super().flush()
        except OSError as exc:
            self._discard(exc)

    def _discard(self, exc: OSError) -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
        if self._name == "stdout" and not isinstance(exc, BrokenPipeError):  # a reader that has left wants no more
            print(f"nanobanana: stdout: cannot be written ({exc.strerror})", file=sys.stderr)  # noqa: T201


def protect_standard_streams() -> None:
    """Make stdout and stderr discard what they cannot write, or cannot encode."""
    sys.stdout = _protected(sys.stdout, "stdout")
    sys.stderr = _protected(sys.stderr, "stderr")


def _protected(stream: IO[str] | None, name: str) -> IO[str]:
    if stream is None:  # it was closed by the parent process
        return open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123 - for the life of the process
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    return _SafeStream(cast("io.TextIOWrapper", stream), name)
