"""What our speed claims are made of, measured side by side: `python -m dpo_sd.benchmark`."""

from __future__ import annotations

import copy
import gc
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from dpo_sd.composition.application import entry_point
from dpo_sd.errors import UserError

if TYPE_CHECKING:
    import torch

    from dpo_sd.data.batches import PreparedSamples
    from dpo_sd.models.families import Family
    from dpo_sd.models.stable_diffusion import StableDiffusion


class Case(NamedTuple):
    """What is measured.

    Args:
        family: whose networks, at their real shapes and with random weights.
        resolution: side of the pictures in pixels.
        pairs: of one update, in one pass.
        updates: of every round; their median counts.
        rounds: in which the ways to train take turns, after one that warms up.
    """

    family: Family
    resolution: int
    pairs: int
    updates: int
    rounds: int

    def __str__(self) -> str:
        return f"{self.family} at {self.resolution}, {self.pairs} pairs"


CASES = {
    "cpu": [Case("tiny", 64, 16, 8, 6), Case("sd15", 256, 4, 1, 3)],
    "cuda": [Case("sd15", 512, 4, 5, 5), Case("sdxl", 1024, 1, 5, 5)],
}
CLAIMS = ("step_over_bare_loop", "speedup_over_public", "speedup_cached_reference")


@entry_point("benchmark")
def main(cfg: DictConfig) -> None:
    """Times our training, a bare loop and the way of the public scripts in turns, and writes benchmark.json.

    A card that the hardware names is a hard cap on what the process may take of a larger one.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler of `measured` talks otherwise
    from dpo_sd.files.atomic import write_json
    from dpo_sd.training.provenance import device_name, versions

    hardware = instantiate(cfg.hardware)
    hardware.check(preset=HydraConfig.get().runtime.choices.get("hardware"))
    loss, lora, optimizer = (instantiate(cfg[group]) for group in ("loss", "lora", "optimizer"))
    if not loss.needs_pairs:
        raise UserError("the benchmark compares ways of Diffusion-DPO: use loss=dpo")
    lora.check()
    optimizer.check(1)
    results: dict[str, Any] = {
        **versions(),
        "overrides": list(HydraConfig.get().overrides.task),
        "device": device_name(hardware.accelerator),
        "lora": {"rank": lora.rank, "modules": lora.target_modules},
    }
    cases = CASES[hardware.accelerator]
    for case in cases:
        bench = Bench(case, cfg)
        memory = bench.memory()
        results[str(case)] = bench.compare() | {"memory_gib": memory}
        _print(str(case), results[str(case)])
        del bench  # before the next one takes its place
    results |= {name: results[str(cases[-1])][name] for name in CLAIMS}
    results["data loading, pairs/s"] = loading_rate(Path(cfg.cache_dir).expanduser())
    print(f"\ndata loading        {results['data loading, pairs/s']:.0f} pairs/s from disk, one process")
    results["cost"] = cost(cases[0], cfg)
    folder = Path(HydraConfig.get().runtime.output_dir)
    write_json(folder / "benchmark.json", results)
    print(folder / "benchmark.json")


def adapted(cfg: DictConfig, case: Case) -> Any:
    """The composition with the case's model, so that the preset says what it has for it, and number of updates."""
    return OmegaConf.merge(cfg, {"model": {"name": case.family}, "trainer": {"max_steps": case.updates, "devices": 1}})


