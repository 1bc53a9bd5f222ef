"""The plan of a card's memory, against tensors counted by hand and against what the CPU's allocator is asked for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from dpo_sd.errors import UserError
from dpo_sd.forecast.counting import CONTEXT, GIB, Alive, Phase, kernels
from dpo_sd.forecast.explaining import explained
from dpo_sd.forecast.measuring import measured
from dpo_sd.forecast.workload import Workload
from dpo_sd.lora.attaching import LoRA
from dpo_sd.losses import DiffusionDPOLoss, SFTLoss
from dpo_sd.models.base import Base
from dpo_sd.models.quantization import QuantisedLinear, quantise
from dpo_sd.models.sampling import Sampler
from dpo_sd.training.hardware import Hardware
from dpo_sd.training.optimizers import AdamW


def training(family: Any = "tiny", resolution=64, loss=None, lora=None, cache="all", **hardware):
    parts = (lora or LoRA(rank=4), loss or DiffusionDPOLoss(), AdamW(), Hardware(**hardware), Sampler(batch_size=1))
    return Workload(family, *parts, resolution, cache)


def gpu(family, resolution, micro_batch=1, weights="bfloat16", checkpointing=True, memory_gib=8.0, **settings):
    hardware = {"precision": "bf16-mixed", "weights": weights, "micro_batch": micro_batch, "memory_gib": memory_gib}
    return training(
        family, resolution, accelerator="cuda", gradient_checkpointing=checkpointing, **hardware, **settings
    )


def test_tensors_are_counted_while_they_are_alive_and_views_are_not():
    there = torch.zeros(128)
    with Alive([there]) as alive:
        first = torch.zeros(256)
        view = first.view(16, 16)
        assert alive.now == 512 + 1024
        del first, view
        torch.zeros(1)  # rounded up to 512 bytes
    assert (alive.stays, alive.now, alive.peak) == (512, 512, 512 + 1024)


def test_a_product_of_matrices_is_counted_with_its_operations():
    with Alive() as alive:
        _ = torch.ones(2, 3) @ torch.ones(3, 5)
    assert alive.flops == 2 * 2 * 3 * 5


def test_attention_is_counted_without_its_matrix():
    query = torch.empty(1, 8, 4096, 64, device="meta", requires_grad=True)
    with Alive() as alive, kernels(None, "cuda"):
        torch.nn.functional.scaled_dot_product_attention(query, query, query)
    assert alive.peak < 3 * query.nbytes < 8 * 4096 * 4096 * 4


def test_a_card_must_have_the_peak_a_tenth_of_what_passes_and_half_a_gib():
    assert Phase("any", stays=2 * GIB, passes=10 * GIB).needs == 13 * GIB + CONTEXT


@pytest.mark.parametrize(
    "settings",
    [
        {"micro_batch": 4},
        {"micro_batch": 4, "gradient_checkpointing": True},
        {"micro_batch": 2, "loss": SFTLoss()},
        {"micro_batch": 4, "precision": "bf16-mixed", "weights": "int8"},
        {"micro_batch": 2, "cache": "latents", "lora": LoRA(rank=4, text_encoder=True)},
    ],
)
def test_the_plan_is_within_a_tenth_of_what_the_allocator_is_asked_for(settings):
    plan = training(**settings)
    assert 0.9 < plan.peak_of_update / measured(plan, torch.device("cpu")) < 1.1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("plan", [gpu("sd15", 512, 4), gpu("sdxl", 1024, 1, "int8")])
def test_on_a_gpu_the_plan_is_within_a_tenth_of_what_the_allocator_held(plan):
    assert 0.9 < plan.peak_of_update / measured(plan, torch.device("cuda")) < 1.1


def test_sd15_trains_four_pairs_at_512_in_8_gib():
    assert gpu("sd15", 512, 4).fits()


def test_sdxl_trains_a_pair_at_1024_in_8_gib_with_its_base_in_8_bit():
    assert gpu("sdxl", 1024, weights="int8").fits()


@pytest.mark.slow
def test_sdxl_in_16_bit_does_not_fit_8_gib_and_8_bit_is_what_does():
    plan = gpu("sdxl", 1024)
    assert not plan.fits()
    assert next(plan.nearest()).overrides == "hardware.weights=int8"


def test_the_nearest_settings_that_fit_change_the_micro_batch_before_anything_else():
    plan = gpu("sd15", 512, 16)
    assert not plan.fits()
    nearest = next(plan.nearest())
    assert nearest.fits() and nearest.overrides == "hardware.micro_batch=8"


def test_the_nearest_settings_take_checkpointing_where_a_single_pair_is_too_much():
    plan = gpu("sd21", 768, 1, checkpointing=False, memory_gib=6.5)
    assert next(plan.nearest()).overrides == "hardware.gradient_checkpointing=true"


@pytest.mark.parametrize(
    ("trained", "fits", "nearest"),
    [
        (False, lambda plan: plan.cache == "all" or plan.hardware.weights == "int8", ["cache=all"]),
        (True, lambda plan: plan.cache == "all", ["cache=all lora.text_encoder=false"]),
        (
            True,
            lambda plan: plan.cache == "all" or plan.hardware.weights == "int8",
            ["hardware.weights=int8", "cache=all lora.text_encoder=false"],
        ),
    ],
)
def test_text_encoders_are_left_alone_only_after_all_that_learns_the_same(monkeypatch, trained, fits, nearest):
    monkeypatch.setattr(Workload, "fits", lambda plan, *_: fits(plan))
    plan = gpu("sd15", 512, cache="latents", lora=LoRA(rank=4, text_encoder=trained))
    assert [other.overrides for other in plan.nearest()] == nearest


def test_linear_layers_of_the_text_encoder_are_kept_in_half_where_the_step_asks_it_and_change_nothing():
    lora = LoRA(rank=4, text_encoder=True)
    plan = training(cache="latents", lora=lora, precision="bf16-mixed")
    single = training(cache="all", lora=lora).build("cpu")
    half = plan.build("cpu")
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


def test_settings_that_are_changed_back_are_no_overrides():
    plan = training(micro_batch=4)
    assert plan.using(micro_batch=2, resolution=128).using(micro_batch=4).overrides == "framing.resolution=128"


def test_more_pairs_checkpointing_and_fewer_bits_change_the_plan_the_way_they_should():
    one, two = (gpu("sd15", 512, n).peak_of_update for n in (1, 2))
    assert one < two < gpu("sd15", 512, 2, checkpointing=False).peak_of_update
    stays = [sum(map(len, [t.untyped_storage() for t in gpu("sd15", 512, weights=w).state["UNet"]])) for w in
             ("bfloat16", "int8", "nf4")]  # fmt: skip
    assert stays == sorted(stays, reverse=True)


def test_a_run_out_of_memory_names_what_it_did_what_is_kept_and_what_takes_less():
    def training_step():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    with (
        pytest.raises(UserError) as error,
        explained(gpu("sd15", 512, 4), lambda overrides: f"last.ckpt is kept; go on with resume=run {overrides}"),
    ):
        training_step()
    assert str(error.value) == (
        "out of memory in the forward pass of an update (CUDA out of memory. Tried to allocate 2 GiB.): "
        "last.ckpt is kept; go on with resume=run hardware.micro_batch=2"
    )


def test_other_errors_are_not_explained():
    with pytest.raises(ZeroDivisionError), explained(training(), str):
        _ = 1 / 0


@pytest.mark.parametrize("cache", ["all", "off"])
def test_the_operations_of_a_pair_are_those_of_its_passes(cache):
    """Back through a frozen base goes the gradient of what passes alone: as much as forward, and the adapters' own."""
    plan = training(micro_batch=2, cache=cache)
    needed = plan.operations
    text = needed.text if cache == "off" else 0.0  # which the encoders do in every pass, without gradients
    assert needed.reference == pytest.approx(needed.forward)
    assert 1.9 < (needed.policy - text) / (needed.forward - text) < 2.3
    assert needed.encoding > 0 and needed.text > 0
    again = plan.using(gradient_checkpointing=True).operations
    assert again.reference == needed.reference and 0.5 < (again.policy - needed.policy) / needed.forward < 1


