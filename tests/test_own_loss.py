"""Losses of a user's own, each in a file outside the package, in the training step."""

from __future__ import annotations

import copy
import importlib
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from steps import PAIRS, TIMESTEPS, error, listen, make_batch, move
from torch.testing import assert_close

from dpo_sd.errors import UserError
from dpo_sd.lora.adapters import policy_parameters, reference
from dpo_sd.lora.attaching import LoRA
from dpo_sd.losses import Loss, LossInputs, PairErrors
from dpo_sd.models.base import Base
from dpo_sd.models.stable_diffusion import StableDiffusion
from dpo_sd.training.optimizers import AdamW
from dpo_sd.training.reference_cache import ReferenceErrors
from dpo_sd.training.step import OURS, DiffusionModule, evaluated

FILE = '''
from typing import Any

import torch.nn.functional as F

from dpo_sd.losses import Loss, LossInputs


class Hinge(Loss):
    """Pairs whose margin is below a threshold, by how much."""

    def __init__(self, margin: float = 1e-3, **common: Any):
        super().__init__(**common)
        self.margin = margin

    def __call__(self, inputs: LossInputs):
        missing = F.relu(self.margin - inputs.margin)
        return missing, {"satisfied": missing == 0}


class SimPO(Loss):
    """The policy's own errors with a target margin, after Meng et al. 2024 (arXiv:2405.14734)."""

    needs_reference = False

    def __init__(self, beta: float = 100.0, target: float = 0.5, **common: Any):
        super().__init__(**common)
        self.beta, self.target = beta, target

    def __call__(self, inputs: LossInputs):
        return -F.logsigmoid(self.beta * (inputs.policy.rejected - inputs.policy.chosen) - self.target)


class Late(Loss):
    """Pairs weighted by their share of the noise schedule."""

    def __call__(self, inputs: LossInputs):
        return inputs.timesteps / 1000 * -F.logsigmoid(500 * inputs.margin)
'''


