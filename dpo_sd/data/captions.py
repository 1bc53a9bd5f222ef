"""Images with captions, in a folder or a dataset, as training data for loss=sft."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from dpo_sd.data.cache import Cache
from dpo_sd.data.caption_folder import (
    IMAGE_COLUMNS,
    MASK,
    METADATA,
    TEXT_COLUMNS,
    TEXT_ENDINGS,
    Caption,
    Listing,
    ending_of,
    from_metadata,
    from_texts,
    listing,
    valued,
)
from dpo_sd.data.extract import Extract
from dpo_sd.data.file_source import FileSource
from dpo_sd.data.folders import read_folders, together
from dpo_sd.data.masks import found_masks
from dpo_sd.data.rows import Tally, image_bytes
from dpo_sd.data.samples import Samples, joined
from dpo_sd.data.source import Found, PreparedData, checked_dropout
from dpo_sd.data.splitting import Split, at_most, check_validation, split_images
from dpo_sd.data.tables import TabularDataset
from dpo_sd.data.usable import left_out, some, usable
from dpo_sd.errors import UserError
from dpo_sd.files.images import ENDINGS
from dpo_sd.noise import order

if TYPE_CHECKING:
    from dpo_sd.data.frames import Framing
    from dpo_sd.models.sampling import Sampler
    from dpo_sd.models.stable_diffusion import StableDiffusion

UNCAPTIONED, IMAGELESS = "without a caption", "without a picture"


class Captions(FileSource):
    """Images with captions: a folder, or a dataset on the Hub or in parquet files.

    A folder, read with the folders in it, linked ones too, has a .txt or .caption file of the same name beside each
    image; or, in it or in the folders in it, a `metadata.jsonl`, `.csv` or `.parquet` with `file_name` (or `image`),
    below the folder of that file, and `text` (or `caption`). Images without a caption are left out and named; where
    there is no caption at all, a trigger is one. Files and folders that begin with a dot are not seen.

    Args:
        path: folder, parquet file, folder of parquet files, or repository on the Hub, which is streamed; or several
            folders of pictures, each with its repeats where these are not 1, as in [photos,sketches:10].
        trigger: text put in front of every caption with a comma, `sks style` for example.
        shuffle_tags: shuffles the tags between the commas of a caption at every visit, the trigger apart. Texts are
            encoded at every step then, which needs cache=latents.
        keep_tokens: number of tags behind the trigger that stay where they are, as in Kohya's trainer; of a
            regularisation picture as many stay in all.
        regularisation: folders of pictures, as `path`, that are trained on as well and keep the model from drawing
            everything in the style: without the trigger, and never held back.
        regularisation_weight: weight of each of them in the loss, where a picture of `path` has 1; positive.
        regularisation_trigger: text in front of their captions, and in the place of those that they have not.
        masks: weight of the pixels where the mask of a picture is black, in [0, 1), where it is white having 1: masks
            are files `<name>-masklabel.png` beside `<name>.png`, as in OneTrainer. None reads none.
        caption_dropout: share of visits that train on the empty prompt, in [0, 1].
        validation: share of the images held back for the validation grid, in (0, 0.5] and at most 128, or a number;
            with 0, or with a single image, all are trained on and the grid is of some of them.
        max_images: most images that are taken, of each folder; the seed chooses them. None takes all.
        image_column, text_column: names of the columns of a dataset or a metadata file; None takes `image` or
            `file_name`, and `text` or `caption`.
        split: which part of a dataset.
        revision: branch, tag or commit of a repository; None takes its main branch.
        seed: seed of the split into training and validation, and of `max_images`.

    Raises:
        UserError: if a setting is out of range, or there is no such folder or file.
    """

    has_pairs: ClassVar[bool] = False

    def __init__(
        self,
        path: str | list[str],
        trigger: str | None = None,
        shuffle_tags: bool = False,
        keep_tokens: int | None = None,
        regularisation: str | list[str] | None = None,
        regularisation_weight: float | None = None,
        regularisation_trigger: str | None = None,
        masks: float | None = None,
        caption_dropout: float = 0.0,
        validation: float = 0.1,
        max_images: int | None = None,
        image_column: str | None = None,
        text_column: str | None = None,
        split: str = "train",
        revision: str | None = None,
        seed: int = 0,
    ):
        if validation != 0:  # which holds back none
            check_validation(validation)
        if max_images is not None and max_images < 1:
            raise UserError(f"max_images must be at least 1, or null for all, got {max_images}")
        if keep_tokens is not None and keep_tokens < 0:
            raise UserError(f"keep_tokens must be at least 0, got {keep_tokens}")
        if keep_tokens is not None and not shuffle_tags:
            raise UserError(f"keep_tokens={keep_tokens} keeps tags from being shuffled: add data.shuffle_tags=true")
        if regularisation is None and (regularisation_weight, regularisation_trigger) != (None, None):
            raise UserError("regularisation_weight and regularisation_trigger are of pictures: add data.regularisation")
        if regularisation_weight is not None and not 0 < regularisation_weight < math.inf:
            raise UserError(f"regularisation_weight must be positive and finite, got {regularisation_weight}")
        if masks is not None and not 0 <= masks < 1:
            raise UserError(f"masks is the weight of black pixels, at least 0 and below 1, got {masks}")
        self.masks = masks
        self.folders = read_folders("path", path)
        self.regularisation = [] if regularisation is None else read_folders("regularisation", regularisation)
        self.regularisation_weight = 1.0 if regularisation_weight is None else regularisation_weight
        self.regularisation_trigger = _phrase(regularisation_trigger)
        places = [{folder.place.resolve() for folder in each} for each in (self.folders, self.regularisation)]
        if both := places[0] & places[1]:
            raise UserError(f"{both.pop()} is both path and regularisation: name it once")
        self.trigger, self.shuffle_tags, self.keep_tokens = _phrase(trigger), shuffle_tags, keep_tokens or 0
        self.validation, self.max_images, self.seed = validation, max_images, seed
        self.image_column, self.text_column = image_column, text_column
        self.caption_dropout = checked_dropout(caption_dropout)
        self.dataset = TabularDataset(self.folders[0].path, split, revision)

    def look(self, cache: Cache, fetch: bool) -> Split | Found:
        """The images of the folder, or those of a dataset, which are streamed into the cache folder.

        Raises:
            UserError: if there are no images or most have no caption, two images share a caption file, or a dataset or
                a file with captions cannot be read.
        """
        first = self.folders[0].place
        if len(self.folders) > 1 or self.regularisation:
            return self._in_folders({})
        if first.is_dir() and not (files := listing(first)).is_dataset:
            return self._in_folders({first: files})
        if self.folders[0].repeats > 1:
            raise UserError(f"path={self.folders[0].path}:{self.folders[0].repeats}: only folders have repeats")
        if self.masks is not None:
            raise UserError(f"data.masks={self.masks}: only pictures in folders have masks beside them")
        there = self.dataset.length(self._needed)
        settings = [self.image_column, self.text_column]
        extract = Extract(self.dataset, cache.folder / "captions", self._needed, [], self._pick, settings, self.seed)
        rows = extract.rows(self.max_images, "pictures") if fetch else extract.there(self.max_images)
        if rows is None:
            return at_most(there, self.max_images, "pictures", self.validation)
        self.commit = extract.commit
        return self._in_dataset(rows, extract.images)

    def prepare(self, model: StableDiffusion, sampler: Sampler, framing: Framing, cache: Cache) -> PreparedData:
        data = super().prepare(model, sampler, framing, cache)
        if not self.shuffle_tags:
            return data
        return replace(data, train=replace(data.train, vary=ShuffledTags(len(_tags(self.trigger)) + self.keep_tokens)))

    @property
    def _needed(self) -> dict[str, Sequence[str]]:
        return {
            "data.image_column": [self.image_column] if self.image_column else IMAGE_COLUMNS,
            "data.text_column": [self.text_column] if self.text_column else TEXT_COLUMNS,
        }

    def _pick(self, row: dict[str, Any], where: str) -> dict[str, Any] | str:
        columns = [[column for column in columns if column in row] for columns in self._needed.values()]
        image_column, text_column = map(" or ".join, columns)
        image, text = (valued(row, names) for names in columns)
        image = image_bytes(image, image_column, where)
        if text is not None and not isinstance(text, str):
            raise UserError(f"{where}: column {text_column} holds {type(text).__name__}, not text")
        if text is None:
            return UNCAPTIONED
        return IMAGELESS if image is None else {"image": image, "text": text}

    def _in_dataset(self, rows: Iterable[dict[str, Any]], images: Path) -> Split:
        tally = Tally(named=(UNCAPTIONED, IMAGELESS))
        captions = [Caption(row["image"], row["text"], row["image"]) for row in tally.kept(rows)]
        line = f"{self.dataset.path}, {self.dataset.split}: {tally}"
        if 2 * tally.left_out[UNCAPTIONED] > tally.read:
            raise UserError(f"{line}; most have no caption: see data.text_column")
        samples, report = self._samples_of(images, captions, [line], self.trigger)
        return split_images(samples, self.validation, self.seed, report)

    def _in_folders(self, known: Mapping[Path, Listing]) -> Split:
        parts = [self._in_folder(folder.place, self.trigger, known.get(folder.place)) for folder in self.folders]
        found, report = together(self.folders, parts)
        if found.masks is not None and not any(found.masks.paths):
            raise UserError(f"data.masks={self.masks}: no picture has a mask: put <name>{MASK} beside <name>.png")
        split = split_images(found, self.validation, self.seed, report)
        split = replace(split, outside=self.masks or 0.0)
        if not self.regularisation:
            return split
        parts = [self._in_folder(folder.place, self.regularisation_trigger) for folder in self.regularisation]
        kept, lines = together(self.regularisation, parts)
        kept = kept.take(np.flatnonzero(~np.isin(kept.chosen.sha256, split.validation.chosen.sha256)))
        kept = replace(kept, weight=kept.weight * np.float32(weight := self.regularisation_weight))
        lines.append(f"{len(kept)} pictures, weight {weight:g}")
        report = [*split.report, *(f"regularisation: {line}" for line in lines)]
        return replace(split, train=joined([split.train, kept]), report=report)

    def _in_folder(self, folder: Path, trigger: str, files: Listing | None = None) -> tuple[Samples, list[str]]:
        """The pictures of a folder with their captions, and lines for the report."""
        if not folder.is_dir():
            raise UserError(f"{folder} is no folder: of several sources, each is a folder of pictures")
        files = files or listing(folder)
        if files.is_dataset:
            raise UserError(f"{folder} holds parquet files: of several sources, each is a folder of pictures")
        if not files.images:
            others = f"; it has {files.counted()}" if files.others else ""
            raise UserError(f"{folder} holds no picture that can be read ({', '.join(ENDINGS)}){others}")
        captions, origin = self._captions(folder, files)
        there = set(files.images)
        used = [caption for caption in captions if caption.image in there]
        imageless = [caption.where for caption in captions if caption.image not in there]
        bare = sorted(there - {caption.image for caption in used})
        if not captions and trigger:
            used, bare = [Caption(image, "", image) for image in files.images], []
        if 2 * len(bare) > len(files.images):
            raise UserError(_mostly_bare(folder, files, bare, imageless))
        used, said = _each_once(used)
        report = [
            f"{folder}: {len(files.images)} pictures, {len(captions)} captions in {origin}",
            *left_out(UNCAPTIONED, bare, len(files.images)),
            *left_out(f"captions {IMAGELESS}", imageless, len(captions)),
            *said,
            *([f"not read: {files.counted()}"] if files.others else []),
            *([f"passed over: {some(files.passed_over)}"] if files.passed_over else []),
            *(
                [f"Kohya's repeats in names of folders do not count: {some(names)}; data.path=[<folder>:10] repeats"]
                if (names := files.repeated())
                else []
            ),
        ]
        if self.max_images is not None:
            used = [used[row] for row in order(self.seed, 0, len(used))[: self.max_images]]
        samples, report = self._samples_of(folder, used, report, trigger)
        if self.masks is None:
            if files.masks:
                report.append(f"{len(files.masks)} masks are not read: data.masks=0.1 weighs the error by them")
            return samples, report
        paths = [files.masks.get(path, "") for path in samples.chosen.paths]
        bare = [image for image, path in zip(samples.chosen.paths, paths, strict=True) if not path]
        line = f"{len(paths) - len(bare)} of {len(paths)} pictures have a mask"
        report.append(f"{line}; the others count wholly: {some(bare)}" if bare else line)
        return replace(samples, masks=found_masks(folder, paths, samples.chosen)), report

    def _captions(self, folder: Path, files: Listing) -> tuple[list[Caption], str]:
        """The captions, and the names of the files that they are in."""
        if (self.image_column or self.text_column) and not files.metadata:
            raise UserError(
                f"{folder} has no {', '.join(METADATA[:-1])} or {METADATA[-1]} for image_column and text_column to "
                "name a column of"
            )
        captions = [*from_metadata(folder, files.metadata, self._needed), *from_texts(folder, files)]
        endings = dict.fromkeys(map(ending_of, files.texts))
        texts = f"{' and '.join(endings or TEXT_ENDINGS[:1])} files"
        return captions, ", ".join([*files.metadata[:5], *([texts] if files.texts or not files.metadata else [])])

    def _samples_of(
        self, folder: Path, captions: Sequence[Caption], report: list[str], trigger: str
    ) -> tuple[Samples, list[str]]:
        if empty := [caption.image for caption in captions if not caption.text.strip()]:
            what = "the trigger alone" if trigger else "the empty prompt"
            report = [*report, f"{len(empty)} pictures have an empty caption and are trained on {what}: {some(empty)}"]
        prompts = [", ".join(part for part in (trigger, caption.text.strip()) if part) for caption in captions]
        found = usable(folder, prompts, [caption.image for caption in captions])
        if not found.rows:
            why = "; ".join(found.left_out or report)
            raise UserError(f"no picture of {folder} can be used: {why}")
        return found.samples, [*report, *found.left_out]


def _each_once(captions: Sequence[Caption]) -> tuple[list[Caption], list[str]]:
    """The captions without those that are there a second time, and lines for the report on images with several."""
    once = list({(caption.image, caption.text): caption for caption in captions}.values())
    several = [image for image, n in Counter(caption.image for caption in once).items() if n > 1]
    repeated = len(captions) - len(once)
    return once, [
        *([f"{repeated} captions are there a second time and count once"] if repeated else []),
        *(
            [f"{len(several)} pictures have several captions and count once with each: {some(several)}"]
            if several
            else []
        ),
    ]


def _mostly_bare(folder: Path, files: Listing, bare: Sequence[str], imageless: Sequence[str]) -> str:
    """The message where most images have no caption."""
    what = f"{len(bare)} of {len(files.images)} pictures in {folder} have no caption ({some(bare)})"
    if imageless:
        what += f", and {len(imageless)} captions have no picture ({some(imageless)})"
    if files.others:
        what += f"; not read: {files.counted()}"
    if not imageless and not files.texts and not files.metadata:
        return f"{what}: write .txt files of the same names, or let one phrase stand for all with data.trigger=<phrase>"
    return f"{what}: name the files of both alike, or move pictures without a caption away"


@dataclass(frozen=True)
class ShuffledTags:
    """Shuffles the tags of a caption, the parts between its commas.

    Args:
        kept: number of tags that stay in front.
    """

    kept: int

    def __call__(self, text: str, generator: np.random.Generator) -> str:
        tags = _tags(text)
        return ", ".join([*tags[: self.kept], *generator.permutation(np.array(tags[self.kept :], object))])


def _phrase(text: str | None) -> str:
    return (text or "").strip().rstrip(",")


def _tags(text: str) -> list[str]:
    return [tag for part in text.split(",") if (tag := part.strip())]