# -------------------------------------------------------------------------------------------------------- quantisation


def test_eight_bits_are_within_half_a_step_of_the_weights():
    layer = torch.nn.Linear(32, 16)
    steps = layer.weight.abs().amax(dim=1, keepdim=True) / 127
    assert ((QuantisedLinear(layer, "int8").expanded(torch.float32) - layer.weight).abs() <= steps * 0.502).all()


def test_eight_bits_in_half_precision_are_those_in_single_precision_rounded_once():
    layer = QuantisedLinear(torch.nn.Linear(32, 16), "int8")
    assert torch.equal(layer.expanded(torch.bfloat16), layer.expanded(torch.float32).bfloat16())


def test_a_quantised_layer_passes_on_the_gradient_of_its_expanded_weight():
    layer = QuantisedLinear(torch.nn.Linear(8, 4), "int8")
    x = torch.randn(3, 8, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.expanded(torch.float32).sum(dim=0).expand(3, 8))


def test_a_quantised_layer_keeps_no_expanded_weight_for_its_backward_pass():
    layer = QuantisedLinear(torch.nn.Linear(512, 512), "int8")
    x = torch.randn(1, 512, requires_grad=True)
    with Alive() as alive:
        y = layer(x)
    assert alive.now <= 4096 and y.requires_grad


def test_the_tiny_model_predicts_the_same_with_its_linear_layers_in_eight_bits_to_two_thousandths():
    unet = Base("tiny").load().unet
    smaller = copy.deepcopy(unet)
    quantise(smaller, "int8")
    side = unet.config["sample_size"]
    given = (
        torch.randn(2, 4, side, side),
        torch.tensor([100, 700]),
        torch.randn(2, 8, unet.config["cross_attention_dim"]),
    )
    with torch.no_grad():
        there, here = unet(*given).sample, smaller(*given).sample
    assert (here - there).norm() < 2e-3 * there.norm()


def test_nf4_of_bitsandbytes_is_near_the_weights_and_trains_the_adapter():
    pytest.importorskip("bitsandbytes")
    layer = torch.nn.Linear(128, 64)
    quantised = QuantisedLinear(layer, "nf4")
    assert (quantised.expanded(torch.float32) - layer.weight).norm() < 0.1 * layer.weight.norm()


def test_networks_come_to_the_device_outside_of_inference_mode_which_would_spoil_them_for_training(monkeypatch):
    model = Base("tiny").load()
    seen = []
    for network in (model.vae, *model.text_encoders):
        move = network.to
        monkeypatch.setattr(
            network, "to", lambda *a, move=move: (seen.append(torch.is_inference_mode_enabled()), move(*a))
        )
    model.encode_prompts(["a"])
    model.decode_latents(torch.zeros(1, 4, 8, 8))
    assert seen and not any(seen)


def test_the_unet_makes_room_for_a_large_picture(monkeypatch):
    model = Base("tiny").load()
    moved = []
    monkeypatch.setattr(model.unet, "to", lambda device: moved.append(str(device)))
    model.decode_latents(torch.zeros(1, 4, 8, 8))
    assert moved == []
    model.decode_latents(torch.zeros(1, 4, 72, 64))
    assert moved == ["cpu", "cpu"]
