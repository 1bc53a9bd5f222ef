"""Batches of pairs: the order of visits, the randomness of a visit, and the pairs of the shapes world."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from album import Album, prompts_of
from peft.tuners.lora import LoraLayer
from PIL import Image
from small_model import make_model

from dpo_sd.data import datamodule
from dpo_sd.data.batches import PreparedSamples, Prompts, UpdateOrder, Visit, Visits, stack
from dpo_sd.data.cache import Cache
from dpo_sd.data.frames import Framing
from dpo_sd.data.shapes import Renders, Shapes
from dpo_sd.data.source import PreparedData
from dpo_sd.errors import UserError
from dpo_sd.lora.adapters import policy_parameters, weights_of
from dpo_sd.lora.attaching import LoRA
from dpo_sd.lora.writing import save_diffusers
from dpo_sd.models.sampling import Sampler
from dpo_sd.shapes.captions import parse
from dpo_sd.shapes.oracle import UTILITIES, score
from dpo_sd.shapes.render import render
from dpo_sd.shapes.scenes import random_scene

# ------------------------------------------------------------------------------------------------- the order of visits

N, PER_UPDATE = 7, 4


def visits(updates: range, micro_batch: int = 1, world_size: int = 1, seed: int = 0) -> list[tuple[int, int]]:
    """All that the devices visit, in the order in which their micro-batches are due."""
    ranks = [
        list(UpdateOrder(N, seed, updates, PER_UPDATE, micro_batch, None, rank, world_size))
        for rank in range(world_size)
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


def test_the_pairs_of_an_update_are_the_same_when_those_of_one_size_stand_together():
    sizes = np.array([0, 1, 0, 1, 2, 0, 1])
    plain, grouped = (list(UpdateOrder(N, 0, range(7), PER_UPDATE, 2, sizes=each)) for each in (None, sizes))
    for update in range(7):
        one, other = (order[2 * update] + order[2 * update + 1] for order in (plain, grouped))
        assert sorted(one) == sorted(other)
        assert [sizes[index] for index, _ in other] == sorted(sizes[index] for index, _ in other)


# --------------------------------------------------------------------------------------------- the randomness of a visi


class Row:
    """Pictures in memory: brightness by row, one for the mirrored ones, and where they were cut."""

    def __init__(self, values: torch.Tensor, sizes: Sequence[tuple[int, int]] = ((2, 2),)):
        self.values, self.sizes = values, sizes
        self.asked: list[tuple[bool, tuple[float, float]]] = []

    def read(self, row: int, flip: bool, where: tuple[float, float]) -> tuple[torch.Tensor, torch.Tensor]:
        self.asked.append((flip, where))
        shape = self.sizes[row % len(self.sizes)]
        return torch.full((4, *shape), float(self.values[row])), torch.full((6,), float(self.values[row]))


def make_pairs(n: int = 6, sizes: Sequence[tuple[int, int]] = ((2, 2),), **more: Any) -> PreparedSamples:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.cat([1 + torch.rand(n, 3, 5, generator=generator), torch.zeros(1, 3, 5)])
    pooled = torch.cat([1 + torch.rand(n, 7, generator=generator), torch.zeros(1, 7)])
    return PreparedSamples(
        chosen=Row(torch.randn(n, generator=generator), sizes),
        rejected=Row(torch.randn(n, generator=generator), sizes),
        prompts=Prompts([f"prompt {i}" for i in range(n)], np.arange(n), hidden, pooled),
        label=np.linspace(0.5, 1, n, dtype=np.float32),
        weight=np.linspace(0.5, 1.5, n, dtype=np.float32),
        sample_ids=np.arange(1000, 1000 + n),
        **more,
    )


def test_a_visit_carries_its_pair():
    pairs: Any = make_pairs()
    visit = Visits(pairs, 0, 1000)[4, 2]
    assert visit.rejected is not None and visit.embeds is not None and visit.embeds.pooled is not None
    assert visit.chosen.unique().tolist() == visit.chosen_time_ids.unique().tolist() == [pairs.chosen.values[4]]
    assert visit.rejected.unique().tolist() == [pairs.rejected.values[4]]
    assert torch.equal(visit.embeds.hidden, pairs.prompts.hidden[4])
    assert torch.equal(visit.embeds.pooled, pairs.prompts.pooled[4])
    assert (visit.label, visit.weight) == (pairs.label[4], pairs.weight[4])
    assert (visit.prompt, visit.index, visit.draw) == ("prompt 4", 4, 2)
    assert (visit.noise.shape, visit.noise.dtype) == ((4, 2, 2), torch.float32)


def same(one: Visit, other: Visit) -> bool:
    return all(
        torch.equal(a, b)
        for a, b in (
            (one.chosen, other.chosen),
            (one.noise, other.noise),
            (torch.tensor(one.timestep), torch.tensor(other.timestep)),
            (one.embeds.hidden, other.embeds.hidden),  # type: ignore[union-attr]
        )
    )


def test_a_visit_is_the_same_whenever_it_is_asked_for():
    one, other = (Visits(make_pairs(), 3, 1000, caption_dropout=0.5) for _ in range(2))
    asked = [(index, draw) for index in range(6) for draw in range(3)]
    forth = {visit: one[visit] for visit in asked}
    back = {visit: other[visit] for visit in reversed(asked)}
    assert all(same(forth[visit], back[visit]) for visit in asked)


def test_pairs_visits_and_seeds_have_noises_of_their_own():
    noises = [
        Visits(make_pairs(), seed, 1000)[index, draw].noise for seed in (0, 1) for index in (0, 1) for draw in (0, 1)
    ]
    assert len({noise.numpy().tobytes() for noise in noises}) == 8


def test_a_pair_keeps_its_noise_and_timestep_whatever_its_label_and_row():
    pairs = make_pairs()
    turned = replace(
        pairs, chosen=pairs.rejected, rejected=pairs.chosen, label=1 - pairs.label, sample_ids=pairs.sample_ids[::-1]
    )
    for index in range(6):
        one, other = Visits(pairs, 0, 1000)[index, 1], Visits(turned, 0, 1000)[5 - index, 1]
        assert torch.equal(one.noise, other.noise) and one.timestep == other.timestep


def test_timesteps_cover_the_schedule():
    assert {Visits(make_pairs(1), 0, 10)[0, draw].timestep for draw in range(200)} == set(range(10))


def test_a_grid_gives_visit_k_its_entry_k():
    grid = Visits(make_pairs(), 0, 1000, timesteps=[125, 375, 625])
    assert [grid[index, k].timestep for index in range(2) for k in range(3)] == [125, 375, 625] * 2
    assert torch.equal(grid[1, 2].noise, Visits(make_pairs(), 0, 1000)[1, 2].noise)


@pytest.mark.parametrize(("share", "low", "high"), [(0.0, 0, 0), (0.3, 0.25, 0.35), (1.0, 1, 1)])
def test_captions_are_dropped_at_their_share(share, low, high):
    drops = Visits(make_pairs(), 0, 1000, caption_dropout=share)
    visited = [drops[index, draw] for index in range(6) for draw in range(150)]
    dropped = [not visit.embeds.hidden.any() for visit in visited]  # type: ignore[union-attr]
    assert low <= np.mean(dropped) <= high
    assert dropped == [visit.prompt == "" for visit in visited]
    assert dropped == [not visit.embeds.pooled.any() for visit in visited]  # type: ignore[union-attr]


def test_dropping_captions_leaves_noise_and_timesteps_alone():
    for visit in [(0, 0), (3, 1)]:
        with_, without = (Visits(make_pairs(), 0, 1000, caption_dropout=share)[visit] for share in (1.0, 0.0))
        assert torch.equal(with_.noise, without.noise) and with_.timestep == without.timestep


@pytest.mark.parametrize("setting", ["flip", "random_crop"])
def test_both_pictures_of_a_pair_are_mirrored_and_cut_alike_and_differently_at_other_visits(setting):
    more: dict[str, Any] = {setting: True}
    pairs: Any = make_pairs(**more)
    visits = Visits(pairs, 0, 1000)
    plain = Visits(make_pairs(), 0, 1000)
    for draw in range(60):
        assert torch.equal(visits[1, draw].noise, plain[1, draw].noise)
    assert pairs.chosen.asked == pairs.rejected.asked
    flips, places = zip(*pairs.chosen.asked, strict=True)
    if setting == "flip":
        assert 18 < sum(flips) < 42 and set(places) == {(0.5, 0.5)}
    else:
        assert len(set(places)) == 60 and not any(flips)
        assert 0 <= np.min(places) < 0.1 and 0.9 < np.max(places) <= 1


def test_the_validation_grid_sees_pictures_and_captions_as_they_are():
    pairs: Any = make_pairs(flip=True, random_crop=True, vary=lambda text, rng: "varied")
    visits = Visits(pairs, 0, 1000, timesteps=[1, 2])
    assert [visits[0, k].prompt for k in range(2)] == ["prompt 0"] * 2
    assert set(pairs.chosen.asked) == {(False, (0.5, 0.5))}


def test_texts_vary_from_visit_to_visit_by_seed_sample_and_draw_and_dropped_ones_stay_empty():
    def vary(text: str, rng: np.random.Generator) -> str:
        return f"{text} {rng.integers(10**6)}"

    cached = make_pairs(vary=vary)
    with pytest.raises(UserError, match=r"another text of a prompt at every visit.*add cache=latents"):
        Visits(cached, 0, 1000)
    pairs = replace(cached, prompts=Prompts(cached.prompts.texts, cached.prompts.row, None))
    visits, again = (Visits(pairs, 0, 1000) for _ in range(2))
    texts = [visits[index, draw].prompt for index in range(3) for draw in range(3)]
    assert len(set(texts)) == 9 and texts[0].startswith("prompt 0 ")
    assert texts == [again[index, draw].prompt for index in range(3) for draw in range(3)]
    assert Visits(pairs, 0, 1000, caption_dropout=1.0)[0, 0].prompt == ""


def test_draws_come_again_after_so_many_visits_and_are_counted_from_0():
    """Flips and dropped captions too, or errors that are kept would be of another picture."""
    pairs = make_pairs(flip=True)
    visits = Visits(pairs, 0, 1000, caption_dropout=0.5, draws_per_pair=3)
    for draw in range(3):
        first, later = visits[2, draw], visits[2, draw + 6]
        assert same(first, later) and first.draw == later.draw == draw
    assert len({visits[2, draw].noise.numpy().tobytes() for draw in range(9)}) == 3


def test_stacking_puts_visits_into_rows():
    visits = Visits(make_pairs(), 0, 1000)
    (batch,) = stack([visits[2, 0], visits[5, 1]])
    assert batch.chosen.shape == (2, 4, 2, 2)
    assert (batch.index, batch.draw, batch.prompts) == ([2, 5], [0, 1], ["prompt 2", "prompt 5"])
    assert (batch.timesteps.dtype, batch.label.dtype, batch.weight.dtype) == (torch.int64, torch.float32, torch.float32)
    assert batch.embeds is not None and batch.embeds.pooled is not None
    assert (batch.embeds.hidden.shape, batch.embeds.pooled.shape) == ((2, 3, 5), (2, 7))
    assert torch.equal(batch.noise[1], visits[5, 1].noise)


def test_stacking_makes_one_batch_of_each_size():
    visits = Visits(make_pairs(sizes=[(2, 2), (2, 3)]), 0, 1000)
    square, wide = stack([visits[index, 0] for index in (0, 1, 3, 2)])
    assert (square.index, wide.index) == ([0, 2], [1, 3])
    assert (square.noise.shape, wide.noise.shape) == ((2, 4, 2, 2), (2, 4, 2, 3))


def test_noise_has_the_size_of_the_latents_of_pixels():
    class Bytes(Row):
        def read(self, row: int, flip: bool, where: tuple[float, float]) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.zeros(3, 16, 24, dtype=torch.uint8), torch.zeros(6)

    pairs = replace(make_pairs(), chosen=Bytes(torch.zeros(6)), rejected=None)
    (batch,) = stack([Visits(pairs, 0, 1000, factor=8)[index, 0] for index in range(2)])
    assert batch.noise.shape == (2, 4, 2, 3) and batch.rejected is None and batch.rejected_time_ids is None


def test_a_fingerprint_depends_on_what_is_trained_on_and_in_which_order_of_preference():
    pairs = make_pairs(content_ids=np.arange(6))
    changes: list[dict[str, Any]] = [
        {"sample_ids": pairs.sample_ids + 1}, {"content_ids": np.arange(6) + 1}, {"label": pairs.label / 2},
        {"weight": pairs.weight * 2}, {"flip": True}, {"random_crop": True},
        {"prompts": Prompts(["other"], np.zeros(6, int), None)},
    ]  # fmt: skip
    assert len({pairs.fingerprint, *(replace(pairs, **change).fingerprint for change in changes)}) == 8
    assert replace(pairs, chosen=Row(torch.zeros(6))).fingerprint == pairs.fingerprint


@pytest.mark.parametrize("micro_batch", [1, 4, 6, 16])
def test_validation_asks_for_every_pair_at_every_point_of_the_grid_pair_by_pair(micro_batch):
    prepared = PreparedData(make_pairs(), make_pairs(5, sizes=[(2, 2), (2, 3)]), [], [])
    source: Any = SimpleNamespace(caption_dropout=1.0)
    data = datamodule.DataModule(prepared, source, Sampler(), 16, micro_batch, seed=0, num_train_timesteps=1000)
    parts = [part for batch in data.validation_batches() for part in batch]
    asked = [(i, int(t)) for part in parts for i, t in zip(part.index, part.timesteps, strict=True)]
    assert data.grid == [125, 375, 625, 875]
    assert sorted(asked) == [(index, timestep) for index in range(5) for timestep in data.grid]
    for start in range(0, len(asked), 4):  # the four of a pair stand together: their margins are averaged
        assert len({index for index, _ in asked[start : start + 4]}) == 1
    for part in parts:
        assert part.embeds is not None and part.embeds.hidden.any(dim=-1).all()  # captions are never dropped here
        assert len(part.index) <= max(micro_batch, 4)


# -------------------------------------------------------------------------------------------- pairs of the shapes world


class Painter(Sampler):
    """Renders what the prompt says, somewhere; remembers what it was asked for."""

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        self.asked: list[tuple[str, int]] = []

    def stream(
        self, model: Any, prompts: Sequence[str], seeds: Sequence[int], embeds: Any = None
    ) -> Iterator[Image.Image]:
        self.asked += zip(prompts, seeds, strict=True)
        return (self.paint(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True))

    def paint(self, prompt: str, seed: int) -> Image.Image:
        asked = parse(prompt)
        kind = (asked.size or "", asked.colour or "", asked.shape, asked.background or "")
        return render(random_scene(np.random.default_rng(seed), kind))


def opened(pixels: torch.Tensor) -> Image.Image:
    return Image.fromarray(((pixels + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy())


def prepare(
    folder: Path, *, model: Album | None = None, painter: Sampler | None = None, **settings: Any
) -> tuple[PreparedData, Shapes]:
    source = Shapes(**{"n_pairs": 12, "n_validation": 3, **settings})
    data = source.prepare(model or Album(), painter or Painter(), Framing(), Cache(folder))  # type: ignore[arg-type]
    return data, source


def test_prompts_of_training_validation_and_verdict_are_disjoint_and_all_there():
    parts = Shapes().prompts
    together = [prompt for part in parts for prompt in part]
    assert len(together) == len(set(together)) == 520
    assert [len(part) for part in parts] == [312, 52, 156]


def test_prepared_prompts_come_from_their_parts(tmp_path):
    data, source = prepare(tmp_path)
    assert prompts_of(data.train) == source.prompts.train[:12]
    assert prompts_of(data.validation) == source.prompts.validation[:3]
    assert data.held_out_prompts == source.prompts.held_out


def test_the_same_seed_gives_the_same_pairs_and_another_seed_others(tmp_path):
    same, again, other = (
        prepare(tmp_path / str(i), seed=seed, temperature=3.0, flip_rate=0.2)[0] for i, seed in enumerate((5, 5, 6))
    )
    assert same.fingerprint == again.fingerprint != other.fingerprint
    assert same.train.sample_ids.tolist() == again.train.sample_ids.tolist()
    assert same.train.contents.tolist() == again.train.contents.tolist()
    assert set(same.train.sample_ids).isdisjoint(other.train.sample_ids)


@pytest.mark.parametrize("preference", ["centred", "large"])
def test_without_whims_the_annotator_chooses_by_the_utility(tmp_path, preference):
    model = Album()
    data, _ = prepare(tmp_path, model=model, preference=preference)
    chosen, rejected = model.encoded[:2]
    assert len(chosen) == len(rejected) == len(data.train) == 12
    utility = UTILITIES[preference]
    for prompt, winner, loser in zip(prompts_of(data.train), map(opened, chosen), map(opened, rejected), strict=True):
        assert utility(winner, prompt, "flat") > utility(loser, prompt, "flat")


def test_flipping_every_answer_turns_the_pairs_round(tmp_path):
    plain, flipped = Album(), Album()
    prepare(tmp_path, model=plain)
    prepare(tmp_path, model=flipped, flip_rate=1.0)
    assert torch.equal(flipped.encoded[0], plain.encoded[1])


def test_a_pair_is_the_same_sample_with_other_contents_when_another_wins(tmp_path):
    """Its noise stays; what is kept of the reference's errors on chosen and rejected must not."""
    plain, flipped = (prepare(tmp_path, flip_rate=rate)[0] for rate in (0.0, 1.0))
    assert plain.train.sample_ids.tolist() == flipped.train.sample_ids.tolist()
    assert set(plain.train.contents).isdisjoint(flipped.train.contents)
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
    data = source.prepare(Album(), painter, Framing(), Cache(tmp_path))  # type: ignore[arg-type]
    first, second, third = source.prompts.train
    assert prompts_of(data.train) == [first, second, third, first, second]
    assert len(set(painter.asked)) == len(painter.asked) == 2 * (5 + 1)


