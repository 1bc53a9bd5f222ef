"""Reading the preferences of a pair folder, from its log or its metadata.jsonl."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dpo_sd.errors import UserError
from dpo_sd.files.json_lines import read_records
from dpo_sd.files.names import spelt
from dpo_sd.preferences.log import ANNOTATIONS, read_events
from dpo_sd.preferences.metadata import METADATA, preference_of
from dpo_sd.preferences.outcome import fold
from dpo_sd.preferences.pair_folder import read_pairs

if TYPE_CHECKING:
    from dpo_sd.preferences.outcome import Preference


def read_preferences(folder: str | Path) -> list[Preference]:
    """The preferences of a pair folder: from its log if it has one, otherwise from its metadata.jsonl.

    In metadata.jsonl the five keys prompt, image_0, image_1, prefer_0 and prefer_1 suffice.

    Raises:
        UserError: if there is neither, or a line is broken; the message names it.
    """
    folder = Path(folder)
    if (folder / ANNOTATIONS).exists():  # metadata.jsonl could be older
        pairs = read_pairs(folder)
        return fold(pairs, read_events(folder / ANNOTATIONS, {pair.pair_id for pair in pairs}))
    file = folder / spelt(folder, METADATA)
    if not file.is_file():
        where = f"{folder} holds no votes yet" if folder.is_dir() else f"no folder {folder}"
        raise UserError(f"{where}: choose between its pairs with python -m dpo_sd.annotate pairs={folder}")
    preferences = []
    for number, row in read_records(file):
        try:
            preferences.append(preference_of(row))
        except ValueError as error:
            raise UserError(f"{file}, line {number}: {error}") from error
    return preferences
