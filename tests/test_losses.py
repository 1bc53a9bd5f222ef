from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from dpo_sd.errors import UserError
from dpo_sd.losses import (
    DiffusionDPOLoss,
    Loss,
    LossInputs,
    PairErrors,
    SFTLoss,
    huber_thresholds,
    min_snr_weights,
    pseudo_huber_error,
    residual,
    reward_margin,
    squared_error,
)

POLICY = PairErrors(torch.tensor([0.10, 0.30, 0.25, 0.70]), torch.tensor([0.20, 0.28, 0.25, 0.40]))
REFERENCE = PairErrors(torch.tensor([0.101, 0.301, 0.25, 0.699]), torch.tensor([0.20, 0.281, 0.249, 0.402]))
NOT_POSITIVE_AND_FINITE = [0.0, -1.0, math.nan, math.inf]


def apply(loss: DiffusionDPOLoss, policy: PairErrors, reference: PairErrors, label: Tensor | None = None) -> Tensor:
    return loss(LossInputs(policy, reference, label))


def gradients(loss: DiffusionDPOLoss, policy: PairErrors, label: Tensor | None = None) -> PairErrors:
    leaves = PairErrors(*(errors.clone().requires_grad_() for errors in policy))
    apply(loss, leaves, REFERENCE, label).sum().backward()
    assert leaves.chosen.grad is not None and leaves.rejected.grad is not None
    return PairErrors(leaves.chosen.grad, leaves.rejected.grad)


# residual and squared_error


def test_squared_error_is_the_mean_square_of_each_sample():
    """Residuals 1, 1, 3, 1 → (1 + 1 + 9 + 1) / 4 = 3; residuals all 2 → 4."""
    target = torch.zeros(2, 1, 2, 2)
    model_pred = torch.tensor([[[[1.0, -1.0], [3.0, 1.0]]], [[[2.0, 2.0], [-2.0, 2.0]]]])
    assert_close(squared_error(residual(model_pred, target)), torch.tensor([3.0, 4.0]))


def test_a_pseudo_huber_error_is_a_square_where_residuals_are_small_and_linear_where_they_are_large():
    small, large = torch.full((1, 4, 2, 2), 1e-3), torch.full((1, 4, 2, 2), 100.0)
    assert_close(pseudo_huber_error(small, 0.1), squared_error(small), rtol=1e-4, atol=0)
    assert_close(pseudo_huber_error(large, 0.1), torch.tensor([2 * 0.1 * (100 - 0.1)]), rtol=1e-4, atol=0)
    assert_close(pseudo_huber_error(large, 1e6), squared_error(large), rtol=1e-4, atol=0)


@pytest.mark.parametrize("c", [0.0, -1.0, float("nan"), float("inf")])
def test_a_huber_c_out_of_range_is_refused(c: float):
    with pytest.raises(UserError, match="huber_c must be positive and finite, or null"):
        SFTLoss(huber_c=c)


def test_huber_thresholds_fall_from_1_without_noise_to_c_in_noise_alone():
    """At SNR 1, σ is 1 and the threshold (1 - 0.1) / 4 + 0.1; each sample's error is one by its own threshold."""
    c = huber_thresholds(torch.tensor([1e12, 1.0, 0.0]), 0.1)
    assert_close(c, torch.tensor([1.0, 0.325, 0.1]).view(3, 1, 1, 1))
    residuals = torch.full((3, 4, 2, 2), 0.7)
    expected = torch.cat([pseudo_huber_error(residuals[:1], float(each)) for each in c.flatten()])
    assert_close(pseudo_huber_error(residuals, c), expected)


