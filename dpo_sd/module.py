"""The training step: the same noise and timestep through policy and reference, and a loss on their errors."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import lightning as L
import torch
from diffusers.training_utils import compute_snr

from dpo_sd.data.batches import PairBatch
from dpo_sd.lora import adapter_state, load_adapter_state, policy_parameters, reference
from dpo_sd.losses import DiffusionDPOLoss, PairErrors, SFTLoss, min_snr_weights, reward_margin, squared_error
from dpo_sd.models import StableDiffusion
from dpo_sd.optimization import AdamW


class DiffusionModule(L.LightningModule):
    """Trains the adapter `policy` by fine-tuning or by Diffusion-DPO (Wallace et al. 2023, arXiv:2311.12908).

    Args:
        model: the base, with its adapters attached.
        loss: `SFTLoss` trains on the chosen pictures only; `DiffusionDPOLoss` on both and on the reference's errors.
        optimizer: builds the optimiser and its schedule.
        max_steps: updates of the whole run, for the schedule.
        seed: of whatever the adapters' dropout draws.
    """

    def __init__(
        self,
        model: StableDiffusion,
        loss: SFTLoss | DiffusionDPOLoss,
        optimizer: AdamW,
        max_steps: int,
        seed: int = 0,
    ):
        super().__init__()
        self.model, self.loss, self.optimizer, self.max_steps, self.seed = model, loss, optimizer, max_steps, seed
        self.unet = model.unet
        self.strict_loading = False  # checkpoints leave the base out
        self.identity: dict[str, Any] = {}  # what the run is, kept in its checkpoints
        self._seen: list[dict[str, torch.Tensor]] = []  # one entry per micro-step since the last update

    # -------------------------------------------------------------------------------------------------------- the step

    def errors(
        self,
        latents: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
    ) -> torch.Tensor:
        """Squared error of the UNet's prediction, mean over pixels: (n,), fp32, min-SNR weighted if the loss says so.

        Args:
            latents, noise: (n, 4, h, w); latents are scaled.
            timesteps: (n,), int64.
            encoder_hidden_states: (n, tokens, width).
        """
        scheduler: Any = self.model.noise_scheduler
        noisy_latents = scheduler.add_noise(latents, noise, timesteps)
        prediction_type = scheduler.config.prediction_type
        target = noise if prediction_type == "epsilon" else scheduler.get_velocity(latents, noise, timesteps)
        model_pred = self.unet(noisy_latents, timesteps, encoder_hidden_states).sample
        errors = squared_error(model_pred, target)
        if self.loss.min_snr_gamma is None:
            return errors
        return errors * min_snr_weights(compute_snr(scheduler, timesteps), self.loss.min_snr_gamma, prediction_type)

    def pair_errors(self, batch: PairBatch) -> PairErrors:
        """Errors on the chosen and the rejected picture under one noise and one timestep, in one pass of the UNet."""
        assert batch.rejected is not None  # the composition asks for pairs where a loss needs them
        errors = self.errors(
            torch.cat([batch.chosen, batch.rejected]),
            batch.noise.repeat(2, 1, 1, 1),
            batch.timesteps.repeat(2),
            batch.prompt_embeds.repeat(2, 1, 1),
        )
        return PairErrors(*errors.chunk(2))

    def losses(self, batch: PairBatch) -> dict[str, torch.Tensor]:
        """Loss and what is watched beside it, each (pairs,); only `loss` carries gradients."""
        loss: Any = self.loss
        if not loss.needs_pairs:
            errors = self.errors(batch.chosen, batch.noise, batch.timesteps, batch.prompt_embeds)
            return {"loss": loss(errors)}
        policy = self.pair_errors(batch)
        with torch.no_grad(), reference(self.unet):
            ref = self.pair_errors(batch)
        margin = reward_margin(policy, ref).detach()
        return {
            "loss": loss(policy, ref, batch.label),
            "reward_margin": margin,
            "reward_accuracy": torch.heaviside(margin, torch.tensor(0.5, device=margin.device)),  # a tie counts half
            "chosen_drift": (policy.chosen - ref.chosen).detach(),
            "rejected_drift": (policy.rejected - ref.rejected).detach(),
        }

    def on_train_batch_start(self, batch: PairBatch, batch_idx: int) -> None:
        # dropout draws from the global generator: tying it to the micro-step keeps a resumed run exact
        torch.manual_seed(self.seed * 1_000_003 + batch_idx)

    def training_step(self, batch: PairBatch, batch_idx: int) -> torch.Tensor:
        values = self.losses(batch)
        self._seen.append({name: value.detach() for name, value in values.items()} | {"index": batch.index})
        return (values["loss"] * batch.weight).mean()

    def seen(self) -> dict[str, torch.Tensor]:
        """Values of every pair since the last update on this device, by name: (pairs,)."""
        return {name: torch.cat([values[name] for values in self._seen]) for name in self._seen[0]}

    def forget_seen(self) -> None:
        self._seen.clear()

    def configure_optimizers(self) -> Any:
        optimizer, scheduler = self.optimizer.build(policy_parameters(self.unet), self.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # ----------------------------------------------------------------------------------------------------- checkpoints

    def adapters(self) -> list[str]:
        return list(self.unet.peft_config)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {}
        checkpoint["identity"] = self.identity
        checkpoint["adapters"] = {name: adapter_state(self.unet, name) for name in self.adapters()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for name, state in checkpoint["adapters"].items():
            load_adapter_state(self.unet, name, state)


def quiet_lightning() -> None:
    """Keeps from the user what Lightning says about choices that are made for him here."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (
        ".*isinstance.treespec.*",
        ".*does not have many workers.*",
        ".*srun.*",
        ".*dataloader is not resumable.*",
    ):
        warnings.filterwarnings("ignore", message=message)
