"""Pick-a-Pic, and any dataset with two images, a caption and a label, as training data."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

from dpo_sd.data.cache import Cache
from dpo_sd.data.extract import Extract
from dpo_sd.data.file_source import FileSource
from dpo_sd.data.rows import Tally, image_bytes
from dpo_sd.data.samples import by_prompt
from dpo_sd.data.source import Found, checked_dropout
from dpo_sd.data.splitting import Split, at_most, check_validation, split
from dpo_sd.data.tables import TabularDataset
from dpo_sd.data.usable import usable
from dpo_sd.errors import UserError
from dpo_sd.models.hub import PICK_A_PIC

COLUMNS = {
    "caption": "caption",
    "image_0": "jpg_0",
    "image_1": "jpg_1",
    "label_0": "label_0",
    "label_1": "label_1",
    "has_label": "has_label",
    "chosen": None,
    "rejected": None,
}
_FLAGS = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}  # as tables write them
TIED, UNLABELLED, UNCAPTIONED, IMAGELESS = "tied", "without a label", "without a caption", "without a picture"


class PickAPic(FileSource):
    """Pairs of Pick-a-Pic v2 (Kirstain et al. 2023, arXiv:2305.01569), or of a dataset like it, by streaming.

    The authors took their repository down in April 2025; the default is an unofficial copy with the same columns and
    splits, 1 001 352 rows in all.

    What is used is kept as files in the cache folder; nothing else is fetched. The dataset's files are read in an
    order that the seed decides, and their rows as they stand: a subset is made of whole files, the last one but for
    its end, and a larger one of the same seed begins with it. A later start reads the cache alone; a repository stays
    as it was when it was first read.

    Args:
        path: repository on the Hub; folder of parquet files in the same layout, or one parquet file, such as
            `python -m dpo_sd.annotate export=` writes.
        split: which part of it.
        revision: branch, tag or commit of a repository; None takes its main branch as it is when it is first read, and
            the run records its commit.
        max_pairs: most pairs that are taken, ties left out and rows without a label not counted; None takes all.
        ties: trains on ties too, with P(chosen is better) = 1/2.
        weight_by_prompt: weighs each pair by one over the number of pairs with its prompt, counted in what is taken.
        columns: names of the dataset's columns, where they are others: `caption`; `image_0` and `image_1` with
            `label_0`, which is 1, 0 or 0.5, and where there are such `label_1` and `has_label`; or instead of all these
            `chosen` and `rejected`, where pairs are ready-made.
        validation: share of the prompts held back for the validation grid, in (0, 0.5] and at most 128, or a number.
        caption_dropout: share of visits that train on the empty prompt, in [0, 1].
        seed: seed of the order of the files, and of the split into training and validation.

    Raises:
        UserError: if a setting is out of range, or there is no such folder or file.
    """

    has_pairs: ClassVar[bool] = True

    def __init__(
        self,
        path: str = PICK_A_PIC,
        split: str = "train",
        revision: str | None = None,
        max_pairs: int | None = 10_000,
        ties: bool = False,
        weight_by_prompt: bool = False,
        columns: dict[str, str | None] = COLUMNS,
        validation: float = 0.1,
        caption_dropout: float = 0.0,
        seed: int = 0,
    ):
        if max_pairs is not None and max_pairs < 2:
            raise UserError(f"max_pairs must be at least 2, or null for all, got {max_pairs}")
        check_validation(validation, max_pairs)
        self.max_pairs, self.ties, self.weight_by_prompt = max_pairs, ties, weight_by_prompt
        self.validation, self.seed = validation, seed
        self.caption_dropout = checked_dropout(caption_dropout)
        self.columns = _checked_columns(columns)
        self.needed, self.optional = _wanted_columns(self.columns)
        self.dataset = TabularDataset(path, split, revision)

    def look(self, cache: Cache, fetch: bool) -> Split | Found:
        """The pairs, streamed into the cache folder as far as they are not there.

        Raises:
            UserError: if the dataset cannot be read, lacks a column, holds something else in a column, or has too few
                pairs that can be used.
        """
        there = self.dataset.length(self.needed)
        settings = [{name: column for name, column in self.columns.items() if column}, self.ties]
        folder = cache.folder / "pickapic"
        extract = Extract(self.dataset, folder, self.needed, self.optional, self._pick, settings, self.seed)
        rows = extract.rows(self.max_pairs, "pairs") if fetch else extract.there(self.max_pairs)
        if rows is not None:
            self.commit = extract.commit
            return self._found(rows, extract.images)
        if there is not None and there < 2:
            raise UserError(
                f"{self.dataset.path} has fewer than two rows, and validation needs a prompt of its own: add pairs"
            )
        return at_most(there, self.max_pairs, "pairs", self.validation, ", so ties are not known yet")

    def _found(self, rows: Iterable[dict[str, Any]], images: Path) -> Split:
        tally = Tally(named=(UNCAPTIONED, IMAGELESS))
        prompts, chosen, rejected, label = [], [], [], []
        for row in tally.kept(rows):
            prompts.append(row["prompt"])
            chosen.append(row["chosen"])
            rejected.append(row["rejected"])
            label.append(row["label"])
        ties = f"; {label.count(0.5)} of the {len(label)} pairs are ties" if self.ties else ""
        commit = f" at commit {self.commit}" if self.commit else ""
        line = f"{self.dataset.path}{commit}, {self.dataset.split}: {tally}{ties}"
        if not prompts:
            raise UserError(f"{line}; no pair is left: see data.columns" + ("" if self.ties else " and data.ties"))
        weight = by_prompt(prompts) if self.weight_by_prompt else None
        found = usable(images, prompts, chosen, rejected, label, weight)
        if not found.rows:
            raise UserError(f"no pair of {self.dataset.path} can be used: {'; '.join(found.left_out)}")
        return split(found.samples, self.validation, self.seed, [line, *found.left_out])

    def _pick(self, row: dict[str, Any], where: str) -> dict[str, Any] | str:
        columns = self.columns
        if columns["chosen"]:
            label, first, second = 1.0, columns["chosen"], columns["rejected"]
        else:
            label, first, second = self._label(row, where), columns["image_0"], columns["image_1"]
            if label is None:
                return UNLABELLED
            if label == 0.5 and not self.ties:
                return TIED
            if label == 0:
                label, first, second = 1.0, second, first
        prompt = row[str(columns["caption"])]
        if prompt is not None and not isinstance(prompt, str):
            raise UserError(f"{where}: column {columns['caption']} holds {type(prompt).__name__}, not text")
        if not (prompt or "").strip():
            return UNCAPTIONED
        chosen, rejected = (image_bytes(row[str(column)], str(column), where) for column in (first, second))
        if chosen is None or rejected is None:
            return IMAGELESS
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "label": label}

    def _label(self, row: dict[str, Any], where: str) -> float | None:
        """P(image_0 is better): 1, 0 or 0.5; None where nobody judged."""
        name, other = str(self.columns["label_0"]), self.columns["label_1"]
        flag = self.columns["has_label"] or ""
        cells = row[name], row.get(other or ""), row.get(flag)
        label, opposite, has_label = (None if cell != cell else cell for cell in cells)  # pandas writes NaN for none
        if has_label is not None and str(has_label).lower() not in _FLAGS:
            raise UserError(f"{where}: column {flag} is {has_label!r:.100}, and it is true or false")
        if label is None or not _FLAGS.get(str(has_label).lower(), True):
            return None
        for column, value in ((name, label), (other, opposite)):
            if value is not None and not (isinstance(value, bool | int | float) and value in (0, 0.5, 1)):
                raise UserError(f"{where}: column {column} is {value!r}, and a label is 1, 0 or, for a tie, 0.5")
        if opposite is not None and label + opposite != 1:
            raise UserError(f"{where}: {name} {label} and {other} {opposite} do not add up to 1")
        return float(label)


def _checked_columns(columns: dict[str, str | None]) -> dict[str, str | None]:
    if unknown := sorted(set(columns) - set(COLUMNS)):
        raise UserError(f"columns.{unknown[0]} is unknown: it can be {', '.join(COLUMNS)}")
    columns = {**COLUMNS, **columns}
    required = ["caption"]
    if columns["chosen"] or columns["rejected"]:
        required += ["chosen", "rejected"]
    else:
        required += ["image_0", "image_1", "label_0"]
    if missing := [name for name in required if not columns[name]]:
        raise UserError(f"columns.{missing[0]} is missing: name the column with data.columns.{missing[0]}=<column>")
    return columns


def _wanted_columns(columns: dict[str, str | None]) -> tuple[dict[str, list[str]], list[str]]:
    """Columns that must be there, by the setting that names each, and columns that are read where they are there."""
    optional = [name for name in ("label_1", "has_label") if columns[name] == COLUMNS[name]]
    needed = [name for name in COLUMNS if columns[name] and name not in optional]  # also those that the user has named
    if columns["chosen"]:
        needed, optional = ["caption", "chosen", "rejected"], []
    return {f"data.columns.{name}": [str(columns[name])] for name in needed}, [str(columns[name]) for name in optional]
