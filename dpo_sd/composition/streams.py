"""Standard output and error that no terminal, pipe or encoding can end a run with."""

from __future__ import annotations

import errno
import io
import os
import sys


def keep_talking() -> None:
    """Makes the standard streams go on where their reader is gone, and replace what their encoding lacks.

    A run whose terminal or pipe (`| head`) has closed goes on with its log.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or isinstance(stream, io.TextIOWrapper) and isinstance(stream.buffer, io.BufferedWriter):
            setattr(sys, name, _unbreakable(stream))


def _unbreakable(stream: io.TextIOWrapper | None) -> io.TextIOWrapper:
    if stream is None:  # a program without any, under a service manager for example
        return open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - for as long as the program runs
    stream.flush()
    raw = _UnbreakableFile(stream.fileno(), "w", closefd=False)
    buffered = io.BufferedWriter(raw)
    return io.TextIOWrapper(
        buffered, encoding=stream.encoding, errors="backslashreplace", line_buffering=stream.line_buffering
    )


class _UnbreakableFile(io.FileIO):
    def write(self, data: object, /) -> int:
        try:
            return super().write(data)  # type: ignore[arg-type]
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO, errno.ENOTCONN):  # EIO is a terminal that is gone
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return len(memoryview(data).cast("B"))  # type: ignore[arg-type]
