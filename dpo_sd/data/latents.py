"""Image files encoded into latents, each once, into the cache."""

from __future__ import annotations

import itertools
import math
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dpo_sd.data.cache import Cache
from dpo_sd.data.frames import Frame, pixels
from dpo_sd.errors import UserError
from dpo_sd.files.images import load_image
from dpo_sd.files.room import free_bytes
from dpo_sd.models.stable_diffusion import encode_bytes, encoded_together

if TYPE_CHECKING:
    from torch import Tensor

    from dpo_sd.data.frames import Frames
    from dpo_sd.data.samples import Samples
    from dpo_sd.files.tensors import TensorStore
    from dpo_sd.models.stable_diffusion import StableDiffusion

READERS = 8  # threads that decode images while the VAE works, at most one for each core


class _Job(NamedTuple):
    """One latent to be made.

    Args:
        key: place in the store.
        file: the image.
        framed: the part of it that is encoded.
        flip: mirrors it first.
    """

    key: bytes
    file: Path
    framed: Frame
    flip: bool

    def read(self) -> Tensor | UserError:
        """Its pixels, (3, h, w), uint8, or why they cannot be read."""
        try:
            return pixels(load_image(self.file), self.framed, self.flip)
        except UserError as error:
            return error


class _Jobs:
    """Latents to be made, in the order of their sizes; as columns, since there can be millions.

    A place numbers the latents of all samples: side by side, within a side first the plain ones and then, where images
    are mirrored, the mirrored ones, within these row by row. So with n samples and f flips (1 or 2) a place is
    (side · f + flip) · n + row.

    Args:
        store: latents that are in it need not be made.
    """

    def __init__(self, samples: Samples, frames: Frames, store: TensorStore):
        self.samples, self.frames = samples, frames
        self.keys = np.concatenate([frames.keys(side) for side in samples.sides])
        _, first = np.unique(self.keys, return_index=True)
        first = np.sort(first)[store.lacks(self.keys[np.sort(first)])]
        self.places = first[np.argsort(frames.numbers[self._rows(first)], kind="stable")]

    def __len__(self) -> int:
        return len(self.places)

    def _rows(self, places: np.ndarray) -> np.ndarray:
        return places % len(self.samples)

    def latent_pixels(self) -> int:
        """Pixels of all latents together."""
        sizes = self.frames.sizes[self._rows(self.places)]
        return int((sizes // self.frames.factor).astype(np.int64).prod(axis=1).sum())

    def batches(self) -> Iterator[list[_Job]]:
        """Jobs of one size each, as many as the VAE encodes together."""
        numbers = self.frames.numbers[self._rows(self.places)]
        for members in np.split(self.places, np.flatnonzero(np.diff(numbers)) + 1):
            if not len(members):
                continue
            size = encoded_together(math.prod(self.frames.sizes[members[0] % len(self.samples)].tolist()))
            for start in range(0, len(members), size):
                yield [self._job(int(place)) for place in members[start : start + size]]

    def _job(self, place: int) -> _Job:
        above, row = divmod(place, len(self.samples))
        number, flip = divmod(above, len(self.frames.flips))
        side = self.samples.sides[number]
        return _Job(self.keys[place], side.folder / side.paths[row], self.frames.of(side, row), bool(flip))

    def affected(self, problems: dict[bytes, str]) -> dict[int, str]:
        """The samples that need a latent that could not be made, and why it could not, by row."""
        places = np.flatnonzero(np.isin(self.keys, np.array(list(problems)))) if problems else np.empty(0, int)
        return {int(row): problems[self.keys[place]] for place, row in zip(places, self._rows(places), strict=True)}


def encode_latents(
    model: StableDiffusion, samples: Samples, frames: Frames, cache: Cache, part: str
) -> tuple[TensorStore, dict[int, str]]:
    """The store with all latents in it, and why samples could not be encoded, by row.

    Args:
        part: name of the samples in the progress bar.

    Raises:
        UserError: if the disk cannot hold the latents.
    """
    import torch
    from tqdm import tqdm

    store = cache.store("latents")
    jobs = _Jobs(samples, frames, store)
    _check_room(store, len(jobs), jobs.latent_pixels())
    problems: dict[bytes, str] = {}
    with (
        torch.inference_mode(),
        model.working(model.vae),
        tqdm(total=len(jobs), desc=f"encoding {part} pictures", unit="picture", disable=not jobs) as bar,
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
    return store, jobs.affected(problems)


def _read_ahead(batches: Iterator[list[_Job]]) -> Iterator[tuple[list[_Job], list[Tensor | UserError]]]:
    """Each batch with its images; the next one is read while the last one is worked on."""
    with ThreadPoolExecutor(min(READERS, os.cpu_count() or 1)) as readers:
        waiting: deque[tuple[list[_Job], list[Future]]] = deque()
        for batch in itertools.chain(batches, [None]):
            if batch is not None:
                waiting.append((batch, [readers.submit(job.read) for job in batch]))
            while len(waiting) > 1 or (batch is None and waiting):
                done, images = waiting.popleft()
                yield done, [image.result() for image in images]


def _check_room(store: TensorStore, n: int, latent_pixels: int) -> None:
    """Refuses to begin an encoding that the disk cannot hold."""
    needed, free = 4 * latent_pixels * store.dtype.itemsize, free_bytes(store.folder)
    if needed > free:
        raise UserError(
            f"the cache needs {needed / 2**30:.2g} GiB for {n} latents, and {store.folder} has {free / 2**30:.2g} GiB "
            "left: make room, choose another place with cache_dir=<folder>, or use cache=off"
        )
