"""An annotator whose true preference is known, and who errs as told."""

from __future__ import annotations

import math
from typing import Literal

from dpo_sd import noise
from dpo_sd.errors import UserError


class SimulatedAnnotator:
    """Annotator who sees scores through logistic noise: the Bradley-Terry model, with known faults.

    Every answer is a function of (seed, pair_id) and the two scores, never of the order of asking.

    Args:
        temperature: of the choice, in units of the score, at least 0: P(image_0) is the sigmoid of
            (score_0 - score_1) / temperature; 0 always takes the higher score.
        tie_band: scores that differ by at most this much are a tie, at least 0; at 0 only equal scores are.
        side_bias: log-odds added to the image shown on the left, which is drawn per pair; finite, below 0 for the
            right.
        flip_rate: share of the answers that are reversed, in [0, 1]; a tie stays a tie.
        seed: of all draws, in [0, 2^64).

    Raises:
        UserError: when a value is out of range, and when side_bias meets temperature 0, where no finite log-odds change
            the answer.
    """

    def __init__(
        self,
        temperature: float = 0.0,
        tie_band: float = 0.0,
        side_bias: float = 0.0,
        flip_rate: float = 0.0,
        seed: int = 0,
    ) -> None:
        if not 0 <= temperature < math.inf:
            raise UserError(f"temperature must be at least 0 and finite, got {temperature}")
        if not 0 <= tie_band < math.inf:
            raise UserError(f"tie_band must be at least 0 and finite, got {tie_band}")
        if not math.isfinite(side_bias):
            raise UserError(f"side_bias must be finite, got {side_bias}")
        if side_bias != 0 and temperature == 0:
            raise UserError(f"side_bias={side_bias} has no effect at temperature 0: give a temperature above 0")
        if not 0 <= flip_rate <= 1:
            raise UserError(f"flip_rate must be in [0, 1], got {flip_rate}")
        noise.check_uint64("seed", seed)
        self.temperature = temperature
        self.tie_band = tie_band
        self.side_bias = side_bias
        self.flip_rate = flip_rate
        self.seed = seed

    def left_image(self, pair_id: str) -> Literal["image_0", "image_1"]:
        """Which image this annotator is shown on the left."""
        coin = noise.uniform(self.seed, noise.sample_id(pair_id), 0, "annotator side")
        return "image_0" if coin < 0.5 else "image_1"

    def choose(self, pair_id: str, score_0: float, score_1: float) -> Literal["image_0", "image_1", "tie"]:
        """The better image in this annotator's eyes.

        Args:
            pair_id: what the draws of this pair hang on.
            score_0, score_1: true scores, finite, higher is better.

        Raises:
            UserError: when a score is not finite.
        """
        if not (math.isfinite(score_0) and math.isfinite(score_1)):
            raise UserError(f"scores must be finite, got {score_0} and {score_1} for pair {pair_id}")
        gap = score_0 - score_1
        if abs(gap) <= self.tie_band:
            return "tie"
        rng = noise.generator(self.seed, noise.sample_id(pair_id), 0, "annotator choice")
        bias = self.side_bias if self.left_image(pair_id) == "image_0" else -self.side_bias
        # a logistic variable is below x with probability sigmoid(x): adding one to the log-odds gives Bradley-Terry,
        # and multiplying by the temperature instead of dividing keeps 0 an ordinary value
        prefers_0 = gap + self.temperature * (bias + rng.logistic()) > 0
        flipped = rng.random() < self.flip_rate
        return "image_0" if prefers_0 != flipped else "image_1"