@pytest.fixture
def own(tmp_path, monkeypatch) -> Iterator[ModuleType]:
    """The module of the user's file."""
    (tmp_path / "my_losses.py").write_text(FILE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield importlib.import_module("my_losses")
    del sys.modules["my_losses"]


@pytest.fixture(scope="module")
def base() -> StableDiffusion:
    return Base().load()


@pytest.fixture
def build(base) -> Callable[..., DiffusionModule]:
    """`build(loss)`: a training step whose policy has moved away from its reference."""

    def build(loss: Loss, kept: ReferenceErrors | None = None) -> DiffusionModule:
        model = replace(base, unet=copy.deepcopy(base.unet))
        LoRA(rank=2).attach(model)
        move(model)
        return DiffusionModule(model, loss, AdamW(), max_steps=10, reference_cache=kept)

    return build


def errors_by_hand(module: DiffusionModule) -> tuple[torch.Tensor, torch.Tensor]:
    """Errors of policy and reference on the chosen and the rejected image of each pair: (2, pairs) each."""

    def errors() -> torch.Tensor:
        batch = make_batch()
        sides = (batch.chosen, batch.rejected)
        return torch.stack([torch.stack([error(module, side, batch, i) for i in range(PAIRS)]) for side in sides])

    with reference(module.model):
        frozen = errors()
    return errors(), frozen


def margins(module: DiffusionModule) -> torch.Tensor:
    (policy_w, policy_l), (frozen_w, frozen_l) = errors_by_hand(module)
    return (frozen_w - policy_w) - (frozen_l - policy_l)


def test_a_hinge_on_the_margin_is_trained_and_its_own_value_is_logged_beside_ours(own, build):
    module = build(own.Hinge())
    margin = margins(module)
    threshold = float(margin.median())  # one pair above, one at it, one below
    module.loss = own.Hinge(threshold)
    calls = listen(module.unet)
    module.training_step([make_batch()], 0).backward()
    assert len(calls) == 2
    seen = module.seen()
    assert_close(seen["loss"], (threshold - margin).clamp(min=0), rtol=1e-3, atol=1e-5)
    assert torch.equal(seen["satisfied"], (seen["loss"] == 0).float()) and 0 < seen["satisfied"].mean() < 1
    assert_close(seen["reward_margin"], margin, rtol=1e-3, atol=1e-5)
    assert seen.keys() == {*OURS, "satisfied"} - {"lr"}
    assert all(parameter.grad is not None for parameter in policy_parameters(module.model)["unet"])


def test_a_cached_reference_serves_a_loss_of_ones_own(own, build, tmp_path):
    kept = ReferenceErrors(tmp_path, np.arange(PAIRS), 1)
    module = build(own.Hinge(reference="cached", draws_per_pair=1), kept)
    live = module.losses(make_batch())
    calls = listen(module.unet)
    for passes in (2, 1):
        calls.clear()
        module.training_step([make_batch()], 0)
        assert len(calls) == passes
        seen = module.seen()
        assert all(torch.equal(seen[name], live[name].detach()) for name in live)
        module.forget_seen()


def test_a_loss_without_reference_costs_no_pass_of_the_reference_and_asks_no_cache(own, build, tmp_path):
    kept = ReferenceErrors(tmp_path, np.arange(PAIRS), 1)
    module = build(own.SimPO(), kept)
    (chosen, rejected), _ = errors_by_hand(module)
    calls = listen(module.unet)
    values = module.losses(make_batch(), kept)
    module.training_step([make_batch()], 0)
    assert [len(latents) for latents, _, _ in calls] == [2 * PAIRS] * 2  # of the policy, once each
    assert kept.asked == kept.filled == 0
    assert values.keys() == {"loss"}
    expected = -torch.log(torch.sigmoid(100 * (rejected - chosen) - 0.5))
    assert_close(values["loss"].detach(), expected, rtol=1e-3, atol=1e-3)


def test_a_loss_sees_the_timesteps_of_its_pairs(own, build):
    module = build(own.Late())
    values = module.losses(make_batch())
    expected = torch.tensor(TIMESTEPS) / 1000 * -torch.log(torch.sigmoid(500 * margins(module)))
    assert_close(values["loss"].detach(), expected, rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------------------------------------------------- mistakes


class Returning(Loss):
    def __init__(self, returned: Any):
        super().__init__()
        self.returned = returned

    def __call__(self, inputs: LossInputs) -> Any:
        return self.returned


ZEROS = torch.zeros(PAIRS)
INPUTS = LossInputs(PairErrors(ZEROS, ZEROS), PairErrors(ZEROS, ZEROS))


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (ZEROS.mean(), r"must return 'loss' as a tensor with one number per sample, \(3,\), got \(\)"),
        (ZEROS[:, None], r"must return 'loss' .*, got \(3, 1\)"),
        (0.0, r"must return 'loss' .*, got float"),
        (None, r"must return 'loss' .*, got NoneType"),
        ((ZEROS, ZEROS, {}), r"must return 'loss' .*, got tuple"),
        ((ZEROS, ZEROS), r"must return its named values as a dictionary, got Tensor"),
        ((ZEROS, {"mine": ZEROS[:2]}), r"must return 'mine' .*, got \(2,\)"),
        ((ZEROS, {"mine": ZEROS.mean()}), r"must return 'mine' .*, got \(\)"),
        ((ZEROS, {"mine": 1.0}), r"must return 'mine' .*, got float"),
        *(
            ((ZEROS, {name: ZEROS}), f"returns a value named '{name}', which every run logs by itself: rename it")
            for name in (*OURS, "reward_margin/t125")
        ),
    ],
)
def test_a_value_of_another_shape_or_of_a_name_of_ours_is_refused_in_one_line(returned, message):
    with pytest.raises(UserError, match=f"^Returning {message}$"):
        evaluated(Returning(returned), INPUTS)


def test_named_values_are_logged_as_numbers_without_gradients():
    value = torch.full((PAIRS,), math.log(2), requires_grad=True)
    values = evaluated(Returning((value, {"mine": value * 2, "count": torch.arange(PAIRS)})), INPUTS)
    assert values["loss"] is value
    assert values["mine"].tolist() == pytest.approx([2 * math.log(2)] * PAIRS)
    assert values["count"].mean() == 1
    assert not values["mine"].requires_grad


def test_values_whose_names_change_from_batch_to_batch_are_refused(build):
    module = build(loss := Returning((ZEROS, {"mine": ZEROS})))
    module.training_step([make_batch()], 0)
    loss.returned = ZEROS
    with pytest.raises(UserError, match="Returning must return values of the same names for every batch"):
        module.training_step([make_batch()], 1)