@pytest.mark.parametrize("c", [None, 1.0])
def test_a_schedule_without_a_huber_c_to_fall_to_is_refused(c: float | None):
    with pytest.raises(UserError, match=f"huber_schedule=snr falls from 1 to huber_c: .* got {c}"):
        SFTLoss(huber_c=c, huber_schedule="snr")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_predictions_give_errors_computed_in_float32(dtype: torch.dtype):
    model_pred = torch.full((1, 4, 8, 8), 300.0, dtype=dtype)  # 300² overflows float16
    target = torch.zeros(1, 4, 8, 8, dtype=dtype)
    errors = squared_error(residual(model_pred, target))
    assert errors.dtype == torch.float32
    assert_close(errors, model_pred[0, 0, 0, :1].float() ** 2)


def test_batched_errors_equal_looped_errors():
    model_pred, target = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    looped = torch.cat([squared_error(residual(model_pred[i : i + 1], target[i : i + 1])) for i in range(3)])
    assert_close(squared_error(residual(model_pred, target)), looped)


def test_a_residual_refuses_to_broadcast():
    with pytest.raises(ValueError, match=r"model_pred \(2, 4, 8, 8\), target \(1, 4, 8, 8\)"):
        residual(torch.zeros(2, 4, 8, 8), torch.zeros(1, 4, 8, 8))


# reward_margin


def test_the_margin_is_zero_when_policy_equals_reference():
    assert_close(reward_margin(POLICY, POLICY), torch.zeros(4), rtol=0, atol=0)


def test_the_margin_is_positive_when_the_policy_improves_on_the_chosen_image_only():
    better = PairErrors(REFERENCE.chosen - 0.01, REFERENCE.rejected)
    assert (reward_margin(better, REFERENCE) > 0).all()


def test_swapping_chosen_and_rejected_negates_the_margin():
    swapped = reward_margin(PairErrors(*reversed(POLICY)), PairErrors(*reversed(REFERENCE)))
    assert_close(swapped, -reward_margin(POLICY, REFERENCE))


def test_swapping_policy_and_reference_negates_the_margin():
    assert_close(reward_margin(REFERENCE, POLICY), -reward_margin(POLICY, REFERENCE))


def test_the_margin_refuses_to_broadcast():
    with pytest.raises(ValueError, match=r"reference_chosen \(4, 1\)"):
        reward_margin(POLICY, PairErrors(REFERENCE.chosen[:, None], REFERENCE.rejected[:, None]))


def test_a_margin_needs_a_reference_and_pairs():
    assert torch.equal(LossInputs(POLICY, REFERENCE).margin, reward_margin(POLICY, REFERENCE))
    with pytest.raises(ValueError, match="needs_reference"):
        _ = LossInputs(POLICY).margin
    with pytest.raises(ValueError, match=r"policy_rejected \(0,\)"):
        reward_margin(PairErrors(POLICY.chosen, torch.zeros(0)), REFERENCE)


# Loss


class OfOnesOwn(Loss):
    def __init__(self, margin: float = 1.0, **common: Any):
        super().__init__(**common)
        self.margin = margin


class NeedsNoReference(OfOnesOwn):
    needs_reference: ClassVar[bool] = False


class NeedsResiduals(OfOnesOwn):
    needs_residuals: ClassVar[bool] = True


def test_a_loss_says_only_what_differs():
    loss = OfOnesOwn(margin=2.0, min_snr_gamma=5.0, reference="cached", draws_per_pair=4)
    assert (loss.margin, loss.min_snr_gamma, loss.reference, loss.draws_per_pair) == (2.0, 5.0, "cached", 4)
    plain = OfOnesOwn()
    assert (plain.needs_pairs, plain.needs_reference, plain.needs_residuals) == (True, True, False)
    assert (plain.min_snr_gamma, plain.reference, plain.draws_per_pair) == (None, "live", None)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (NeedsNoReference, "NeedsNoReference has no reference to be cached: leave out loss.reference=cached"),
        (NeedsResiduals, "reference=cached keeps errors, but NeedsResiduals needs residuals: use loss.reference=live"),
    ],
)
def test_a_cached_reference_is_refused_where_it_would_not_be_read(kind: type[OfOnesOwn], message: str):
    with pytest.raises(UserError, match=message):
        kind(reference="cached", draws_per_pair=4)
    assert kind(draws_per_pair=4).draws_per_pair == 4


