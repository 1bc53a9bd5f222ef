"""Standard output and error that no terminal, pipe or encoding can end a run with."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Any, TextIO


def keep_talking() -> None:
    """Makes the standard streams go on where their reader is gone, and replace what their encoding lacks.

    A run whose terminal or pipe (`| head`) has closed goes on with its log.
    """
    if sys.stdout is sys.__stdout__:  # and no test reads it
        sys.stdout = _unbreakable(sys.stdout)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _unbreakable(sys.stderr)


def _unbreakable(stream: Any) -> TextIO:
    if stream is None:  # a program without any, under a service manager for example
        return open(os.devnull, "w", encoding="utf-8")
    stream.flush()
    raw: Any = _UnbreakableFile(stream.fileno(), "w", closefd=False)
    return io.TextIOWrapper(
        raw if stream.write_through else io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


# EIO is a terminal that is gone; a file on a full disk takes nothing either
_GONE = (errno.EPIPE, errno.EIO, errno.ENOTCONN, errno.ENOSPC, errno.EDQUOT)


class _UnbreakableFile(io.FileIO):
    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in _GONE:
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return len(memoryview(data).cast("B"))