def test_prompt_embeddings_belong_to_their_pairs(tmp_path):
    data, _ = prepare(tmp_path)
    for row, prompt in enumerate(prompts_of(data.train)):
        whole, dropped = (data.train.prompts.embeds(row, dropped) for dropped in (False, True))
        assert whole is not None and whole.hidden.tolist() == [[len(prompt)]]
        assert dropped is not None and dropped.hidden.tolist() == [[0]]


@pytest.mark.parametrize(("keep", "kept"), [("all", True), ("latents", False), ("off", False)])
def test_prompts_are_left_to_the_step_where_the_cache_does_not_keep_them(tmp_path, keep, kept):
    data = Shapes(n_pairs=12, n_validation=3).prepare(Album(), Painter(), Framing(), Cache(tmp_path, keep))  # type: ignore[arg-type]
    assert (data.train.prompts.embeds(0, dropped=False) is not None) == kept


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
def networks(tmp_path_factory) -> dict[str, Any]:
    """Small networks by what training starts from: the bare base, or LoRAs that differ in a weight or in alpha."""
    folder = tmp_path_factory.mktemp("loras")

    def build(lora: LoRA) -> Any:
        model = make_model()
        lora.attach(model)
        return model

    made: dict[str, Any] = {"base": build(LoRA(rank=2)).networks}
    for name, alpha, weight in (("one", 2.0, 0.1), ("alpha", 4.0, 0.1), ("weight", 2.0, 0.2)):
        model = build(LoRA(rank=2, alpha=alpha))
        for parameter in policy_parameters(model)["unet"]:
            torch.nn.init.constant_(parameter, weight)
        made[name] = build(
            LoRA(init_from=str(save_diffusers(weights_of(model), folder / f"{name}.safetensors")))
        ).networks
    return made