# SFTLoss


def test_the_sft_loss_is_the_error():
    assert_close(SFTLoss()(LossInputs(POLICY)), POLICY.chosen)


def test_the_sft_loss_knows_no_setting_of_a_reference():
    assert (SFTLoss().needs_pairs, SFTLoss().needs_reference, SFTLoss().reference) == (False, False, "live")
    for settings in ({"reference": "cached"}, {"draws_per_pair": 4}):
        with pytest.raises(TypeError):
            SFTLoss(**settings)  # pyright: ignore[reportArgumentType]


# DiffusionDPOLoss: identities


@pytest.mark.parametrize("beta", [1.0, 2000.0, 5000.0, 1e6])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_the_loss_is_ln_2_when_policy_equals_reference(beta: float, label_smoothing: float):
    loss = DiffusionDPOLoss(beta, label_smoothing)
    assert_close(apply(loss, POLICY, POLICY), torch.full((4,), math.log(2)))
    assert_close(apply(loss, POLICY, POLICY, torch.tensor([0.0, 0.3, 0.5, 1.0])), torch.full((4,), math.log(2)))


def test_at_the_reference_the_loss_rises_with_the_chosen_error_and_falls_with_the_rejected_error():
    gradient = gradients(DiffusionDPOLoss(), REFERENCE)
    assert (gradient.chosen > 0).all() and (gradient.rejected < 0).all()
    assert_close(gradient.chosen, torch.full((4,), 5000 / 4))  # d/de of -logsigmoid(-β/2·e) at 0
    assert_close(gradient.rejected, -gradient.chosen)


@pytest.mark.parametrize("shift", [-0.02, -0.005, 0.005, 0.02])
def test_with_hard_labels_the_gradient_signs_hold_away_from_the_reference_too(shift: float):
    gradient = gradients(DiffusionDPOLoss(beta=500), PairErrors(REFERENCE.chosen + shift, REFERENCE.rejected))
    assert (gradient.chosen > 0).all() and (gradient.rejected < 0).all()


def test_swapping_chosen_and_rejected_is_the_opposite_label():
    loss = DiffusionDPOLoss()
    swapped = apply(loss, PairErrors(*reversed(POLICY)), PairErrors(*reversed(REFERENCE)))
    assert_close(swapped, apply(loss, POLICY, REFERENCE, torch.zeros(4)))


