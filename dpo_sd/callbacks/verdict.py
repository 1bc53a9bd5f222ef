"""Did it get better? Base and policy draw the same held-out prompts with the same seeds, and a judge compares them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
import numpy as np

from dpo_sd.errors import UserError
from dpo_sd.judges.judge import Judge
from dpo_sd.lora.adapters import using
from dpo_sd.noise import check_uint64, image_seed
from dpo_sd.statistics import WinRate, mean_difference, minimal_detectable_rate, win_rate, win_shares
from dpo_sd.training.step import DiffusionModule


class Verdict(L.Callback):
    """After the last update, the win rate of the policy over its reference on prompts that training has not seen.

    Args:
        n_prompts: how many held-out prompts, at least 2.
        seeds_per_prompt: pictures per prompt and model, at least 1; with 2 or more, the reference is also compared with
            itself under other seeds (A/A), which shows what a win rate of two equal models looks like here.
        seed: of the pictures.
    """

    def __init__(self, n_prompts: int = 128, seeds_per_prompt: int = 2, seed: int = 0):
        if n_prompts < 2:
            raise UserError(f"n_prompts must be at least 2, got {n_prompts}")
        if seeds_per_prompt < 1:
            raise UserError(f"seeds_per_prompt must be at least 1, got {seeds_per_prompt}")
        check_uint64("seed", seed)
        self.n_prompts, self.seeds_per_prompt, self.seed = n_prompts, seeds_per_prompt, seed
        self.result: dict[str, Any] | None = None

    def promise(self, judge: Judge | None, held_out_prompts: Sequence[str]) -> str:
        """What so many prompts can show, to be said before the training."""
        if judge is None:
            return "none: only people can judge this data; see val/reward_accuracy and the samples"
        n = min(self.n_prompts, len(held_out_prompts))
        fewer = "" if n == self.n_prompts else f" (there are no {self.n_prompts})"
        rate = minimal_detectable_rate(n)
        if rate > 0.995:
            return f"{n} held-out prompts{fewer} cannot tell any win rate from chance"
        return f"on {n} held-out prompts{fewer}, a win rate of {rate:.0%} is told from chance with 80 % power"

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        judge: Judge | None = data.source.judge
        if trainer.global_step < trainer.max_steps or not trainer.is_global_zero or judge is None:
            return
        assert isinstance(pl_module, DiffusionModule)
        held_out = data.data.held_out_prompts[: self.n_prompts]
        prompts = [prompt for prompt in held_out for _ in range(self.seeds_per_prompt)]
        seeds = [image_seed(self.seed, prompt, 1, k) for prompt in held_out for k in range(self.seeds_per_prompt)]
        pictures = {}
        for which in ("reference", "policy"):
            with using(pl_module.model, which):
                pictures[which] = data.sampler.draw(pl_module.model, prompts, seeds, f"verdict: {which}")

        def by_prompt(scores: list[float]) -> np.ndarray:
            return np.array(scores).reshape(len(held_out), -1)

        before, after = (by_prompt(judge.scores(pictures[which], prompts)) for which in pictures)
        first, second = (judge.properties(pictures[which], prompts) for which in pictures)
        rate = win_rate(win_shares(after, before))
        self.result = {
            "win_rate": rate.rate,
            "low": rate.low,
            "high": rate.high,
            "n_prompts": len(held_out),
            "seeds_per_prompt": self.seeds_per_prompt,
            "judge": judge.name,
            "score_before": float(before.mean()),
            "score_after": float(after.mean()),
            "properties": {
                name: {"before": float(np.mean(first[name])), "after": float(np.mean(second[name]))}
                | mean_difference(by_prompt(first[name]), by_prompt(second[name]))._asdict()
                for name in first
            },
        }
        if self.seeds_per_prompt > 1:
            # each picture against another seed of its own prompt and model
            same = win_rate(win_shares(before[:, 1:], before[:, :-1]))
            self.result["a_a"] = same._asdict()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.result is None:  # a run that was killed after its last update has no training to end
            self.on_train_end(trainer, pl_module.to(trainer.strategy.root_device))

    def report(self) -> str:
        """The result in words; empty before there is one."""
        if self.result is None:
            return ""
        r = self.result
        rate = WinRate(r["win_rate"], r["low"], r["high"], r["n_prompts"])
        lines = [
            f"The policy wins {rate} against its reference on held-out prompts.",
            f"  judge         {r['judge']}",
            f"  score         {r['score_before']:.2f} → {r['score_after']:.2f}",
        ]
        for name, p in r["properties"].items():
            change = f"{p['mean']:+.3f} [{p['low']:+.3f}, {p['high']:+.3f}]"
            lines.append(f"  {name:<13} {p['before']:.3f} → {p['after']:.3f}  change {change}")
        if "a_a" in r:
            lines.append(f"  A/A control   {WinRate(**r['a_a'])}: the reference against itself, other seeds")
        return "\n".join(lines)
