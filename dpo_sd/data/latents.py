"""Image files encoded into latents, or read at every step."""

from __future__ import annotations

import itertools
import math
import os
import shutil
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dpo_sd.data.cache import Cache
from dpo_sd.data.frames import Frame, pixels, time_ids
from dpo_sd.errors import UserError
from dpo_sd.files.hashes import remembered
from dpo_sd.files.images import load_image
from dpo_sd.models.stable_diffusion import encode_bytes, encoded_together

if TYPE_CHECKING:
    from torch import Tensor

    from dpo_sd.data.frames import Frames
    from dpo_sd.data.samples import ImageFiles, Samples
    from dpo_sd.files.tensors import TensorStore
    from dpo_sd.models.stable_diffusion import StableDiffusion

READERS = 8  # threads that decode pictures while the VAE works, at most one for each core


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


def undecodable(samples: Samples, what: str) -> dict[int, str]:
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


def encode_latents(
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
