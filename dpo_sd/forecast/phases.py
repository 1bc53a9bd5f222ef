"""Phases of a run: each does on the `meta` device what the run does on the card, and counts what that takes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dpo_sd.data.datamodule import grid_batch
from dpo_sd.forecast.counting import CONTEXT, Alive, Phase, kernels
from dpo_sd.forecast.workload import Workload, micro_step
from dpo_sd.lora.adapters import policy_parameters
from dpo_sd.models.stable_diffusion import PROMPTS, StableDiffusion, decoded_together, encoded_together
from dpo_sd.training.step import needed_networks


@dataclass(frozen=True)
class OnCard:
    """The model of a workload without weights, and the tensors that stay on the card while the run trains.

    Args:
        model: with its adapters, on `meta`.
        parts: the tensors by what they are, in the order in which the plan names them.
    """

    model: StableDiffusion
    parts: Mapping[str, list[Tensor]]

    @classmethod
    def of(cls, workload: Workload) -> OnCard:
        model = workload.build()
        unet, adapters = [], []
        for name, tensor in itertools.chain(model.unet.named_parameters(), model.unet.named_buffers()):
            (adapters if "lora_" in name else unet).append(tensor)
        encoders = list(_tensors(*needed_networks(model, workload.cache)))
        trained = list(itertools.chain(*policy_parameters(model).values()))
        gradients = [torch.empty_like(parameter) for parameter in trained]
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.grad = gradient
        sizes = (workload.optimizer.state_bytes(parameter.numel()) for parameter in trained)
        state = [torch.empty(size, dtype=torch.uint8, device="meta") for size in sizes]
        parts = {"UNet": unet, "encoders of the step": encoders, "adapters": adapters}
        return cls(model, parts | {"gradients": gradients, "optimiser": state})

    @property
    def tensors(self) -> list[Tensor]:
        return list(itertools.chain(*self.parts.values()))

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each part."""
        return {name: sum(tensor.untyped_storage().nbytes() for tensor in part) for name, part in self.parts.items()}


class Forecast:
    """Phases of a workload, each counted when it is first asked for.

    Args:
        workload: the settings.
        known: phases that other settings have in common with these, by the work of `WORKS` that they belong to.
        card: the model and its state, where a forecast with the same networks has built them.
    """

    def __init__(
        self, workload: Workload, known: Mapping[str, list[Phase]] | None = None, card: OnCard | None = None
    ) -> None:
        self.workload = workload
        self.known: dict[str, list[Phase]] = dict(known or {})
        self.built = card

    @property
    def card(self) -> OnCard:
        """The model and its state, built when they are first needed."""
        if self.built is None:
            self.built = OnCard.of(self.workload)
        return self.built

    def of(self, work: str) -> list[Phase]:
        """Phases of one work, a key of `WORKS`."""
        if work not in self.known:
            self.known[work] = list(WORKS[work](self.workload, self.card))
        return self.known[work]

    @property
    def works(self) -> list[str]:
        """Everything that the run does, by the keys of `WORKS`, in its order."""
        before = {"all": ["images", "prompts"], "latents": ["images"], "off": []}[self.workload.cache]
        step = ["images of a step"] if self.workload.cache == "off" else []
        drawing = ["captions", "denoising", "decoding"] if self.workload.draws else []
        return [*before, *step, "update", "validation", *drawing]

    @property
    def phases(self) -> list[Phase]:
        """All phases of the run, in its order."""
        return [phase for work in self.works for phase in self.of(work)]

    @property
    def worst(self) -> Phase:
        """The phase that needs the most memory."""
        return max(self.phases, key=lambda phase: phase.needs)

    @property
    def peak_of_update(self) -> int:
        """Bytes at the peak of an update, without the encoding of its images, as `measured` measures them."""
        return max(phase.peak for phase in self.of("update"))

    @property
    def overweight(self) -> bool:
        """Whether the card cannot even hold what stays on it."""
        limit = self.workload.limit
        return limit is not None and sum(self.card.sizes.values()) + CONTEXT > limit

    def fits(self, limit: int | None = None, of: str = "") -> bool:
        """Whether every phase fits the card, and those whose names begin with `of` the limit as well.

        Args:
            limit: bytes; None sets no limit beside the card's.
        """
        cheapest_first = list(WORKS)
        for work in sorted(self.works, key=lambda work: (work not in self.known, cheapest_first.index(work))):
            for phase in self.of(work):
                bounds = (self.workload.limit, limit if phase.name.startswith(of) else None)
                if any(bound is not None and phase.needs > bound for bound in bounds):
                    return False
        return True


# ----------------------------------------------------------------------------------------------------------- the works


def _encoding_images(workload: Workload, card: OnCard) -> Iterator[Phase]:
    images = _images(workload, encoded_together(workload.resolution**2))
    encode = partial(card.model.encode_pixels, images)
    yield _counted("encoding pictures", _tensors(card.model.vae), encode, workload)