class Bench:
    """One case: networks with random weights, random pictures and prompts, and ways to train on them.

    Args:
        case: what is measured.
        cfg: composed from benchmark.yaml; what its hardware says of the case's model is taken.
    """

    def __init__(self, case: Case, cfg: DictConfig):
        import torch

        from dpo_sd.forecast.workload import Workload
        from dpo_sd.models.compilation import compile_blocks
        from dpo_sd.models.sampling import Sampler

        self.case = case
        self.cfg = adapted(cfg, case)
        parts = (instantiate(self.cfg[group]) for group in ("hardware", "lora", "loss", "optimizer"))
        self.hardware, lora, self.loss, self.optimizer = parts
        self.hardware.micro_batch = case.pairs
        self.training = Workload(
            case.family,
            lora,
            self.loss,
            self.optimizer,
            self.hardware,
            Sampler(),
            case.resolution,
            pairs=case.pairs,
            draws=False,
        )
        torch.manual_seed(cfg.seed)
        self.model = self.training.build("cpu")  # a GPU takes each part when it is needed
        self.model.device = self.hardware.device
        if self.hardware.compile:
            compile_blocks(self.model.unet)
        self.pixels, self.samples = random_samples(self.model, case)
        self._folder = tempfile.TemporaryDirectory()

    def compare(self) -> dict[str, Any]:
        """Seconds per update of each way, their ratios, and the ratios of their operations.

        Seconds and ratios have median, lowest and highest over the rounds, or None where a way runs out of memory.
        """
        import torch

        from dpo_sd.models.compilation import eager

        public = _PublicWay(self)

        def eagerly(way: Callable[[], list[float]]) -> list[float]:
            with eager():
                return way()

        ways: dict[str, Callable[[], list[float]]] = {
            "ours": self.ours,
            "bare": lambda: eagerly(self.bare),
            "public": lambda: eagerly(public.updates),
            "cached": lambda: self.ours(self._reference()),
        }
        self.ours()  # warms up what the ways share, and compiles
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(self.case.rounds):  # in turns, so that whatever else the machine does strikes all
            for name, way in ways.items():
                try:
                    seconds[name].append(statistics.median(way()))
                except torch.OutOfMemoryError:
                    seconds[name].append(math.nan)
                gc.collect()

        def ratio(of: str, to: str) -> dict[str, float] | None:
            return spread([a / b for a, b in zip(seconds[of], seconds[to], strict=True)])

        needed = self.training.operations
        ours = needed.policy + needed.reference
        return {f"{name}_s": spread(values) for name, values in seconds.items()} | {
            "step_over_bare_loop": ratio("ours", "bare"),
            "speedup_over_public": ratio("public", "ours"),
            "speedup_cached_reference": ratio("public", "cached"),
            "allowed_over_public": (ours + needed.encoding + needed.text) / ours,
            "allowed_cached_reference": (ours + needed.encoding + needed.text) / needed.policy,
            "tflop_a_pair": {name: count / 1e12 for name, count in needed._asdict().items()},
        }

    def memory(self) -> dict[str, float]:
        """GiB at the peak of an update: as the plan foretells and as the allocator says."""
        from dpo_sd.forecast.counting import GIB
        from dpo_sd.forecast.measuring import measured

        really = measured(self.training, self.hardware.device)
        return {"planned": self.training.peak_of_update / GIB, "measured": really / GIB}

    def _reference(self) -> Any:
        """A cache that knows the reference's errors of the one draw that each pair has."""
        import torch

        from dpo_sd.losses import PairErrors
        from dpo_sd.training.reference_cache import ReferenceErrors

        kept = ReferenceErrors(None, self.samples.contents, draws=1)
        n = len(self.samples)
        kept.put(list(range(n)), [0] * n, PairErrors(torch.ones(n), torch.ones(n)))
        return kept

    def ours(self, reference: Any = None) -> list[float]:
        """Seconds per update of the trainer and the metrics of a real run."""
        import lightning as L

        from dpo_sd.callbacks.metrics import Metrics
        from dpo_sd.callbacks.watcher import Run
        from dpo_sd.data.datamodule import DataModule
        from dpo_sd.data.source import PreparedData
        from dpo_sd.models.sampling import Sampler
        from dpo_sd.training.step import DiffusionModule
        from dpo_sd.training.trainer import make_trainer

        class Clock(L.Callback):
            def on_train_start(self, *_: Any) -> None:
                self.ends = [time.perf_counter()]

            def on_train_batch_end(self, *_: Any) -> None:
                _synchronise()
                self.ends.append(time.perf_counter())

        clock, run, seed = Clock(), Path(self._folder.name), self.cfg.seed
        metrics = Metrics(log_every=1, validate_every=0)
        trainer = make_trainer(self.cfg, self.hardware, run, 1, [metrics, clock])
        module = DiffusionModule(
            self.model, self.loss, self.optimizer, self.case.updates, seed, reference_cache=reference
        )
        module.set_training(True)
        source: Any = type("NoDropout", (), {"caption_dropout": 0.0})
        data = DataModule(
            PreparedData(self.samples, self.samples, [], []),
            source,
            Sampler(),
            self.case.pairs,
            self.case.pairs,
            seed,
            num_train_timesteps=1000,
            factor=self.model.factor,
            draws_per_pair=None if reference is None else 1,
            num_workers=self.hardware.num_workers,
        )
        metrics.run = Run(trainer, module, data)
        trainer.fit(module, datamodule=data)
        return [end - start for start, end in zip(clock.ends[:-1], clock.ends[1:], strict=True)]

    def bare(self) -> list[float]:
        """Seconds per update of the same operations and nothing else: batches lie ready, nothing is logged."""
        import torch

        from dpo_sd.lora.adapters import policy_parameters, reference

        model, device = self.model, torch.device(self.hardware.device)
        batches = self.batches()
        unet: Any = model.unet
        unet.to(device).train()
        parameters = policy_parameters(model)
        adam, schedule = self.optimizer.build(parameters, self.case.updates)
        seconds = []
        for batch in batches:
            latents = torch.cat([batch.chosen, batch.rejected]).to(device)
            noise, timesteps = batch.noise.to(device).repeat(2, 1, 1, 1), batch.timesteps.to(device).repeat(2)
            hidden, added = self.told(batch, device)
            _synchronise()
            start = time.perf_counter()
            adam.zero_grad()
            with self.autocast():
                noisy = model.noise_scheduler.add_noise(latents, noise, timesteps)
                with torch.no_grad(), reference(model):
                    frozen = unet(noisy, timesteps, hidden, added_cond_kwargs=added).sample
                policy = unet(noisy, timesteps, hidden, added_cond_kwargs=added).sample
            self.step(policy, frozen, noise, parameters, adam, schedule)
            seconds.append(time.perf_counter() - start)
        return seconds

    def batches(self) -> list[Any]:
        """Those of the updates, as our training takes them."""
        from dpo_sd.data.batches import UpdateOrder, Visits, stack

        visits, pairs = Visits(self.samples, self.cfg.seed, 1000, self.model.factor), self.case.pairs
        order = UpdateOrder(len(self.samples), self.cfg.seed, range(self.case.updates), pairs, pairs)
        return [stack([visits[visit] for visit in update])[0] for update in order]

    def told(self, batch: Any, device: torch.device) -> tuple[Any, dict[str, Any] | None]:
        """What the UNet is told beside the latents, for both pictures of each pair: hidden states of the prompts
        (2·pairs, tokens, width), and for SDXL pooled ones and sizes.
        """
        import torch

        hidden, pooled = batch.embeds
        if pooled is None:
            return hidden.to(device).repeat(2, 1, 1), None
        ids = torch.cat([batch.chosen_time_ids, batch.rejected_time_ids]).to(device)
        return hidden.to(device).repeat(2, 1, 1), {"text_embeds": pooled.to(device).repeat(2, 1), "time_ids": ids}

    def autocast(self) -> Any:
        import torch

        half = self.hardware.half
        return torch.autocast(torch.device(self.hardware.device).type, half, enabled=half is not None)

    def step(self, policy: Any, frozen: Any, noise: Any, parameters: Any, adam: Any, schedule: Any) -> None:
        """Loss, gradients and update, written out."""
        import torch

        e_w, e_l = (policy.float() - noise).square().mean(dim=(1, 2, 3)).chunk(2)
        r_w, r_l = (frozen.float() - noise).square().mean(dim=(1, 2, 3)).chunk(2)
        margin = 0.5 * self.loss.beta * ((r_w - e_w) - (r_l - e_l))
        (-torch.nn.functional.logsigmoid(margin).mean()).backward()
        torch.nn.utils.clip_grad_norm_([p for group in parameters.values() for p in group], 1.0)
        adam.step()
        schedule.step()
        _synchronise()


