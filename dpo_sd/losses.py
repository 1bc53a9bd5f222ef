"""Losses on denoising errors: they take numbers, return one number per sample and never call a model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_sd.errors import UserError

PredictionType = Literal["epsilon", "v_prediction"]
HuberSchedule = Literal["constant", "snr"]


class PairErrors(NamedTuple):
    """Denoising errors of one network on the images of a batch, as `squared_error` gives them.

    Args:
        chosen: (n,), errors on the preferred images, x^w in the paper, or on single images.
        rejected: (n,), errors on the other images, x^l in the paper, at the same noise and timestep; empty, (0,), for
            single images.
    """

    chosen: Tensor
    rejected: Tensor


class Residuals(NamedTuple):
    """Residuals of one network on the images of a batch, as `residual` gives them, without min-SNR weights.

    Args:
        chosen: (n, 4, h, w), fp32, residuals on the preferred images, or on single images.
        rejected: (n, 4, h, w), fp32, residuals on the other images; (0, 4, h, w) for single images.
    """

    chosen: Tensor
    rejected: Tensor


class LossInputs(NamedTuple):
    """Everything that a loss may look at, for the n pairs or single images of a batch.

    Args:
        policy: errors of the trained network, which carry gradients.
        reference: errors of the frozen reference on the same noisy latents; None where the loss needs no reference.
        label: (n,), the probability in [0, 1] that the chosen image is the better one; 0.5 is a tie; None means 1
            everywhere.
        timesteps: (n,), int64, in [0, length of the noise schedule).
        policy_residuals, reference_residuals: residuals of the two networks, where the loss declares
            `needs_residuals`; None elsewhere.
    """

    policy: PairErrors
    reference: PairErrors | None = None
    label: Tensor | None = None
    timesteps: Tensor | None = None
    policy_residuals: Residuals | None = None
    reference_residuals: Residuals | None = None

    @property
    def margin(self) -> Tensor:
        """`reward_margin` of policy and reference: (pairs,).

        Raises:
            ValueError: if there is no reference, or no rejected image.
        """
        if self.reference is None:
            raise ValueError("a margin needs a reference: declare needs_reference = True")
        return reward_margin(self.policy, self.reference)


def residual(model_pred: Tensor, target: Tensor) -> Tensor:
    """Prediction minus target in float32, whatever the precision of the inputs: (batch, C, H, W).

    Args:
        model_pred, target: (batch, C, H, W), of equal shape.

    Raises:
        ValueError: if the shapes differ.
    """
    _check_same_shape(model_pred=model_pred, target=target)
    return model_pred.float() - target.float()


def squared_error(residuals: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean square of each sample's residual: (batch,).

    Args:
        residuals: (batch, C, H, W), as `residual` gives them.
        weights: (batch, 1, H, W), factor of each pixel's square; the mean is not divided by it; None is 1.
    """
    squares = residuals.square()
    return (squares if weights is None else squares * weights).flatten(1).mean(1)


