"""Sources of the user's own: a class outside the package that becomes batches, by files or by images in memory."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from PIL import Image

from dpo_sd.data.batches import Batch
from dpo_sd.data.cache import Cache
from dpo_sd.data.datamodule import DataModule
from dpo_sd.data.drawn import encode_drawn
from dpo_sd.data.file_source import FileSource
from dpo_sd.data.frames import Framing
from dpo_sd.data.source import Found, PreparedData, Source
from dpo_sd.data.splitting import Split, split_images
from dpo_sd.data.usable import usable
from dpo_sd.errors import UserError
from dpo_sd.models.base import Base
from dpo_sd.models.sampling import Sampler
from dpo_sd.models.stable_diffusion import StableDiffusion
from dpo_sd.noise import sample_id


class Listed(FileSource):
    """Single images from a list, one a line with its caption behind a tab."""

    has_pairs: ClassVar[bool] = False

    def __init__(self, listing: str, caption_dropout: float = 0.0):
        self.listing, self.caption_dropout = Path(listing), caption_dropout

    def look(self, cache: Cache, fetch: bool) -> Split:
        names, captions = zip(*(line.split("\t") for line in self.listing.read_text().splitlines()), strict=True)
        found = usable(self.listing.parent, captions, names)
        if not found.rows:
            raise UserError(f"no image of {self.listing} can be read: {'; '.join(found.left_out)}")
        return split_images(found.samples, 0.25, seed=0, report=found.left_out)


class Plain(Source):
    """Pairs of plain colours: the lighter one is better."""

    has_pairs: ClassVar[bool] = True
    fixed_resolution: ClassVar[int | None] = 64
    labeller = "lightness"

    def find(self, cache: Cache, fetch: bool) -> Found:
        return Found(6, 2, 8, ["grey"], ["8 pairs of plain colours"], ["grey"], cached=False)

    def prepare(self, model: StableDiffusion, sampler: Sampler, framing: Framing, cache: Cache) -> PreparedData:
        def samples(levels: range) -> Any:
            light, dark = ([Image.new("L", (64, 64), level + more) for level in levels] for more in (100, 0))
            ids = [sample_id("grey", str(level)) for level in levels]
            return encode_drawn(model, ["grey"] * len(levels), light, dark, ids, cache.keep)

        report = self.find(cache, fetch=True).report
        return PreparedData(samples(range(6)), samples(range(6, 8)), ["grey"], report)


@pytest.fixture(scope="module")
def model() -> StableDiffusion:
    return Base().load()


@pytest.fixture
def listing(tmp_path, monkeypatch) -> Path:
    """Eight images of two shapes, of which the last is none."""
    monkeypatch.setenv("DPO_SD_CACHE", str(tmp_path / "memory"))
    for n in range(8):
        Image.new("RGB", (64, 64) if n % 2 else (128, 64), (30 * n, 0, 0)).save(tmp_path / f"{n}.png")
    (tmp_path / "7.png").write_text("<html>")
    (tmp_path / "list.tsv").write_text("".join(f"{n}.png\timage {n}\n" for n in range(8)))
    return tmp_path / "list.tsv"


def batches(source: Source, data: PreparedData) -> list[list[Batch]]:
    """All of the first two updates, of four samples each in two micro-batches."""
    module = DataModule(data, source, Sampler(), 4, 2, seed=0, num_train_timesteps=1000)
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    trainer: Any = SimpleNamespace(global_step=0, max_steps=2, global_rank=0, world_size=1, strategy=strategy)
    module.trainer = trainer
    assert len(list(module.validation_batches())) > 0
    return list(module.train_dataloader())


def prepared(source: Source, model: StableDiffusion, folder: Path) -> PreparedData:
    source.check(model)
    return source.prepare(model, Sampler(), Framing(), Cache(folder / "cache"))


def test_files_of_a_users_own_list_become_batches(model, listing):
    source, cache = Listed(str(listing), caption_dropout=1.0), Cache(listing.parent / "cache")
    found = source.find(cache, fetch=False)
    assert (found.train, found.validation, found.both) == (6, 1, 7)
    assert found.prompts == [f"image {n}" for n in range(7)]
    assert "left out 1 of 8 that cannot be read" in found.report[0] and "7.png is a web page" in found.report[0]
    assert not cache.folder.exists()
    data = prepared(source, model, listing.parent)
    assert data.report[: len(found.report)] == found.report and data.held_out_prompts == list(found.held_out)
    seen = [part for batch in batches(source, data) for part in batch]
    assert sum(len(part.index) for part in seen) == 8 and all(part.rejected is None for part in seen)
    assert len({tuple(part.chosen.shape[1:]) for part in seen}) == 2
    assert {prompt for part in seen for prompt in part.prompts} == {""}  # all captions are dropped


def test_pairs_in_memory_become_batches(model, tmp_path):
    source = Plain()
    data = prepared(source, model, tmp_path)
    assert len(data.train) == 6 and not (tmp_path / "cache").exists()
    for part in (part for batch in batches(source, data) for part in batch):
        assert part.rejected is not None and part.chosen.shape == part.rejected.shape == (2, 4, 8, 8)
        assert part.prompts == ["grey"] * 2


def test_what_a_source_does_not_say_has_a_default(model):
    source = Plain()
    assert (source.caption_dropout, source.drawn_with(), source.check(model)) == (0.0, None, None)
    assert Listed("list.tsv").labeller is None and Listed("list.tsv").fixed_resolution is None


def test_what_a_source_must_say_is_named_where_it_lacks(model, tmp_path):
    class Empty(Source):
        has_pairs: ClassVar[bool] = False

    with pytest.raises(NotImplementedError, match=r"Empty has no find\(cache, fetch\)"):
        Empty().find(Cache(tmp_path), fetch=False)
    with pytest.raises(NotImplementedError, match=r"Empty has no prepare\(model, sampler, framing, cache\)"):
        prepared(Empty(), model, tmp_path)
