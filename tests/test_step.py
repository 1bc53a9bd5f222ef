"""The step: inputs of the UNet, inputs of the loss, and losses that are those of the paper's symbols by hand."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from lightning.pytorch.plugins.precision import MixedPrecision
from small_model import make_model, trained
from steps import PAIRS, TIMESTEPS, error, hidden, listen, make_batch, move
from torch.testing import assert_close

from dpo_sd.data.batches import Batch, PreparedSamples, Prompts, UpdateOrder, Visits, stack
from dpo_sd.errors import UserError
from dpo_sd.lora.adapters import adapter_state, policy_parameters, reference, weights_of
from dpo_sd.lora.attaching import LoRA
from dpo_sd.lora.weights import WEIGHTS_NAME
from dpo_sd.lora.writing import save_diffusers
from dpo_sd.losses import DiffusionDPOLoss, Loss, LossInputs, PairErrors, SFTLoss, squared_error
from dpo_sd.models.base import Base
from dpo_sd.models.skeletons import on_meta
from dpo_sd.models.stable_diffusion import StableDiffusion, TextEmbeds, encode_bytes
from dpo_sd.training.optimizers import AdamW, ScheduleFree
from dpo_sd.training.reference_cache import ReferenceErrors
from dpo_sd.training.step import DiffusionModule, needed_networks


@pytest.fixture(scope="module")
def base() -> StableDiffusion:
    return Base().load()


@pytest.fixture
def build(base):
    """`build(loss, lora)`: a training step on a fresh copy of the base; `moved` stands for updates behind it."""

    def build(loss: Any = None, lora: LoRA | None = None, moved: bool = False, seed: int = 0) -> DiffusionModule:
        model = replace(base, unet=copy.deepcopy(base.unet))
        (lora or LoRA(rank=2)).attach(model, seed)
        if moved:
            move(model)
        return DiffusionModule(model, loss or DiffusionDPOLoss(2000.0), AdamW(), max_steps=10)

    return build


def row(batch: Batch, i: int) -> Batch:
    assert batch.embeds is not None
    alone: Any = {name: column[i : i + 1] for name, column in batch._asdict().items() if name not in ("embeds", "mask")}
    return Batch(**alone, embeds=TextEmbeds(hidden(batch)[i : i + 1], None))


class RecordingLoss(DiffusionDPOLoss):
    given: LossInputs

    def __call__(self, inputs: LossInputs) -> torch.Tensor:
        self.given = inputs
        return super().__call__(inputs)

    @property
    def of_policy(self) -> PairErrors:
        return self.given.policy

    @property
    def of_reference(self) -> PairErrors:
        assert self.given.reference is not None
        return self.given.reference


# ------------------------------------------------------------------------------------------------- inputs of the UNet


def test_policy_and_reference_are_given_the_same_bytes(build):
    module = build(moved=True)
    calls = listen(module.unet)
    module.losses(make_batch())
    policy, ref = calls
    assert all(torch.equal(mine, its) for mine, its in zip(policy, ref, strict=True))


def test_chosen_and_rejected_are_given_the_same_noise_timesteps_and_prompts(build):
    module, batch = build(), make_batch()
    calls = listen(module.unet)
    module.losses(batch)
    noisy_latents, timesteps, prompt_embeds = calls[0]
    for half, latents in ((slice(PAIRS), batch.chosen), (slice(PAIRS, None), batch.rejected)):
        assert torch.equal(timesteps[half], batch.timesteps)
        assert torch.equal(prompt_embeds[half], hidden(batch))
        expected = module.model.noise_scheduler.add_noise(latents, batch.noise, batch.timesteps)
        assert torch.equal(noisy_latents[half], expected)


def test_a_mask_weighs_the_error_and_white_ones_change_no_bit(build):
    module, batch = build(SFTLoss(), moved=True), make_batch()
    white = torch.ones(PAIRS, 1, 8, 8)
    half = torch.cat([white[..., :4], 0 * white[..., 4:]], dim=-1)
    whole, same, left, right = (
        module.losses(batch._replace(mask=mask))["loss"] for mask in (None, white, half, 1 - half)
    )
    assert torch.equal(whole, same) and not torch.allclose(left, right)
    assert_close(left + right, whole)


def test_sft_is_given_the_chosen_pictures_once_and_nothing_else(build):
    module = build(SFTLoss(), moved=True)
    batch = make_batch()._replace(rejected=torch.full((PAIRS, 4, 8, 8), math.nan))
    calls = listen(module.unet)
    values = module.losses(batch)
    (noisy_latents, _, _) = calls[0]
    assert len(calls) == 1
    expected = module.model.noise_scheduler.add_noise(batch.chosen, batch.noise, batch.timesteps)
    assert torch.equal(noisy_latents, expected)
    assert_close(values["loss"].detach(), torch.stack([error(module, batch.chosen, batch, i) for i in range(PAIRS)]))


# --------------------------------------------------------------------------------------------------- inputs of the loss


def test_a_loss_is_given_errors_labels_and_timesteps_and_no_residuals_unless_it_asks(build):
    module, batch = build(loss := RecordingLoss(50.0), moved=True), make_batch()
    module.losses(batch._replace(label=torch.tensor([0.5, 0.7, 1.0])))
    given = loss.given
    assert given.label is not None and given.label.tolist() == pytest.approx([0.5, 0.7, 1.0])
    assert given.timesteps is not None and given.timesteps.tolist() == TIMESTEPS
    assert given.policy_residuals is given.reference_residuals is None


class OfResiduals(RecordingLoss):
    needs_residuals = True


def test_residuals_on_request_are_those_whose_mean_square_the_errors_are(build, tmp_path):
    """Also where errors of the reference are kept, for residuals are not: every visit computes them."""
    module, batch = build(loss := OfResiduals(50.0), moved=True), make_batch()
    for kept in (None, ReferenceErrors(tmp_path, np.arange(PAIRS), 1)):
        for _ in range(2):
            calls = listen(module.unet)
            module.losses(batch, kept)
            assert len(calls) == 2
            given = loss.given
            for errors, residuals in (
                (given.policy, given.policy_residuals),
                (given.reference, given.reference_residuals),
            ):
                assert errors is not None and residuals is not None
                for side, residual in zip(errors, residuals, strict=True):
                    assert residual.shape == (PAIRS, 4, 8, 8)
                    assert torch.equal(squared_error(residual), side)


class Single(Loss):
    """A loss on single images with a reference, as KTO has."""

    needs_pairs = False

    def __call__(self, inputs: LossInputs) -> torch.Tensor:
        assert inputs.reference is not None and inputs.policy.rejected.shape == inputs.reference.rejected.shape == (0,)
        return inputs.policy.chosen - inputs.reference.chosen


@pytest.mark.parametrize("rejected", [True, False])
def test_a_loss_on_single_images_with_a_reference_takes_the_chosen_images_of_pairs_too(build, tmp_path, rejected):
    module, batch = build(Single(reference="cached", draws_per_pair=1), moved=True), make_batch()
    if not rejected:
        batch = batch._replace(rejected=None, rejected_time_ids=None)
    expected = [error(module, batch.chosen, batch, i) for i in range(PAIRS)]
    with reference(module.model):
        frozen = [error(module, batch.chosen, batch, i) for i in range(PAIRS)]
    calls = listen(module.unet)
    kept = ReferenceErrors(tmp_path, np.arange(PAIRS), 1, images=1)
    for _ in range(2):
        values = module.losses(batch, kept)
        assert values.keys() == {"loss", "chosen_drift"}
        assert_close(values["loss"].detach(), torch.stack(expected) - torch.stack(frozen), rtol=1e-3, atol=1e-5)
    assert [len(latents) for latents, _, _ in calls] == [PAIRS] * 3  # reference, policy, policy
    assert kept.filled == 1


# ------------------------------------------------------------------------------------------------------------ the value


@pytest.mark.parametrize("beta", [1.0, 2000.0, 1e7])
def test_the_first_loss_is_ln_2_for_any_beta(build, beta):
    values = build(DiffusionDPOLoss(beta)).losses(make_batch())
    assert torch.equal(values["reward_margin"], torch.zeros(PAIRS))
    assert_close(values["loss"].detach(), torch.full((PAIRS,), math.log(2)))


def test_the_loss_is_that_of_errors_worked_out_picture_by_picture(build):
    """loss = -log sigmoid(beta/2 ((r_w - e_w) - (r_l - e_l))), each error from a UNet call of its own."""
    module, batch = build(DiffusionDPOLoss(50.0), moved=True), make_batch()
    values = module.losses(batch)
    assert values["reward_margin"].abs().max() > 1e-4  # or the rest says nothing
    for i in range(PAIRS):
        e_w, e_l = error(module, batch.chosen, batch, i), error(module, batch.rejected, batch, i)
        with reference(module.model):
            r_w, r_l = error(module, batch.chosen, batch, i), error(module, batch.rejected, batch, i)
        margin = (r_w - e_w) - (r_l - e_l)
        assert_close(values["loss"][i].detach(), -torch.log(torch.sigmoid(25.0 * margin)), rtol=1e-3, atol=1e-4)
        assert_close(values["reward_margin"][i], margin, rtol=1e-3, atol=1e-5)
        assert values["reward_accuracy"][i] == float(values["reward_margin"][i] > 0)
        assert_close(values["chosen_drift"][i], e_w - r_w, rtol=1e-3, atol=1e-5)
        assert_close(values["rejected_drift"][i], e_l - r_l, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("loss", [DiffusionDPOLoss(50.0), SFTLoss()])
def test_a_batch_gives_what_its_pairs_give_one_by_one(build, loss):
    module, batch = build(loss, moved=True), make_batch()
    together = module.losses(batch)
    alone = [module.losses(row(batch, i)) for i in range(PAIRS)]
    for name in together.keys() - {"reward_accuracy"}:  # the sign of the margin, which rounding may turn near zero
        assert_close(together[name], torch.cat([values[name] for values in alone]), rtol=1e-3, atol=3e-5)


def test_the_label_of_a_pair_reaches_the_loss(build):
    """A tie, label 1/2, is the mean of both ways to read the pair."""
    module, batch = build(DiffusionDPOLoss(50.0), moved=True), make_batch()
    one, none, tie = (
        module.losses(batch._replace(label=torch.full((PAIRS,), p)))["loss"].detach() for p in (1.0, 0.0, 0.5)
    )
    assert_close(tie, (one + none) / 2)
    assert not torch.allclose(one, none)


def test_under_v_prediction_the_target_is_the_velocity(build):
    module, batch = build(SFTLoss(), moved=True), make_batch()
    scheduler: Any = DDPMScheduler.from_config(module.model.noise_scheduler.config, prediction_type="v_prediction")
    module.model.noise_scheduler = scheduler
    alphas = scheduler.alphas_cumprod[batch.timesteps].view(-1, 1, 1, 1)
    noisy = alphas.sqrt() * batch.chosen + (1 - alphas).sqrt() * batch.noise
    velocity = alphas.sqrt() * batch.noise - (1 - alphas).sqrt() * batch.chosen
    with torch.no_grad():
        predicted = module.unet(noisy, batch.timesteps, hidden(batch)).sample
    expected = (predicted - velocity).square().mean(dim=(1, 2, 3))
    assert_close(module.losses(batch)["loss"].detach(), expected, rtol=1e-4, atol=1e-5)


def test_min_snr_weighs_the_errors_of_policy_and_reference_alike(build):
    """For noise prediction the weight is min(snr, gamma) / snr."""
    plain, weighted = RecordingLoss(50.0), RecordingLoss(50.0, min_snr_gamma=5.0)
    module, batch = build(plain, moved=True), make_batch()
    module.losses(batch)
    module.loss = weighted
    module.losses(batch)
    alphas = module.model.noise_scheduler.alphas_cumprod[batch.timesteps]
    snr = alphas / (1 - alphas)
    weights = snr.clamp(max=5.0) / snr
    assert weights[0] < 0.1 and weights[-1] == 1  # both sides of the cap
    for mine, its in ((plain.of_policy, weighted.of_policy), (plain.of_reference, weighted.of_reference)):
        for unweighted, value in zip(mine, its, strict=True):
            assert_close(value, unweighted * weights)


def test_a_huber_loss_takes_the_place_of_the_square_for_policy_and_reference_alike(build):
    plain, huber = RecordingLoss(50.0), RecordingLoss(50.0, huber_c=0.1)
    module, batch = build(plain, moved=True), make_batch()
    module.losses(batch)
    module.loss = huber
    module.losses(batch)
    for mine, its in ((plain.of_policy, huber.of_policy), (plain.of_reference, huber.of_reference)):
        for square, value in zip(mine, its, strict=True):
            assert (value < square).all() and (value > 0).all()
    constant = huber.of_policy
    module.loss = scheduled = RecordingLoss(50.0, huber_c=0.1, huber_schedule="snr")
    module.losses(batch)
    for square, value, each in zip(plain.of_policy, constant, scheduled.of_policy, strict=True):
        assert (value < each).all() and (each < square).all()  # between, for its threshold is larger


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_latents_in_half_precision_give_errors_in_float32(build, dtype):
    module, batch = build(), make_batch(dtype)
    module.unet.to(dtype)
    assert batch.embeds is not None and batch.rejected is not None
    errors = module.denoised(batch).errors
    precise = batch._replace(
        chosen=batch.chosen.float(),
        rejected=batch.rejected.float(),
        noise=batch.noise.float(),
        embeds=TextEmbeds(hidden(batch).float(), None),
    )
    for mine, exact in zip(errors, build().denoised(precise).errors, strict=True):
        assert mine.dtype == torch.float32
        assert_close(mine, exact, rtol=0.1, atol=0.01)


# ------------------------------------------------------------------------------------------------------------ gradients


def test_after_a_first_update_every_policy_parameter_and_nothing_else_has_a_gradient(build):
    module, batch = build(), make_batch()
    parameters = policy_parameters(module.model)["unet"]
    optimizer = torch.optim.SGD(parameters, lr=1e-3)
    for _ in range(2):  # B is zero at the start, and A has no gradient through it
        optimizer.zero_grad()
        module.losses(batch)["loss"].mean().backward()
        optimizer.step()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in parameters)
    policy = {id(parameter) for parameter in parameters}
    rest = [parameter for parameter in module.parameters() if id(parameter) not in policy]
    assert rest and all(parameter.grad is None for parameter in rest)


def test_the_reference_pass_adds_no_graph(build):
    loss = RecordingLoss()
    values = build(loss, moved=True).losses(make_batch())
    assert all(errors.requires_grad for errors in loss.of_policy)
    assert not any(errors.requires_grad for errors in loss.of_reference)
    assert [name for name, value in values.items() if value.requires_grad] == ["loss"]


def test_a_policy_that_starts_from_a_lora_has_that_lora_as_its_reference(build, tmp_path):
    started = build(moved=True)
    file = save_diffusers(weights_of(started.model), tmp_path / WEIGHTS_NAME)
    loss = RecordingLoss(2000.0)
    module, batch = build(loss, LoRA(rank=2, init_from=str(file))), make_batch()
    values = module.losses(batch)
    assert torch.equal(values["reward_margin"], torch.zeros(PAIRS))
    assert_close(values["loss"].detach(), torch.full((PAIRS,), math.log(2)))
    with torch.no_grad(), reference(started.model):
        base_errors = started.denoised(batch).errors
    assert (loss.of_reference.chosen - base_errors.chosen).abs().max() > 1e-3


def test_dropout_is_a_function_of_seed_and_micro_step(build):
    module, batch = build(SFTLoss(), LoRA(rank=2, dropout=0.5), moved=True), make_batch()
    module.train()

    def loss(batch_idx: int, rank: int = 0, world_size: int = 1) -> torch.Tensor:
        module._trainer = SimpleNamespace(global_rank=rank, world_size=world_size)  # type: ignore[assignment]
        module.on_train_batch_start([batch], batch_idx)
        return module.losses(batch)["loss"].detach()

    first = loss(5)
    torch.rand(3)
    assert torch.equal(loss(5), first)
    assert not torch.equal(loss(6), first)
    assert torch.equal(loss(2, rank=1, world_size=2), first)  # the same micro-batch, on the second of two devices
    module.seed = 1
    assert not torch.equal(loss(5), first)


# ---------------------------------------------------------------------------------------------------- between the steps


def test_a_training_step_returns_the_mean_and_remembers_every_pair_until_told_to_forget(build):
    module, batch = build(SFTLoss()), make_batch()
    means = torch.stack([module.training_step([part], i).detach() for i, part in enumerate((batch, row(batch, 1)))])
    seen = module.seen()
    assert seen["index"].tolist() == [0, 1, 2, 1]
    assert_close(torch.stack([seen["loss"][:PAIRS].mean(), seen["loss"][PAIRS]]), means)
    assert not seen["loss"].requires_grad
    module.forget_seen()
    module.training_step([row(batch, 2)], 2)
    assert module.seen()["index"].tolist() == [2]


def test_a_checkpoint_holds_the_adapters_and_no_base(build, tmp_path):
    file = save_diffusers(weights_of(build(moved=True).model), tmp_path / WEIGHTS_NAME)
    module = build(lora=LoRA(init_from=str(file)))
    move(module.model)
    module.identity = {"settings": {"seed": 3}}
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    assert checkpoint["state_dict"] == {}
    assert checkpoint["identity"] == {"settings": {"seed": 3}}
    assert set(checkpoint["adapters"]) == {"policy", "reference"}
    assert not torch.equal(*(next(iter(checkpoint["adapters"][name].values())) for name in ("policy", "reference")))


def test_adapters_survive_a_checkpoint_to_the_bit(build, tmp_path: Path):
    module, other, batch = build(moved=True), build(seed=1), make_batch()
    checkpoint: dict[str, Any] = {}
    module.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "last.ckpt")
    assert not torch.equal(other.losses(batch)["loss"], module.losses(batch)["loss"])
    other.on_load_checkpoint(torch.load(tmp_path / "last.ckpt", weights_only=True))
    for key, value in adapter_state(module.model).items():
        assert torch.equal(adapter_state(other.model)[key], value)
    assert torch.equal(other.losses(batch)["loss"], module.losses(batch)["loss"])


def test_a_checkpoint_of_another_rank_is_refused(build):
    checkpoint: dict[str, Any] = {}
    build(lora=LoRA(rank=3)).on_save_checkpoint(checkpoint)
    with pytest.raises(UserError, match="of another shape"):
        build().on_load_checkpoint(checkpoint)


def test_the_optimiser_holds_the_policy_alone(build):
    module = build()
    built = module.configure_optimizers()
    held = [parameter for group in built["optimizer"].param_groups for parameter in group["params"]]
    assert [id(p) for p in held] == [id(p) for p in policy_parameters(module.model)["unet"]]
    assert built["lr_scheduler"]["interval"] == "step"


# ------------------------------------------------------------------------------------- families, sizes and what is kept


@pytest.fixture
def sdxl(twin) -> StableDiffusion:
    return Base("sdxl", str(twin("sdxl"))).load()


def told(unet: Any) -> list[dict[str, torch.Tensor]]:
    """What the UNet is told beside the prompt, from now on."""
    calls: list[Any] = []
    unet.register_forward_pre_hook(lambda _, given, named: calls.append(named["added_cond_kwargs"]), with_kwargs=True)
    return calls


def test_sdxl_is_told_the_sizes_of_each_picture_of_a_pair_and_the_pooled_prompt_of_both(sdxl):
    LoRA(rank=2).attach(sdxl)
    module = DiffusionModule(sdxl, DiffusionDPOLoss(2000.0), AdamW(), max_steps=10)
    ids = torch.arange(2 * PAIRS * 6, dtype=torch.float32).view(2, PAIRS, 6)
    batch = make_batch()._replace(
        embeds=sdxl.encode_prompts(["one", "two", "three"]), chosen_time_ids=ids[0], rejected_time_ids=ids[1]
    )
    calls = told(sdxl.unet)
    module.losses(batch)
    assert len(calls) == 2  # policy and reference
    for call in calls:
        assert torch.equal(call["time_ids"], torch.cat([ids[0], ids[1]]))
        assert batch.embeds is not None and batch.embeds.pooled is not None
        assert torch.equal(call["text_embeds"], batch.embeds.pooled.repeat(2, 1))


def test_the_sizes_that_sdxl_is_told_matter_to_it(sdxl):
    LoRA(rank=2).attach(sdxl)
    module = DiffusionModule(sdxl, SFTLoss(), AdamW(), max_steps=10)
    batch = make_batch()._replace(embeds=sdxl.encode_prompts(["one", "two", "three"]))
    small, large = (
        module.losses(batch._replace(chosen_time_ids=torch.full((PAIRS, 6), size)))["loss"] for size in (64.0, 900.0)
    )
    assert not torch.allclose(small, large)


@pytest.mark.parametrize(("family", "width"), [("sd15", 768), ("sd21", 1024), ("sdxl", 2048)])
def test_a_family_at_its_real_shape_makes_a_step_that_gives_its_lora_gradients(family, width):
    """Full depth and width, on a device without memory."""
    model = on_meta(family)
    LoRA(rank=2).attach(model)
    module = DiffusionModule(model, DiffusionDPOLoss(2000.0, min_snr_gamma=5.0), AdamW(), max_steps=10)
    side, pooled = model.latent_size, (1, 1280) if family == "sdxl" else None
    with torch.device("meta"):
        latents, ids, one = torch.zeros(1, 4, side, side), torch.zeros(1, 6), torch.zeros(1)
        embeds = TextEmbeds(torch.zeros(1, 77, width), None if pooled is None else torch.zeros(pooled))
        timesteps = torch.zeros(1, dtype=torch.int64)
        batch = Batch(latents, latents, ids, ids, [""], embeds, latents, timesteps, one, one, [0], [0])
    values = module.losses(batch)
    assert {value.shape for value in values.values()} == {(1,)}
    values["loss"].sum().backward()
    for parameter in policy_parameters(model)["unet"]:
        assert parameter.grad is not None and parameter.grad.shape == parameter.shape


class Memory:
    """Pictures of two sizes, in memory."""

    def __init__(self, seed: int):
        self.seed = seed

    def read(self, row: int, flip: bool, where: tuple[float, float]) -> tuple[torch.Tensor, torch.Tensor]:
        shape = [(4, 8, 8), (4, 8, 12)][row % 2]
        return torch.randn(shape, generator=torch.Generator().manual_seed(100 * self.seed + row)), torch.zeros(6)


def make_samples(n: int = 8) -> PreparedSamples:
    return PreparedSamples(
        chosen=Memory(1),
        rejected=Memory(2),
        prompts=Prompts([f"prompt {i}" for i in range(n)], np.arange(n), None),
        label=np.linspace(0.6, 1, n, dtype=np.float32),
        weight=np.linspace(0.5, 1.5, n, dtype=np.float32),
        sample_ids=np.arange(n),
        sizes=np.arange(n) % 2,
    )


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_the_gradient_of_an_update_does_not_depend_on_the_micro_batch_though_sizes_differ(build, micro_batch):
    samples = make_samples()
    visits = Visits(samples, 0, 1000)

    def gradient(size: int) -> torch.Tensor:
        module = build(DiffusionDPOLoss(200.0), moved=True)
        batches = list(UpdateOrder(8, 0, range(1), 8, size, samples.sizes))
        assert {len(stack([visits[visit] for visit in batch])) for batch in batches} <= {1, 2}
        for number, batch in enumerate(batches):
            (module.training_step(stack([visits[visit] for visit in batch]), number) / len(batches)).backward()
        return torch.cat([p.grad.flatten() for p in policy_parameters(module.model)["unet"] if p.grad is not None])

    whole, parts = gradient(8), gradient(micro_batch)
    assert torch.linalg.norm(parts - whole) < 1e-4 * torch.linalg.norm(whole)


@pytest.mark.parametrize("loss", [DiffusionDPOLoss(200.0), SFTLoss()])
def test_pixels_and_texts_give_the_losses_of_their_latents_and_embeddings(build, base, loss):
    """What cache=off leaves to the step."""
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, (2, PAIRS, 3, 64, 64), generator=generator, dtype=torch.uint8)
    with torch.no_grad():
        chosen, rejected = (encode_bytes(base, each) for each in pixels)
    prompts = ["one", "", "three"]
    module, batch = build(loss, moved=True), make_batch()._replace(prompts=prompts)
    kept = module.losses(batch._replace(chosen=chosen, rejected=rejected, embeds=base.encode_prompts(prompts)))
    asked = module.losses(batch._replace(chosen=pixels[0], rejected=pixels[1], embeds=None))
    for name in kept.keys() - {"reward_accuracy"}:
        assert_close(asked[name], kept[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("keep", "text", "needed"),
    [
        ("all", False, []),
        ("latents", False, ["text"]),
        ("off", False, ["text", "vae"]),
        ("latents", True, ["text"]),
    ],
)
def test_a_step_has_beside_it_what_the_cache_does_not_keep(build, keep, text, needed):
    model = build().model
    if text:
        model = make_model()
        LoRA(rank=2, text_encoder=True).attach(model)
    networks = {"text": model.text_encoders[0], "vae": model.vae}
    assert needed_networks(model, keep) == tuple(networks[name] for name in needed)


def test_a_text_encoder_that_is_trained_is_asked_with_the_policy_and_with_the_reference():
    """The policy's text gets a gradient, and the reference's is that of the base."""
    model = trained(LoRA(rank=2, text_encoder=True))
    tokens = torch.tensor([[0, 5, 9, 3, 1]] * PAIRS)
    model.embed = lambda prompts: TextEmbeds(model.text_encoders[0](tokens).last_hidden_state, None)
    base = make_model()
    loss = RecordingLoss(200.0)
    module = DiffusionModule(model, loss, AdamW(), max_steps=10)
    batch = make_batch()._replace(embeds=None)
    module.losses(batch)["loss"].sum().backward()
    assert all(parameter.grad is not None for parameter in policy_parameters(model)["text_encoder"])
    LoRA(rank=2).attach(base)
    plain = DiffusionModule(base, loss, AdamW(), max_steps=10)
    kept = TextEmbeds(base.text_encoders[0](tokens).last_hidden_state, None)
    expected = plain.denoised(batch._replace(embeds=kept)).errors
    for mine, its in zip(loss.of_reference, expected, strict=True):
        assert_close(mine, its.detach())


def test_dropout_goes_on_and_off_in_all_networks():
    model = trained(LoRA(rank=2, dropout=0.5, text_encoder=True))
    module = DiffusionModule(model, SFTLoss(), AdamW(), max_steps=10)
    for training in (True, False):
        module.set_training(training)
        assert {network.training for network in model.networks.values()} == {training}


# ----------------------------------------------------------------------------------------------------- a kept reference


def test_a_kept_reference_is_asked_once_and_gives_the_same_values(build, tmp_path):
    module, batch = build(moved=True), make_batch()
    kept = ReferenceErrors(tmp_path, np.arange(PAIRS), 1)
    calls = listen(module.unet)
    live = module.losses(batch)
    assert len(calls) == 2
    for passes in (2, 1, 1):
        calls.clear()
        values = module.losses(batch, kept)
        assert len(calls) == passes
        assert all(torch.equal(values[name], live[name]) for name in live)
    assert (kept.hits, kept.asked) == (2 * PAIRS, 3 * PAIRS)


def test_where_some_errors_are_known_the_others_are_computed(build, tmp_path):
    """And the known ones are taken, so that a run that is continued sees the same numbers."""
    module, batch = build(RecordingLoss(50.0), moved=True), make_batch()
    kept = ReferenceErrors(tmp_path, np.arange(PAIRS), 1)
    kept.put([1], [0], PairErrors(torch.tensor([7.0]), torch.tensor([9.0])))
    module.losses(batch)
    live = module.loss.of_reference
    module.losses(batch, kept)
    mixed = module.loss.of_reference
    assert mixed.chosen[1] == 7 and mixed.rejected[1] == 9
    for mine, its in zip(mixed, live, strict=True):
        assert torch.equal(mine[[0, 2]], its[[0, 2]])
    assert kept.filled == 1


def test_validation_neither_reads_nor_fills_what_is_kept(build, tmp_path):
    module = build(moved=True)
    module.reference_cache = ReferenceErrors(tmp_path, np.arange(PAIRS), 1)
    module.losses(make_batch())
    assert module.reference_cache.asked == module.reference_cache.filled == 0
    module.training_step([make_batch()], 0)
    assert module.reference_cache.filled == 1


def test_what_is_kept_is_on_disk_with_every_checkpoint(build, tmp_path):
    module = build(moved=True)
    module.reference_cache = ReferenceErrors(tmp_path, np.arange(PAIRS), 1)
    module.training_step([make_batch()], 0)
    module.on_save_checkpoint({})
    assert ReferenceErrors(tmp_path, np.arange(PAIRS), 1).filled == 1


# ------------------------------------------------------------------------------------------------- the moving average


def test_inside_averaged_the_policy_is_the_moving_average_of_its_updates_and_outside_it_goes_on(build):
    """diffusers' decay is at most (1 + n) / (10 + n) at update n + 1, and 0 at the first: 0.5 counts from the ninth."""
    module = build()
    module.ema_decay = 0.5
    module.configure_optimizers()
    assert module.average is not None
    states = []
    for _ in range(3):
        move(module.model)
        module.average.step(module._trained)
        states.append(adapter_state(module.model))
    with module.averaged():
        averaged = adapter_state(module.model)
    expected = {name: states[0][name] for name in averaged}
    for n, state in enumerate(states[1:], start=1):
        decay = min(0.5, (1 + n) / (10 + n))
        expected = {name: decay * expected[name] + (1 - decay) * value for name, value in state.items()}
    for name, value in averaged.items():
        assert_close(value, expected[name])
        assert torch.equal(adapter_state(module.model)[name], states[-1][name])
    with pytest.raises(RuntimeError), module.averaged():
        raise RuntimeError
    assert torch.equal(adapter_state(module.model)[name], states[-1][name])


