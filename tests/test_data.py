"""Batches of pairs: the order of visits, the randomness of a visit, the cache, and the pairs of the shapes world."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from peft.tuners.lora import LoraLayer
from PIL import Image
from safetensors.torch import save_file

from dpo_sd import files
from dpo_sd.data import datamodule, shapes
from dpo_sd.data.batches import EncodedPairs, UpdateOrder, Visits, stack
from dpo_sd.data.cache import cached, content_key
from dpo_sd.data.shapes import Renders, Shapes
from dpo_sd.data.source import PreparedData
from dpo_sd.errors import UserError
from dpo_sd.lora import LoRA, policy_parameters, save_diffusers
from dpo_sd.sampling import Sampler
from dpo_sd.shapes.captions import parse
from dpo_sd.shapes.oracle import UTILITIES, score
from dpo_sd.shapes.render import render
from dpo_sd.shapes.scenes import random_scene

# ------------------------------------------------------------------------------------------------- the order of visits

N, PER_UPDATE = 7, 4


def visits(updates: range, micro_batch: int = 1, world_size: int = 1, seed: int = 0) -> list[tuple[int, int]]:
    """All that the devices visit, in the order in which their micro-batches are due."""
    ranks = [
        list(UpdateOrder(N, seed, updates, PER_UPDATE, micro_batch, rank, world_size)) for rank in range(world_size)
    ]
    assert {len(batch) for batches in ranks for batch in batches} == {micro_batch}
    return [visit for step in zip(*ranks, strict=True) for batch in step for visit in batch]


@pytest.mark.parametrize(("micro_batch", "world_size"), [(2, 1), (4, 1), (1, 2), (2, 2)])
def test_the_visits_of_an_update_do_not_depend_on_micro_batch_and_devices(micro_batch, world_size):
    assert visits(range(10), micro_batch, world_size) == visits(range(10))


@pytest.mark.parametrize(("micro_batch", "world_size"), [(4, 1), (1, 2)])
def test_beginning_at_an_update_gives_the_rest_of_the_whole_run(micro_batch, world_size):
    rest = visits(range(3, 10), micro_batch, world_size)
    assert rest == visits(range(10))[3 * PER_UPDATE :]


def test_every_pass_visits_every_pair_once_and_counts_its_visits():
    whole = visits(range(N))
    assert len(whole) == 4 * N
    for epoch in range(4):
        passed = whole[epoch * N : (epoch + 1) * N]
        assert sorted(index for index, _ in passed) == list(range(N))
        assert {draw for _, draw in passed} == {epoch}


def test_passes_and_seeds_go_different_ways():
    first, second = (visits(range(N))[start : start + N] for start in (0, N))
    assert [index for index, _ in first] != [index for index, _ in second]
    assert visits(range(N), seed=1) != visits(range(N))


# --------------------------------------------------------------------------------------------- the randomness of a visi


def make_pairs(n: int = 6) -> Any:
    generator = torch.Generator().manual_seed(0)
    return EncodedPairs(
        chosen=torch.randn(n, 4, 2, 2, generator=generator),
        rejected=torch.randn(n, 4, 2, 2, generator=generator),
        prompt_embeds=1 + torch.rand(n, 3, 5, generator=generator),
        empty_embeds=torch.zeros(3, 5),
        label=torch.linspace(0.5, 1, n),
        weight=torch.linspace(0.5, 1.5, n),
        sample_ids=[1000 + i for i in range(n)],
        prompts=[f"prompt {i}" for i in range(n)],
    )


def test_a_visit_carries_its_pair():
    pairs = make_pairs()
    visit = Visits(pairs, 0, 1000)[4, 2]
    for name in ("chosen", "rejected", "prompt_embeds", "label", "weight"):
        assert torch.equal(getattr(visit, name), getattr(pairs, name)[4])
    assert visit.index == 4
    assert (visit.noise.shape, visit.noise.dtype, visit.timesteps.dtype) == ((4, 2, 2), torch.float32, torch.int64)


def test_a_visit_is_the_same_whenever_it_is_asked_for():
    one, other = (Visits(make_pairs(), 3, 1000, caption_dropout=0.5) for _ in range(2))
    asked = [(index, draw) for index in range(6) for draw in range(3)]
    forth: dict[Any, Any] = {visit: one[visit] for visit in asked}
    back: dict[Any, Any] = {visit: other[visit] for visit in reversed(asked)}
    for visit in asked:
        assert all(torch.equal(a, b) for a, b in zip(forth[visit], back[visit], strict=True))


def test_pairs_visits_and_seeds_have_noises_of_their_own():
    noises = [
        Visits(make_pairs(), seed, 1000)[index, draw].noise for seed in (0, 1) for index in (0, 1) for draw in (0, 1)
    ]
    assert len({noise.numpy().tobytes() for noise in noises}) == 8


def test_a_pair_keeps_its_noise_and_timestep_whatever_its_label_and_row():
    pairs = make_pairs()
    turned = replace(
        pairs,
        chosen=pairs.rejected.flip(0),
        rejected=pairs.chosen.flip(0),
        label=1 - pairs.label,
        sample_ids=pairs.sample_ids[::-1],
    )
    for index in range(6):
        one, other = Visits(pairs, 0, 1000)[index, 1], Visits(turned, 0, 1000)[5 - index, 1]
        assert torch.equal(one.noise, other.noise) and torch.equal(one.timesteps, other.timesteps)


def test_timesteps_cover_the_schedule():
    timesteps = [int(Visits(make_pairs(1), 0, 10)[0, draw].timesteps) for draw in range(200)]
    assert set(timesteps) == set(range(10))


def test_a_grid_gives_visit_k_its_entry_k():
    grid = Visits(make_pairs(), 0, 1000, timesteps=[125, 375, 625])
    assert [int(grid[index, k].timesteps) for index in range(2) for k in range(3)] == [125, 375, 625] * 2
    assert torch.equal(grid[1, 2].noise, Visits(make_pairs(), 0, 1000)[1, 2].noise)


@pytest.mark.parametrize(("share", "low", "high"), [(0.0, 0, 0), (0.3, 0.25, 0.35), (1.0, 1, 1)])
def test_captions_are_dropped_at_their_share(share, low, high):
    drops = Visits(make_pairs(), 0, 1000, caption_dropout=share)
    dropped = [not drops[index, draw].prompt_embeds.any() for index in range(6) for draw in range(150)]
    assert low <= np.mean(dropped) <= high


def test_dropping_captions_leaves_noise_and_timesteps_alone():
    for visit in [(0, 0), (3, 1)]:
        with_, without = (Visits(make_pairs(), 0, 1000, caption_dropout=share)[visit] for share in (1.0, 0.0))
        assert torch.equal(with_.noise, without.noise) and torch.equal(with_.timesteps, without.timesteps)


def test_stacking_puts_visits_into_rows():
    drops = Visits(make_pairs(), 0, 1000)
    batch = stack([drops[2, 0], drops[5, 0]])
    assert batch.chosen.shape == (2, 4, 2, 2)
    assert batch.index.tolist() == [2, 5]
    assert torch.equal(batch.noise[1], drops[5, 0].noise)


@pytest.mark.parametrize("micro_batch", [1, 4, 6, 16])
def test_validation_asks_for_every_pair_at_every_point_of_the_grid_pair_by_pair(micro_batch):
    prepared = PreparedData(make_pairs(), make_pairs(5), [], [])
    source: Any = SimpleNamespace(caption_dropout=1.0)
    data = datamodule.PairData(prepared, source, Sampler(), 16, micro_batch, seed=0, num_train_timesteps=1000)
    batches = list(data.validation_batches())
    asked = [(int(i), int(t)) for batch in batches for i, t in zip(batch.index, batch.timesteps, strict=True)]
    assert data.grid == [125, 375, 625, 875]
    assert asked == [(index, timestep) for index in range(5) for timestep in data.grid]
    assert all(batch.prompt_embeds.any(dim=-1).all() for batch in batches)  # captions are never dropped here
    assert max(len(batch.index) for batch in batches) <= max(micro_batch, 4)


# ------------------------------------------------------------------------------------------------------------- the cach


def computed(folder: Path, key: str = "key") -> tuple[torch.Tensor, int]:
    """What the cache gives, and how often it was computed for that."""
    calls = []
    value = cached(folder, key, lambda: calls.append(1) or torch.arange(6).view(2, 3).T)
    return value, len(calls)


def test_what_was_computed_once_is_read_again(tmp_path):
    folder = tmp_path / "new" / "folder"
    first, calls = computed(folder)
    again, more = computed(folder)
    assert (calls, more) == (1, 0)
    assert torch.equal(first, again) and again.shape == (3, 2)
    assert computed(folder, "another key")[1] == 1


@pytest.mark.parametrize("content", [b"", b"garbage", None])
def test_a_damaged_file_is_said_computed_anew_and_mended(tmp_path, caplog, content):
    file = tmp_path / "key.safetensors"
    if content is None:  # whole, but of something else
        save_file({"other": torch.zeros(1)}, file)
    else:
        computed(tmp_path)
        file.write_bytes(content or file.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING):
        value, calls = computed(tmp_path)
    assert (calls, value.tolist()) == (1, [[0, 3], [1, 4], [2, 5]])
    assert str(file) in caplog.text and "anew" in caplog.text
    assert computed(tmp_path)[1] == 0


@pytest.mark.parametrize("place", ["a file", "n" * 300])
def test_a_folder_that_cannot_be_written_costs_the_cache_and_not_the_run(tmp_path, caplog, place):
    (tmp_path / "a file").touch()
    with caplog.at_level(logging.WARNING):
        value, calls = computed(tmp_path / place)
    assert (calls, value.tolist()) == (1, [[0, 3], [1, 4], [2, 5]])
    assert "cannot be written" in caplog.text


def test_a_kill_while_writing_leaves_no_file_under_the_key(tmp_path, monkeypatch):
    def killed(*names: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            computed(tmp_path)
    assert not (tmp_path / "key.safetensors").exists()
    assert computed(tmp_path)[1] == 1


def test_the_key_depends_on_every_ingredient_and_not_on_their_order():
    made_from: dict[str, Any] = {"model": "a", "steps": 12, "guidance": 4.0, "prompts": ["x", "y"], "seeds": [1, 2]}
    changes: list[dict[str, Any]] = [
        {"model": "b"}, {"steps": 13}, {"guidance": 4.5}, {"prompts": ["y", "x"]}, {"seeds": [1, 3]}, {"more": None},
    ]  # fmt: skip
    keys = {content_key(**made_from), *(content_key(**made_from | change) for change in changes)}
    assert len(keys) == 1 + len(changes)
    assert content_key(**dict(reversed(made_from.items()))) == content_key(**made_from)


# -------------------------------------------------------------------------------------------- pairs of the shapes world


class Painter(Sampler):
    """Renders what the prompt says, somewhere; remembers what it was asked for."""

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        self.asked: list[tuple[str, int]] = []

    def draw(
        self, model: Any, prompts: Sequence[str], seeds: Sequence[int], progress: str | None = None
    ) -> list[Image.Image]:
        self.asked += zip(prompts, seeds, strict=True)
        return [self.paint(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]

    def paint(self, prompt: str, seed: int) -> Image.Image:
        asked = parse(prompt)
        kind = (asked.size or "", asked.colour or "", asked.shape, asked.background or "")
        return render(random_scene(np.random.default_rng(seed), kind))


class Album:
    """Stands for the model: keeps the pictures that it should encode."""

    name, resolution, tokenizer = "tiny", 64, SimpleNamespace(model_max_length=77)

    def __init__(self, fingerprint: str = "base", unet: Any = None, arithmetic: str = "float32 on cpu"):
        self.fingerprint = fingerprint
        self.unet: Any = unet or torch.nn.Identity()
        dtype, _, device = arithmetic.partition(" on ")
        if unet is None:
            self.unet.dtype, self.unet.device = dtype, torch.device(device)
        self.encoded: list[list[Image.Image]] = []  # chosen and rejected of training, then of validation

    def encode_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        self.encoded.append(list(images))
        return torch.tensor([[np.asarray(image).mean()] for image in images])

    def encode_prompts(self, prompts: Sequence[str]) -> torch.Tensor:
        return torch.tensor([[float(len(prompt))] for prompt in prompts])

    def truncated(self, prompts: Sequence[str]) -> list[str]:
        return [prompt for prompt in prompts if "star" in prompt]


def prepare(
    folder: Path, *, model: Album | None = None, painter: Sampler | None = None, **settings: Any
) -> tuple[PreparedData, Shapes]:
    source = Shapes(**{"n_pairs": 12, "n_validation": 3, **settings})
    data = source.prepare(model or Album(), painter or Painter(), folder)  # type: ignore[arg-type]
    return data, source


def test_prompts_of_training_validation_and_verdict_are_disjoint_and_all_there():
    parts = Shapes().prompts
    together = [prompt for part in parts for prompt in part]
    assert len(together) == len(set(together)) == 520
    assert [len(part) for part in parts] == [312, 52, 156]


def test_prepared_prompts_come_from_their_parts(tmp_path):
    data, source = prepare(tmp_path)
    assert data.train.prompts == source.prompts.train[:12]
    assert data.validation.prompts == source.prompts.validation[:3]
    assert data.held_out_prompts == source.prompts.held_out


def test_the_same_seed_gives_the_same_pairs_and_another_seed_others(tmp_path):
    same, again, other = (
        prepare(tmp_path / str(i), seed=seed, temperature=3.0, flip_rate=0.2)[0] for i, seed in enumerate((5, 5, 6))
    )
    assert same.fingerprint == again.fingerprint != other.fingerprint
    assert same.train.sample_ids == again.train.sample_ids
    assert torch.equal(same.train.chosen, again.train.chosen)
    assert set(same.train.sample_ids).isdisjoint(other.train.sample_ids)


@pytest.mark.parametrize("preference", ["centred", "large"])
def test_without_whims_the_annotator_chooses_by_the_utility(tmp_path, preference):
    model = Album()
    data, _ = prepare(tmp_path, model=model, preference=preference)
    chosen, rejected = model.encoded[:2]
    assert len(chosen) == len(rejected) == len(data.train) == 12
    for prompt, winner, loser in zip(data.train.prompts, chosen, rejected, strict=True):
        assert UTILITIES[preference](winner, prompt, "flat") > UTILITIES[preference](loser, prompt, "flat")


def test_flipping_every_answer_turns_the_pairs_round(tmp_path):
    plain, flipped = Album(), Album()
    prepare(tmp_path, model=plain)
    prepare(tmp_path, model=flipped, flip_rate=1.0)
    assert [p.tobytes() for p in flipped.encoded[0]] == [p.tobytes() for p in plain.encoded[1]]


def test_a_pair_is_the_same_sample_whoever_wins(tmp_path):
    plain, flipped = (prepare(tmp_path, flip_rate=rate)[0] for rate in (0.0, 1.0))
    assert plain.train.sample_ids == flipped.train.sample_ids
    assert plain.fingerprint != flipped.fingerprint


def test_ties_are_left_out_and_counted(tmp_path):
    everything, _ = prepare(tmp_path)
    some, _ = prepare(tmp_path, tie_band=6.0)
    left_out = 12 - len(some.train)
    assert 0 < left_out < 12
    assert f"training: {len(some.train)} pairs on {len(some.train)} prompts, {left_out} ties left out" in some.report[0]
    assert "12 pairs on 12 prompts, 0 ties left out" in everything.report[0]
    assert set(some.train.sample_ids) < set(everything.train.sample_ids)


def test_nothing_but_ties_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"all 12 training pairs are ties: lower data.tie_band \(1000"):
        prepare(tmp_path, tie_band=1000.0)


def test_cut_prompts_are_reported(tmp_path):
    data, source = prepare(tmp_path)
    cut = [prompt for prompt in source.prompts.train[:12] if "star" in prompt]
    assert f"{len(cut)} prompts are cut at the text encoder's limit of 77 tokens: {cut[0]!r}" in data.report[1]


def test_more_pairs_than_prompts_use_prompts_again_with_new_pictures(tmp_path):
    painter, source = Painter(), Shapes(n_pairs=5, n_validation=1)
    del source.prompts.train[3:]
    data = source.prepare(Album(), painter, tmp_path)  # type: ignore[arg-type]
    first, second, third = source.prompts.train
    assert data.train.prompts == [first, second, third, first, second]
    assert len(set(painter.asked)) == len(painter.asked) == 2 * (5 + 1)


def test_prompt_embeddings_belong_to_their_pairs(tmp_path):
    data, _ = prepare(tmp_path)
    assert data.train.prompt_embeds[:, 0].tolist() == [len(prompt) for prompt in data.train.prompts]
    assert data.train.empty_embeds.tolist() == [0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_pairs": 0}, "n_pairs must be at least 1, got 0"),
        ({"n_validation": 0}, "n_validation must be between 1 and 52, got 0"),
        ({"n_validation": 53}, "n_validation must be between 1 and 52, got 53"),
        ({"caption_dropout": -0.1}, "caption_dropout must be between 0 and 1, got -0.1"),
        ({"caption_dropout": 1.1}, "caption_dropout must be between 0 and 1, got 1.1"),
        ({"style": "outline"}, "did you mean outlined"),
        ({"preference": "centered"}, "did you mean centred"),
        ({"temperature": -1.0}, "temperature"),
        ({"tie_band": -1.0}, "tie_band"),
        ({"flip_rate": 1.5}, "flip_rate"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        Shapes(**settings)


def test_pictures_in_the_cache_are_not_drawn_again(tmp_path):
    first, second, none = Painter(), Painter(batch_size=5), Painter()
    data, _ = prepare(tmp_path, painter=first)
    again, _ = prepare(tmp_path, painter=second)
    prepare(tmp_path, painter=none, preference="large", tie_band=0.1, flip_rate=0.5)  # judged anew, not drawn
    assert len(first.asked) == 2 * 15
    assert second.asked == none.asked == []
    assert again.fingerprint == data.fingerprint


@pytest.mark.parametrize("settings", [{"steps": 13}, {"guidance": 3.0}, {"scheduler": "ddim"}])
def test_another_setting_of_the_sampler_draws_again(tmp_path, settings):
    prepare(tmp_path)
    painter = Painter(**settings)
    prepare(tmp_path, painter=painter)
    assert len(painter.asked) == 2 * 15


def test_another_model_draws_again(tmp_path):
    prepare(tmp_path)
    painter = Painter()
    prepare(tmp_path, painter=painter, model=Album("other"))
    assert len(painter.asked) == 2 * 15


@pytest.fixture(scope="module")
def unets(tmp_path_factory) -> dict[str, Any]:
    """Small UNets by what training starts from: the bare base, or LoRAs that differ in a weight or in alpha."""
    folder = tmp_path_factory.mktemp("loras")

    def build(lora: LoRA) -> Any:
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8,),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
            cross_attention_dim=8,
            attention_head_dim=1,
            norm_num_groups=4,
        )
        lora.attach(unet)
        return unet

    made: dict[str, Any] = {"base": build(LoRA(rank=2))}
    for name, alpha, weight in (("one", 2.0, 0.1), ("alpha", 4.0, 0.1), ("weight", 2.0, 0.2)):
        unet = build(LoRA(rank=2, alpha=alpha))
        for parameter in policy_parameters(unet):
            torch.nn.init.constant_(parameter, weight)
        made[name] = build(LoRA(init_from=str(save_diffusers(unet, folder / name))))
    return made


def test_pictures_are_drawn_with_the_lora_that_training_starts_from_and_cached_as_its_own(tmp_path, unets):
    """Or a run with `lora.init_from` would learn from pictures that the bare base drew in an earlier run."""
    for unet in unets.values():
        painter, again = Painter(), Painter()
        for asking in (painter, again):
            prepare(tmp_path, painter=asking, model=Album(unet=unet), n_pairs=2, n_validation=1)
        assert (len(painter.asked), len(again.asked)) == (2 * 3, 0)


@pytest.mark.parametrize(("start", "adapters"), [("base", []), ("one", ["reference"])])
def test_pairs_are_drawn_by_the_reference(tmp_path, unets, start, adapters):
    class Looking(Painter):
        def draw(self, model: Any, prompts: Any, seeds: Any, progress: str | None = None) -> list[Image.Image]:
            layers = [module for module in model.unet.modules() if isinstance(module, LoraLayer)]
            assert layers
            for layer in layers:
                assert ([] if layer.disable_adapters else layer.active_adapters) == adapters
            return super().draw(model, prompts, seeds, progress)

    painter = Looking()
    prepare(tmp_path, painter=painter, model=Album(unet=unets[start]), n_pairs=2, n_validation=1)
    assert painter.asked


def test_a_killed_preparation_goes_on_where_it_was(tmp_path, monkeypatch):
    class Killed(Painter):
        def draw(self, model: Any, prompts: Any, seeds: Any, progress: str | None = None) -> list[Image.Image]:
            if len(self.asked) >= 16:
                raise KeyboardInterrupt
            return super().draw(model, prompts, seeds, progress)

    monkeypatch.setattr(shapes, "CHUNK", 8)
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path, painter=Killed())
    painter = Painter()
    prepare(tmp_path, painter=painter)
    assert len(painter.asked) == 2 * 15 - 16


def test_pictures_in_another_arithmetic_are_drawn_again_and_stay_the_same_samples(tmp_path):
    """A bfloat16 UNet draws other pixels: its pictures must not stand in for those of a float32 one."""
    first, second = Painter(), Painter()
    data, _ = prepare(tmp_path, painter=first)
    half = Album(arithmetic="bfloat16 on cuda")
    again, _ = prepare(tmp_path, painter=second, model=half)
    assert len(second.asked) == len(first.asked)
    assert again.train.sample_ids == data.train.sample_ids


def test_a_model_of_another_resolution_is_refused_before_it_draws(tmp_path):
    big, painter = Album(), Painter()
    big.resolution = 512
    with pytest.raises(UserError, match=r"measures pictures of 64 pixels, but .* draws 512"):
        prepare(tmp_path, painter=painter, model=big)
    assert not painter.asked


# ------------------------------------------------------------------------------------------------------ rendered styles


def test_renders_are_of_their_captions_in_their_style_and_repeatable():
    album, again = Album(), Album()
    data, same = (
        Renders(style="outlined", n_pictures=20, n_validation=2).prepare(each, None, Path())  # type: ignore[arg-type]
        for each in (album, again)
    )
    assert data.train.rejected is None and data.fingerprint == same.fingerprint
    pictures = album.encoded[0]
    scores = [score(picture, prompt, "outlined") for picture, prompt in zip(pictures, data.train.prompts, strict=True)]
    assert sum(each.faithful for each in scores) >= 19
    assert set(data.train.prompts).isdisjoint(data.validation.prompts)
    assert data.held_out_prompts == Shapes().prompts.held_out


def test_more_renders_than_prompts_show_each_prompt_anew():
    album = Album()
    Renders(n_pictures=624, n_validation=1).prepare(album, None, Path())  # type: ignore[arg-type]
    assert len({picture.tobytes() for picture in album.encoded[0]}) == 624


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"style": "outline"}, "did you mean outlined"),
        ({"n_pictures": 0}, "n_pictures must be at least 1"),
        ({"n_validation": 0}, "n_validation must be between"),
        ({"caption_dropout": 1.5}, "caption_dropout must be between"),
    ],
)
def test_renders_refuse_settings_out_of_range(settings, message):
    with pytest.raises(UserError, match=message):
        Renders(**settings)