def _encoding_prompts(workload: Workload, card: OnCard) -> Iterator[Phase]:
    embed = partial(card.model.embed, [""] * PROMPTS)
    yield _counted("encoding prompts", _tensors(*card.model.text_encoders), embed, workload)


def _encoding_in_step(workload: Workload, card: OnCard) -> Iterator[Phase]:
    encode = partial(card.model.encode_pixels, _images(workload, workload.hardware.micro_batch))
    yield _counted("update: pictures", card.tensors, encode, workload)


def _update(workload: Workload, card: OnCard) -> Iterator[Phase]:
    """The last micro-batch of an update: the gradients of earlier ones are there."""
    module, hardware = workload.module(card.model), workload.hardware
    module.set_training(True)
    with Alive(card.tensors) as alive, kernels(hardware.half, hardware.accelerator):
        loss = micro_step(module, workload.batch(card.model, hardware.micro_batch))
        forward = alive.phase("update: forward")
        torch.autograd.backward(loss)
        backward = alive.phase("update: backward")
        copies = [torch.empty_like(gradient) for gradient in card.parts["gradients"] for _ in range(2)]
        optimiser = alive.phase("update: optimiser")
        del loss, copies
    return iter((forward, backward, optimiser))


def _validation(workload: Workload, card: OnCard) -> Iterator[Phase]:
    module, size = workload.module(card.model), grid_batch(workload.hardware.micro_batch)
    batch = workload.batch(card.model, size)
    if workload.cache == "off":
        encode = partial(card.model.encode_pixels, _images(workload, size))
        yield _counted("validation: pictures", card.tensors, encode, workload)
    yield _counted("validation", card.tensors, partial(module.losses, batch), workload, workload.hardware.half)


def _captions_of_samples(workload: Workload, card: OnCard) -> Iterator[Phase]:
    model = card.model
    tensors = [*card.tensors, *_tensors(*model.text_encoders)]
    yield _counted("samples: prompts", tensors, partial(model.embed, [""] * PROMPTS), workload, model.text_dtype)


def _denoising(workload: Workload, card: OnCard) -> Iterator[Phase]:
    unet, sampler = card.model.unet, workload.sampler
    empty = partial(torch.empty, sampler.batch_size * (2 if sampler.guidance > 1 else 1), device="meta")
    hidden, timesteps = empty(*card.model.hidden_shape), empty(dtype=torch.int64)
    pooled = None if card.model.pooled_width is None else empty(card.model.pooled_width)
    added, latents = card.model.added(pooled, empty(6)), empty(4, *_drawn(workload, card.model))
    half = None if unet.dtype == torch.float32 else unet.dtype
    draw = partial(unet, latents, timesteps, hidden, added_cond_kwargs=added)
    stays = [*card.tensors, *_tensors(card.model.vae)]  # which stays on the card between two batches
    yield _counted("samples: denoising", stays, draw, workload, half)


def _decoding(workload: Workload, card: OnCard) -> Iterator[Phase]:
    height, width = _drawn(workload, card.model)
    area = height * width * card.model.factor**2
    latents = torch.empty(min(decoded_together(area), workload.sampler.batch_size), 4, height, width, device="meta")
    vae: Any = card.model.vae

    def decoding(*resting: str) -> Phase:
        stays = itertools.chain(*(part for name, part in card.parts.items() if name not in resting))
        return _counted("samples: decoding", [*stays, *_tensors(vae)], partial(vae.decode, latents), workload)

    beside = decoding()
    fits = workload.limit is None or beside.needs <= workload.limit
    yield beside if fits else decoding("UNet", "adapters", "gradients")  # on the CPU, to make room


WORKS: dict[str, Callable[[Workload, OnCard], Iterable[Phase]]] = {  # the cheapest to count first
    "captions": _captions_of_samples,
    "decoding": _decoding,
    "images": _encoding_images,
    "images of a step": _encoding_in_step,
    "prompts": _encoding_prompts,
    "denoising": _denoising,
    "update": _update,
    "validation": _validation,
}


def _counted(
    name: str, stays: Iterable[Tensor], work: Callable[[], Any], workload: Workload, half: torch.dtype | None = None
) -> Phase:
    with Alive(stays) as alive, torch.no_grad(), kernels(half, workload.hardware.accelerator):
        work()
        return alive.phase(name)


def _images(workload: Workload, n: int) -> Tensor:
    return torch.empty(n, 3, workload.resolution, workload.resolution, device="meta")


def _drawn(workload: Workload, model: StableDiffusion) -> tuple[int, int]:
    """Height and width of the latents of drawn images."""
    height, width = workload.sampler.height, workload.sampler.width
    return (height or model.resolution) // model.factor, (width or model.resolution) // model.factor


def _tensors(*networks: nn.Module) -> Iterator[Tensor]:
    return itertools.chain.from_iterable((*network.parameters(), *network.buffers()) for network in networks)
