"""What a training takes of a card's memory: an update on the `meta` device, whose tensors have shapes and no bytes."""

from __future__ import annotations

import copy
import itertools
import traceback
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from dpo_sd import quantization
from dpo_sd.data.batches import PairBatch
from dpo_sd.data.datamodule import grid_batch
from dpo_sd.errors import UserError
from dpo_sd.hardware import Hardware
from dpo_sd.lora import LoRA, policy_parameters
from dpo_sd.losses import DiffusionDPOLoss, SFTLoss
from dpo_sd.models import (
    DECODED_PIXELS,
    PROMPTS,
    Family,
    Fingerprints,
    StableDiffusion,
    TextEmbeds,
    encoded_together,
    skeleton,
)
from dpo_sd.module import DiffusionModule, needed_networks
from dpo_sd.optimization import AdamW
from dpo_sd.sampling import Sampler

GIB = 2**30
CONTEXT = GIB // 2  # CUDA itself and the workspaces of cuBLAS: assumed, not measured
SPARE = 0.1  # of what comes and goes: gaps that the allocator cannot close, workspaces of cuDNN; assumed
OWNED = 0.95  # of what a card is sold with, what its programs get; assumed
ROUND = 512  # bytes that CUDA's allocator rounds up to
POOLED = 1280  # width of what SDXL is told of a prompt as a whole
DOING = {  # functions in a traceback: what was being done in them, and how the names of its phases begin
    "prepare": ("encoding the data", "encoding"),
    "draw": ("drawing pictures", "samples"),
    "_validate": ("the validation", "validation"),
    "training_step": ("the forward pass of an update", "update"),
    "backward": ("the backward pass of an update", "update"),
}
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


class Phase(NamedTuple):
    """One thing that a run does.

    Args:
        name: of it.
        stays: bytes of what is on the card all the while: weights, adapters, gradients, optimiser state.
        passes: bytes of what else there is at its peak.
        flops: its floating-point operations, two for a multiplication and its addition.
    """

    name: str
    stays: int
    passes: int
    flops: int = 0

    @property
    def peak(self) -> int:
        return self.stays + self.passes

    @property
    def needs(self) -> int:
        """Bytes that the card must have for it: the peak, the allocator's gaps and CUDA itself."""
        return round(self.peak + SPARE * self.passes + CONTEXT)


class Operations(NamedTuple):
    """Floating-point operations for a pair, or a picture of a loss without pairs.

    Args:
        policy: its forward and backward pass, with what checkpointing computes again.
        reference: the forward pass of the reference; 0 for a loss without pairs.
        forward: the forward pass of the policy alone.
        encoding: of its pictures by the VAE.
        text: of its prompt by the text encoders.
    """

    policy: float
    reference: float
    forward: float
    encoding: float
    text: float


class Alive(TorchDispatchMode):
    """Inside, counts the bytes of the tensors that are alive, and floating-point operations as PyTorch does.

    Args:
        tensors: that are there already.
    """

    def __init__(self, tensors: Iterable[Tensor] = ()):
        super().__init__()
        self.now = self.peak = self.flops = 0
        self._storages: dict[int, weakref.ref] = {}
        for tensor in tensors:
            self._count(tensor)
        self.stays = self.now

    def phase(self, name: str) -> Phase:
        """What was counted since the last call."""
        phase = Phase(name, self.stays, self.peak - self.stays, self.flops)
        self.peak, self.flops = self.now, 0
        return phase

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        size = -(-storage.nbytes() // ROUND) * ROUND

        def freed(_: Any) -> None:
            self.now -= size
            del self._storages[key]

        self._storages[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        if count := flop_registry.get(func.overloadpacket):
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        return result


@contextmanager
def kernels(half: torch.dtype | None, accelerator: str) -> Iterator[None]:
    """Inside, the `meta` device computes as the accelerator does: fused attention, and autocast's precisions.

    Functions are replaced, because autocast knows no `meta` device and what backward passes compute again is hidden
    from `TorchFunctionMode`.

    Args:
        half: of autocast; None computes in the precision of the inputs.
    """

    def cast(function: Any, dtype: torch.dtype) -> Any:
        def casting(*args: Any, **kwargs: Any) -> Any:
            to = lambda t: t.to(dtype) if t.is_floating_point() else t  # noqa: E731
            return function(*tree_map_only(torch.Tensor, to, args), **tree_map_only(torch.Tensor, to, kwargs))

        return casting

    def attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        if half is not None:
            query, key, value = (tensor.to(half) for tensor in (query, key, value))
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]

    replaced: dict[str, Any] = {"scaled_dot_product_attention": attention}
    if half is not None:
        replaced |= {name: cast(getattr(F, name), half) for name in ("linear", "conv2d")}
        if accelerator == "cuda":  # autocast on the CPU leaves the norms as they are
            replaced |= {name: cast(getattr(F, name), torch.float32) for name in ("group_norm", "layer_norm")}
    with ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(F, **replaced))
        if half is not None:
            stack.enter_context(mock.patch.object(quantization, "arithmetic", lambda x: half))
        yield


