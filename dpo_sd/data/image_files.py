"""Samples whose pictures are files: from paths to encoded tensors, with everything said that is left out on the way."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import shutil
from collections import Counter, deque
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dpo_sd.data.framing import MIDDLE, Frame, Framing, frames, nearest_sizes, pixels, time_ids
from dpo_sd.data.source import Cache, PreparedData, encode_bytes, encode_texts, too_long
from dpo_sd.data.store import KEY
from dpo_sd.errors import UserError
from dpo_sd.images import facts, load_image
from dpo_sd.models import encoded_together
from dpo_sd.noise import order, sample_id
from dpo_sd.remembered import remembered

if TYPE_CHECKING:
    from torch import Tensor

    from dpo_sd.data.batches import PreparedSamples
    from dpo_sd.data.store import TensorStore
    from dpo_sd.models import StableDiffusion

THINNEST = 16  # longer side over shorter side; beyond, a scaled picture would fill the memory
ENOUGH = 128  # prompts for a validation grid; more would cost more than the training where pairs are many
READERS = 8  # threads that decode pictures while the VAE works, at most one for each core


@dataclass(frozen=True)
class ImageFiles:
    """One picture of each sample, as columns: objects would not do for a million.

    Args:
        folder: that the paths are relative to.
        paths: POSIX.
        sha256: of the files' bytes, (n,), ASCII.
        sizes: width and height in pixels, upright, (n, 2), int32.
    """

    folder: Path
    paths: Sequence[str]
    sha256: np.ndarray
    sizes: np.ndarray

    def take(self, rows: np.ndarray) -> ImageFiles:
        return ImageFiles(self.folder, [self.paths[int(row)] for row in rows], self.sha256[rows], self.sizes[rows])


@dataclass(frozen=True)
class Samples:
    """What a source has found, before anything is decoded.

    Args:
        prompts: one per sample.
        chosen, rejected: their pictures; single pictures have no rejected ones.
        label: P(chosen is better), (n,), in [0.5, 1].
        weight: share of each sample in the loss, (n,), positive.
    """

    prompts: Sequence[str]
    chosen: ImageFiles
    rejected: ImageFiles | None
    label: np.ndarray
    weight: np.ndarray

    def __len__(self) -> int:
        return len(self.prompts)

    def without(self, rows: Container[int]) -> Samples:
        """All but those of the samples."""
        return self.take(np.array([row for row in range(len(self)) if row not in rows], int)) if rows else self

    @property
    def sides(self) -> list[ImageFiles]:
        return [self.chosen] if self.rejected is None else [self.chosen, self.rejected]

    def take(self, rows: np.ndarray) -> Samples:
        """Those of the samples, in this order."""
        return Samples(
            [self.prompts[int(row)] for row in rows],
            self.chosen.take(rows),
            None if self.rejected is None else self.rejected.take(rows),
            self.label[rows],
            self.weight[rows],
        )


@dataclass
class Found:
    """Samples split by prompt, and what there is to say of them.

    Args:
        train, validation: samples with disjoint prompts, or of single pictures with disjoint pictures.
        report: what was used and what was not, one line each.
    """

    train: Samples
    validation: Samples
    report: list[str] = field(default_factory=list)


def find(
    folder: Path | None,
    prompts: Sequence[str],
    chosen: Sequence[str],
    rejected: Sequence[str] | None,
    label: Sequence[float] | np.ndarray | None,
    weight: Sequence[float] | np.ndarray | None,
    report: list[str],
    resolve: Callable[[str], Path] | None = None,
) -> tuple[Samples, list[int]]:
    """Samples from their columns, and the rows that they come from.

    Those with a picture that cannot be used, or with the same one twice, are left out.

    Args:
        folder: that the paths are relative to; None looks at no picture, and takes those of one path for one.
        prompts, chosen, rejected, label, weight: columns; no label means 1, no weight equal ones.
        report: gets a line for what is left out, with the first five reasons.
        resolve: the file of a path, refusing what may not be read; None joins it to the folder.
    """
    n = len(prompts)
    kept = np.ones(n, bool)
    complaints: list[str] = []
    sides = []
    for paths in (chosen, rejected):
        if paths is None:
            continue
        found, problems = (_unseen(paths), {}) if folder is None else _facts(folder, paths, resolve)
        for row, problem in problems.items():
            if kept[row]:
                complaints.append(problem)
            kept[row] = False
        sides.append(found)
    if folder is None:
        report.append("pictures are not looked at: those that cannot be read are counted with the others")
    left_out("that cannot be read", complaints, n, report)
    if len(sides) == 2:
        same = kept & (sides[0].sha256 == sides[1].sha256)
        left_out(
            "whose two pictures are the same file", [chosen[row] for row in np.flatnonzero(same).tolist()], n, report
        )
        kept &= ~same
    samples = Samples(
        prompts,
        sides[0],
        sides[1] if len(sides) == 2 else None,
        np.ones(n, np.float32) if label is None else np.asarray(label, np.float32),
        np.ones(n, np.float32) if weight is None else np.asarray(weight, np.float32),
    )
    return (samples if kept.all() else samples.take(np.flatnonzero(kept))), np.flatnonzero(kept).tolist()


def _unseen(paths: Sequence[str]) -> ImageFiles:
    sha256 = np.array([hashlib.sha256(path.encode()).hexdigest() for path in paths], "S64")
    return ImageFiles(Path(), paths, sha256, np.zeros((len(paths), 2), np.int32))


def _facts(
    folder: Path, paths: Sequence[str], resolve: Callable[[str], Path] | None
) -> tuple[ImageFiles, dict[int, str]]:
    """What is known of the files, and why some cannot be used, by row."""
    problems: dict[int, str] = {}
    rows: list[int] = []

    def files() -> Iterator[Path]:  # one by one: a million paths are not for the memory
        for row, path in enumerate(paths):
            try:
                file = folder / path if resolve is None else resolve(path)
                if not file.is_file():
                    raise UserError(f"image {file} does not exist")
            except UserError as error:
                problems[row] = str(error)
            else:
                rows.append(row)
                yield file

    sha256 = np.zeros(len(paths), "S64")
    sizes = np.zeros((len(paths), 2), np.int32)
    for known in facts(files()):
        row = rows.pop()
        if known.problem:
            problems[row] = known.problem
        elif max(known.width, known.height) > THINNEST * min(known.width, known.height):
            problems[row] = (
                f"image {folder / paths[row]} has {known.width} × {known.height} pixels, which are scaled up until the "
                "shorter side fills the frame: crop it"
            )
        sha256[row], sizes[row] = known.sha256.encode(), (known.width, known.height)
    return ImageFiles(folder, paths, sha256, sizes), problems


def left_out(what: str, named: Sequence[str], n: int, report: list[str]) -> None:
    """Adds a line to the report where something is left out: how many, and the first five."""
    if named:
        report.append(f"left out {len(named)} of {n} {what}: {'; '.join(named[:5])}{' …' if len(named) > 5 else ''}")


def split(samples: Samples, validation: float, seed: int, report: list[str], what: str = "pairs") -> Found:
    """Training and validation with disjoint prompts.

    Args:
        validation: as in `held_back`, of the prompts.

    Raises:
        UserError: when there are not two prompts, and as `held_back`.
    """
    prompts = sorted(set(samples.prompts))
    if len(prompts) < 2:
        raise UserError(
            f"the data has {len(samples)} {what} on {len(prompts)} prompts, and validation needs prompts of its own: "
            f"add {what} for other prompts"
        )
    shuffled = [prompts[i] for i in order(seed, 0, len(prompts))]
    apart = set(shuffled[: held_back(validation, len(prompts))])
    is_held_back = np.array([prompt in apart for prompt in samples.prompts])
    found = Found(samples.take(np.flatnonzero(~is_held_back)), samples.take(np.flatnonzero(is_held_back)), report)
    report.append(
        f"training: {len(found.train)} {what} on {len(prompts) - len(apart)} prompts; "
        f"validation: {len(found.validation)} on {len(apart)} others"
    )
    return found


def by_prompt(prompts: Sequence[str]) -> np.ndarray:
    """Weight of each sample: one over the number of samples with its prompt."""
    counts = Counter(prompts)
    return np.array([1 / counts[prompt] for prompt in prompts], np.float32)


def check_validation(validation: float, most: int | None = None) -> None:
    """Refuse what is neither a share nor a number, and more than half of what there is at most, if that is known."""
    if not (0 < validation <= 0.5 or (validation >= 1 and validation == int(validation))):
        raise UserError(
            f"validation must be a share above 0 and at most 0.5, or how many, from 1 on, got {validation:g}"
        )
    if most is not None:
        held_back(validation, most)


def held_back(validation: float, n: int) -> int:
    """How many of n prompts or pictures are for validation, at least one.

    Args:
        validation: a share, in (0, 0.5], that is taken as far as `ENOUGH`; or how many, from 1 to half of them.

    Raises:
        UserError: when it is more than half of them.
    """
    if validation < 1:
        return max(1, min(ENOUGH, int(validation * n)))
    if validation > n // 2:
        raise UserError(f"validation={validation:g} holds back more than half of {n}: use at most {n // 2}, or a share")
    return int(validation)


# ------------------------------------------------------------------------------------------------------------ encoding


def prepare(
    model: StableDiffusion, found: Found, framing: Framing, cache: Cache, held_out: Sequence[str] | None = None
) -> PreparedData:
    """Encodes what the cache does not hold yet, and hands over the rest from there.

    Args:
        held_out: prompts for samples and the verdict; None takes those of the validation samples.

    Raises:
        UserError: when all samples of a part turn out unreadable, and when there is no room for the cache.
    """
    report = list(found.report)
    train = _prepare(model, found.train, framing, cache, report, "training")
    validation = _prepare(model, found.validation, framing, cache, report, "validation")
    texts = sorted({*found.train.prompts, *found.validation.prompts})
    report += too_long(model, texts)
    known = set(found.train.prompts)
    candidates = sorted(set(found.validation.prompts)) if held_out is None else list(held_out)
    unseen = [prompt for prompt in candidates if prompt not in known]
    return PreparedData(train, validation, unseen or candidates, report)  # pictures may all have the same caption


def _prepare(
    model: StableDiffusion, samples: Samples, framing: Framing, cache: Cache, report: list[str], what: str
) -> PreparedSamples:
    from dpo_sd.data.batches import Latents, PreparedSamples

    frames, store = Frames(model, samples, framing), None
    if cache.keep == "off":
        broken = _broken(samples, what)
    else:
        store, broken = _encode(model, samples, frames, cache, what)
        report += store.notes
    if broken:
        left_out(f"{what} samples that cannot be read to their end", list(broken.values()), len(samples), report)
        if len(broken) == len(samples):
            raise UserError(f"no {what} sample can be read: {next(iter(broken.values()))}")
        samples = samples.without(broken)
        frames = Frames(model, samples, framing)
    if store is None:
        sides = [Pixels(side, frames) for side in samples.sides]
    else:
        sides = [Latents(store.rows(frames.keys(side)), frames.time_ids(side)) for side in samples.sides]
    if upscaled := frames.upscaled():
        report.append(f"{upscaled} {what} pictures are smaller than the training size and are scaled up")
    if len(used := Counter(frames.numbers.tolist())) > 1:
        named = ", ".join("{}x{}: {}".format(*frames.all_sizes[number], n) for number, n in used.most_common())
        report.append(f"{what} sizes: {named}")
    texts = sorted(set(samples.prompts))
    place = {text: row for row, text in enumerate(texts)}
    return PreparedSamples(
        chosen=sides[0],
        rejected=sides[1] if len(sides) == 2 else None,
        prompts=encode_texts(model, texts, [place[prompt] for prompt in samples.prompts], cache, report),
        label=samples.label,
        weight=samples.weight / samples.weight.mean(),
        sample_ids=np.fromiter(_ids(samples, sorted), np.int64, len(samples)),  # whoever wins
        content_ids=np.fromiter(_ids(samples, list), np.int64, len(samples)),
        sizes=frames.numbers,
        flip=framing.flip,
        random_crop=framing.random_crop,
    )


def _ids(samples: Samples, arranged: Callable[[Iterable[bytes]], list[bytes]]) -> Iterator[int]:
    for row, prompt in enumerate(samples.prompts):
        yield sample_id(prompt, *arranged(bytes(side.sha256[row]) for side in samples.sides))


class Frames:
    """The size that each sample is trained at, and the part of each picture that fills it.

    Args:
        model: whose UNet takes the sizes.
        samples, framing: which and how.

    Raises:
        UserError: when the UNet cannot take the resolution.
    """

    def __init__(self, model: StableDiffusion, samples: Samples, framing: Framing):
        # the UNet halves the latents at every block but the last
        step = model.factor * 2 ** (len(model.unet.config["block_out_channels"]) - 1)
        resolution = framing.resolution or model.resolution
        if resolution % step:
            below = resolution // step * step
            raise UserError(
                f"framing.resolution={resolution} is no multiple of {step} pixels, which {model.name} needs: "
                f"use {below or step} or {below + step}"
            )
        self.flips = (False, True) if framing.flip else (False,)
        self.vae, self.factor = model.fingerprints.vae, model.factor
        self.all_sizes = framing.sizes(resolution, step)
        together = np.stack([side.sizes for side in samples.sides], axis=1)
        unique, inverse = np.unique(together, axis=0, return_inverse=True)
        self.numbers = nearest_sizes(self.all_sizes, unique)[inverse.reshape(-1)]
        self.sizes = np.array(self.all_sizes, np.int32)[self.numbers]
        self._sides = samples.sides

    def of(self, side: ImageFiles, row: int, where: tuple[float, float] = MIDDLE) -> Frame:
        """The part of a picture that is trained on."""
        return Frame(*frames(side.sizes[row : row + 1], self.sizes[row : row + 1], where)[0].tolist())

    def keys(self, side: ImageFiles) -> np.ndarray:
        """What the latents of a side are kept under: of all rows and, where pictures are mirrored, of all again."""
        images, framed = side.sha256.tobytes(), frames(side.sizes, self.sizes).astype("<i4").tobytes()
        keys = bytearray()
        for flip in self.flips:
            kind = json.dumps({"kind": "latent 1", "vae": self.vae, "flip": flip}, sort_keys=True).encode()
            for row in range(len(side.paths)):
                made_from = kind + images[64 * row : 64 * row + 64] + framed[24 * row : 24 * row + 24]
                keys += hashlib.sha256(made_from).hexdigest()[:KEY].encode()
        return np.frombuffer(keys, f"S{KEY}")

    def time_ids(self, side: ImageFiles) -> np.ndarray:
        """What SDXL is told of the sizes of a side: (n, 6), int32."""
        return time_ids(side.sizes, frames(side.sizes, self.sizes))

    def upscaled(self) -> int:
        """Pictures that are smaller than their size in some direction."""
        return int(sum((side.sizes < self.sizes).any(axis=1).sum() for side in self._sides))


class Pixels:
    """Pictures that the training step encodes by itself.

    Args:
        side: the files.
        frames: their sizes.
    """

    def __init__(self, side: ImageFiles, frames: Frames):
        self.side, self.frames = side, frames

    def read(self, row: int, flip: bool, where: tuple[float, float]) -> tuple[Tensor, Tensor]:
        import torch

        framed = self.frames.of(self.side, row, where)
        picture = load_image(self.side.folder / self.side.paths[row])
        (ids,) = time_ids(self.side.sizes[row : row + 1], np.array([framed]))
        return pixels(picture, framed, flip), torch.from_numpy(ids).float()


def _broken(samples: Samples, what: str) -> dict[int, str]:
    """Why samples cannot be decoded, by row: found once and remembered, and not in the middle of a training."""
    from tqdm import tqdm

    problems: dict[int, str] = {}
    for side in samples.sides:
        files = (side.folder / path for path in side.paths)
        found = remembered(files, "decoded 1", _decoding_problem)
        for row, problem in enumerate(tqdm(found, f"checking {what} pictures", len(samples), unit="picture", delay=2)):
            if problem:
                problems.setdefault(row, problem)
    return problems


def _decoding_problem(file: str) -> str:
    try:
        load_image(Path(file))
        return ""
    except UserError as error:
        return str(error)


class _Job(NamedTuple):
    """One latent to be made."""

    key: bytes
    file: Path
    framed: Frame
    flip: bool

    def read(self) -> Tensor | UserError:
        try:
            return pixels(load_image(self.file), self.framed, self.flip)
        except UserError as error:
            return error


class _Jobs:
    """Latents to be made, in the order of their sizes; as columns, since there can be millions.

    Args:
        store: what is in it need not be made.
    """

    def __init__(self, samples: Samples, frames: Frames, store: TensorStore):
        self.samples, self.frames = samples, frames
        self.keys = np.concatenate([frames.keys(side) for side in samples.sides])
        _, first = np.unique(self.keys, return_index=True)
        first = np.sort(first)[store.lacks(self.keys[np.sort(first)])]
        self.places = first[np.argsort(frames.numbers[first % len(samples)], kind="stable")]

    def __len__(self) -> int:
        return len(self.places)

    def latent_pixels(self) -> int:
        sizes = self.frames.sizes[self.places % len(self.samples)]
        return int((sizes // self.frames.factor).astype(np.int64).prod(axis=1).sum())

    def batches(self) -> Iterator[list[_Job]]:
        """Jobs of one size each."""
        numbers = self.frames.numbers[self.places % len(self.samples)]
        for members in np.split(self.places, np.flatnonzero(np.diff(numbers)) + 1):
            if not len(members):
                continue
            area = math.prod(self.frames.sizes[members[0] % len(self.samples)].tolist())
            size = encoded_together(area)
            for start in range(0, len(members), size):
                yield [self._job(int(place)) for place in members[start : start + size]]

    def _job(self, place: int) -> _Job:
        n = len(self.samples)
        side = self.samples.sides[place // (n * len(self.frames.flips))]
        row, flip = place % n, bool(place // n % len(self.frames.flips))
        return _Job(self.keys[place], side.folder / side.paths[row], self.frames.of(side, row), flip)

    def rows(self, problems: dict[bytes, str]) -> dict[int, str]:
        """The samples that need what could not be made, and why it could not."""
        places = np.flatnonzero(np.isin(self.keys, np.array(list(problems)))) if problems else ()
        return {int(place) % len(self.samples): problems[self.keys[place]] for place in places}


def _encode(
    model: StableDiffusion, samples: Samples, frames: Frames, cache: Cache, what: str
) -> tuple[TensorStore, dict[int, str]]:
    """The store with all latents in it, and why samples could not be encoded, by row."""
    import torch
    from tqdm import tqdm

    store = cache.store("latents")
    jobs = _Jobs(samples, frames, store)
    _check_room(store, len(jobs), jobs.latent_pixels())
    problems: dict[bytes, str] = {}
    with (
        torch.inference_mode(),
        model.working(model.vae),
        tqdm(total=len(jobs), desc=f"encoding {what} pictures", unit="picture", disable=not jobs) as bar,
    ):
        for batch, tensors in _read_ahead(jobs.batches()):
            whole = []
            for job, tensor in zip(batch, tensors, strict=True):
                if isinstance(tensor, UserError):
                    problems[job.key] = str(tensor)
                else:
                    whole.append((job.key, tensor))
            if whole:
                latents = encode_bytes(model, torch.stack([tensor for _, tensor in whole])).to("cpu", store.dtype)
                for (key, _), latent in zip(whole, latents, strict=True):
                    store.put(key.decode(), latent)
            bar.update(len(batch))
    store.flush()
    return store, jobs.rows(problems)


def _read_ahead(batches: Iterator[list[_Job]]) -> Iterator[tuple[list[_Job], list[Tensor | UserError]]]:
    """Each batch with its pictures; the next one is read while the last one is worked on."""
    with ThreadPoolExecutor(min(READERS, os.cpu_count() or 1)) as readers:
        waiting: deque[tuple[list[_Job], list[Future]]] = deque()
        for batch in itertools.chain(batches, [None]):
            if batch is not None:
                waiting.append((batch, [readers.submit(job.read) for job in batch]))
            while len(waiting) > 1 or (batch is None and waiting):
                done, pictures = waiting.popleft()
                yield done, [picture.result() for picture in pictures]


def _check_room(store: TensorStore, n: int, latent_pixels: int) -> None:
    """Refuses to begin what the disk cannot hold."""
    needed = 4 * latent_pixels * store.dtype.itemsize
    place = next(folder for folder in (store.folder, *store.folder.parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise UserError(
            f"the cache needs {needed / 2**30:.2g} GiB for {n} latents, and {place} has {free / 2**30:.2g} GiB "
            "left: make room, choose another place with cache_dir=<folder>, or use cache=off"
        )
