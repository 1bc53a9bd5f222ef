"""Phases of a run: each does what the run does on the card, on `meta` to be counted, or on a device to be measured."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

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
    """The model of a workload, and the tensors that stay on the card while the run trains.

    Args:
        model: with its adapters and their gradients, on `meta`, or on the CPU with random weights.
        parts: the tensors by what they are, in the order in which the plan names them.
        networks: those that an update needs.
        device: where inputs are made: `meta`, or the device that is measured.
    """

    model: StableDiffusion
    parts: Mapping[str, list[Tensor]]
    networks: Sequence[nn.Module]
    device: torch.device

    @classmethod
    def of(cls, workload: Workload, device: torch.device | str = "meta") -> OnCard:
        model = workload.build(device)
        unet, adapters = [], []
        for name, tensor in itertools.chain(model.unet.named_parameters(), model.unet.named_buffers()):
            (adapters if "lora_" in name else unet).append(tensor)
        encoders = needed_networks(model, workload.cache)
        trained = list(itertools.chain(*policy_parameters(model).values()))
        gradients = [torch.zeros_like(parameter) for parameter in trained]
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.grad = gradient
        sizes = (workload.optimizer.state_bytes(parameter.shape) for parameter in trained)
        if workload.ema:
            sizes = itertools.chain(sizes, (parameter.nbytes for parameter in trained))
        state = [torch.empty(size, dtype=torch.uint8, device=model.unet.device) for size in sizes]
        parts = {"UNet": unet, "encoders of the step": list(_tensors(*encoders)), "adapters": adapters}
        parts |= {"gradients": gradients, "optimiser": state}
        return cls(model, parts, (model.unet, *encoders), torch.device(device))

    @property
    def state(self) -> list[Tensor]:
        """Tensors of the optimiser."""
        return self.parts["optimiser"]

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
            if work == "update":
                self.known[work] = _counted_update(self.workload, self.card)
            else:
                accelerator = self.workload.hardware.accelerator
                self.known[work] = [job.counted(accelerator) for job in self.jobs(work, self.card)]
        return self.known[work]

    def jobs(self, work: str, card: OnCard) -> list[Job]:
        """What that work does, on `meta` or on the device of a card that is measured."""
        if work == "decoding":
            return _decoding(self.workload, card, self.decodes_beside)
        return WORKS[work](self.workload, card)

    @cached_property
    def decodes_beside(self) -> bool:
        """Whether images are decoded with the UNet on the card, which otherwise makes room."""
        limit = self.workload.limit
        if limit is None:
            return True
        (beside,) = _decoding(self.workload, self.card)
        return beside.counted(self.workload.hardware.accelerator).needs <= limit

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


class Job(NamedTuple):
    """One piece of work of a run.

    Args:
        name: of its phase.
        networks: on the card while it lasts, with their gradients.
        stays: other tensors on the card meanwhile.
        work: the work itself.
        half: precision of autocast; None computes in the precision of the inputs.
    """

    name: str
    networks: Sequence[nn.Module]
    stays: Sequence[Tensor]
    work: Callable[[], Any]
    half: torch.dtype | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """Everything that is on the card while it lasts, but for what it makes."""
        return [*_tensors(*self.networks), *self.stays]

    def counted(self, accelerator: str) -> Phase:
        """Its phase on a card of that kind; for networks on `meta`."""
        with Alive(self.tensors) as alive, torch.no_grad(), kernels(self.half, accelerator):
            self.work()
            return alive.phase(self.name)


def _encoding_images(workload: Workload, card: OnCard) -> list[Job]:
    images = _images(workload, card, encoded_together(workload.resolution**2))
    return [Job("encoding pictures", [card.model.vae], [], partial(card.model.encode_pixels, images))]


def _encoding_prompts(workload: Workload, card: OnCard) -> list[Job]:
    return [Job("encoding prompts", card.model.text_encoders, [], partial(card.model.embed, [""] * PROMPTS))]


def _encoding_in_step(workload: Workload, card: OnCard) -> list[Job]:
    encode = partial(card.model.encode_pixels, _images(workload, card, workload.hardware.micro_batch))
    return [Job("update: pictures", card.networks, card.state, encode)]


def update(workload: Workload, card: OnCard) -> Job:
    """The last micro-batch of an update: the gradients of earlier ones are there."""
    module, batch = workload.module(card.model), workload.batch(card.model, workload.hardware.micro_batch, card.device)
    module.set_training(True)

    def step() -> None:
        with torch.enable_grad():
            torch.autograd.backward(micro_step(module, batch))

    return Job("update", card.networks, card.state, step, workload.hardware.half)


def _counted_update(workload: Workload, card: OnCard) -> list[Phase]:
    """`update` in its parts, and the optimiser's step."""
    module, hardware = workload.module(card.model), workload.hardware
    module.set_training(True)
    job = update(workload, card)
    with Alive(job.tensors) as alive, kernels(hardware.half, hardware.accelerator):
        loss = micro_step(module, workload.batch(card.model, hardware.micro_batch))
        forward = alive.phase("update: forward")
        torch.autograd.backward(loss)
        backward = alive.phase("update: backward")
        copies = [torch.empty_like(gradient) for gradient in card.parts["gradients"] for _ in range(2)]
        optimiser = alive.phase("update: optimiser")
        del loss, copies
    return [forward, backward, optimiser]


