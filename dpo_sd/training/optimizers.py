"""Optimisers of the adapters' parameters, each with its learning-rate schedule."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from dpo_sd.errors import UserError, check_range
from dpo_sd.lora.names import check_parts, having

if TYPE_CHECKING:
    from torch.nn import Parameter
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

Schedule = Literal["constant", "cosine", "linear", "cosine_with_restarts", "polynomial", "piecewise_constant"]

_NUMBER = r"\d+(\.\d*)?(e-?\d+)?"


class AdamW:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101).

    `rate_to_adamws` is the optimiser's learning rate as a share of AdamW's, which a recipe gives as
    `${adamw_rate:1e-4}`; 0 for one whose rate has a scale of its own, which its default is on.

    Args:
        lr: learning rate after the warm-up, positive.
        betas: decay rates of the two running means, each in [0, 1).
        eps: added to the denominator, positive.
        weight_decay: decoupled from the gradient, at least 0.
        schedule: course of lr after the warm-up, as in `diffusers.optimization`; all but the constant ones end near 0.
        warmup_steps: updates over which lr rises from 0, at least 0.
        text_encoder_lr: learning rate of text encoders where they are trained, positive; None takes lr.
        cycles: how often "cosine_with_restarts" begins anew, at least 1.
        power: exponent of "polynomial", positive; 1 is "linear".
        loraplus_ratio: how many times as fast the B of an adapter learns as its A, positive; 16 in LoRA+ (Hayou et al.
            2024, arXiv:2402.12354), where lr is A's.
        lr_factors: factors on lr for parts of the networks by dotted parts of their names, such as {mid_block: 0.5};
            of several that fit, the last counts. 0 leaves a part as it is.
        step_rules: factors on lr of "piecewise_constant" with the updates that they end at, and the factor of the rest:
            "1:200,0.1:400,0.01".

    Raises:
        UserError: if a value is out of range.
    """

    rate_to_adamws = 1.0
    averages = False  # whether it has an average of the weights, which `eval()` puts in their place

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
        loraplus_ratio: float = 1.0,
        lr_factors: dict[str, float] | None = None,
        step_rules: str | None = None,
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
        if not 0 < loraplus_ratio < math.inf:
            raise UserError(f"loraplus_ratio must be positive and finite, got {loraplus_ratio}")
        check_parts("lr_factors", lr_factors, (int, float))
        for part, factor in (lr_factors or {}).items():
            if not 0 <= factor < math.inf:
                raise UserError(f"lr_factors.{part} must be at least 0 and finite, got {factor}")
        if (schedule == "piecewise_constant") != (step_rules is not None):
            raise UserError("step_rules are those of schedule=piecewise_constant: give both, or none of them")
        if step_rules is not None and not re.fullmatch(rf"({_NUMBER}:\d+,)*{_NUMBER}", step_rules):
            raise UserError(f"step_rules must be like '1:200,0.1:400,0.01', got {step_rules!r}")
        if step_rules is not None and warmup_steps:
            raise UserError("step_rules say the rate of every update: leave out warmup_steps")
        self.step_rules = step_rules
        self.cycles, self.power = cycles, power
        self.loraplus_ratio, self.lr_factors = loraplus_ratio, dict(lr_factors or {})
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

    def state_bytes(self, shape: Sequence[int]) -> int:
        """Bytes of optimiser state for one parameter tensor of that shape."""
        return 8 * math.prod(shape)

    def build(self, parameters: Mapping[str, Mapping[str, Parameter]], max_steps: int) -> tuple[Optimizer, LRScheduler]:
        """Builds the optimiser and its schedule, which is stepped once per update.

        Args:
            parameters: trained parameters by their network, `unet`, `text_encoder` or `text_encoder_2`, and by their
                name there, as in `LoRAWeights`. Those of one network and learning rate are a group.
            max_steps: updates until the schedule ends, at least 1.

        Raises:
            UserError: as `check`, if text_encoder_lr is given without a text encoder to train, or if a name of
                lr_factors is part of none.
        """
        from diffusers.optimization import get_scheduler

        self.check(max_steps)
        if self.text_encoder_lr is not None and not set(parameters) - {"unet"}:
            raise UserError("text_encoder_lr is given, but no text encoder is trained: use lora.text_encoder=true")
        optimizer = self._optimizer(list(self._groups(parameters)))
        # diffusers' "constant" overlooks the warm-up
        schedule = "constant_with_warmup" if self.schedule == "constant" else self.schedule
        scheduler = get_scheduler(
            schedule,
            optimizer,
            self.step_rules,
            num_warmup_steps=self.warmup_steps,
            num_training_steps=max_steps,
            num_cycles=self.cycles,
            power=self.power,
        )
        return optimizer, scheduler

    def _groups(self, parameters: Mapping[str, Mapping[str, Parameter]]) -> Iterator[dict[str, Any]]:
        modules = {f"{network}.{name.rpartition('.lora_')[0]}" for network, own in parameters.items() for name in own}
        fitting = {part: set(having(part, modules, "lr_factors")) for part in self.lr_factors}
        text_lr = self.lr if self.text_encoder_lr is None else self.text_encoder_lr
        for network, own in parameters.items():
            groups: dict[tuple[float, bool], list[Parameter]] = {}
            for name, parameter in own.items():
                module, _, half = name.rpartition(".lora_")
                rate = self.lr if network == "unet" else text_lr
                for part, factor in reversed(self.lr_factors.items()):
                    if f"{network}.{module}" in fitting[part]:
                        rate *= factor
                        break
                rate = rate * self.loraplus_ratio if half.startswith("B") else rate
                groups.setdefault((rate, half == "magnitude_vector"), []).append(parameter)
            # a magnitude is as large as the base's: 0 is no place for it, so its weights do not decay
            for (rate, magnitudes), group in groups.items():
                yield {"params": group, "lr": rate} | ({"weight_decay": 0.0} if magnitudes else {})

    def _optimizer(self, groups: list[dict[str, Any]]) -> Optimizer:
        import torch

        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay)


