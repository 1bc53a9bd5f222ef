"""Several folders as one source, each with its repeats."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dpo_sd.data.samples import Samples, joined
from dpo_sd.errors import UserError

MOST = 10_000  # repeats


class Folder(NamedTuple):
    """A folder of a source.

    Args:
        path: as it was given.
        repeats: how often each of its samples is visited while those of others are visited once.
    """

    path: str
    repeats: int

    @property
    def place(self) -> Path:
        return Path(self.path).expanduser()


def read_folders(setting: str, given: str | Sequence[str]) -> list[Folder]:
    """Folders as settings name them: one or a list, each with its repeats where these are not 1, as in `photos:10`.

    Args:
        setting: name of the setting, for messages.

    Raises:
        UserError: if there is none, one is named twice, or its repeats are out of range.
    """
    if not given:
        raise UserError(f"{setting} is empty: name a folder")
    if not isinstance(given, str | Sequence) or not all(isinstance(text, str) and text.strip() for text in given):
        raise UserError(f"{setting} must be a folder, or a list of folders such as [photos,sketches:3], got {given!r}")
    folders = []
    for text in [given] if isinstance(given, str) else given:
        path, times = text, "1"
        if (match := re.fullmatch(r"(.+):(\d+)", text)) and not Path(text).expanduser().exists():
            path, times = match.groups()
        if not 1 <= int(times) <= MOST:
            raise UserError(f"{setting}={text}: repeats are between 1 and {MOST}")
        folders.append(Folder(path, int(times)))
    places = [folder.place.resolve() for folder in folders]
    if twice := [folder.path for folder, place in zip(folders, places, strict=True) if places.count(place) > 1]:
        raise UserError(f"{setting} names {twice[0]} twice: name it once, with its repeats as {twice[0]}:2")
    return folders


def together(folders: Sequence[Folder], parts: Sequence[tuple[Samples, list[str]]]) -> tuple[Samples, list[str]]:
    """The samples of all folders with their repeats, and their lines for the report.

    Args:
        parts: samples and lines of each folder.
    """
    report = []
    for folder, (_, lines) in zip(folders, parts, strict=True):
        report += [*lines, *([f"{folder.path}: {folder.repeats} times each"] if folder.repeats > 1 else [])]
    return joined([part.repeated(f.repeats) for (part, _), f in zip(parts, folders, strict=True)]), report
