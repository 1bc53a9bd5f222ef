"""What a training step costs beside the arithmetic it cannot do without: `python -m dpo_sd.benchmark`."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig

from dpo_sd.config import entry_point

ROUNDS, UPDATES, WARM_UP = 6, 12, 2


@entry_point("benchmark")
def main(cfg: DictConfig) -> None:
    """Times our training against a bare loop over the same UNet and batches, in turns, in one process.

    Prints seconds per update of both and their ratio, and writes them to benchmark.json.
    """
    import torch

    from dpo_sd.errors import UserError
    from dpo_sd.files import write_json
    from dpo_sd.losses import DiffusionDPOLoss

    hardware = instantiate(cfg.hardware)
    hardware.check(preset=HydraConfig.get().runtime.choices.get("hardware"))
    loss, lora, sampler, optimizer, source, base = (
        instantiate(cfg[group]) for group in ("loss", "lora", "sampler", "optimizer", "data", "model")
    )
    if type(loss) is not DiffusionDPOLoss or loss.min_snr_gamma or cfg.trainer.gradient_clip is None:
        raise UserError("the bare loop is plain Diffusion-DPO with clipped gradients: use loss=dpo")
    torch.manual_seed(cfg.seed)
    model = base.load(hardware.weights)
    lora.attach(model.unet, cfg.seed)
    data = source.prepare(model, sampler, Path(cfg.cache_dir).expanduser())
    device = torch.device("cuda" if hardware.accelerator == "cuda" else "cpu")
    model.unet.to(device)

    ours, bare = [], []  # median seconds per update, one per round
    for _ in range(ROUNDS):  # in turns, so that whatever else the machine does strikes both
        ours.append(statistics.median(_our_updates(cfg, hardware, model, loss, optimizer, source, sampler, data)))
        bare.append(statistics.median(_bare_updates(cfg, hardware, model, loss, optimizer, data, device)))
    result = {
        "ours_s": _spread(ours),
        "bare_loop_s": _spread(bare),
        "step_over_bare_loop": _spread([a / b for a, b in zip(ours, bare, strict=True)]),
        "rounds": ROUNDS,
        "updates_per_round": UPDATES,
        "pairs_per_update": cfg.pairs_per_update,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
    }
    folder = Path(HydraConfig.get().runtime.output_dir)
    write_json(folder / "benchmark.json", result)
    for name in ("ours_s", "bare_loop_s", "step_over_bare_loop"):
        row = result[name]
        print(f"{name:<20} {row['median']:.4f}  [{row['low']:.4f}, {row['high']:.4f}]")
    print(folder / "benchmark.json")


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def _our_updates(cfg: Any, hardware: Any, model: Any, loss: Any, optimizer: Any, source: Any, sampler: Any, data: Any):
    """Seconds per update of the Lightning trainer with the metrics of a real run, warm-up left out."""
    import lightning as L
    import torch

    from dpo_sd.callbacks.metrics import Metrics
    from dpo_sd.data.datamodule import PairData
    from dpo_sd.module import DiffusionModule, quiet_lightning

    class Clock(L.Callback):
        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if (_[-1] + 1) % trainer.accumulate_grad_batches == 0:
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                self.ends.append(time.perf_counter())

    quiet_lightning()
    clock = Clock()
    trainer = L.Trainer(
        accelerator="gpu" if hardware.accelerator == "cuda" else "cpu",
        devices=1,
        precision=hardware.precision,
        max_epochs=-1,
        max_steps=UPDATES + WARM_UP,
        accumulate_grad_batches=hardware.accumulation(cfg.pairs_per_update),
        gradient_clip_val=cfg.trainer.gradient_clip,
        callbacks=[Metrics(cfg.trainer.log_every, validate_every=0), clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = DiffusionModule(model, loss, optimizer, UPDATES + WARM_UP, cfg.seed).train()
    steps = model.noise_scheduler.config["num_train_timesteps"]
    workers = hardware.num_workers
    trainer.fit(
        module,
        datamodule=PairData(
            data, source, sampler, cfg.pairs_per_update, hardware.micro_batch, cfg.seed, steps, workers
        ),
    )
    return [end - start for start, end in zip(clock.ends[WARM_UP - 1 :], clock.ends[WARM_UP:], strict=False)]


def _bare_updates(cfg: Any, hardware: Any, model: Any, loss: Any, optimizer: Any, data: Any, device: Any):
    """Seconds per update of the same operations and nothing else: batches lie ready, nothing is logged."""
    import torch

    from dpo_sd.data.batches import UpdateOrder, Visits, stack
    from dpo_sd.lora import policy_parameters, reference

    scheduler, unet = model.noise_scheduler, model.unet.train()
    visits = Visits(data.train, cfg.seed, scheduler.config["num_train_timesteps"])
    order = UpdateOrder(len(data.train), cfg.seed, range(UPDATES + WARM_UP), cfg.pairs_per_update, hardware.micro_batch)
    batches = [stack([visits[visit] for visit in batch]) for batch in order]
    batches: Any = [type(batch)(*(tensor.to(device) for tensor in batch)) for batch in batches]  # type: ignore
    accumulation = hardware.accumulation(cfg.pairs_per_update)
    parameters = policy_parameters(unet)
    adam, schedule = optimizer.build(parameters, UPDATES + WARM_UP)
    half = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(hardware.precision)
    seconds = []
    for update in range(UPDATES + WARM_UP):
        start = time.perf_counter()
        adam.zero_grad()
        for batch in batches[update * accumulation : (update + 1) * accumulation]:
            latents = torch.cat([batch.chosen, batch.rejected])
            noise, timesteps = batch.noise.repeat(2, 1, 1, 1), batch.timesteps.repeat(2)
            states = batch.prompt_embeds.repeat(2, 1, 1)
            with torch.autocast(device.type, half, enabled=half is not None):
                noisy = scheduler.add_noise(latents, noise, timesteps)
                policy = unet(noisy, timesteps, states).sample
                with torch.no_grad(), reference(unet):
                    frozen = unet(noisy, timesteps, states).sample
            e_w, e_l = (policy.float() - noise).square().mean(dim=(1, 2, 3)).chunk(2)
            r_w, r_l = (frozen.float() - noise).square().mean(dim=(1, 2, 3)).chunk(2)
            margin = 0.5 * loss.beta * ((r_w - e_w) - (r_l - e_l))
            (-torch.nn.functional.logsigmoid(margin).mean() / accumulation).backward()
        torch.nn.utils.clip_grad_norm_(parameters, cfg.trainer.gradient_clip)
        adam.step()
        schedule.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if update >= WARM_UP:
            seconds.append(time.perf_counter() - start)
    return seconds


if __name__ == "__main__":
    main()
