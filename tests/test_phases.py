"""Phases of a run: which settings change them, and which cards hold them."""

from __future__ import annotations

from dataclasses import replace

import torch
from workloads import on_card, workload

from dpo_sd.data.prompts import Line
from dpo_sd.forecast.phases import Forecast
from dpo_sd.forecast.workload import largest
from dpo_sd.lora.attaching import LoRA
from dpo_sd.models.base import Base
from dpo_sd.models.families import FAMILIES
from dpo_sd.models.sampling import Sampler


def test_sd15_trains_four_pairs_at_512_in_8_gib():
    assert Forecast(on_card("sd15", 512, 4)).fits()


def test_sdxl_trains_a_pair_at_1024_in_8_gib_with_its_base_in_8_bit():
    assert Forecast(on_card("sdxl", 1024, weights="int8")).fits()


def test_more_pairs_checkpointing_and_fewer_bits_change_the_plan_the_way_they_should():
    one, two = (Forecast(on_card("sd15", 512, n)).peak_of_update for n in (1, 2))
    assert one < two < Forecast(on_card("sd15", 512, 2, checkpointing=False)).peak_of_update
    bits = ("bfloat16", "int8", "nf4")
    stays = [Forecast(on_card("sd15", 512, weights=weights)).card.sizes["UNet"] for weights in bits]
    assert stays == sorted(stays, reverse=True)


def test_what_runs_before_and_beside_the_updates_follows_from_the_cache():
    named = {cache: [phase.name for phase in Forecast(workload(cache=cache)).phases] for cache in ("all", "off")}
    update = ["update: forward", "update: backward", "update: optimiser"]
    drawing = ["samples: prompts", "samples: denoising", "samples: decoding"]
    assert named["all"] == ["encoding pictures", "encoding prompts", *update, "validation", *drawing]
    assert named["off"] == ["update: pictures", *update, "validation: pictures", "validation", *drawing]


def test_linear_layers_of_the_text_encoder_are_kept_in_half_where_the_step_asks_it_and_change_nothing():
    lora = LoRA(rank=4, text_encoder=True)
    single = workload(cache="all", lora=lora).build("cpu")
    half = workload(cache="latents", lora=lora, precision="bf16-mixed").build("cpu")
    kinds = {name.split(".")[-2]: value.dtype for name, value in half.text_encoders[0].named_parameters()}
    assert kinds["fc1"] == kinds["base_layer"] == torch.bfloat16
    assert kinds["token_embedding"] == kinds["policy"] == kinds["final_layer_norm"] == torch.float32
    half.text_encoders[0].load_state_dict(single.text_encoders[0].state_dict())
    for model in (single, half):
        model.tokenizers = Base("tiny").load().tokenizers
    with torch.autocast("cpu", torch.bfloat16):
        one, two = (model.embed(["a red star"]).hidden for model in (single, half))
    assert torch.equal(one, two)
    torch.testing.assert_close(half.encode_prompts(["a red star"]).hidden, one.float())


def test_the_plan_counts_the_largest_prompt_and_every_chunk_of_it():
    sampler = Sampler()
    lines = [Line("a"), Line("b", width=128, height=96), Line("c", width=128, height=96, guidance=1.0)]
    assert vars(largest(sampler, lines, 64)) == vars(sampler.changed(width=128, height=96))
    assert largest(sampler, lines[:1], 64) is sampler
    one, three = (replace(workload(), reading=FAMILIES["tiny"].reading(tokens)) for tokens in (30, 90))
    assert three.build().hidden_shape == (3 * one.build().hidden_shape[0], 128)
    assert Forecast(three).of("prompts")[0].flops == 3 * Forecast(one).of("prompts")[0].flops


def test_a_moving_average_takes_as_much_as_the_adapters():
    plain, averaged = (Forecast(replace(workload(), ema=ema)).card.sizes for ema in (False, True))
    assert averaged["optimiser"] - plain["optimiser"] == plain["adapters"] == plain["gradients"]