def test_swapping_chosen_and_rejected_negates_the_logits():
    """-logsigmoid(-z) + logsigmoid(z) = z, so the difference of the two losses is z = β/2 · margin."""
    loss = DiffusionDPOLoss(beta=3000)
    swapped = apply(loss, PairErrors(*reversed(POLICY)), PairErrors(*reversed(REFERENCE)))
    assert_close(
        swapped - apply(loss, POLICY, REFERENCE), 1500 * reward_margin(POLICY, REFERENCE), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_what_policy_and_reference_share_does_not_matter(side: str):
    policy = POLICY._replace(**{side: getattr(POLICY, side) + 0.25})
    reference = REFERENCE._replace(**{side: getattr(REFERENCE, side) + 0.25})
    loss = DiffusionDPOLoss()
    assert_close(apply(loss, policy, reference), apply(loss, POLICY, REFERENCE), rtol=1e-3, atol=1e-4)


def test_soft_labels_of_one_and_no_smoothing_are_plain_dpo():
    plain = -torch.nn.functional.logsigmoid(2500 * reward_margin(POLICY, REFERENCE))
    assert_close(apply(DiffusionDPOLoss(), POLICY, REFERENCE), plain)
    assert_close(apply(DiffusionDPOLoss(label_smoothing=0.0), POLICY, REFERENCE, torch.ones(4)), plain)


def test_label_smoothing_is_a_soft_label():
    smoothed = apply(DiffusionDPOLoss(label_smoothing=0.1), POLICY, REFERENCE)
    assert_close(smoothed, apply(DiffusionDPOLoss(), POLICY, REFERENCE, torch.full((4,), 0.9)))


def test_label_smoothing_moves_soft_labels_towards_a_half():
    """0.8 · (1 - 0.1) + 0.2 · 0.1 = 0.74."""
    smoothed = apply(DiffusionDPOLoss(label_smoothing=0.1), POLICY, REFERENCE, torch.full((4,), 0.8))
    assert_close(smoothed, apply(DiffusionDPOLoss(), POLICY, REFERENCE, torch.full((4,), 0.74)))


def test_a_tie_pulls_the_policy_back_to_the_reference():
    tie = torch.full((4,), 0.5)
    assert_close(gradients(DiffusionDPOLoss(), REFERENCE, tie).chosen, torch.zeros(4))
    improved = PairErrors(REFERENCE.chosen - 0.001, REFERENCE.rejected)
    assert (gradients(DiffusionDPOLoss(), improved, tie).chosen < 0).all()


def test_with_label_smoothing_the_optimum_is_where_the_sigmoid_equals_one_minus_smoothing():
    """sigmoid(z) = 1 - a at z = ln((1 - a) / a), so margin = 2 ln 9 / β at a = 0.1."""
    policy = PairErrors(REFERENCE.chosen - 2 * math.log(9) / 5000, REFERENCE.rejected)
    gradient = gradients(DiffusionDPOLoss(label_smoothing=0.1), policy)
    assert_close(gradient.chosen, torch.zeros(4), rtol=0, atol=0.5)  # beside 1250 at the reference


def test_batched_losses_equal_looped_losses():
    """Averaging before the logsigmoid, as one public trainer does, would fail this."""
    loss = DiffusionDPOLoss()
    looped = [
        apply(loss, PairErrors(*(e[i : i + 1] for e in POLICY)), PairErrors(*(e[i : i + 1] for e in REFERENCE)))
        for i in range(4)
    ]
    assert_close(apply(loss, POLICY, REFERENCE), torch.cat(looped))


def test_gradients_accumulated_over_micro_batches_equal_those_of_one_batch():
    loss, scale = DiffusionDPOLoss(), torch.ones((), requires_grad=True)

    def backward(rows: slice) -> None:
        policy = PairErrors(*(scale * errors[rows] for errors in POLICY))
        reference = PairErrors(*(errors[rows] for errors in REFERENCE))
        (apply(loss, policy, reference).sum() / 4).backward()

    backward(slice(0, 4))
    assert scale.grad is not None
    whole, scale.grad = scale.grad, None
    backward(slice(0, 2))
    backward(slice(2, 4))
    assert_close(scale.grad, whole)


def test_summing_over_pixels_only_rescales_beta():
    elements = 16384
    summed = DiffusionDPOLoss(beta=5000 / elements)
    assert_close(
        apply(summed, PairErrors(*(e * elements for e in POLICY)), PairErrors(*(e * elements for e in REFERENCE))),
        apply(DiffusionDPOLoss(beta=5000), POLICY, REFERENCE),
        rtol=1e-3,
        atol=1e-4,
    )


# DiffusionDPOLoss: numbers and limits


def test_one_pair_worked_by_hand():
    """The policy improves by 0.001 on the chosen image and not at all on the rejected one.

    margin = (0.101 - 0.100) - (0.200 - 0.200) = 0.001, z = 5000/2 · 0.001 = 2.5,
    loss = ln(1 + exp(-2.5)) = ln 1.0820850 = 0.0788897.
    """
    policy = PairErrors(torch.tensor([0.100]), torch.tensor([0.200]))
    reference = PairErrors(torch.tensor([0.101]), torch.tensor([0.200]))
    assert_close(apply(DiffusionDPOLoss(), policy, reference), torch.tensor([0.0788897]), rtol=1e-4, atol=0)


def test_huge_margins_give_finite_losses_and_gradients():
    errors = PairErrors(torch.tensor([0.0, 1000.0, 0.0, 1000.0]), torch.tensor([1000.0, 0.0, 1000.0, 0.0]))
    label = torch.tensor([1.0, 1.0, 0.0, 0.0])
    assert_close(apply(DiffusionDPOLoss(), errors, REFERENCE, label).isfinite(), torch.ones(4, dtype=torch.bool))
    assert all(g.isfinite().all() for g in gradients(DiffusionDPOLoss(), errors, label))


def test_labels_must_have_the_shape_of_the_pairs():
    with pytest.raises(ValueError, match=r"label \(4, 1\), margin \(4,\)"):
        apply(DiffusionDPOLoss(), POLICY, REFERENCE, torch.ones(4, 1))


@pytest.mark.parametrize("beta", NOT_POSITIVE_AND_FINITE)
def test_beta_out_of_range_is_refused(beta: float):
    with pytest.raises(UserError, match=f"beta must be positive and finite, got {beta}"):
        DiffusionDPOLoss(beta=beta)


@pytest.mark.parametrize("label_smoothing", [-0.1, 0.5, 1.0, math.nan, math.inf])
def test_label_smoothing_out_of_range_is_refused(label_smoothing: float):
    with pytest.raises(UserError, match=rf"label_smoothing must be in \[0, 0.5\), got {label_smoothing}"):
        DiffusionDPOLoss(label_smoothing=label_smoothing)


@pytest.mark.parametrize("loss", [SFTLoss, DiffusionDPOLoss])
@pytest.mark.parametrize("gamma", NOT_POSITIVE_AND_FINITE)
def test_min_snr_gamma_out_of_range_is_refused(loss: type[SFTLoss] | type[DiffusionDPOLoss], gamma: float):
    with pytest.raises(UserError, match=f"min_snr_gamma must be positive and finite, got {gamma}"):
        loss(min_snr_gamma=gamma)


@pytest.mark.parametrize("draws", [0, -1, 1001])
@pytest.mark.parametrize("reference", ["live", "cached"])
def test_draws_per_pair_out_of_range_are_refused(draws: int, reference: Literal["live", "cached"]):
    with pytest.raises(UserError, match=f"draws_per_pair must be between 1 and 1000, or null .*, got {draws}"):
        DiffusionDPOLoss(reference=reference, draws_per_pair=draws)


def test_a_kept_reference_without_draws_that_come_again_is_refused():
    with pytest.raises(UserError, match=r"reference=cached needs draws that come again: add loss.draws_per_pair=4"):
        DiffusionDPOLoss(reference="cached")
    assert DiffusionDPOLoss(reference="cached", draws_per_pair=4).draws_per_pair == 4
    assert DiffusionDPOLoss().draws_per_pair is None


# min_snr_weights


def test_min_snr_weights_follow_the_paper():
    """gamma = 5. epsilon: 1/1, 5/5, 5/10. v_prediction: 1/(1+1), 5/(5+1), 5/(10+1)."""
    snr = torch.tensor([1.0, 5.0, 10.0])
    assert_close(min_snr_weights(snr, 5.0, "epsilon"), torch.tensor([1.0, 1.0, 0.5]))
    assert_close(min_snr_weights(snr, 5.0, "v_prediction"), torch.tensor([1 / 2, 5 / 6, 5 / 11]))


def test_both_prediction_types_weigh_the_error_of_the_clean_image_alike():
    """With alpha² + sigma² = 1 an error e of the clean image is snr · e in epsilon and (snr + 1) · e in v."""
    snr = torch.logspace(-3, 3, 13)
    epsilon = snr * min_snr_weights(snr, 5.0, "epsilon")
    assert_close(epsilon, (snr + 1) * min_snr_weights(snr, 5.0, "v_prediction"))


def test_min_snr_weights_are_finite_at_zero_terminal_snr():
    assert_close(min_snr_weights(torch.zeros(1), 5.0, "epsilon"), torch.ones(1))
    assert_close(min_snr_weights(torch.zeros(1), 5.0, "v_prediction"), torch.zeros(1))


def test_an_unknown_prediction_type_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match="epsilon, v_prediction, got sample"):
        min_snr_weights(torch.ones(1), 5.0, "sample")  # pyright: ignore[reportArgumentType]