class Adafactor(AdamW):
    """Adafactor (Shazeer and Stern 2018, arXiv:1804.04235), whose state of a matrix is a row and a column.

    Its steps have the size that lr says, as AdamW's have, instead of one relative to the weights: those of an adapter's
    B begin at 0.

    Args:
        lr, weight_decay, schedule, warmup_steps, text_encoder_lr, cycles, power, loraplus_ratio, lr_factors,
            step_rules: as in `AdamW`.

    Raises:
        UserError: if a value is out of range.
    """

    def __init__(
        self,
        lr: float = 1e-4,
        weight_decay: float = 0.0,
        schedule: Schedule = "constant",
        warmup_steps: int = 0,
        text_encoder_lr: float | None = None,
        cycles: int = 3,
        power: float = 2.0,
        loraplus_ratio: float = 1.0,
        lr_factors: dict[str, float] | None = None,
        step_rules: str | None = None,
    ) -> None:
        course = (schedule, warmup_steps, text_encoder_lr, cycles, power, loraplus_ratio, lr_factors, step_rules)
        super().__init__(lr, (0.9, 0.999), 1e-8, weight_decay, *course)

    def state_bytes(self, shape: Sequence[int]) -> int:
        n = math.prod(shape)
        return 4 * (n // shape[-1] + n // shape[-2]) + 4 if len(shape) > 1 else 4 * n + 4

    def _optimizer(self, groups: list[dict[str, Any]]) -> Optimizer:
        from transformers.optimization import Adafactor

        absolute = {"scale_parameter": False, "relative_step": False, "warmup_init": False}
        return Adafactor(groups, lr=self.lr, weight_decay=self.weight_decay, **absolute)


class Lion(AdamW):
    """Lion (Chen et al. 2023, arXiv:2302.06675), whose step has one size for all weights; by lion-pytorch.

    Args:
        lr: learning rate after the warm-up, positive.
        betas, weight_decay, schedule, warmup_steps, text_encoder_lr, cycles, power, loraplus_ratio, lr_factors,
            step_rules: as in `AdamW`.

    Raises:
        UserError: if a value is out of range.
    """

    rate_to_adamws = 0.2  # the paper: a third to a tenth

    def __init__(
        self,
        lr: float = 2e-5,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 5e-2,
        schedule: Schedule = "constant",
        warmup_steps: int = 0,
        text_encoder_lr: float | None = None,
        cycles: int = 3,
        power: float = 2.0,
        loraplus_ratio: float = 1.0,
        lr_factors: dict[str, float] | None = None,
        step_rules: str | None = None,
    ) -> None:
        course = (schedule, warmup_steps, text_encoder_lr, cycles, power, loraplus_ratio, lr_factors, step_rules)
        super().__init__(lr, betas, 1e-8, weight_decay, *course)

    def check(self, max_steps: int) -> None:
        super().check(max_steps)
        _check_installed("lion_pytorch", "lion")

    def state_bytes(self, shape: Sequence[int]) -> int:
        return 4 * math.prod(shape)

    def _optimizer(self, groups: list[dict[str, Any]]) -> Optimizer:
        from lion_pytorch import Lion

        return Lion(groups, lr=self.lr, betas=self.betas, weight_decay=self.weight_decay)


class ScheduleFree(AdamW):
    """Schedule-free AdamW (Defazio et al. 2024, arXiv:2405.15682), whose average needs no schedule; by schedulefree.

    Args:
        lr: learning rate after the warm-up, positive.
        betas, eps, weight_decay, warmup_steps, text_encoder_lr, loraplus_ratio, lr_factors: as in `AdamW`.
        schedule: "constant".

    Raises:
        UserError: if a value is out of range.
    """

    averages = True

    def __init__(
        self,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        schedule: Schedule = "constant",
        warmup_steps: int = 0,
        text_encoder_lr: float | None = None,
        loraplus_ratio: float = 1.0,
        lr_factors: dict[str, float] | None = None,
    ) -> None:
        rates = {"text_encoder_lr": text_encoder_lr, "loraplus_ratio": loraplus_ratio, "lr_factors": lr_factors}
        if betas[0] == 0:
            raise UserError(
                "the first of betas must be above 0: it is the share of the average where gradients are taken"
            )
        if schedule != "constant":
            raise UserError(
                f"schedule must be constant, for an average is in its place, got {schedule}: leave optimizer.schedule "
                f"out; where a file sets it, write ${{adamw_schedule:{schedule}}} there"
            )
        super().__init__(lr, betas, eps, weight_decay, schedule, warmup_steps, **rates)

    def check(self, max_steps: int) -> None:
        super().check(max_steps)
        _check_installed("schedulefree", "schedulefree")

    def _optimizer(self, groups: list[dict[str, Any]]) -> Optimizer:
        from schedulefree import AdamWScheduleFree

        settings = {"betas": self.betas, "eps": self.eps, "weight_decay": self.weight_decay}
        optimizer = AdamWScheduleFree(groups, lr=self.lr, **settings)
        optimizer.train()
        return optimizer


class AdamW8bit(AdamW):
    """AdamW with its state in 8 bit (Dettmers et al. 2022, arXiv:2110.02861), by bitsandbytes.

    Args:
        lr, betas, eps, weight_decay, schedule, warmup_steps, text_encoder_lr, cycles, power, loraplus_ratio,
            lr_factors, step_rules: as in `AdamW`.

    Raises:
        UserError: if a value is out of range.
    """

    def check(self, max_steps: int) -> None:
        super().check(max_steps)
        _check_installed("bitsandbytes", "adamw8bit")

    def state_bytes(self, shape: Sequence[int]) -> int:
        n = math.prod(shape)
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

    rate_to_adamws = 0.0

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

    def state_bytes(self, shape: Sequence[int]) -> int:
        return 16 * math.prod(shape)

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