def test_pictures_are_drawn_with_the_lora_that_training_starts_from_and_cached_as_its_own(tmp_path, networks):
    """Or a run with `lora.init_from` would learn from pictures that the bare base drew in an earlier run."""
    for each in networks.values():
        painter, again = Painter(), Painter()
        for asking in (painter, again):
            prepare(tmp_path, painter=asking, model=Album(networks=each), n_pairs=2, n_validation=1)
        assert (len(painter.asked), len(again.asked)) == (2 * 3, 0)


@pytest.mark.parametrize(("start", "adapters"), [("base", []), ("one", ["reference"])])
def test_pairs_are_drawn_by_the_reference(tmp_path, networks, start, adapters):
    class Looking(Painter):
        def draw(self, model: Any, prompts: Any, seeds: Any, progress: str | None = None) -> list[Image.Image]:
            layers = [module for module in model.unet.modules() if isinstance(module, LoraLayer)]
            assert layers
            for layer in layers:
                assert ([] if layer.disable_adapters else layer.active_adapters) == adapters
            return super().draw(model, prompts, seeds, progress)

    painter = Looking()
    prepare(tmp_path, painter=painter, model=Album(networks=networks[start]), n_pairs=2, n_validation=1)
    assert painter.asked


def test_a_killed_preparation_goes_on_where_it_was(tmp_path):
    """It keeps 64 images together."""

    class Killed(Painter):
        def stream(self, *given: Any) -> Iterator[Image.Image]:
            yield from itertools.islice(super().stream(*given), 64)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path, painter=Killed(), n_pairs=40)
    painter = Painter()
    prepare(tmp_path, painter=painter, n_pairs=40)
    assert len(painter.asked) == 2 * 43 - 64


