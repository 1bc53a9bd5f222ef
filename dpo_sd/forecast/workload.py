"""What a training takes of a card: an update on the `meta` device, whose tensors have shapes and no bytes."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dpo_sd.data.batches import Batch
from dpo_sd.data.datamodule import grid_batch
from dpo_sd.forecast.counting import CONTEXT, GIB, OWNED, Alive, Operations, kernels
from dpo_sd.lora.adapters import policy_parameters
from dpo_sd.lora.attaching import LoRA
from dpo_sd.losses import Loss
from dpo_sd.models import quantization
from dpo_sd.models.families import Family
from dpo_sd.models.sampling import Sampler
from dpo_sd.models.skeletons import skeleton
from dpo_sd.models.stable_diffusion import (
    DECODED_PIXELS,
    PROMPTS,
    Fingerprints,
    StableDiffusion,
    TextEmbeds,
    encoded_together,
)
from dpo_sd.training.hardware import Hardware
from dpo_sd.training.optimizers import AdamW
from dpo_sd.training.step import DiffusionModule, needed_networks

if TYPE_CHECKING:
    from dpo_sd.forecast.counting import Phase

POOLED = 1280  # width of what SDXL is told of a prompt as a whole
TUNED = {  # settings that may make it fit, with their keys on the command line
    "micro_batch": "hardware.micro_batch",
    "gradient_checkpointing": "hardware.gradient_checkpointing",
    "precision": "hardware.precision",
    "weights": "hardware.weights",
    "batch_size": "sampler.batch_size",
    "cache": "cache",
    "text_encoder": "lora.text_encoder",
    "resolution": "framing.resolution",
}
CHANGES = {  # the phases that a setting changes: all where it is not named
    "micro_batch": {"step pictures", "update", "validation"},
    "gradient_checkpointing": {"update"},
    "batch_size": {"denoising", "decoding"},
    "resolution": {"pictures", "step pictures", "update", "validation"},
}


@dataclass(frozen=True)
class Workload:
    """What decides how much memory a training takes.

    Args:
        family: of the base, whose real shapes are taken.
        resolution: side of the square that has the area of the training pictures, in pixels.
        cache: what is kept, as in `dpo_sd.data.cache.Cache`.
        pairs: behind one update on one device; the micro-batches divide it.
        draws: whether pictures are drawn on the way.
    """

    family: Family
    lora: LoRA
    loss: Loss
    optimizer: AdamW
    hardware: Hardware
    sampler: Sampler
    resolution: int
    cache: str = "all"
    pairs: int = 16
    draws: bool = True
    origin: Workload | None = None  # whose settings `using` has changed
    known: dict[str, list[Phase]] = field(default_factory=dict)  # phases by what was tried

    def using(self, **settings: Any) -> Workload:
        """The same with other values for what `TUNED` names."""
        new = {name: value for name, value in settings.items() if value != getattr(self._home(name), name)}
        parts: dict[str, Any] = {part: copy.copy(getattr(self, part)) for part in ("hardware", "sampler", "lora")}
        own = {name: value for name, value in new.items() if self._home(name) is self}
        for name in new.keys() - own:
            setattr(parts[TUNED[name].partition(".")[0]], name, new[name])
        changed = set().union(*(CHANGES.get(name, self.known) for name in new))
        known = {name: phases for name, phases in self.known.items() if name not in changed}
        other = replace(self, **parts, **own, origin=self.origin or self, known=known)
        if new.keys() <= {"micro_batch", "batch_size", "resolution"}:  # the same networks
            other.__dict__.update({name: self.__dict__[name] for name in ("model", "state") if name in self.__dict__})
        return other

    def _home(self, name: str) -> Any:
        """What has the setting as an attribute."""
        return getattr(self, TUNED[name].rpartition(".")[0], self)

    @property
    def settings(self) -> dict[str, Any]:
        """What `using` can change, by the keys of the command line, the cheapest first."""
        return {key: getattr(self._home(name), name) for name, key in TUNED.items()}

    @property
    def overrides(self) -> str:
        """What `using` has changed, as it is written on a command line."""
        before = self.settings if self.origin is None else self.origin.settings
        changed = {key: value for key, value in self.settings.items() if value != before[key]}
        if "lora.text_encoder" in changed and self.optimizer.text_encoder_lr is not None:
            changed["optimizer.text_encoder_lr"] = "null"
        return " ".join(f"{key}={str(value).lower()}" for key, value in changed.items())

    @property
    def limit(self) -> int | None:
        """Bytes that the card has for the run; None where no card is named."""
        memory_gib = self.hardware.memory_gib
        return None if memory_gib is None else round(memory_gib * OWNED * GIB)

    # -------------------------------------------------------------------------------------------------------- the parts

    def build(self, device: str = "meta") -> StableDiffusion:
        """The model with its adapters; with random weights where the device is not `meta`."""
        weights = self.hardware.weights
        with torch.device(device):
            parts = skeleton(self.family)
            encoders = [parts[name] for name in ("text_encoder", "text_encoder_2") if name in parts]
            tokenizers: Any = [partial(_tokens, encoder) for encoder in encoders]
            unknown = Fingerprints("", "", "")
            model = StableDiffusion(
                self.family, parts["unet"], parts["vae"], encoders, tokenizers, parts["scheduler"], unknown, device
            )
            quantised = weights in quantization.QUANTISED
            for parameter in model.unet.parameters():
                parameter.data = parameter.data.to(torch.bfloat16 if quantised else getattr(torch, weights))
            if quantised:
                quantization.quantise(model.unet, weights)  # type: ignore[arg-type]
        self.lora.attach(model)
        if self.cache != "all" and self.hardware.half is not None:
            model.halve_text(self.hardware.half)
        if self.hardware.gradient_checkpointing:
            model.unet.enable_gradient_checkpointing()
        return model

    def batch(self, model: StableDiffusion, pairs: int, device: torch.device | str = "meta") -> Batch:
        """A batch of pairs, encoded as the cache keeps them."""
        side = self.resolution // model.factor
        rows = lambda *shape: torch.zeros(pairs, *shape, device=device)  # noqa: E731
        embeds = TextEmbeds(rows(*hidden_shape(model)), rows(POOLED) if model.is_xl else None)
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

    def module(self, model: StableDiffusion) -> DiffusionModule:
        return DiffusionModule(model, self.loss, self.optimizer, 1, encodes=needed_networks(model, self.cache))

    # ------------------------------------------------------------------------------------------------------- the phases

    @cached_property
    def model(self) -> StableDiffusion:
        return self.build()

    @cached_property
    def state(self) -> dict[str, list[Tensor]]:
        """What stays on the card while the run trains, by what it is."""
        model = self.model
        trained = list(itertools.chain(*policy_parameters(model).values()))
        unet, adapters = [], []
        for name, tensor in itertools.chain(model.unet.named_parameters(), model.unet.named_buffers()):
            (adapters if "lora_" in name else unet).append(tensor)
        encoders = [tensor for network in needed_networks(model, self.cache) for tensor in _tensors(network)]
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        bits = [torch.empty(self.optimizer.state_bytes(p.numel()), dtype=torch.uint8, device="meta") for p in trained]
        gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
        return {
            "UNet": unet,
            "encoders of the step": encoders,
            "adapters": adapters,
            "gradients": gradients,
            "optimiser": bits,
        }

    @cached_property
    def _stays(self) -> list[Tensor]:
        return list(itertools.chain(*self.state.values()))

    @property
    def _kernels(self) -> AbstractContextManager[None]:
        return kernels(self.hardware.half, self.hardware.accelerator)

    @property
    def phases(self) -> list[Phase]:
        """All that a run does on the card, in its order."""
        return [phase for name in self._work for phase in self._tried(name)]

    @property
    def _work(self) -> list[str]:
        """What a run does, by the names of `_tried`."""
        before = {"all": ["pictures", "prompts"], "latents": ["pictures"], "off": []}[self.cache]
        step = ["step pictures"] if self.cache == "off" else []
        drawing = ["captions", "denoising", "decoding"] if self.draws else []  # the captions of what is drawn
        return [*before, *step, "update", "validation", *drawing]

    def _tried(self, name: str) -> list[Phase]:
        tries: dict[str, Callable[[], Iterable[Phase]]] = {
            "pictures": self._pictures,
            "prompts": self._prompts,
            "step pictures": self._step_pictures,
            "update": self._update,
            "validation": self._validation,
            "captions": self._captions,
            "denoising": self._denoising,
            "decoding": self._decoding,
        }
        if name not in self.known:
            self.known[name] = list(tries[name]())
        return self.known[name]

    @property
    def operations(self) -> Operations:
        """What the passes of the phases do, for each pair."""
        update = sum(phase.flops for phase in self._tried("update")) / self.hardware.micro_batch
        both = self._tried("validation")[-1].flops / grid_batch(self.hardware.micro_batch)
        reference = both / 2 if self.loss.needs_reference else 0.0
        picture = self._tried("pictures")[0].flops / encoded_together(self.resolution**2)
        encoding = picture * (2 if self.loss.needs_pairs else 1)
        text = self._tried("prompts")[0].flops / PROMPTS
        return Operations(update - reference, reference, both - reference, encoding, text)

    @property
    def drawing(self) -> float:
        """Floating-point operations of a picture that is drawn, without its decoding."""
        return self._tried("denoising")[0].flops / self.sampler.batch_size * self.sampler.steps

    @property
    def peak_of_update(self) -> int:
        """Bytes at the peak of an update, without the encoding of its pictures: what `measured` measures."""
        return max(phase.peak for phase in self._tried("update"))

    def _update(self) -> Iterator[Phase]:
        """With the gradients of earlier micro-batches."""
        module, micro_batch = self.module(self.model), self.hardware.micro_batch
        module.set_training(True)
        with Alive(self._stays) as alive, self._kernels:
            loss = micro_step(module, self.batch(self.model, micro_batch))
            forward = alive.phase("update: forward")
            torch.autograd.backward(loss)
            backward = alive.phase("update: backward")
            copies = [torch.empty_like(gradient) for gradient in self.state["gradients"] for _ in range(2)]
            optimiser = alive.phase("update: optimiser")
            del loss, copies
        return iter((forward, backward, optimiser))

    def _pictures(self) -> Iterator[Phase]:
        pictures = self._images(encoded_together(self.resolution**2))
        yield self._alone("encoding pictures", [self.model.vae], lambda: self.model.encode_pixels(pictures))

    def _prompts(self) -> Iterator[Phase]:
        yield self._alone("encoding prompts", self.model.text_encoders, lambda: self.model.embed([""] * PROMPTS))

    def _step_pictures(self) -> Iterator[Phase]:
        pictures = self._images(self.hardware.micro_batch)
        yield self._counted("update: pictures", self._stays, lambda: self.model.encode_pixels(pictures))

    def _images(self, n: int) -> Tensor:
        return torch.empty(n, 3, self.resolution, self.resolution, device="meta")

    def _alone(self, name: str, networks: Iterable[nn.Module], work: Callable[[], Any]) -> Phase:
        """A phase before the training, with nothing but these networks on the card."""
        return self._counted(name, [tensor for network in networks for tensor in _tensors(network)], work)

    def _counted(
        self, name: str, stays: list[Tensor], work: Callable[[], Any], half: torch.dtype | None = None
    ) -> Phase:
        with Alive(stays) as alive, torch.no_grad(), kernels(half, self.hardware.accelerator):
            work()
            return alive.phase(name)

    def _validation(self) -> Iterator[Phase]:
        module, size = self.module(self.model), grid_batch(self.hardware.micro_batch)
        batch = self.batch(self.model, size)
        if self.cache == "off":
            pictures = self._images(size)
            yield self._counted("validation: pictures", self._stays, lambda: self.model.encode_pixels(pictures))
        yield self._counted("validation", self._stays, lambda: module.losses(batch), self.hardware.half)

    def _captions(self) -> Iterator[Phase]:
        stays = [*self._stays, *(t for encoder in self.model.text_encoders for t in _tensors(encoder))]
        prompts = [""] * PROMPTS
        yield self._counted("samples: prompts", stays, lambda: self.model.embed(prompts), self.model.text_dtype)

    def _denoising(self) -> Iterator[Phase]:
        unet = self.model.unet
        empty = partial(torch.empty, self.sampler.batch_size * (2 if self.sampler.guidance > 1 else 1), device="meta")
        hidden, timesteps = empty(*hidden_shape(self.model)), empty(dtype=torch.int64)
        told, latents = {"text_embeds": empty(POOLED), "time_ids": empty(6)}, empty(4, *self._drawn)
        half = None if unet.dtype == torch.float32 else unet.dtype
        draw = lambda: unet(latents, timesteps, hidden, added_cond_kwargs=told)  # noqa: E731
        yield self._counted("samples: denoising", self._stays, draw, half)

    def _decoding(self) -> Iterator[Phase]:
        height, width = self._drawn
        together = max(1, DECODED_PIXELS // (height * width * self.model.factor**2))
        latents = torch.empty(min(together, self.sampler.batch_size), 4, height, width, device="meta")
        stays = self._stays
        if height * width * self.model.factor**2 > DECODED_PIXELS:  # the UNet rests on the CPU
            stays = [*self.state["encoders of the step"], *self.state["optimiser"]]
        vae: Any = self.model.vae
        tensors = [*stays, *_tensors(vae)]
        yield self._counted("samples: decoding", tensors, lambda: vae.decode(latents))

    @property
    def _drawn(self) -> tuple[int, int]:
        """Height and width of the latents of drawn pictures."""
        model, sampler = self.model, self.sampler
        return (sampler.height or model.resolution) // model.factor, (sampler.width or model.resolution) // model.factor

    # ----------------------------------------------------------------------------------------------------- what fits

    @property
    def worst(self) -> Phase:
        """The phase that needs the most."""
        return max(self.phases, key=lambda phase: phase.needs)

    @property
    def overweight(self) -> bool:
        """Whether the card cannot even hold what stays on it."""
        stays = sum(tensor.untyped_storage().nbytes() for tensor in self._stays)
        return self.limit is not None and stays + CONTEXT > self.limit

    def fits(self, limit: int | None = None, of: str = "") -> bool:
        """Whether every phase fits the card, and those whose names begin with `of` the limit as well.

        Args:
            limit: in bytes; None is none.
        """
        dear = ("denoising", "validation", "update")  # tried last
        names = sorted(self._work, key=lambda name: (name not in self.known, name in dear, name))
        for phase in (phase for name in names for phase in self._tried(name)):
            bounds = (self.limit, limit if phase.name.startswith(of) else None)
            if any(bound is not None and phase.needs > bound for bound in bounds):
                return False
        return True

    def nearest(self, limit: int | None = None, of: str = "") -> Iterator[Workload]:
        """The nearest settings that fit, the cheapest first: one that learns the same, whose base is stored smaller
        only where nothing else does; one whose text encoders are left alone; and without these one with smaller
        pictures.

        Args:
            limit, of: as in `fits`.
        """
        bases = [{"weights": weights} for weights in (self.hardware.weights, *self._smaller_weights())]
        kept = [base | {"cache": "all", "text_encoder": False} for base in bases if self.cache != "all"]
        smaller_pictures = [{"resolution": side} for side in (768, 512) if side < self.resolution]
        learns_the_same = [bases, kept] if self.lora.text_encoder else [kept + bases]

        def first(settings: list[dict[str, Any]]) -> Workload | None:
            tried = (self._first_that_fits(limit, of, **each) for each in settings)
            return next((other for other in tried if other is not None), None)

        found = False
        for settings in learns_the_same:
            if (other := first(settings)) is not None:
                found = True
                yield other
        if not found and (other := first(smaller_pictures)) is not None:
            yield other

    def _smaller_weights(self) -> list[str]:
        order = ["float32", "bfloat16", "int8", "nf4"]
        now = "bfloat16" if self.hardware.weights == "float16" else self.hardware.weights
        allowed = order[order.index(now) + 1 :]
        return [bits for bits in allowed if self.hardware.accelerator == "cuda" or bits == "bfloat16"]

    def _first_that_fits(self, limit: int | None, of: str, **settings: Any) -> Workload | None:
        """With smaller micro-batches, and with checkpointing where these do not do; None when nothing fits."""
        if settings.get("weights", "float32") != "float32" and self.hardware.precision == "32-true":
            settings["precision"] = "bf16-mixed"
        micro_batches = [n for n in range(self.hardware.micro_batch, 0, -1) if self.pairs % n == 0]
        for checkpointing in sorted({self.hardware.gradient_checkpointing, True}):
            least = self.using(gradient_checkpointing=checkpointing, micro_batch=1, **settings)
            if least.overweight:
                return None
            sizes = [self.sampler.batch_size >> k for k in range(self.sampler.batch_size.bit_length())]
            drawing = (other for n in sizes if (other := least.using(batch_size=n)).fits(limit, of))
            if (least := next(drawing, None)) is not None:
                return next(found for n in micro_batches if (found := least.using(micro_batch=n)).fits(limit, of))
        return None


def micro_step(module: DiffusionModule, batch: Batch) -> Tensor:
    """The loss of one micro-batch, with its graph."""
    return module.losses(batch)["loss"].mean()


def hidden_shape(model: StableDiffusion) -> tuple[int, int]:
    """Of the hidden states of a prompt: tokens and width."""
    return model.text_encoders[0].config.max_position_embeddings, int(model.unet.config["cross_attention_dim"])


def _tensors(network: nn.Module) -> Iterator[Tensor]:
    return itertools.chain(network.parameters(), network.buffers())


def _tokens(encoder: Any, prompts: list[str], **_: Any) -> SimpleNamespace:
    """What a tokenizer would give, without its vocabulary."""
    length = encoder.config.max_position_embeddings
    return SimpleNamespace(input_ids=torch.zeros(len(prompts), length, dtype=torch.int64, device=encoder.device))
