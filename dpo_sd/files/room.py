"""Room on a disk: how much there is, and one message where it ends."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dpo_sd.errors import UserError

WAYS_OUT = "make room, or choose another place with cache_dir=<folder>"


def free_bytes(folder: Path) -> int:
    """Bytes that are free where a folder lies, or will lie once it is made."""
    return shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free


@contextmanager
def writing(place: Path, *errors: type[Exception]) -> Iterator[None]:
    """Turns an error of writing into one line that says how to go on.

    Args:
        place: file or folder that the line names.
        errors: exceptions that mean so in addition to OSError.

    Raises:
        UserError: if such an error is raised inside.
    """
    try:
        yield
    except (OSError, *errors) as error:
        raise UserError(f"{place} cannot be written ({error}): {WAYS_OUT}; what is complete is kept") from error