class _PublicWay:
    """The same algorithm as public scripts run it: VAE and text encoders in every step, a second UNet as reference."""

    def __init__(self, bench: Bench):
        self.bench = bench
        self.second: Any = copy.deepcopy(bench.model.unet)
        self.second.requires_grad_(False)
        self.second.disable_adapters()
        if bench.hardware.half is not None:
            bench.model.halve_text(bench.hardware.half)

    def updates(self) -> list[float]:
        """Seconds per update; afterwards only the policy is on the device."""
        model = self.bench.model
        with model.working(self.second, model.vae, *model.text_encoders):
            return self._updates()

    def _updates(self) -> list[float]:
        import torch

        from dpo_sd.lora.adapters import policy_parameters

        bench, model = self.bench, self.bench.model
        device = torch.device(bench.hardware.device)
        unet: Any = model.unet
        unet.to(device).train()
        parameters = policy_parameters(model)
        adam, schedule = bench.optimizer.build(parameters, bench.case.updates)
        pairs, seconds = bench.case.pairs, []
        length = model.text_encoders[0].config.max_position_embeddings
        tokens = torch.randint(0, model.text_encoders[0].config.vocab_size - 2, (pairs, length))
        for batch in bench.batches():
            pixels = torch.cat([side[:pairs] for side in bench.pixels])
            _synchronise()
            start = time.perf_counter()
            adam.zero_grad()
            with bench.autocast():
                with torch.no_grad():
                    latents = model.encode_pixels(pixels.to(device)).float()
                    for encoder in model.text_encoders:
                        encoder(tokens.to(device), output_hidden_states=True)
                noise, timesteps = batch.noise.to(device).repeat(2, 1, 1, 1), batch.timesteps.to(device).repeat(2)
                hidden, added = bench.told(batch, device)
                noisy = model.noise_scheduler.add_noise(latents, noise, timesteps)
                policy = unet(noisy, timesteps, hidden, added_cond_kwargs=added).sample
                with torch.no_grad():
                    frozen = self.second(noisy, timesteps, hidden, added_cond_kwargs=added).sample
            bench.step(policy, frozen, noise, parameters, adam, schedule)
            seconds.append(time.perf_counter() - start)
        return seconds