def _validation(workload: Workload, card: OnCard) -> list[Job]:
    module, size = workload.module(card.model), grid_batch(workload.hardware.micro_batch)
    losses = partial(module.losses, workload.batch(card.model, size, card.device))
    jobs = [Job("validation", card.networks, card.state, losses, workload.hardware.half)]
    if workload.cache == "off":
        encode = partial(card.model.encode_pixels, _images(workload, card, size))
        jobs.insert(0, Job("validation: pictures", card.networks, card.state, encode))
    return jobs


def _captions_of_samples(workload: Workload, card: OnCard) -> list[Job]:
    networks = [*card.networks, *card.model.text_encoders]
    embed = partial(card.model.embed, [""] * PROMPTS)
    return [Job("samples: prompts", networks, card.state, embed, card.model.text_dtype)]


def _denoising(workload: Workload, card: OnCard) -> list[Job]:
    unet, sampler = card.model.unet, workload.sampler
    zeros = partial(torch.zeros, sampler.batch_size * (2 if sampler.guidance > 1 else 1), device=card.device)
    hidden, timesteps = zeros(*card.model.hidden_shape), zeros(dtype=torch.int64)
    pooled = None if card.model.pooled_width is None else zeros(card.model.pooled_width)
    added, latents = card.model.added(pooled, zeros(6)), zeros(4, *_drawn(workload, card.model))
    half = None if unet.dtype == torch.float32 else unet.dtype
    draw = partial(unet, latents, timesteps, hidden, added_cond_kwargs=added)
    # the VAE stays on the card between two batches
    return [Job("samples: denoising", [*card.networks, card.model.vae], card.state, draw, half)]


def _decoding(workload: Workload, card: OnCard, beside: bool = True) -> list[Job]:
    # beside: whether the UNet stays on the card, with its gradients
    height, width = _drawn(workload, card.model)
    n = min(decoded_together(height * width * card.model.factor**2), workload.sampler.batch_size)
    vae: Any = card.model.vae
    decode = partial(vae.decode, torch.zeros(n, 4, height, width, device=card.device))
    networks = [network for network in card.networks if beside or network is not card.model.unet]
    return [Job("samples: decoding", [*networks, vae], card.state, decode)]


WORKS: dict[str, Callable[[Workload, OnCard], list[Job]]] = {  # the cheapest to count first
    "captions": _captions_of_samples,
    "decoding": _decoding,
    "images": _encoding_images,
    "images of a step": _encoding_in_step,
    "prompts": _encoding_prompts,
    "denoising": _denoising,
    "update": lambda workload, card: [update(workload, card)],
    "validation": _validation,
}


def _images(workload: Workload, card: OnCard, n: int) -> Tensor:
    return torch.zeros(n, 3, workload.resolution, workload.resolution, device=card.device)


def _drawn(workload: Workload, model: StableDiffusion) -> tuple[int, int]:
    """Height and width of the latents of drawn images."""
    height, width = workload.sampler.height, workload.sampler.width
    return (height or model.resolution) // model.factor, (width or model.resolution) // model.factor


def _tensors(*networks: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers and gradients."""
    for network in networks:
        yield from network.buffers()
        for parameter in network.parameters():
            yield parameter
            if parameter.grad is not None:
                yield parameter.grad
