"""Prompts from a text file, a list, or the shapes world."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from dpo_sd.errors import UserError
from dpo_sd.files.texts import is_text, read_text
from dpo_sd.shapes.captions import split_prompts


def read_prompts(prompts: str | Sequence[str], seed: int = 0) -> list[str]:
    """Prompts of a text file, a list or the shapes world, each once, in the order of their first appearance.

    Args:
        prompts: path of a file with one prompt a line, in which blank lines and lines that begin with # are skipped; a
            list of prompts; "shapes", for the training prompts that `data=shapes` and `data=renders` have; or
            "shapes:held_out", for those that neither has for training or validation.
        seed: seed of the split of the latter two.

    Raises:
        UserError: if there is no such file, it is no text, or there are no prompts.
    """
    if prompts == "shapes":
        return split_prompts(seed).train
    if prompts == "shapes:held_out":
        return split_prompts(seed).held_out
    if isinstance(prompts, str):
        file = Path(prompts).expanduser()
        if not file.is_file():
            raise UserError(
                f"prompts={prompts}: no such file: name a text file with a prompt a line, a list such as "
                "prompts='[a red fox,a blue bird]', or shapes"
            )
        # not str.splitlines: texts from documents hold the other separators at which it cuts
        lines = io.StringIO(read_text(file), newline=None)
        found = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    elif not isinstance(prompts, Sequence):
        raise UserError(f"prompts must be a text file or a list of prompts, got {prompts!r}")
    else:
        if others := [prompt for prompt in prompts if type(prompt) not in (str, int, float)]:
            raise UserError(f"prompts: {others[0]!r:.100} is no prompt: give texts, in quotes where they hold a comma")
        found = [str(prompt).strip() for prompt in prompts]
        if cut := [prompt for prompt in found if not is_text(prompt)]:
            raise UserError(
                f"prompts: {cut[0]!r:.100} holds half of a character, or bytes that are not UTF-8: write it anew"
            )
    if not found or not all(found):
        raise UserError(f"prompts={prompts}: {'an empty prompt is among them' if found else 'there are none'}")
    return list(dict.fromkeys(found))
