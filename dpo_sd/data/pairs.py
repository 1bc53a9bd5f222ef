"""Pairs of images in a folder, with what people prefer, as training data."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from dpo_sd.data.cache import Cache
from dpo_sd.data.file_source import FileSource
from dpo_sd.data.folders import read_folders, together
from dpo_sd.data.samples import Samples, by_prompt
from dpo_sd.data.source import checked_dropout
from dpo_sd.data.splitting import Split, check_validation, split
from dpo_sd.data.usable import left_out, some, usable
from dpo_sd.errors import UserError
from dpo_sd.files.names import spelt
from dpo_sd.files.texts import is_text
from dpo_sd.preferences.drawn_with import drawn_with
from dpo_sd.preferences.outcome import SIDES, Preference, merged
from dpo_sd.preferences.pair_folder import image_file, is_uid
from dpo_sd.preferences.reading import read_preferences


class Pairs(FileSource):
    """A pair folder as `python -m dpo_sd.annotate` leaves it, or any folder with a `metadata.jsonl` of that kind.

    Args:
        pairs: the folder; or several, each with its repeats where these are not 1, as in [pairs/one,pairs/two:3].
        validation: share of the prompts held back for the validation grid, in (0, 0.5] and at most 128, or a number.
        soft_labels: where several people voted, P(chosen is better) is their share; otherwise the majority decides.
        ties: trains on ties too, with P = 1/2.
        weight_by_prompt: weighs each pair by one over the number of pairs with its prompt.
        caption_dropout: share of visits that train on the empty prompt, in [0, 1].
        seed: seed of the split into training and validation.

    Raises:
        UserError: if a setting is out of range.
    """

    has_pairs: ClassVar[bool] = True

    def __init__(
        self,
        pairs: str | list[str],
        validation: float = 0.1,
        soft_labels: bool = False,
        ties: bool = False,
        weight_by_prompt: bool = False,
        caption_dropout: float = 0.0,
        seed: int = 0,
    ):
        self.folders = read_folders("pairs", pairs)
        check_validation(validation)
        self.caption_dropout = checked_dropout(caption_dropout)
        self.validation, self.seed = validation, seed
        self.soft_labels, self.ties, self.weight_by_prompt = soft_labels, ties, weight_by_prompt

    def look(self, cache: Cache, fetch: bool) -> Split:
        """The decided pairs of the folders.

        Raises:
            UserError: if a folder cannot be read, nothing in it is decided, or there is only one prompt.
        """
        parts = [self._of_folder(folder.place) for folder in self.folders]
        samples, report = together(self.folders, parts)
        if self.weight_by_prompt and len(parts) > 1:
            samples = replace(samples, weight=by_prompt(samples.prompts))
        first, *others = self._drawn_with()
        if any(loras != first for loras in others):
            report.append("the folders were not drawn with the same LoRAs")
        return split(samples, self.validation, self.seed, report)

    def _of_folder(self, folder: Path) -> tuple[Samples, list[str]]:
        """The decided pairs of a folder, and lines for the report."""
        preferences, several = merged(read_preferences(folder))
        wanted = (*SIDES, "tie") if self.ties else SIDES
        decided = [preference for preference in preferences if preference.status in wanted]
        if not decided:
            raise UserError(
                f"{folder} has no {'decided or tied' if self.ties else 'decided'} pair ({counted(preferences)}): "
                f"choose the better pictures with python -m dpo_sd.annotate pairs={folder}"
            )
        flipped = [preference.status == "image_1" for preference in decided]
        names = [(spelt(folder, p.pair.image_0), spelt(folder, p.pair.image_1)) for p in decided]
        prompts = [p.pair.prompt for p in decided]
        found = usable(
            folder,
            prompts,
            chosen=[name[flip] for name, flip in zip(names, flipped, strict=True)],
            rejected=[name[not flip] for name, flip in zip(names, flipped, strict=True)],
            label=[_label(p, self.soft_labels) for p in decided],
            weight=by_prompt(prompts) if self.weight_by_prompt else None,
            resolve=_Inside(folder),
        )
        if not found.rows:
            raise UserError(f"no decided pair of {folder} can be read: {'; '.join(found.left_out)}")
        empty = [" and ".join(names[row]) for row in found.rows if not prompts[row].strip()]
        uids = [(p.pair.image_0_uid, p.pair.image_1_uid) for p in decided]
        changed = _changed(found.samples, [uids[row][:: -1 if flipped[row] else 1] for row in found.rows])
        report = [
            f"{folder}: {counted(preferences)}",
            *several,
            *found.left_out,
            *([f"{len(empty)} pairs have an empty prompt and are trained on it: {some(empty)}"] if empty else []),
            *left_out("with a picture that has changed since it was judged", list(changed.values()), len(decided)),
        ]
        return found.samples.without(changed), report

    def drawn_with(self) -> list[dict[str, Any]] | None:
        """The LoRAs that drew the pictures: path, weight and sha256 of each; None where they come from elsewhere."""
        first, *others = self._drawn_with()
        return first if all(loras == first for loras in others) else None

    def _drawn_with(self) -> list[list[dict[str, Any]] | None]:
        records = (drawn_with(folder.place) for folder in self.folders)
        return [None if record is None else record["loras"] for record in records]


class _Inside:
    """Resolves many paths of a folder as `image_file` does, but looks at each folder in it only once."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._known: set[str] = set()

    def __call__(self, path: str) -> Path:
        parent, file = os.path.dirname(path), os.path.join(self.folder, path)
        if parent in self._known and is_text(path) and not os.path.islink(file):
            return Path(file)
        checked = image_file(self.folder, path)
        if (self.folder / parent).resolve().is_relative_to(self.folder.resolve()):
            self._known.add(parent)
        return checked


def _changed(samples: Samples, judged: Sequence[tuple[str, ...]]) -> dict[int, str]:
    """The image of each sample whose bytes are not those that were judged, by row.

    Args:
        judged: uids of the chosen and the rejected image of each sample.
    """
    changed = {}
    for row, uids in enumerate(judged):
        for side, uid in zip(samples.sides, uids, strict=True):
            if is_uid(uid) and uid != side.sha256[row].decode():
                changed[row] = side.paths[row]
    return changed


def _label(preference: Preference, soft: bool) -> float:
    if preference.status == "tie":
        return 0.5
    return max(preference.label_0, 1 - preference.label_0) if soft else 1.0


def counted(preferences: Sequence[Preference]) -> str:
    """How many pairs have which outcome: `412 pairs: 380 decided, 20 tie, 12 skipped`."""
    counts = Counter("decided" if p.status in SIDES else p.status for p in preferences)
    named = ", ".join(f"{n} {status.replace('_', ' ')}" for status, n in counts.most_common())
    return f"{len(preferences)} pairs" + (f": {named}" if named else "")