def random_samples(model: StableDiffusion, case: Case) -> tuple[list[torch.Tensor], PreparedSamples]:
    """Pixels of both sides in [-1, 1], and the same pairs as samples in memory."""
    import numpy as np
    import torch

    from dpo_sd.data.batches import Latents, PreparedSamples, Prompts
    from dpo_sd.forecast.workload import POOLED, hidden_shape

    n, side, latent = max(case.pairs, 4), case.resolution, case.resolution // model.factor
    pixels = [torch.rand(case.pairs, 3, side, side) * 2 - 1 for _ in range(2)]
    pooled = torch.randn(2, POOLED) if model.is_xl else None
    time_ids = np.tile(np.array([side, side, 0, 0, side, side], np.int32), (n, 1))
    return pixels, PreparedSamples(
        chosen=Latents(torch.randn(n, 4, latent, latent), time_ids),
        rejected=Latents(torch.randn(n, 4, latent, latent), time_ids),
        prompts=Prompts(["a prompt"], np.zeros(n, int), torch.randn(2, *hidden_shape(model)), pooled),
        label=np.ones(n, np.float32),
        weight=np.ones(n, np.float32),
        sample_ids=np.arange(n),
    )


def loading_rate(folder: Path, n: int = 2000) -> float:
    """Pairs per second that one process reads from the cache and gives noise and a timestep, at SD 1.5's size."""
    import numpy as np
    import torch

    from dpo_sd.data.batches import Latents, PreparedSamples, Prompts, Visits, stack
    from dpo_sd.files.tensors import TensorStore

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        store = TensorStore(Path(place), torch.float16)
        keys = [f"{row:024x}" for row in range(2 * n)]
        for key in keys:
            store.put(key, torch.randn(4, 64, 64))
        store.flush()
        time_ids = np.zeros((n, 6), np.int32)
        sides = [Latents(store.rows(keys[start::2]), time_ids) for start in (0, 1)]
        texts = Prompts(["a prompt"], np.zeros(n, int), torch.randn(2, 77, 768))
        ones = np.ones(n, np.float32)
        visits = Visits(PreparedSamples(sides[0], sides[1], texts, ones, ones, np.arange(n)), 0, 1000)
        start = time.perf_counter()
        for row in range(0, n, 4):
            stack([visits[row + k, 0] for k in range(4)])
        return n / (time.perf_counter() - start)


def cost(basis: Case, cfg: DictConfig) -> dict[str, float]:
    """Seconds per update of a case as one thing changes: pairs, resolution, rank."""
    rank = cfg.lora.rank
    changed: dict[str, tuple[Case, int]] = {
        f"{basis}, rank {rank}": (basis, rank),
        "a quarter of the pairs": (basis._replace(pairs=max(1, basis.pairs // 4)), rank),
        "twice the resolution": (basis._replace(resolution=2 * basis.resolution), rank),
        "eight times the rank": (basis, 8 * rank),
    }
    seconds = {}
    for name, (case, rank) in changed.items():
        bench = Bench(case, OmegaConf.merge(cfg, {"lora": {"rank": rank, "alpha": float(rank)}}))  # type: ignore[arg-type]
        bench.ours()  # warms up
        seconds[name] = statistics.median(bench.ours())
        print(f"{name:<44}{seconds[name]:8.3f} s an update", flush=True)
    return seconds


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Median, lowest and highest; None where one is no number."""
    if any(map(math.isnan, values)):
        return None
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def _synchronise() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _print(title: str, rows: dict[str, Any]) -> None:
    print(f"\n{title}")
    for name in (*(name for name in rows if name.endswith("_s")), *CLAIMS):
        row = rows[name]
        told = "runs out of memory" if row is None else f"{row['median']:9.4f}  [{row['low']:.4f}, {row['high']:.4f}]"
        print(f"  {name:<26}{told}")
    for name in ("allowed_over_public", "allowed_cached_reference"):
        print(f"  {name:<26}{rows[name]:9.4f}  by counts of operations")
    planned, really = rows["memory_gib"]["planned"], rows["memory_gib"]["measured"]
    foretold = f"{planned:9.4f} planned, {really:.4f} measured: {planned / really:.3f} of it"
    print(f"  peak of an update, GiB    {foretold}", flush=True)


if __name__ == "__main__":
    main()