def pseudo_huber_error(residuals: Tensor, c: float | Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean pseudo-Huber loss of each sample's residual, 2c(√(r² + c²) − c): (batch,).

    For small residuals it is the square, for large ones it grows linearly, so that outliers pull less (Charbonnier et
    al. 1997; for diffusion models Khrapov et al. 2024, arXiv:2403.16728).

    Args:
        residuals: (batch, C, H, W), as `residual` gives them.
        c: residual between the two, positive; or one for each sample, (batch, 1, 1, 1).
        weights: as in `squared_error`.
    """
    # r² / (√(r² + c²) + c) is √(r² + c²) − c without its rounding where r is small
    squares = residuals.square()
    values = 2 * c * squares / ((squares + c * c).sqrt() + c)
    return (values if weights is None else values * weights).flatten(1).mean(1)


def huber_thresholds(snr: Tensor, c: float) -> Tensor:
    """Thresholds of the pseudo-Huber loss that fall from 1 without noise to c in noise alone: (batch, 1, 1, 1).

    (1 − c) / (1 + σ)² + c, where σ² is 1/SNR (Khrapov et al. 2024, arXiv:2403.16728, as diffusers has it).

    Args:
        snr: (batch,), alpha_t² / sigma_t² at each sample's timestep, at least 0.
        c: the threshold in noise alone, in (0, 1).
    """
    root = snr.sqrt()
    return ((1 - c) * (root / (1 + root)).square() + c).view(-1, 1, 1, 1)  # in a form that is not 1/0 at snr = 0


def reward_margin(policy: PairErrors, reference: PairErrors) -> Tensor:
    """Improvement of the policy on the reference for the chosen image, less that for the rejected one.

    Args:
        policy, reference: errors of the two networks on the same noisy latents, each (pairs,).

    Returns:
        (pairs,); a margin above zero means that the policy ranks the pair rightly.

    Raises:
        ValueError: if the four shapes differ.
    """
    _check_same_shape(
        policy_chosen=policy.chosen,
        policy_rejected=policy.rejected,
        reference_chosen=reference.chosen,
        reference_rejected=reference.rejected,
    )
    return (reference.chosen - policy.chosen) - (reference.rejected - policy.rejected)


class Loss:
    """Base class of group `loss`: declares what the training step prepares, and returns one value per sample.

    A loss of your own overrides `__call__` and the declarations that differ; `**common` in its constructor hands on
    the settings below.

    Args:
        min_snr_gamma: cap on the signal-to-noise ratio for `min_snr_weights`, which the training step multiplies into
            the errors of policy and reference alike; positive, 5 in the paper; None trains on unweighted errors.
        reference: "live" runs the reference at every visit, "cached" once for each of a sample's draws.
        draws_per_pair: noises and timesteps of a sample, taken in turns, in [1, 1000]; None makes every visit a new
            one.
        huber_c: makes the errors of policy and reference pseudo-Huber ones, linear in residuals far above it, positive,
            0.1 for example; None leaves them squares.
        huber_schedule: "constant" has huber_c at every timestep; with "snr" it is that of noise alone, and 1 without
            noise, see `huber_thresholds`.

    Raises:
        UserError: if a value is out of range, or if a cached reference would never be read.
    """

    needs_pairs: ClassVar[bool] = True  # False takes single images, and of pairs the chosen ones
    needs_reference: ClassVar[bool] = True  # False saves the pass of the reference
    needs_residuals: ClassVar[bool] = False

    def __init__(
        self,
        min_snr_gamma: float | None = None,
        reference: Literal["live", "cached"] = "live",
        draws_per_pair: int | None = None,
        huber_c: float | None = None,
        huber_schedule: HuberSchedule = "constant",
    ) -> None:
        self.min_snr_gamma = _checked_gamma(min_snr_gamma)
        if huber_c is not None and not 0 < huber_c < math.inf:
            raise UserError(f"huber_c must be positive and finite, or null for squared errors, got {huber_c}")
        if huber_schedule not in get_args(HuberSchedule):
            raise UserError(f"unknown huber_schedule {huber_schedule!r}: use {' or '.join(get_args(HuberSchedule))}")
        if huber_schedule == "snr" and (huber_c is None or huber_c >= 1):
            raise UserError(
                f"huber_schedule=snr falls from 1 to huber_c: give one below 1, 0.1 for example; got {huber_c}"
            )
        self.huber_c, self.huber_schedule = huber_c, huber_schedule
        if draws_per_pair is not None and not 1 <= draws_per_pair <= 1000:
            raise UserError(
                f"draws_per_pair must be between 1 and 1000, or null for a new one at each visit, got {draws_per_pair}"
            )
        if reference == "cached":
            _check_cached_reference(type(self), draws_per_pair)
        self.reference = reference
        self.draws_per_pair = draws_per_pair

    def __call__(self, inputs: LossInputs) -> Tensor | tuple[Tensor, Mapping[str, Tensor]]:
        """One loss per sample, (n,), which the training step averages; with named values to log, each (n,), if any.

        Args:
            inputs: errors of n pairs or single images, with what the declarations ask for.
        """
        raise NotImplementedError


class SFTLoss(Loss):
    """Denoising loss of supervised fine-tuning: the error itself (Ho et al. 2020, arXiv:2006.11239, eq. 14).

    Args:
        min_snr_gamma, huber_c, huber_schedule: as in `Loss`.

    Raises:
        UserError: if a value is out of range.
    """

    needs_pairs = False
    needs_reference = False

    def __init__(
        self,
        min_snr_gamma: float | None = None,
        huber_c: float | None = None,
        huber_schedule: HuberSchedule = "constant",
    ) -> None:
        super().__init__(min_snr_gamma, huber_c=huber_c, huber_schedule=huber_schedule)

    def __call__(self, inputs: LossInputs) -> Tensor:
        """The errors on the chosen or single images: (n,)."""
        return inputs.policy.chosen


BetaConvention = Literal[
    "diffusion-dpo",
    "diffusers-sdxl",
    "diffusers-sd15",
    "onetrainer",
    "diffusion-npo",
    "diffusion-kto",
    "invoke-training",
]
_HALVED = ("diffusion-dpo", "diffusers-sdxl")  # multiply the margin by beta/2; the others by beta


class DiffusionDPOLoss(Loss):
    """Diffusion-DPO objective, one value per pair (Wallace et al. 2023, arXiv:2311.12908, eq. 14).

    Args:
        beta: strength of the tie to the reference, positive.
        label_smoothing: assumed share of wrong labels, in [0, 0.5) (cDPO).
        min_snr_gamma, reference, draws_per_pair, huber_c, huber_schedule: as in `Loss`.
        beta_convention: the code base whose beta this is. "diffusion-dpo", the paper's released code, with which InPO,
            SafetyDPO and SDPO agree, and "diffusers-sdxl" multiply the margin by beta/2; "diffusers-sd15",
            "onetrainer", "diffusion-npo", "diffusion-kto" and "invoke-training" by beta, so that half the number means
            the same. For invoke-training this is exact at its batch size 1, for it averages over the batch before the
            logsigmoid. SimpleTuner sums over the C·H·W numbers of a latent: its beta times that count, 16384 for
            SD 1.5 at 512 pixels, is the beta of "diffusion-dpo".

    Raises:
        UserError: if a value is out of range, or if a cached reference would never be read.
    """

    def __init__(
        self,
        beta: float = 5000.0,
        label_smoothing: float = 0.0,
        min_snr_gamma: float | None = None,
        reference: Literal["live", "cached"] = "live",
        draws_per_pair: int | None = None,
        beta_convention: BetaConvention = "diffusion-dpo",
        huber_c: float | None = None,
        huber_schedule: HuberSchedule = "constant",
    ) -> None:
        if not 0 < beta < math.inf:
            raise UserError(f"beta must be positive and finite, got {beta}")
        if not 0 <= label_smoothing < 0.5:
            raise UserError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")
        if beta_convention not in get_args(BetaConvention):
            raise UserError(
                f"unknown beta_convention {beta_convention!r}: use one of {', '.join(get_args(BetaConvention))}"
            )
        super().__init__(min_snr_gamma, reference, draws_per_pair, huber_c, huber_schedule)
        self.beta = beta if beta_convention in _HALVED else 2 * beta
        self.label_smoothing = label_smoothing

    def __call__(self, inputs: LossInputs) -> Tensor:
        """One loss per pair, (pairs,); ln 2 wherever the policy equals the reference.

        Args:
            inputs: errors of policy and reference on pairs, and their labels.

        Raises:
            ValueError: if the shapes differ.
        """
        margin = inputs.margin
        label = torch.ones_like(margin) if inputs.label is None else inputs.label
        _check_same_shape(label=label, margin=margin)
        label = label * (1 - self.label_smoothing) + (1 - label) * self.label_smoothing
        logits = 0.5 * self.beta * margin  # half: the paper's released code uses beta/2 on mean-squared errors
        return -label * F.logsigmoid(logits) - (1 - label) * F.logsigmoid(-logits)


def min_snr_weights(snr: Tensor, gamma: float, prediction_type: PredictionType) -> Tensor:
    """Min-SNR weights (Hang et al. 2023, arXiv:2303.09556), to multiply errors with, never losses: the shape of snr.

    Args:
        snr: (batch,), alpha_t² / sigma_t² at each sample's timestep, at least 0.
        gamma: cap on the signal-to-noise ratio, positive.
        prediction_type: quantity that the network predicts.

    Raises:
        UserError: if gamma is out of range or prediction_type is unknown.
    """
    _checked_gamma(gamma)
    if prediction_type == "epsilon":
        return (gamma / snr).clamp(max=1)  # min(snr, gamma) / snr, in the form that is not 0/0 at snr = 0
    if prediction_type == "v_prediction":
        return snr.clamp(max=gamma) / (snr + 1)
    raise UserError(
        f"min-SNR weights know the prediction types {', '.join(get_args(PredictionType))}, got {prediction_type}"
    )


def _check_cached_reference(kind: type[Loss], draws_per_pair: int | None) -> None:
    if not kind.needs_reference:
        raise UserError(f"{kind.__name__} has no reference to be cached: leave out loss.reference=cached")
    if kind.needs_residuals:
        raise UserError(f"reference=cached keeps errors, but {kind.__name__} needs residuals: use loss.reference=live")
    if draws_per_pair is None:
        raise UserError("reference=cached needs draws that come again: add loss.draws_per_pair=4, for example")


def _checked_gamma(gamma: float | None) -> float | None:
    if gamma is not None and not 0 < gamma < math.inf:
        raise UserError(f"min_snr_gamma must be positive and finite, got {gamma}")
    return gamma


def _check_same_shape(**tensors: Tensor) -> None:
    # broadcasting (pairs, 1) against (pairs,) would give pairs² numbers that average to something plausible
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"shapes must be equal: {shapes}")
