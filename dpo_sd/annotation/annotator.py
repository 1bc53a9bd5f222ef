"""The contract of an annotator."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dpo_sd.judges.judge import Judge


class Annotator:
    """Base class of the group `annotator`: whoever votes on the pairs of a folder."""

    def annotate(self, folder: Path, judge: Judge | None) -> None:
        """Votes on the pairs of a folder, as events in its log.

        Args:
            folder: with a pairs.jsonl.
            judge: scores the images for annotators that do not look for themselves; None for judge=none.

        Raises:
            UserError: if the folder cannot be annotated, or the annotator and the judge do not go together.
        """
        raise NotImplementedError
