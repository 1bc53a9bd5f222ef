"""Losses on per-sample errors: numbers in, one number per example out; no model is ever called here."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_sd.errors import UserError

PredictionType = Literal["epsilon", "v_prediction"]


class PairErrors(NamedTuple):
    """Denoising errors of one network on both images of each pair, as `squared_error` gives them.

    Args:
        chosen: (pairs,), the error on the preferred image, x^w in the paper.
        rejected: (pairs,), the error on the other image, x^l in the paper, at the same noise and timestep.
    """

    chosen: Tensor
    rejected: Tensor


def squared_error(model_pred: Tensor, target: Tensor) -> Tensor:
    """Mean squared residual of each sample, computed in float32 whatever the inputs' precision: (batch,).

    Args:
        model_pred, target: (batch, C, H, W), of equal shape.

    Raises:
        ValueError: when the shapes differ.
    """
    _check_same_shape(model_pred=model_pred, target=target)
    return (model_pred.float() - target.float()).square().flatten(1).mean(1)


def reward_margin(policy: PairErrors, reference: PairErrors) -> Tensor:
    """How much more the policy improves on the reference for the chosen image than for the rejected one.

    Args:
        policy, reference: errors of the two networks on the same noisy latents, each (pairs,).

    Returns:
        (pairs,); a margin above zero means that the policy ranks the pair rightly.

    Raises:
        ValueError: when the four shapes differ.
    """
    _check_same_shape(
        policy_chosen=policy.chosen,
        policy_rejected=policy.rejected,
        reference_chosen=reference.chosen,
        reference_rejected=reference.rejected,
    )
    return (reference.chosen - policy.chosen) - (reference.rejected - policy.rejected)


class SFTLoss:
    """Denoising loss of supervised fine-tuning: the error itself (Ho et al. 2020, arXiv:2006.11239, eq. 14).

    Args:
        min_snr_gamma: cap on the signal-to-noise ratio for `min_snr_weights`, which the training step multiplies into
            the errors; positive, 5 in the paper; None trains on unweighted errors.

    Raises:
        UserError: when a value is out of range.
    """

    needs_pairs = False

    def __init__(self, min_snr_gamma: float | None = None) -> None:
        self.min_snr_gamma = _checked_gamma(min_snr_gamma)

    def __call__(self, errors: Tensor) -> Tensor:
        """One loss per sample, (batch,).

        Args:
            errors: (batch,).
        """
        return errors


class DiffusionDPOLoss:
    """Diffusion-DPO objective, one value per pair (Wallace et al. 2023, arXiv:2311.12908, eq. 14).

    Args:
        beta: strength of the tie to the reference, positive; counted as in the paper's released code, on errors that
            are means over pixels. `convert_beta` translates the betas of other code bases.
        label_smoothing: assumed share of wrong labels, in [0, 0.5) (cDPO).
        min_snr_gamma: cap on the signal-to-noise ratio for `min_snr_weights`, which the training step multiplies into
            the errors of policy and reference alike; positive, 5 in the paper; None trains on unweighted errors.
        reference: "live" asks the reference at every visit, "cached" once for each of a pair's draws.
        draws_per_pair: noises and timesteps of a pair, taken in turns, in [1, 1000]; None makes every visit a new one.

    Raises:
        UserError: when a value is out of range, and when a cached reference would never be read.
    """

    needs_pairs = True

    def __init__(
        self,
        beta: float = 5000.0,
        label_smoothing: float = 0.0,
        min_snr_gamma: float | None = None,
        reference: Literal["live", "cached"] = "live",
        draws_per_pair: int | None = None,
    ) -> None:
        if not 0 < beta < math.inf:
            raise UserError(f"beta must be positive and finite, got {beta}")
        if not 0 <= label_smoothing < 0.5:
            raise UserError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")
        self.beta = beta
        self.label_smoothing = label_smoothing
        self.min_snr_gamma = _checked_gamma(min_snr_gamma)
        if draws_per_pair is not None and not 1 <= draws_per_pair <= 1000:
            raise UserError(
                f"draws_per_pair must be between 1 and 1000, or null for a new one at each visit, got {draws_per_pair}"
            )
        if reference == "cached" and draws_per_pair is None:
            raise UserError("reference=cached needs draws that come again: add loss.draws_per_pair=4, for example")
        self.reference = reference
        self.draws_per_pair = draws_per_pair

    def __call__(self, policy: PairErrors, reference: PairErrors, label: Tensor | None = None) -> Tensor:
        """One loss per pair, (pairs,); ln 2 wherever the policy equals the reference.

        Args:
            policy, reference: errors of the two networks on the same noisy latents, each (pairs,).
            label: (pairs,), the probability in [0, 1] that the chosen image is the better one; 0.5 is a tie; None means
                1 everywhere.

        Raises:
            ValueError: when the shapes differ.
        """
        margin = reward_margin(policy, reference)
        if label is None:
            label = torch.ones_like(margin)
        _check_same_shape(label=label, margin=margin)
        label = label * (1 - self.label_smoothing) + (1 - label) * self.label_smoothing
        logits = 0.5 * self.beta * margin  # half: the paper's released code uses beta/2 on mean-squared errors
        return -label * F.logsigmoid(logits) - (1 - label) * F.logsigmoid(-logits)


def min_snr_weights(snr: Tensor, gamma: float, prediction_type: PredictionType) -> Tensor:
    """Min-SNR weights (Hang et al. 2023, arXiv:2303.09556), to multiply errors with, never losses: the shape of snr.

    Args:
        snr: (batch,), alpha_t² / sigma_t² at each sample's timestep, at least 0.
        gamma: cap on the signal-to-noise ratio, positive.
        prediction_type: what the network predicts.

    Raises:
        UserError: when gamma is out of range or prediction_type is unknown.
    """
    _checked_gamma(gamma)
    if prediction_type == "epsilon":
        return (gamma / snr).clamp(max=1)  # min(snr, gamma) / snr, in the form that is not 0/0 at snr = 0
    if prediction_type == "v_prediction":
        return snr.clamp(max=gamma) / (snr + 1)
    raise UserError(
        f"min-SNR weights know the prediction types {', '.join(get_args(PredictionType))}, got {prediction_type}"
    )


# logits = kappa * beta * margin, with errors reduced over pixels by "mean" or "sum"
_CONVENTIONS: dict[str, tuple[float, Literal["mean", "sum"]]] = {
    "diffusion-dpo": (0.5, "mean"),
    "diffusers-sdxl": (0.5, "mean"),
    "diffusers-sd15": (1.0, "mean"),
    "onetrainer": (1.0, "mean"),
    "diffusion-npo": (1.0, "mean"),
    "diffusion-kto": (1.0, "mean"),
    "invoke-training": (1.0, "mean"),
    "simpletuner": (0.5, "sum"),
}


def convert_beta(beta: float, convention: str, latent_elements: int | None = None) -> float:
    """The beta that means in `DiffusionDPOLoss` what `beta` means in another code base.

    Args:
        beta: as written for the other code base, positive.
        convention: that code base: "diffusion-dpo" (Salesforce; InPO, SafetyDPO and SDPO count alike),
            "diffusers-sdxl", "diffusers-sd15", "onetrainer", "diffusion-npo", "diffusion-kto", "invoke-training" (exact
            at its batch size 1 only, for it averages over the batch before the logsigmoid) or "simpletuner".
        latent_elements: C·H·W of one latent, 16384 for SD1.5 at 512 pixels; asked for by "simpletuner", which sums over
            pixels, and refused elsewhere.

    Raises:
        UserError: when a value is out of range, missing or of no use.
    """
    if not 0 < beta < math.inf:
        raise UserError(f"beta must be positive and finite, got {beta}")
    if convention not in _CONVENTIONS:
        raise UserError(f"unknown beta convention {convention!r}: use one of {', '.join(_CONVENTIONS)}")
    kappa, reduction = _CONVENTIONS[convention]
    if reduction == "mean":
        if latent_elements is not None:
            raise UserError(f"{convention} takes the mean over pixels: leave latent_elements out")
        return beta * kappa / 0.5
    if latent_elements is None or latent_elements < 1:
        raise UserError(
            f"{convention} sums over pixels: latent_elements must be C·H·W of one latent, got {latent_elements}"
        )
    return beta * kappa / 0.5 * latent_elements


def _checked_gamma(gamma: float | None) -> float | None:
    if gamma is not None and not 0 < gamma < math.inf:
        raise UserError(f"min_snr_gamma must be positive and finite, got {gamma}")
    return gamma


def _check_same_shape(**tensors: Tensor) -> None:
    # broadcasting (pairs, 1) against (pairs,) would give pairs² numbers that average to something plausible
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"shapes must be equal: {shapes}")
