"""Ways to train with Diffusion-DPO, measured side by side: what the speed claims are made of."""

from __future__ import annotations

import copy
import gc
import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from dpo_sd.callbacks.metrics import Metrics
from dpo_sd.callbacks.watcher import Run
from dpo_sd.data.batches import Batch, Latents, PreparedSamples, Prompts, UpdateOrder, Visits, stack
from dpo_sd.data.datamodule import DataModule
from dpo_sd.data.source import PreparedData
from dpo_sd.files.tensors import TensorStore
from dpo_sd.forecast.measuring import measured
from dpo_sd.forecast.operations import per_sample
from dpo_sd.forecast.phases import Forecast
from dpo_sd.forecast.units import GIB
from dpo_sd.forecast.workload import Workload
from dpo_sd.lora.adapters import named_policy_parameters, reference
from dpo_sd.losses import DiffusionDPOLoss, PairErrors
from dpo_sd.models import compilation
from dpo_sd.models.families import FamilyName
from dpo_sd.models.sampling import Sampler
from dpo_sd.models.stable_diffusion import StableDiffusion
from dpo_sd.training.reference_cache import ReferenceErrors
from dpo_sd.training.step import DiffusionModule
from dpo_sd.training.trainer import make_trainer

CLAIMS = ("step_over_bare_loop", "speedup_over_public", "speedup_cached_reference")
TIMESTEPS = 1000  # length of the noise schedule
Way = Callable[[], list[float]]  # trains for the updates of a case: seconds of each


class Case(NamedTuple):
    """Size of one measurement.

    Args:
        family: family of the networks that are trained, at their real shapes and with random weights.
        resolution: side of the images in pixels.
        pairs: pairs of one update, in one pass.
        updates: updates of every round; their median counts.
        rounds: rounds in which the ways take turns, after one that warms up.
    """

    family: FamilyName
    resolution: int
    pairs: int
    updates: int
    rounds: int

    def __str__(self) -> str:
        return f"{self.family} at {self.resolution}, {self.pairs} pairs"