# beta_convention


def test_the_beta_of_the_papers_code_is_the_default_to_the_bit():
    named = DiffusionDPOLoss(beta=3000.1, beta_convention="diffusion-dpo")
    assert torch.equal(apply(named, POLICY, REFERENCE), apply(DiffusionDPOLoss(3000.1), POLICY, REFERENCE))


@pytest.mark.parametrize(
    ("convention", "factor"),
    [
        ("diffusion-dpo", 0.5),
        ("diffusers-sdxl", 0.5),
        ("diffusers-sd15", 1.0),
        ("onetrainer", 1.0),
        ("diffusion-npo", 1.0),
        ("diffusion-kto", 1.0),
        ("invoke-training", 1.0),
    ],
)
def test_a_beta_of_another_code_base_multiplies_the_margin_as_that_code_does(convention: Any, factor: float):
    """margin = 0.001 and beta = 500: z = factor · 0.5, loss = ln(1 + exp(-z)), 0.5759394 or 0.4740770."""
    policy = PairErrors(torch.tensor([0.100]), torch.tensor([0.200]))
    reference = PairErrors(torch.tensor([0.101]), torch.tensor([0.200]))
    loss = apply(DiffusionDPOLoss(beta=500, beta_convention=convention), policy, reference)
    assert_close(loss, torch.tensor([{0.5: 0.5759394, 1.0: 0.4740770}[factor]]), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("convention", "theirs", "ours"),
    [
        ("diffusion-dpo", 5000, 5000),
        ("diffusers-sdxl", 5000, 5000),
        ("diffusers-sd15", 2500, 5000),
        ("onetrainer", 200, 400),
        ("diffusion-npo", 500, 1000),
        ("diffusion-npo", 2000, 4000),
        ("diffusion-kto", 1000, 2000),
        ("invoke-training", 5000, 10000),
    ],
)
def test_defaults_of_other_code_bases_have_known_values_here(convention: Any, theirs: float, ours: float):
    loss = DiffusionDPOLoss(beta=theirs, beta_convention=convention)
    assert loss.beta == ours
    assert torch.equal(apply(loss, POLICY, REFERENCE), apply(DiffusionDPOLoss(beta=ours), POLICY, REFERENCE))


def test_an_unknown_convention_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match=r"unknown beta_convention 'kohya'.*onetrainer"):
        DiffusionDPOLoss(500, beta_convention="kohya")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("beta", NOT_POSITIVE_AND_FINITE)
def test_a_beta_of_another_code_base_out_of_range_is_refused(beta: float):
    with pytest.raises(UserError, match=f"beta must be positive and finite, got {beta}"):
        DiffusionDPOLoss(beta, beta_convention="onetrainer")


def test_a_pixels_weight_is_a_factor_of_its_square():
    """Of four pixels with the squares 1, 4, 9, 16 the second counts half and the last not: (1 + 2 + 9) / 4."""
    residuals, weights = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]), torch.tensor([[[[1.0, 0.5], [1.0, 0.0]]]])
    assert squared_error(residuals, weights).tolist() == [3.0]
    assert squared_error(residuals, torch.ones(1, 1, 2, 2)).tolist() == squared_error(residuals).tolist() == [7.5]
