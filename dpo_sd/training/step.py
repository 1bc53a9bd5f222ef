"""The training step: the same noise and timestep through policy and reference, and a loss on their errors."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from diffusers.training_utils import compute_snr
from torch import Tensor, nn

from dpo_sd.data.batches import Batch
from dpo_sd.lora.adapters import (
    adapter_names,
    adapter_state,
    load_adapter_state,
    policy_parameters,
    reference,
    trains_text,
)
from dpo_sd.losses import DiffusionDPOLoss, PairErrors, SFTLoss, min_snr_weights, reward_margin, squared_error
from dpo_sd.models.stable_diffusion import StableDiffusion, TextEmbeds, encode_bytes
from dpo_sd.training.optimizers import AdamW
from dpo_sd.training.reference_cache import ReferenceErrors


class DiffusionModule(L.LightningModule):
    """Trains the adapter `policy` by fine-tuning or by Diffusion-DPO (Wallace et al. 2023, arXiv:2311.12908).

    Args:
        model: the base, with its adapters attached.
        loss: `SFTLoss` trains on the chosen pictures only; `DiffusionDPOLoss` on both and on the reference's errors.
        optimizer: builds the optimiser and its schedule.
        max_steps: updates of the whole run, for the schedule.
        seed: of whatever the adapters' dropout draws.
        encodes: networks that steps need beside the UNet because the cache does not have their results.
        reference_cache: keeps the reference's errors of the training samples; None computes them at every visit.
    """

    def __init__(
        self,
        model: StableDiffusion,
        loss: SFTLoss | DiffusionDPOLoss,
        optimizer: AdamW,
        max_steps: int,
        seed: int = 0,
        encodes: tuple[nn.Module, ...] = (),
        reference_cache: ReferenceErrors | None = None,
    ):
        super().__init__()
        self.model, self.loss, self.optimizer, self.max_steps, self.seed = model, loss, optimizer, max_steps, seed
        self.unet, self.reference_cache = model.unet, reference_cache
        self.encodes = nn.ModuleList(encodes)  # which Lightning takes to the device with the UNet
        self.strict_loading = False  # checkpoints leave the base out
        self.identity: dict[str, Any] = {}  # what the run is, kept in its checkpoints
        self._seen: list[dict[str, Tensor]] = []  # one entry per pass since the last update
        self._rows: list[int] = []  # of their samples

    # -------------------------------------------------------------------------------------------------------- the step

    def errors(
        self,
        latents: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        embeds: TextEmbeds,
        time_ids: Tensor | None = None,
    ) -> Tensor:
        """Squared error of the UNet's prediction, mean over pixels: (n,), fp32, min-SNR weighted if the loss says so.

        Args:
            latents, noise: (n, 4, h, w); latents are scaled.
            timesteps: (n,), int64.
            embeds: of the prompts, n of them.
            time_ids: (n, 6), what SDXL is told of sizes; other families do not read it.
        """
        scheduler: Any = self.model.noise_scheduler
        noisy_latents = scheduler.add_noise(latents, noise, timesteps)
        prediction_type = self.model.prediction_type
        target = noise if prediction_type == "epsilon" else scheduler.get_velocity(latents, noise, timesteps)
        added = self.model.added(embeds.pooled, time_ids)
        model_pred = self.unet(noisy_latents, timesteps, embeds.hidden, added_cond_kwargs=added).sample
        errors = squared_error(model_pred, target)
        if self.loss.min_snr_gamma is None:
            return errors
        return errors * min_snr_weights(compute_snr(scheduler, timesteps), self.loss.min_snr_gamma, prediction_type)

    def pair_errors(self, batch: Batch) -> PairErrors:
        """Errors on the chosen and the rejected picture under one noise and one timestep, in one pass of the UNet."""
        assert batch.rejected is not None and batch.rejected_time_ids is not None
        embeds = self.embeds(batch)
        errors = self.errors(
            torch.cat([batch.chosen, batch.rejected]),
            batch.noise.repeat(2, 1, 1, 1),
            batch.timesteps.repeat(2),
            TextEmbeds(embeds.hidden.repeat(2, 1, 1), None if embeds.pooled is None else embeds.pooled.repeat(2, 1)),
            torch.cat([batch.chosen_time_ids, batch.rejected_time_ids]),
        )
        return PairErrors(*errors.chunk(2))

    def reference_errors(self, batch: Batch, kept: ReferenceErrors | None) -> PairErrors:
        """`pair_errors` of the frozen reference, or what is kept of them from an earlier visit."""
        if kept is None:
            with torch.no_grad(), reference(self.model):
                return self.pair_errors(batch)
        known, before = kept.get(batch.index, batch.draw)
        before = PairErrors(*(errors.to(batch.noise.device, non_blocking=True) for errors in before))
        if known.all():
            return before
        now = self.reference_errors(batch, None)
        kept.put(batch.index, batch.draw, now)
        known = known.to(batch.noise.device, non_blocking=True)
        return PairErrors(*(torch.where(known, old, new) for old, new in zip(before, now, strict=True)))

    def embeds(self, batch: Batch) -> TextEmbeds:
        """What the text encoders make of the prompts: kept, or asked with the adapters that are set."""
        return self.model.embed(batch.prompts) if batch.embeds is None else batch.embeds

    def latents(self, pictures: Tensor) -> Tensor:
        """The pictures as latents; pixels are encoded."""
        if pictures.is_floating_point():
            return pictures
        with torch.no_grad(), torch.autocast(pictures.device.type, enabled=False):
            return encode_bytes(self.model, pictures).float()

    def losses(self, batch: Batch, kept: ReferenceErrors | None = None) -> dict[str, Tensor]:
        """Loss and what is watched beside it, each (pairs,); only `loss` carries gradients.

        Args:
            kept: errors of the reference on these samples; None computes them.
        """
        loss: Any = self.loss
        batch = batch._replace(chosen=self.latents(batch.chosen))
        if not loss.needs_pairs:
            errors = self.errors(batch.chosen, batch.noise, batch.timesteps, self.embeds(batch), batch.chosen_time_ids)
            return {"loss": loss(errors)}
        assert batch.rejected is not None  # the composition asks for pairs where a loss needs them
        batch = batch._replace(rejected=self.latents(batch.rejected))
        ref = self.reference_errors(batch, kept)  # first: nothing of the policy's pass lies beside it
        policy = self.pair_errors(batch)
        margin = reward_margin(policy, ref).detach()
        return {
            "loss": loss(policy, ref, batch.label),
            "reward_margin": margin,
            "reward_accuracy": torch.heaviside(margin, margin.new_full((), 0.5)),  # a tie counts half
            "chosen_drift": (policy.chosen - ref.chosen).detach(),
            "rejected_drift": (policy.rejected - ref.rejected).detach(),
        }

    def on_train_batch_start(self, batch: list[Batch], batch_idx: int) -> None:
        # dropout draws from the global generator: tying it to the micro-step keeps a resumed run exact
        torch.manual_seed(self.seed * 1_000_003 + batch_idx)

    def training_step(self, batch: list[Batch], batch_idx: int) -> Tensor:
        """Mean loss of a micro-batch, one pass for each size of picture in it."""
        total = torch.zeros((), device=self.device)
        for part in batch:
            values = self.losses(part, self.reference_cache)
            self._seen.append({name: value.detach() for name, value in values.items()})
            self._rows += part.index
            total = total + (values["loss"] * part.weight).sum()
        return total / sum(len(part.index) for part in batch)

    def seen(self) -> dict[str, Tensor]:
        """Values of every pair since the last update on this device, by name: (pairs,)."""
        values = {name: torch.cat([values[name] for values in self._seen]) for name in self._seen[0]}
        return values | {"index": torch.tensor(self._rows, device=self.device)}

    def forget_seen(self) -> None:
        self._seen.clear()
        self._rows.clear()

    def set_training(self, training: bool) -> None:
        """Adapters' dropout on or off, in all networks that they are on."""
        for network in self.model.networks.values():
            network.train(training)

    def configure_optimizers(self) -> Any:
        optimizer, scheduler = self.optimizer.build(policy_parameters(self.model), self.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # ----------------------------------------------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {}
        checkpoint["identity"] = self.identity
        if self.reference_cache is not None:
            self.reference_cache.save()
        checkpoint["adapters"] = {name: adapter_state(self.model, name) for name in adapter_names(self.model)}

    def on_train_end(self) -> None:
        if self.reference_cache is not None:
            self.reference_cache.save()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for name, state in checkpoint["adapters"].items():
            load_adapter_state(self.model, name, state)


def needed_networks(model: StableDiffusion, keep: str) -> tuple[nn.Module, ...]:
    """Networks that training steps need beside the UNet.

    Args:
        keep: what the cache has, as in `dpo_sd.data.cache.Cache`.
    """
    text = tuple(model.text_encoders) if keep != "all" or trains_text(model) else ()
    return (*text, model.vae) if keep == "off" else text