def test_a_checkpoint_brings_policy_and_average_back(build):
    module = build(moved=True)
    module.ema_decay = 0.9
    module.configure_optimizers()
    assert module.average is not None
    module.average.step(module._trained)
    move(module.model)
    module.average.step(module._trained)
    checkpoint: dict[str, Any] = {}
    module.on_save_checkpoint(checkpoint)
    again = build()
    again.ema_decay = 0.9
    again.on_load_checkpoint(checkpoint)
    again.configure_optimizers()
    for kept in (lambda module: adapter_state(module.model), its_average):
        before, after = kept(module), kept(again)
        assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert again.average is not None and again.average.optimization_step == 2


def test_an_optimiser_with_an_average_of_its_own_gives_it_and_goes_on_to_the_bit(build):
    def after(steps: int, looks: bool) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        module, batch = build(), make_batch()
        module.optimizer = ScheduleFree(lr=1e-3)
        optimizer = module.configure_optimizers()["optimizer"]
        module._trainer = SimpleNamespace(optimizers=[optimizer])  # type: ignore[assignment]
        for _ in range(steps):
            module.losses(batch)["loss"].mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if looks:
                its_average(module)
        return adapter_state(module.model), its_average(module)

    policy, average = after(3, looks=False)
    assert any(not torch.equal(value, average[name]) for name, value in policy.items())
    for mine, its in zip(after(3, looks=True), (policy, average), strict=True):
        assert all(torch.equal(value, its[name]) for name, value in mine.items())