@dataclass(frozen=True)
class Training:
    """What decides how much memory a training takes.

    Args:
        family: of the base, whose real shapes are taken.
        resolution: side of the square that has the area of the training pictures, in pixels.
        cache: what is kept, as in `dpo_sd.data.source.Cache`.
        pairs: behind one update on one device; the micro-batches divide it.
        draws: whether pictures are drawn on the way.
    """

    family: Family
    lora: LoRA
    loss: SFTLoss | DiffusionDPOLoss
    optimizer: AdamW
    hardware: Hardware
    sampler: Sampler
    resolution: int
    cache: str = "all"
    pairs: int = 16
    draws: bool = True
    origin: Training | None = None  # whose settings `using` has changed
    known: dict[str, list[Phase]] = field(default_factory=dict)  # phases by what was tried

    def using(self, **settings: Any) -> Training:
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

    def batch(self, model: StableDiffusion, pairs: int, device: torch.device | str = "meta") -> PairBatch:
        """A batch of pairs, encoded as the cache keeps them."""
        side = self.resolution // model.factor
        rows = lambda *shape: torch.zeros(pairs, *shape, device=device)  # noqa: E731
        embeds = TextEmbeds(rows(*hidden_shape(model)), rows(POOLED) if model.is_xl else None)
        return PairBatch(
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
        reference = both / 2 if self.loss.needs_pairs else 0.0
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

    def nearest(self, limit: int | None = None, of: str = "") -> Iterator[Training]:
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

        def first(settings: list[dict[str, Any]]) -> Training | None:
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

    def _first_that_fits(self, limit: int | None, of: str, **settings: Any) -> Training | None:
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


def micro_step(module: DiffusionModule, batch: PairBatch) -> Tensor:
    """The loss of one micro-batch, with its graph."""
    return module.losses(batch)["loss"].mean()


def hidden_shape(model: StableDiffusion) -> tuple[int, int]:
    """Of the hidden states of a prompt: tokens and width."""
    return model.text_encoders[0].config.max_position_embeddings, int(model.unet.config["cross_attention_dim"])


def measured(training: Training, device: torch.device) -> int:
    """Bytes at the peak of a micro-step with random weights, by the allocator: `Training.peak_of_update` foretells it.

    On a CUDA device under a hard cap of the card that the hardware names.
    """
    cuda = device.type == "cuda"
    if cuda and training.hardware.memory_gib is not None:
        share = training.hardware.memory_gib * GIB / torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, share), device)
    model = training.build("cpu")
    module = training.module(model).to(device)
    module.set_training(True)
    batch, half = training.batch(model, training.hardware.micro_batch, device), training.hardware.half
    trained = list(itertools.chain(*policy_parameters(model).values()))
    state = [torch.empty(training.optimizer.state_bytes(p.numel()), dtype=torch.uint8, device=device) for p in trained]

    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)

    def step() -> None:
        with nullcontext() if half is None else torch.autocast(device.type, half):
            loss = micro_step(module, batch)
        torch.autograd.backward(loss)

    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device)
    gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
    there = Alive([*module.parameters(), *module.buffers(), *gradients, *state, *_of_batch(batch)]).now
    return there + _allocated(step)


def _allocated(work: Callable[[], None]) -> int:
    """Bytes that the CPU's allocator holds at the peak of some work, beyond what it held before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    results: Any = profile.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events), default=0)


@contextmanager
def explained(training: Training, go_on: Callable[[str], str]) -> Iterator[None]:
    """Turns a card that has no more memory into a message with the nearest settings that take less.

    Args:
        go_on: what is kept, and the command that goes on with these overrides.

    Raises:
        UserError: when memory ran out inside.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        frames = traceback.extract_tb(error.__traceback__)
        doing, of = next((DOING[frame.name] for frame in frames if frame.name in DOING), ("the training", ""))
        # the plan was too hopeful: clearly less than it said is wanted
        said = max(phase.needs for phase in training.phases if phase.name.startswith(of))
        smaller = training.nearest(round(0.9 * (said - CONTEXT)) + CONTEXT, of)
        now = (training.resolution, training.cache)  # which a run that goes on cannot change
        found = next((other.overrides for other in smaller if (other.resolution, other.cache) == now), "")
        only = "" if found else "only a smaller framing.resolution or sampler.height takes less; "
        raise UserError(f"out of memory in {doing} ({str(error).splitlines()[0]}): {only}{go_on(found)}") from error


def _tensors(network: nn.Module) -> Iterator[Tensor]:
    return itertools.chain(network.parameters(), network.buffers())


def _of_batch(batch: PairBatch) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tuple(batch)) if isinstance(leaf, Tensor))


def _tokens(encoder: Any, prompts: list[str], **_: Any) -> SimpleNamespace:
    """What a tokenizer would give, without its vocabulary."""
    length = encoder.config.max_position_embeddings
    return SimpleNamespace(input_ids=torch.zeros(len(prompts), length, dtype=torch.int64, device=encoder.device))