def test_pictures_in_another_arithmetic_are_drawn_again_and_stay_the_same_samples(tmp_path):
    """A bfloat16 UNet draws other pixels: its pictures must not stand in for those of a float32 one."""
    first, second = Painter(), Painter()
    data, _ = prepare(tmp_path, painter=first)
    half = Album(arithmetic="bfloat16")
    again, _ = prepare(tmp_path, painter=second, model=half)
    assert len(second.asked) == len(first.asked)
    assert again.train.sample_ids.tolist() == data.train.sample_ids.tolist()


@pytest.mark.parametrize("source", [Shapes(), Renders()])
def test_a_model_of_another_resolution_is_refused_before_it_draws(source):
    big: Any = Album()
    source.check(big)
    big.resolution = 512
    with pytest.raises(UserError, match=r"pictures of the shapes world have 64 pixels, but .* draws 512"):
        source.check(big)


def test_what_will_be_drawn_is_known_without_looking_and_nothing_is_written(tmp_path):
    source = Shapes(n_pairs=400, n_validation=3)
    found = source.find(Cache(tmp_path / "cache"), fetch=True)
    assert (found.train, found.validation, found.both, found.drawn) == (400, 3, 403, 806)
    assert found.prompts == sorted(source.prompts.train + source.prompts.validation[:3])  # 312 serve again
    assert found.report == ["400 pairs: to be drawn, so ties are not known yet"]
    assert found.held_out == source.prompts.held_out
    renders = Renders(n_pictures=1, n_validation=2).find(Cache(tmp_path / "cache"), fetch=False)
    assert (renders.both, renders.drawn, renders.report) == (3, 0, ["1 picture: to be drawn"])
    assert list(tmp_path.iterdir()) == []


