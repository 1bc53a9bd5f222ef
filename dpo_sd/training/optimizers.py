"""Optimisers of the adapters' parameters, each with its learning-rate schedule."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from dpo_sd.errors import UserError, check_range

if TYPE_CHECKING:
    from torch.nn import Parameter
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

Schedule = Literal["constant", "cosine", "linear", "cosine_with_restarts", "polynomial"]


class AdamW:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101).

    `finds_step_size` says that lr is only a factor on a step size that the optimiser finds: a recipe's learning rate,
    `${adamw_rate:1e-4}` in its file, is none of its settings then.

    Args:
        lr: learning rate after the warm-up, positive.
        betas: decay rates of the two running means, each in [0, 1).
        eps: added to the denominator, positive.
        weight_decay: decoupled from the gradient, at least 0.
        schedule: course of lr after the warm-up, as in `diffusers.optimization`; all but "constant" end near 0.
        warmup_steps: updates over which lr rises from 0, at least 0.
        text_encoder_lr: learning rate of text encoders where they are trained, positive; None takes lr.
        cycles: how often "cosine_with_restarts" begins anew, at least 1.
        power: exponent of "polynomial", positive; 1 is "linear".

    Raises:
        UserError: if a value is out of range.
    """

    finds_step_size = False

    def __init__(
        self,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        schedule: Schedule = "constant",
        warmup_steps: int = 0,
        text_encoder_lr: float | None = None,
        cycles: int = 3,
        power: float = 2.0,
    ) -> None:
        if not 0 < lr <= 1000:
            raise UserError(f"lr must be positive and at most 1000, got {lr}")
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise UserError(f"betas must be two numbers in [0, 1), got {list(betas)}")
        if not 0 < eps < math.inf:
            raise UserError(f"eps must be positive and finite, got {eps}")
        if not 0 <= weight_decay < math.inf:
            raise UserError(f"weight_decay must be at least 0 and finite, got {weight_decay}")
        if warmup_steps < 0:
            raise UserError(f"warmup_steps must be at least 0, got {warmup_steps}")
        self.lr = lr
        self.betas = (betas[0], betas[1])
        self.eps = eps
        self.weight_decay = weight_decay
        if text_encoder_lr is not None and not 0 < text_encoder_lr < math.inf:
            raise UserError(f"text_encoder_lr must be positive and finite, or null for lr, got {text_encoder_lr}")
        check_range("cycles", cycles, 1)
        if not 0 < power < math.inf:
            raise UserError(f"power must be positive and finite, got {power}")
        self.cycles, self.power = cycles, power
        self.schedule: Schedule = schedule
        self.warmup_steps = warmup_steps
        self.text_encoder_lr = text_encoder_lr

    def check(self, max_steps: int) -> None:
        """Checks what does not depend on the model, before weights load.

        Args:
            max_steps: updates of the run.

        Raises:
            UserError: if warmup_steps ≥ max_steps, or if the optimiser's package is missing.
        """
        self.check_schedule(max_steps)

    def check_schedule(self, max_steps: int) -> None:
        """Checks the schedule alone, for plans on a machine without the optimiser's package.

        Args:
            max_steps: updates of the run.

        Raises:
            UserError: if warmup_steps ≥ max_steps.
        """
        if self.warmup_steps >= max_steps:
            raise UserError(
                f"optimizer.warmup_steps must be below trainer.max_steps={max_steps}, got {self.warmup_steps}: "
                f"a tenth, {max_steps // 10}, is usual"
            )

    def state_bytes(self, n: int) -> int:
        """Bytes of optimiser state for one parameter tensor of n numbers."""
        return 8 * n

    def build(self, parameters: Mapping[str, Sequence[Parameter]], max_steps: int) -> tuple[Optimizer, LRScheduler]:
        """Builds the optimiser and its schedule, which is stepped once per update.

        Args:
            parameters: trained parameters by their network, one group each: `unet`, `text_encoder`, `text_encoder_2`.
            max_steps: updates until the schedule ends, at least 1.

        Raises:
            UserError: as `check`, and if text_encoder_lr is given without a text encoder to train.
        """
        from diffusers.optimization import get_scheduler

        self.check(max_steps)
        if self.text_encoder_lr is not None and not set(parameters) - {"unet"}:
            raise UserError("text_encoder_lr is given, but no text encoder is trained: use lora.text_encoder=true")
        text_lr = self.lr if self.text_encoder_lr is None else self.text_encoder_lr
        optimizer = self._optimizer(
            [{"params": list(own), "lr": self.lr if name == "unet" else text_lr} for name, own in parameters.items()]
        )
        # diffusers' "constant" overlooks the warm-up
        schedule = "constant_with_warmup" if self.schedule == "constant" else self.schedule
        steps = {"num_warmup_steps": self.warmup_steps, "num_training_steps": max_steps}
        scheduler = get_scheduler(schedule, optimizer, **steps, num_cycles=self.cycles, power=self.power)
        return optimizer, scheduler

    def _optimizer(self, groups: list[dict[str, Any]]) -> Optimizer:
        import torch

        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay)


class AdamW8bit(AdamW):
    """AdamW with its state in 8 bit (Dettmers et al. 2022, arXiv:2110.02861), by bitsandbytes.

    Args:
        lr, betas, eps, weight_decay, schedule, warmup_steps, text_encoder_lr, cycles, power: as in `AdamW`.

    Raises:
        UserError: if a value is out of range.
    """

    def check(self, max_steps: int) -> None:
        super().check(max_steps)
        _check_installed("bitsandbytes", "adamw8bit")

    def state_bytes(self, n: int) -> int:
        # bitsandbytes leaves small parameters in 32 bit, and keeps a scale for each 256 numbers
        return 8 * n if n < 4096 else 2 * n + 8 * -(-n // 256)

    def _optimizer(self, groups: list[dict[str, Any]]) -> Optimizer:
        from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports] - optional extra

        return AdamW8bit(groups, lr=self.lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay)


class Prodigy(AdamW):
    """Prodigy (Mishchenko and Defazio 2023, arXiv:2306.06101), which estimates one step size for all; by prodigyopt.

    Args:
        lr: factor on the estimated step size, at least 0.01; 1 in the paper.
        betas, eps, weight_decay, schedule, warmup_steps: as in `AdamW`.

    Raises:
        UserError: if a value is out of range.
    """

    finds_step_size = True

    def __init__(
        self,
        lr: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        schedule: Schedule = "constant",
        warmup_steps: int = 0,
    ) -> None:
        super().__init__(lr, betas, eps, weight_decay, schedule, warmup_steps)
        if lr < 0.01:  # a rate of AdamW's, with which nothing would be learnt
            raise UserError(
                f"lr is a factor on the step size that Prodigy finds, 1 as a rule, got {lr}: leave optimizer.lr out; "
                f"where a file sets it, write ${{adamw_rate:{lr}}} there"
            )

    def check(self, max_steps: int) -> None:
        super().check(max_steps)
        _check_installed("prodigyopt", "prodigy")

    def state_bytes(self, n: int) -> int:
        return 16 * n

    def _optimizer(self, groups: list[dict[str, Any]]) -> Optimizer:
        from prodigyopt import Prodigy  # pyright: ignore[reportMissingImports] - optional extra

        return Prodigy(
            groups,
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            safeguard_warmup=True,  # otherwise the small steps of a warm-up spoil the estimate of the step size
        )


def _check_installed(package: str, option: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"optimizer={option} needs {package}, which is not installed: "
            "run pip install -e '.[gpu]', or use optimizer=adamw"
        )
