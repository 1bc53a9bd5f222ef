"""The training step: policy and reference denoise the same noisy latents, and a loss weighs their errors."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import lightning as L
import torch
from diffusers.training_utils import EMAModel, compute_snr
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn

from dpo_sd.data.batches import Batch
from dpo_sd.errors import UserError
from dpo_sd.lora.adapters import (
    adapter_names,
    adapter_state,
    load_adapter_state,
    named_policy_parameters,
    policy_parameters,
    reference,
    trains_text,
    weights_of,
)
from dpo_sd.losses import (
    Loss,
    LossInputs,
    PairErrors,
    Residuals,
    huber_thresholds,
    min_snr_weights,
    pseudo_huber_error,
    residual,
    squared_error,
)
from dpo_sd.models.stable_diffusion import StableDiffusion, TextEmbeds, encode_bytes
from dpo_sd.training.optimizers import AdamW
from dpo_sd.training.reference_cache import ReferenceErrors

# names of values that a run logs by itself, or keeps beside them
OURS = ("loss", "reward_margin", "reward_accuracy", "chosen_drift", "rejected_drift", "lr", "index")


class Denoised(NamedTuple):
    """One pass of a network over a batch.

    Args:
        errors: each (n,), fp32, mean over pixels, min-SNR weighted if the loss says so.
        residuals: each (n, 4, h, w), fp32, where the loss needs them; None elsewhere.
    """

    errors: PairErrors
    residuals: Residuals | None


class DiffusionModule(L.LightningModule):
    """Trains the adapter `policy` with a loss, by Diffusion-DPO for example (Wallace et al. 2023, arXiv:2311.12908).

    Args:
        model: the base, with its adapters attached.
        loss: declares which images, reference and residuals it needs, and weighs the errors.
        optimizer: builds the optimiser and its schedule.
        max_steps: updates of the whole run, for the schedule.
        seed: seed of the adapters' dropout.
        encodes: networks that steps need beside the UNet because the cache does not have their results.
        reference_cache: keeps the reference's errors on the training samples; None computes them at every visit.
        ema_decay: keeps an exponential moving average of the policy, for `averaged`; in (0, 1), None keeps none.
    """

    def __init__(
        self,
        model: StableDiffusion,
        loss: Loss,
        optimizer: AdamW,
        max_steps: int,
        seed: int = 0,
        encodes: tuple[nn.Module, ...] = (),
        reference_cache: ReferenceErrors | None = None,
        ema_decay: float | None = None,
    ):
        super().__init__()
        self.model, self.loss, self.optimizer, self.max_steps, self.seed = model, loss, optimizer, max_steps, seed
        self.unet, self.reference_cache = model.unet, reference_cache
        self.encodes = nn.ModuleList(encodes)  # which Lightning takes to the device with the UNet
        self.strict_loading = False  # checkpoints leave the base out
        self.ema_decay = ema_decay
        self.average: EMAModel | None = None  # from the first update on
        self._average_state: dict[str, Any] | None = None  # of a checkpoint, until there are optimisers
        self.skipped = 0  # updates that were left out because a gradient overflowed
        self._just_skipped = False
        self.identity: dict[str, Any] = {}  # what the run is, kept in its checkpoints
        self._seen: list[dict[str, Tensor]] = []  # one entry per pass since the last update
        self._rows: list[int] = []  # of those passes' samples in the dataset

    # -------------------------------------------------------------------------------------------------------- the step

    def residuals(
        self,
        latents: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        embeds: TextEmbeds,
        time_ids: Tensor | None = None,
    ) -> Tensor:
        """Prediction of the UNet minus its target: (n, 4, h, w), fp32.

        Args:
            latents, noise: (n, 4, h, w); latents are scaled.
            timesteps: (n,), int64.
            embeds: embeddings of n prompts.
            time_ids: (n, 6), the sizes that SDXL is told; other families do not read them.
        """
        scheduler: Any = self.model.noise_scheduler
        noisy_latents = scheduler.add_noise(latents, noise, timesteps)
        prediction_type = self.model.prediction_type
        target = noise if prediction_type == "epsilon" else scheduler.get_velocity(latents, noise, timesteps)
        added = self.model.added(embeds.pooled, time_ids)
        model_pred = self.unet(noisy_latents, timesteps, embeds.hidden, added_cond_kwargs=added).sample
        return residual(model_pred, target)

    def errors(self, residuals: Tensor, timesteps: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mean square of each residual, or what the loss has in its place, min-SNR weighted if it says so: (n,).

        Args:
            residuals: (n, 4, h, w).
            timesteps: (n,), int64.
            mask: (n, 1, h, w), weights of the pixels; None weighs all alike.
        """
        loss = self.loss

        def snr() -> Tensor:
            return compute_snr(self.model.noise_scheduler, timesteps)

        if loss.huber_c is None:
            errors = squared_error(residuals, mask)
        else:
            c = loss.huber_c if loss.huber_schedule == "constant" else huber_thresholds(snr(), loss.huber_c)
            errors = pseudo_huber_error(residuals, c, mask)
        if loss.min_snr_gamma is None:
            return errors
        return errors * min_snr_weights(snr(), loss.min_snr_gamma, self.model.prediction_type)

    def denoised(self, batch: Batch) -> Denoised:
        """One pass of the UNet over all images of a batch, both images of a pair under one noise and one timestep.

        Args:
            batch: images as latents.
        """
        latents, noise, timesteps, embeds = batch.chosen, batch.noise, batch.timesteps, self.embeds(batch)
        time_ids, n = batch.chosen_time_ids, len(latents)
        if batch.rejected is not None and batch.rejected_time_ids is not None:
            latents, time_ids = torch.cat([latents, batch.rejected]), torch.cat([time_ids, batch.rejected_time_ids])
            noise, timesteps = noise.repeat(2, 1, 1, 1), timesteps.repeat(2)
            pooled = None if embeds.pooled is None else embeds.pooled.repeat(2, 1)
            embeds = TextEmbeds(embeds.hidden.repeat(2, 1, 1), pooled)
        residuals = self.residuals(latents, noise, timesteps, embeds, time_ids)
        errors = self.errors(residuals, timesteps, batch.mask)
        wanted = Residuals(residuals[:n], residuals[n:]) if self.loss.needs_residuals else None
        return Denoised(PairErrors(errors[:n], errors[n:]), wanted)

    def denoised_by_reference(self, batch: Batch, kept: ReferenceErrors | None) -> Denoised:
        """`denoised` with the frozen reference; errors that are kept from an earlier visit are taken from there."""
        if kept is None or self.loss.needs_residuals:
            with torch.no_grad(), reference(self.model):
                return self.denoised(batch)
        known, before = kept.get(batch.index, batch.draw)
        before = PairErrors(*(errors.to(batch.noise.device, non_blocking=True) for errors in before))
        if known.all():
            return Denoised(before, None)
        now = self.denoised_by_reference(batch, None).errors
        kept.put(batch.index, batch.draw, now)
        known = known.to(batch.noise.device, non_blocking=True)
        mixed = (torch.where(known[: len(old)], old, new) for old, new in zip(before, now, strict=True))
        return Denoised(PairErrors(*mixed), None)

    def embeds(self, batch: Batch) -> TextEmbeds:
        """Embeddings of the prompts: those of the cache, or the text encoders' with the adapters that are set."""
        return self.model.embed(batch.prompts) if batch.embeds is None else batch.embeds

    def latents(self, images: Tensor) -> Tensor:
        """Images as latents, (n, 4, h, w); pixels, (n, 3, h, w), uint8, are encoded."""
        if images.is_floating_point():
            return images
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            return encode_bytes(self.model, images).float()

    def encoded(self, batch: Batch) -> Batch:
        """The batch as latents, without the rejected images where the loss needs no pairs."""
        batch = batch._replace(chosen=self.latents(batch.chosen))
        if not self.loss.needs_pairs:
            return batch._replace(rejected=None, rejected_time_ids=None)
        assert batch.rejected is not None  # the composition asks for pairs where a loss needs them
        return batch._replace(rejected=self.latents(batch.rejected))

    def losses(self, batch: Batch, kept: ReferenceErrors | None = None) -> dict[str, Tensor]:
        """Loss and metrics of a batch by name, each (n,); only `loss` carries gradients.

        Args:
            kept: errors of the reference on these samples; None computes them.

        Raises:
            UserError: as `evaluated`.
        """
        batch, frozen, frozen_residuals = self.encoded(batch), None, None
        if self.loss.needs_reference:  # first: nothing of the policy's pass lies beside it
            frozen, frozen_residuals = self.denoised_by_reference(batch, kept)
        policy, residuals = self.denoised(batch)
        inputs = LossInputs(policy, frozen, batch.label, batch.timesteps, residuals, frozen_residuals)
        values = evaluated(self.loss, inputs)
        return {"loss": values.pop("loss"), **rewards(inputs), **values}

    def on_train_batch_start(self, batch: list[Batch], batch_idx: int) -> None:
        # dropout draws from the global generator: tying it to the micro-batch keeps a resumed run exact, and lets
        # every device draw what one device alone would draw for the same pairs
        trainer = self.trainer
        torch.manual_seed(self.seed * 1_000_003 + batch_idx * trainer.world_size + trainer.global_rank)

    def training_step(self, batch: list[Batch], batch_idx: int) -> Tensor:
        """Mean loss of a micro-batch, with one pass for each size of image in it."""
        total = torch.zeros((), device=self.device)
        for part in batch:
            values = self.losses(part, self.reference_cache)
            if self._seen and values.keys() != self._seen[0].keys():
                raise UserError(f"{type(self.loss).__name__} must return values of the same names for every batch")
            self._seen.append({name: value.detach() for name, value in values.items()})
            self._rows += part.index
            total = total + (values["loss"] * part.weight).sum()
        return total / sum(len(part.index) for part in batch)

    def seen(self) -> dict[str, Tensor]:
        """Loss and metrics of every sample since the last update on this device, by name, and its row: each (n,)."""
        values = {name: torch.cat([values[name] for values in self._seen]) for name in self._seen[0]}
        return values | {"index": torch.tensor(self._rows, device=self.device)}

    def forget_seen(self) -> None:
        self._seen.clear()
        self._rows.clear()

    def set_training(self, training: bool) -> None:
        """Switches the adapters' dropout on or off, in all networks that have adapters."""
        for network in self.model.networks.values():
            network.train(training)

    def configure_optimizers(self) -> Any:
        if self.ema_decay is not None:
            self.average = self._begun_average()
        optimizer, scheduler = self.optimizer.build(named_policy_parameters(self.model), self.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        # in 16-mixed a GradScaler leaves out an update whose gradients overflow float16, and lowers its scale
        plugin = self.trainer.precision_plugin
        scaler = plugin.scaler if isinstance(plugin, MixedPrecision) else None
        before = 0.0 if scaler is None else scaler.get_scale()
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self._just_skipped = scaler is not None and scaler.get_scale() < before
        self.skipped += self._just_skipped
        if self.average is not None and not self._just_skipped:
            self.average.step(self._trained)

    @property
    def _trained(self) -> list[nn.Parameter]:
        return list(itertools.chain(*policy_parameters(self.model).values()))

    def _begun_average(self) -> EMAModel:
        """The average of the checkpoint, or one that begins with the policy."""
        assert self.ema_decay is not None
        if self._average_state is None:
            return EMAModel(self._trained, self.ema_decay)
        now = adapter_state(self.model, "policy")
        load_adapter_state(self.model, "policy", self._average_state["weights"])
        average = EMAModel(self._trained, self.ema_decay)  # of copies
        load_adapter_state(self.model, "policy", now)
        average.optimization_step = self._average_state["step"]
        return average

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the policy is its average where one is kept: that is validated, drawn, judged and exported."""
        optimizer: Any = self.trainer.optimizers[0] if self.optimizer.averages and self.trainer.optimizers else None
        if self.average is None and optimizer is None:
            yield
            return
        now = [parameter.detach().clone() for parameter in self._trained]
        if self.average is not None:
            self.average.copy_to(self._trained)
        else:
            optimizer.eval()
        try:
            yield
        finally:
            if optimizer is not None:
                optimizer.train()
            with torch.no_grad():  # to the bit, which the optimiser's way back is not
                for parameter, value in zip(self._trained, now, strict=True):
                    parameter.copy_(value)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        if not self._just_skipped:  # the schedule is that of the updates that were made
            super().lr_scheduler_step(scheduler, metric)

    # ----------------------------------------------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {}
        checkpoint["identity"] = self.identity
        checkpoint["skipped"] = self.skipped
        if self.average is not None or self.optimizer.averages:
            with self.averaged():  # `lora.reading` takes it for the policy
                weights = adapter_state(self.model, "policy")
            step = 0 if self.average is None else self.average.optimization_step
            checkpoint["average"] = {"weights": weights, "step": step}
        if self.reference_cache is not None:
            self.reference_cache.save()
        checkpoint["adapters"] = {name: adapter_state(self.model, name) for name in adapter_names(self.model)}
        checkpoint["alphas"] = weights_of(self.model).alphas  # of the policy, for `lora.reading`

    def on_train_end(self) -> None:
        if self.reference_cache is not None:
            self.reference_cache.save()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.skipped = checkpoint.get("skipped", 0)  # which older checkpoints do not count
        self._average_state = checkpoint.get("average")
        for name, state in checkpoint["adapters"].items():
            load_adapter_state(self.model, name, state)


def rewards(inputs: LossInputs) -> dict[str, Tensor]:
    """Metrics of the policy against the reference, each (n,), without gradients; none where there is no reference."""
    policy, frozen = inputs.policy, inputs.reference
    if frozen is None:
        return {}
    chosen_drift = (policy.chosen - frozen.chosen).detach()
    if not len(policy.rejected):
        return {"chosen_drift": chosen_drift}
    margin = inputs.margin.detach()
    return {
        "reward_margin": margin,
        "reward_accuracy": torch.heaviside(margin, margin.new_full((), 0.5)),  # a tie counts half
        "chosen_drift": chosen_drift,
        "rejected_drift": (policy.rejected - frozen.rejected).detach(),
    }


def evaluated(loss: Loss, inputs: LossInputs) -> dict[str, Tensor]:
    """The loss of each sample as "loss", and the values that the loss names; each (n,), only "loss" with gradients.

    Raises:
        UserError: if one of them is not one number per sample, or bears a name of `OURS`.
    """
    who, n = type(loss).__name__, len(inputs.policy.chosen)
    returned = loss(inputs)
    value, named = returned if isinstance(returned, tuple) and len(returned) == 2 else (returned, {})
    if not isinstance(named, Mapping):
        raise UserError(f"{who} must return its named values as a dictionary, got {type(named).__name__}")
    for name in named:
        if str(name).partition("/")[0] in OURS:
            raise UserError(f"{who} returns a value named {name!r}, which every run logs by itself: rename it")
    values = {"loss": value, **named}
    for name, each in values.items():
        shape = tuple(each.shape) if isinstance(each, Tensor) else type(each).__name__
        if shape != (n,):
            raise UserError(f"{who} must return {name!r} as a tensor with one number per sample, ({n},), got {shape}")
    return {"loss": value} | {str(name): each.detach().float() for name, each in named.items()}


def needed_networks(model: StableDiffusion, keep: str) -> tuple[nn.Module, ...]:
    """Networks that training steps need beside the UNet.

    Args:
        keep: results that the cache has, as in `dpo_sd.data.cache.Cache`.
    """
    text = tuple(model.text_encoders) if keep != "all" or trains_text(model) else ()
    return (*text, model.vae) if keep == "off" else text