def test_the_labels_say_whose_they_are():
    assert Shapes(preference="large", style="outlined").labeller == "oracle: large, in the outlined style"
    assert Renders().labeller is None


# ------------------------------------------------------------------------------------------------------ rendered styles


def test_renders_are_of_their_captions_in_their_style_and_repeatable():
    album, again = Album(), Album()
    data, same = (
        Renders(style="outlined", n_pictures=20, n_validation=2).prepare(each, Painter(), Framing(), Cache(Path()))  # type: ignore[arg-type]
        for each in (album, again)
    )
    assert data.train.rejected is None and data.fingerprint == same.fingerprint
    pictures = map(opened, album.encoded[0])
    scores = [
        score(picture, prompt, "outlined") for picture, prompt in zip(pictures, prompts_of(data.train), strict=True)
    ]
    assert sum(each.faithful for each in scores) >= 19
    assert set(prompts_of(data.train)).isdisjoint(prompts_of(data.validation))
    assert data.held_out_prompts == Shapes().prompts.held_out


def test_more_renders_than_prompts_show_each_prompt_anew():
    album = Album()
    Renders(n_pictures=624, n_validation=1).prepare(album, Painter(), Framing(), Cache(Path()))  # type: ignore[arg-type]
    assert len({picture.numpy().tobytes() for batch in album.encoded[:-1] for picture in batch}) == 624


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