def its_average(module: DiffusionModule) -> dict[str, torch.Tensor]:
    with module.averaged():
        return adapter_state(module.model)


# -------------------------------------------------------------------------------------------- float16 that overflows


def test_an_update_that_overflows_is_left_out_counted_and_no_step_of_the_schedule(build, tmp_path):
    """Gradients times 2^127 are infinite in float32 too; the scaler lowers that to 2^7."""
    module = build(moved=True)
    module.optimizer = AdamW(schedule="linear")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-120)  # type: ignore[attr-defined]
    before, rates = adapter_state(module.model), []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            same = all(torch.equal(value, before[name]) for name, value in adapter_state(module.model).items())
            rates.append((trainer.optimizers[0].param_groups[0]["lr"], module.skipped, same))

    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=3,
        plugins=[MixedPrecision("16-mixed", "cpu", scaler)],
        callbacks=[Watch()],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, torch.utils.data.DataLoader([[make_batch()]] * 3, batch_size=None))  # type: ignore[arg-type]
    assert rates[0] == (1e-4, 1, True)
    assert [skipped for _, skipped, _ in rates] == [1, 1, 1] and not rates[1][2]
    assert [rate for rate, _, _ in rates[1:]] == pytest.approx([9e-5, 8e-5])
    checkpoint: dict[str, Any] = {}
    module.on_save_checkpoint(checkpoint)
    again = build()
    again.on_load_checkpoint(checkpoint)
    assert again.skipped == 1