class Bench:
    """Networks with random weights, random images and prompts, and ways to train on them.

    Args:
        case: size of the measurement.
        workload: settings of a training with Diffusion-DPO, with the case's family, resolution and pairs.
        trainer: makes Lightning's trainer of a run, from the run's folder and its callbacks.
        seed: seed of weights, order, noise and timesteps.
    """

    def __init__(
        self, case: Case, workload: Workload, trainer: Callable[[Path, list[L.Callback]], L.Trainer], seed: int
    ):
        self.case, self.workload, self.trainer, self.seed = case, workload, trainer, seed
        assert isinstance(workload.loss, DiffusionDPOLoss)
        self.hardware, self.optimizer, self.loss = workload.hardware, workload.optimizer, workload.loss
        torch.manual_seed(seed)
        self.model = workload.build(self.hardware.device, self.hardware.compile)  # a GPU takes a part when it is needed
        self.pixels, self.samples = random_samples(self.model, case)
        self._folder = tempfile.TemporaryDirectory()

    @property
    def ways(self) -> dict[str, Way]:
        """Ways to train, by the names of their seconds in the results."""
        return {
            "ours": self.ours,
            "bare": eagerly(BareLoop(self).updates),
            "public": eagerly(PublicWay(self).updates),
            "cached": lambda: self.ours(self.known_reference()),
        }

    def compare(self, ways: Mapping[str, Way] | None = None) -> dict[str, Any]:
        """Seconds per update of each way, their ratios, and the ratios of their operations.

        Seconds and ratios have median, lowest and highest over the rounds, or None where a way runs out of memory.

        Args:
            ways: "ours", "bare", "public" and "cached"; None takes `ways`.
        """
        ways = self.ways if ways is None else ways
        ways["ours"]()  # warms up what the ways share, and compiles
        seconds = in_turns(ways, self.case.rounds)
        needed = per_sample(Forecast(self.workload))
        ours = needed.policy + needed.reference
        public = ours + needed.encoding + needed.text
        return {f"{name}_s": spread(values) for name, values in seconds.items()} | {
            "step_over_bare_loop": ratio(seconds["ours"], seconds["bare"]),
            "speedup_over_public": ratio(seconds["public"], seconds["ours"]),
            "speedup_cached_reference": ratio(seconds["public"], seconds["cached"]),
            "allowed_over_public": public / ours,
            "allowed_cached_reference": public / needed.policy,
            "tflop_a_pair": {name: count / 1e12 for name, count in needed._asdict().items()},
        }

    def memory(self) -> dict[str, float]:
        """GiB at the peak of an update, planned and measured by the allocator."""
        really = measured(self.workload, self.hardware.device)
        return {"planned": Forecast(self.workload).peak_of_update / GIB, "measured": really / GIB}

    def known_reference(self) -> ReferenceErrors:
        """A cache that holds the reference's errors of one draw for each pair."""
        kept = ReferenceErrors(None, self.samples.contents, draws=1)
        n = len(self.samples)
        kept.put(list(range(n)), [0] * n, PairErrors(torch.ones(n), torch.ones(n)))
        return kept

    def ours(self, known: ReferenceErrors | None = None) -> list[float]:
        """Seconds per update of the trainer and the metrics of a real run.

        Args:
            known: errors of the reference; None computes them.
        """
        clock, metrics = Clock(), Metrics(log_every=1, validate_every=0)
        trainer = self.trainer(Path(self._folder.name), [metrics, clock])
        module = DiffusionModule(
            self.model, self.loss, self.optimizer, self.case.updates, self.seed, reference_cache=known
        )
        module.set_training(True)
        source: Any = type("NoDropout", (), {"caption_dropout": 0.0})
        data = DataModule(
            PreparedData(self.samples, self.samples, [], []),
            source,
            self.workload.sampler,
            self.case.pairs,
            self.case.pairs,
            self.seed,
            num_train_timesteps=TIMESTEPS,
            factor=self.model.factor,
            draws_per_pair=None if known is None else 1,
            num_workers=self.hardware.num_workers,
        )
        metrics.run = Run(trainer, module, data)
        trainer.fit(module, datamodule=data)
        return clock.seconds

    def batches(self) -> list[Batch]:
        """One batch for each update, as our training takes them."""
        visits, pairs = Visits(self.samples, self.seed, TIMESTEPS, self.model.factor), self.case.pairs
        order = UpdateOrder(len(self.samples), self.seed, range(self.case.updates), pairs, pairs)
        return [stack([visits[visit] for visit in update])[0] for update in order]


def bench(cfg: DictConfig, case: Case) -> Bench:
    """Networks and ways to train of a case, with the hardware that the preset has for its model.

    Args:
        cfg: composed from benchmark.yaml.
    """
    cfg = of_case(cfg, case)
    lora, loss, optimizer, hardware = (instantiate(cfg[group]) for group in ("lora", "loss", "optimizer", "hardware"))
    hardware.micro_batch = case.pairs
    parts = (case.family, lora, loss, optimizer, hardware, Sampler(), case.resolution)
    workload = Workload(*parts, pairs=case.pairs, draws=False)
    return Bench(case, workload, lambda run, callbacks: make_trainer(cfg, hardware, run, 1, callbacks), cfg.seed)


def of_case(cfg: DictConfig, case: Case) -> Any:
    """The composition with the model of a case, so that its preset sets what it has for that model."""
    return OmegaConf.merge(cfg, {"model": {"name": case.family}, "trainer": {"max_steps": case.updates, "devices": 1}})


class Clock(L.Callback):
    """Takes the time of every update of a trainer."""

    def on_train_start(self, *_: Any) -> None:
        self.ends = [time.perf_counter()]

    def on_train_batch_end(self, *_: Any) -> None:
        synchronise()
        self.ends.append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:
        return [end - start for start, end in itertools.pairwise(self.ends)]


