"""Settings of a training that decide what it takes of a card, and the model and batches that follow from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from dpo_sd.data.batches import Batch
from dpo_sd.data.prompts import Line, read_lines
from dpo_sd.forecast.counting import OWNED
from dpo_sd.forecast.units import GIB
from dpo_sd.lora.attaching import LoRA
from dpo_sd.losses import Loss
from dpo_sd.models.families import AS_USUAL, FAMILIES, FamilyName, Reading
from dpo_sd.models.ready import ready
from dpo_sd.models.sampling import Sampler
from dpo_sd.models.skeletons import RandomWeights
from dpo_sd.models.stable_diffusion import StableDiffusion, TextEmbeds
from dpo_sd.training.hardware import Hardware
from dpo_sd.training.optimizers import AdamW
from dpo_sd.training.step import DiffusionModule, needed_networks


@dataclass(frozen=True)
class Workload:
    """Settings of a training that decide its memory and its operations; two that are alike take the same of a card.

    Args:
        family: family of the base, whose real shapes are taken.
        lora, loss, optimizer, hardware, sampler: as composed.
        resolution: side of the square that has the area of the training images, in pixels.
        cache: which encodings are kept, as in `dpo_sd.data.cache.Cache`.
        pairs: pairs behind one update on one device; the micro-batch divides them.
        draws: whether images are drawn while the run trains.
        flip: whether each image is encoded in both mirror images.
        ema: whether a moving average of the policy is kept.
        card: bytes of the card that is there; None takes what the hardware's would have.
        reading: how prompts are read.
    """

    family: FamilyName
    lora: LoRA
    loss: Loss
    optimizer: AdamW
    hardware: Hardware
    sampler: Sampler
    resolution: int
    cache: str = "all"
    pairs: int = 16
    draws: bool = True
    flip: bool = False
    ema: bool = False
    card: int | None = None
    reading: Reading = AS_USUAL

    @property
    def limit(self) -> int | None:
        """Bytes that the card has for the run; None where no card is named."""
        if self.card is not None:
            return self.card
        memory_gib = self.hardware.memory_gib
        return None if memory_gib is None else round(memory_gib * OWNED * GIB)

    @property
    def sample(self) -> str:
        """Word for one training sample: "pair", or "picture" where the loss needs no pairs."""
        return "pair" if self.loss.needs_pairs else "picture"

    @property
    def images_per_sample(self) -> int:
        return 2 if self.loss.needs_pairs else 1

    @property
    def kept_draws(self) -> int | None:
        """Draws of a sample whose reference errors are kept; None where the reference runs at every visit."""
        return self.loss.draws_per_pair if self.loss.reference == "cached" else None

    def build(self, device: torch.device | str = "meta", compile: bool = False) -> StableDiffusion:
        """The model with its adapters, as training has it; with random weights where the device is not `meta`."""
        hardware = self.hardware
        base = RandomWeights(self.family, self.reading)
        model = ready(base, device, hardware.weights, hardware.gradient_checkpointing, compile)
        self.lora.attach(model)
        if self.cache != "all" and self.hardware.half is not None:
            model.halve_text(self.hardware.half)
        return model

    def module(self, model: StableDiffusion) -> DiffusionModule:
        """The training step on that model."""
        return DiffusionModule(model, self.loss, self.optimizer, 1, encodes=needed_networks(model, self.cache))

    def batch(self, model: StableDiffusion, pairs: int, device: torch.device | str = "meta") -> Batch:
        """A batch of that many samples, encoded as far as the cache keeps encodings, zeros throughout."""
        side = self.resolution // model.factor

        def rows(*shape: int) -> Tensor:
            return torch.zeros(pairs, *shape, device=device)

        pooled = None if model.pooled_width is None else rows(model.pooled_width)
        embeds = TextEmbeds(rows(*model.hidden_shape), pooled)
        return Batch(
            chosen=rows(4, side, side),
            rejected=rows(4, side, side) if self.loss.needs_pairs else None,
            chosen_time_ids=rows(6),
            rejected_time_ids=rows(6) if self.loss.needs_pairs else None,
            prompts=[""] * pairs,
            embeds=embeds if self.cache == "all" else None,
            noise=rows(4, side, side),
            timesteps=rows().long(),
            label=rows() + 1,
            weight=rows() + 1,
            index=[0] * pairs,
            draw=[0] * pairs,
        )


def of_composition(cfg: DictConfig, resolution: int, **parts: Any) -> Workload:
    """The workload of a training that was composed.

    Args:
        cfg: composed from train.yaml.
        resolution: side of the square that has the area of the training images, in pixels.
        parts: the objects of the groups lora, loss, optimizer, hardware and sampler, by these names.
    """
    samples = cfg.callbacks.get("samples")
    if samples is not None and samples.get("prompts") is not None:
        parts["sampler"] = largest(parts["sampler"], read_lines(samples.prompts), FAMILIES[cfg.model.name].resolution)
    return Workload(
        family=cfg.model.name,
        **parts,
        resolution=resolution,
        cache=cfg.cache,
        pairs=cfg.pairs_per_update // (cfg.trainer.devices * cfg.trainer.num_nodes),
        draws=not cfg.callbacks.keys().isdisjoint(("samples", "verdict")),
        flip=cfg.framing.flip,
        ema=cfg.trainer.ema_decay is not None,
        reading=FAMILIES[cfg.model.name].reading(cfg.model.max_tokens, cfg.model.clip_skip),
    )


def largest(sampler: Sampler, lines: Sequence[Line], side: int) -> Sampler:
    """The sampler of the prompt whose image takes the most memory.

    Args:
        side: of images whose size nobody sets, in pixels.

    Raises:
        UserError: if a prompt cannot be drawn with its settings.
    """

    def takes(own: Sampler) -> tuple[int, bool]:
        return (own.width or side) * (own.height or side), own.guidance > 1

    return max((line.drawn_by(sampler) for line in lines), key=takes, default=sampler)


def micro_step(module: DiffusionModule, batch: Batch) -> Tensor:
    """Mean loss of one micro-batch, with its graph."""
    return module.losses(batch)["loss"].mean()
