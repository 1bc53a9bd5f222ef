"""The verdict of a training: does the policy draw better images than its reference, on prompts it has not seen?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dpo_sd.callbacks.watcher import Run, Watcher
from dpo_sd.data.prompts import read_prompts
from dpo_sd.data.splitting import essence
from dpo_sd.errors import UserError, check_range
from dpo_sd.evaluation.comparison import Comparison, compare, power, too_few
from dpo_sd.evaluation.drawing import Side, draw_sides, questions
from dpo_sd.judges.judge import Judge
from dpo_sd.noise import check_uint64


class Verdict(Watcher):
    """After the last update, the win rate of the policy over its reference on held-out prompts, by the run's judge.

    Args:
        n_prompts: number of held-out prompts, at least 2.
        seeds_per_prompt: images per prompt and side, at least 1; with 2 or more, the reference is also compared with
            itself under other seeds (A/A), which shows what a win rate of two equal models looks like here.
        seed: seed of the images, and of the split of `shapes:held_out`.
        prompts: held-out prompts to use instead of the data's own: a text file with a prompt a line, a list, or
            `shapes:held_out` (the captions that no pair of the shapes world has). Those that training has seen are left
            out.

    Raises:
        UserError: if a value is out of range or the prompts cannot be read.
    """

    def __init__(
        self,
        n_prompts: int = 128,
        seeds_per_prompt: int = 2,
        seed: int = 0,
        prompts: str | list[str] | None = None,
    ):
        check_range("n_prompts", n_prompts, 2, 100_000)
        check_range("seeds_per_prompt", seeds_per_prompt, 1, 1000)
        check_uint64("seed", seed)
        self.n_prompts, self.seeds_per_prompt, self.seed = n_prompts, seeds_per_prompt, seed
        self.prompts = None if prompts is None else read_prompts(prompts, seed)
        self.result: Comparison | None = None

    def check(self, judge: Judge | None, size: tuple[int, int], prompts: Sequence[str]) -> None:
        if judge is None:
            if self.prompts is not None:
                raise UserError("callbacks.verdict.prompts is given, but nobody judges: add judge=, or leave it out")
            return
        try:
            judge.check(size, prompts if self.prompts is None else self.prompts)
        except UserError as error:
            raise UserError(f"{judge.name} cannot judge this run: {error}") from error

    def promise(self, run: Run) -> str:
        judge, labeller = run.judge, run.data.source.labeller
        if judge is None:
            return "verdict none: only people can judge this data; see val/reward_accuracy and the samples"
        prompts, seen = self.held_out(run)
        left_out = f"; {seen} that training has seen are left out" if seen else ""
        same = "; the same judge labelled the pairs" if judge.name == labeller else ""
        return f"verdict {power(len(prompts), self.n_prompts)}{left_out}{same}"

    def held_out(self, run: Run) -> tuple[list[str], int]:
        """Prompts of the verdict, and how many were left out because training has seen them.

        Raises:
            UserError: if training has seen all of them.
        """
        if self.prompts is None:
            return run.data.data.held_out_prompts[: self.n_prompts], 0
        seen = set(map(essence, run.data.data.train.prompts.texts))
        unseen = [prompt for prompt in self.prompts if essence(prompt) not in seen]
        if not unseen:
            raise UserError("callbacks.verdict.prompts: training has seen all of them: name others, or leave them out")
        return unseen[: self.n_prompts], len(self.prompts) - len(unseen)

    def on_end(self, run: Run) -> None:
        if run.judge is None or not run.is_last or not run.is_global_zero:
            return
        prompts, seeds = questions(self.held_out(run)[0], self.seeds_per_prompt, self.seed)
        sides: tuple[Side, ...] = ("reference", "policy")
        with run.module.averaged():
            drawn = draw_sides(sides, run.module.model, run.data.sampler, prompts, seeds, "verdict")
        try:
            self.result = compare(run.judge, prompts, drawn["reference"], drawn["policy"], run.data.source.labeller)
        except Exception as error:
            self.failure = error

    def summary(self) -> dict[str, Any]:
        return {"verdict": None if self.result is None else self.result.record()}

    def report(self) -> str:
        if self.result is None:
            return ""
        few = ", which are too few to tell any win rate from chance" if too_few(self.result.win.n) else ""
        first = f"The policy wins {self.result.win} against its reference on held-out prompts{few}."
        return "\n".join([first, *self.result.lines()])