class BareLoop:
    """The operations of our update and nothing else: batches lie ready on the device, nothing is logged."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.model, self.device = bench, bench.model, bench.hardware.device
        self.unet: Any = bench.model.unet
        self.scheduler: Any = bench.model.noise_scheduler

    def updates(self) -> list[float]:
        """Seconds per update, from a new optimiser on."""
        self.unet.to(self.device).train()
        parameters = named_policy_parameters(self.model)
        adam, schedule = self.bench.optimizer.build(parameters, self.bench.case.updates)
        seconds, half = [], self.bench.hardware.half
        for batch in self.bench.batches():
            given = self.given(batch)
            synchronise()
            start = time.perf_counter()
            adam.zero_grad()
            with torch.autocast(self.device.type, half, enabled=half is not None):
                policy, frozen, noise = self.predictions(given)
            self.loss(policy, frozen, noise).backward()
            torch.nn.utils.clip_grad_norm_([p for group in parameters.values() for p in group.values()], 1.0)
            adam.step()
            schedule.step()
            synchronise()
            seconds.append(time.perf_counter() - start)
        return seconds

    def given(self, batch: Batch) -> Any:
        """Tensors that are there before the clock starts."""
        latents = torch.cat([batch.chosen, batch.rejected]).to(self.device)  # type: ignore[list-item]
        return latents, *self.conditions(batch)

    def conditions(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor | None] | None]:
        """Noise, timesteps, hidden states and SDXL's pooled text and sizes, for chosen and rejected images alike."""
        assert batch.embeds is not None and batch.rejected_time_ids is not None
        hidden, pooled = (None if part is None else part.to(self.device) for part in batch.embeds)
        assert hidden is not None
        ids = torch.cat([batch.chosen_time_ids, batch.rejected_time_ids]).to(self.device)
        added = self.bench.model.added(None if pooled is None else pooled.repeat(2, 1), ids)
        noise, timesteps = batch.noise.to(self.device), batch.timesteps.to(self.device)
        return noise.repeat(2, 1, 1, 1), timesteps.repeat(2), hidden.repeat(2, 1, 1), added

    def predictions(self, given: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Predictions of policy and reference, and the noise: (2 * pairs, 4, h, w) each, the chosen images first."""
        latents, noise, timesteps, hidden, added = given
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        with torch.no_grad(), reference(self.model):
            frozen = self.unet(noisy, timesteps, hidden, added_cond_kwargs=added).sample
        return self.unet(noisy, timesteps, hidden, added_cond_kwargs=added).sample, frozen, noise

    def loss(self, policy: Tensor, frozen: Tensor, noise: Tensor) -> Tensor:
        """Diffusion-DPO written out, mean over the pairs: a scalar."""
        e_w, e_l = (policy.float() - noise).square().mean(dim=(1, 2, 3)).chunk(2)
        r_w, r_l = (frozen.float() - noise).square().mean(dim=(1, 2, 3)).chunk(2)
        margin = 0.5 * self.bench.loss.beta * ((r_w - e_w) - (r_l - e_l))
        return -torch.nn.functional.logsigmoid(margin).mean()


class PublicWay(BareLoop):
    """The same algorithm as public scripts run it: VAE and text encoders in every step, a second UNet as reference."""

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench)
        self.second: Any = copy.deepcopy(bench.model.unet)
        self.second.requires_grad_(False)
        self.second.disable_adapters()
        if bench.hardware.half is not None:
            bench.model.halve_text(bench.hardware.half)
        config = bench.model.text_encoders[0].config
        shape = (bench.case.pairs, config.max_position_embeddings)
        self.tokens = torch.randint(0, config.vocab_size - 2, shape)

    def updates(self) -> list[float]:
        """Seconds per update; afterwards only the policy is on the device."""
        with self.model.working(self.second, self.model.vae, *self.model.text_encoders):
            return super().updates()

    def given(self, batch: Batch) -> Any:
        return torch.cat([side[: self.bench.case.pairs] for side in self.bench.pixels]), batch

    def predictions(self, given: Any) -> tuple[Tensor, Tensor, Tensor]:
        pixels, batch = given
        with torch.no_grad():
            latents = self.model.encode_pixels(pixels.to(self.device)).float()
            for encoder in self.model.text_encoders:
                encoder(self.tokens.to(self.device), output_hidden_states=True)
        noise, timesteps, hidden, added = self.conditions(batch)
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        policy = self.unet(noisy, timesteps, hidden, added_cond_kwargs=added).sample
        with torch.no_grad():
            frozen = self.second(noisy, timesteps, hidden, added_cond_kwargs=added).sample
        return policy, frozen, noise


# ------------------------------------------------------------------------------------------------------------- samples


def random_samples(model: StableDiffusion, case: Case) -> tuple[list[Tensor], PreparedSamples]:
    """Pixels of both sides in [-1, 1], (pairs, 3, H, W) each, and random samples in memory of the same size."""
    n, side, latent = max(case.pairs, 4), case.resolution, case.resolution // model.factor
    pixels = [torch.rand(case.pairs, 3, side, side) * 2 - 1 for _ in range(2)]
    pooled = None if model.pooled_width is None else torch.randn(2, model.pooled_width)
    time_ids = np.tile(np.array([side, side, 0, 0, side, side], np.int32), (n, 1))
    sides = [Latents(torch.randn(n, 4, latent, latent), time_ids) for _ in range(2)]
    return pixels, _paired(sides, torch.randn(2, *model.hidden_shape), pooled)


def _paired(sides: Sequence[Latents], hidden: Tensor, pooled: Tensor | None = None) -> PreparedSamples:
    """Samples with one prompt; the second row of its embeddings is the empty prompt's."""
    chosen, rejected = sides
    n = len(chosen.time_ids)
    ones = np.ones(n, np.float32)
    prompts = Prompts(["a prompt"], np.zeros(n, int), hidden, pooled)
    return PreparedSamples(chosen, rejected, prompts, label=ones, weight=ones, sample_ids=np.arange(n))


def loading_rate(folder: Path, n: int = 2000) -> float:
    """Pairs per second that one process reads from the cache and gives noise and a timestep, at SD 1.5's size.

    Args:
        folder: where the latents lie for the while.
        n: how many pairs, a multiple of 4.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        store = TensorStore(Path(place), torch.float16)
        keys = [f"{row:024x}" for row in range(2 * n)]
        for key in keys:
            store.put(key, torch.randn(4, 64, 64))
        store.flush()
        sides = [Latents(store.rows(keys[start::2]), np.zeros((n, 6), np.int32)) for start in (0, 1)]
        visits = Visits(_paired(sides, torch.randn(2, 77, 768)), 0, TIMESTEPS)
        start = time.perf_counter()
        for row in range(0, n, 4):
            stack([visits[row + k, 0] for k in range(4)])
        return n / (time.perf_counter() - start)


# ------------------------------------------------------------------------------------------------------------- numbers


def in_turns(ways: Mapping[str, Way], rounds: int) -> dict[str, list[float]]:
    """Median seconds per update of each way in each round; NaN where the way runs out of memory.

    The ways take turns, so that everything else that the machine does strikes all of them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            try:
                seconds[name].append(statistics.median(way()))
            except torch.OutOfMemoryError:
                seconds[name].append(math.nan)
            gc.collect()
    return seconds


def eagerly(way: Way) -> Way:
    """The same way with nothing compiled."""

    def run() -> list[float]:
        with compilation.eager():
            return way()

    return run


def ratio(of: Sequence[float], to: Sequence[float]) -> dict[str, float] | None:
    """Spread of the ratios round by round."""
    return spread([a / b for a, b in zip(of, to, strict=True)])


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Median, lowest and highest; None where one is no number."""
    if any(map(math.isnan, values)):
        return None
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def synchronise() -> None:
    """Waits for the GPU, whose work is otherwise only begun when a call returns."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def table(title: str, rows: Mapping[str, Any]) -> Iterator[str]:
    """Lines for people on the results of one case."""
    yield f"\n{title}"
    for name in (*(name for name in rows if name.endswith("_s")), *CLAIMS):
        row = rows[name]
        told = "runs out of memory" if row is None else f"{row['median']:9.4f}  [{row['low']:.4f}, {row['high']:.4f}]"
        yield f"  {name:<26}{told}"
    for name in ("allowed_over_public", "allowed_cached_reference"):
        yield f"  {name:<26}{rows[name]:9.4f}  by counts of operations"
    planned, really = rows["memory_gib"]["planned"], rows["memory_gib"]["measured"]
    foretold = f"{planned:9.4f} planned, {really:.4f} measured: {planned / really:.3f} of it"
    yield f"  peak of an update, GiB    {foretold}"
