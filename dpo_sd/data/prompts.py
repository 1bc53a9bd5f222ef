"""Prompts from a text file, a list, or the shapes world."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dpo_sd.errors import UserError
from dpo_sd.files.texts import is_text, read_text
from dpo_sd.shapes.captions import split_prompts

if TYPE_CHECKING:
    from dpo_sd.models.sampling import Sampler


class Line(NamedTuple):
    """A prompt, and what its images are drawn with where that is not what the others are drawn with.

    Args:
        prompt: the prompt.
        negative_prompt, width, height, steps, guidance: as in `Sampler`; None leaves them as they are.
        seed: of its first image, whose next ones have the next numbers; None takes one of its own for each.
    """

    prompt: str
    negative_prompt: str | None = None
    width: int | None = None
    height: int | None = None
    seed: int | None = None
    steps: int | None = None
    guidance: float | None = None

    @property
    def settings(self) -> dict[str, str | int | float]:
        """The settings that it has, by their names."""
        return {name: value for name, value in self._asdict().items() if value is not None and name != "prompt"}

    def drawn_by(self, sampler: Sampler) -> Sampler:
        """The sampler with the settings of this prompt.

        Raises:
            UserError: if they are out of range, or make no sense together.
        """
        changes = {name: value for name, value in self.settings.items() if name != "seed"}
        try:
            return sampler.changed(**changes) if changes else sampler
        except UserError as error:
            raise UserError(f"prompt {self.prompt[:100]!r}: {error}") from error


_FLAGS = {  # as Kohya's trainer writes them
    "n": ("negative_prompt", str),
    "w": ("width", int),
    "h": ("height", int),
    "d": ("seed", int),
    "s": ("steps", int),
    "l": ("guidance", float),
}


def read_prompts(prompts: str | Sequence[str], seed: int = 0) -> list[str]:
    """Prompts of a text file, a list or the shapes world, as `read_lines`, for images that are all drawn alike.

    Raises:
        UserError: as `read_lines`, and if a prompt has settings of its own.
    """
    lines = read_lines(prompts, seed)
    if own := [line for line in lines if line.settings]:
        raise UserError(f"prompts={prompts}: all are drawn alike here: leave out the settings behind {own[0].prompt!r}")
    return [line.prompt for line in lines]


def read_lines(prompts: str | Sequence[str], seed: int = 0) -> list[Line]:
    """Prompts of a text file, a list or the shapes world, each once, in the order of their first appearance.

    Args:
        prompts: path of a file with one prompt a line, in which blank lines and lines that begin with # are skipped,
            and a prompt may have settings behind it, in the words of Kohya's trainer: `a red fox --n blurry --w 512
            --h 768 --d 7 --s 30 --l 7.5` (negative prompt, width, height, seed, steps, guidance); a list of prompts
            without settings; "shapes", for the training prompts that `data=shapes` and `data=renders` have; or
            "shapes:held_out", for those that neither has for training or validation.
        seed: seed of the split of the latter two.

    Raises:
        UserError: if there is no such file, it is no text, there are no prompts, or a setting is unknown or out of
            range.
    """
    if isinstance(prompts, str) and prompts not in ("shapes", "shapes:held_out"):
        return list(dict.fromkeys(_in_file(prompts)))
    return [Line(prompt) for prompt in _given(prompts, seed)]


def _in_file(prompts: str) -> Iterator[Line]:
    file = Path(prompts).expanduser()
    if not file.is_file():
        raise UserError(
            f"prompts={prompts}: no such file: name a text file with a prompt a line, a list such as "
            "prompts='[a red fox,a blue bird]', or shapes"
        )
    none = True
    # not str.splitlines: texts from documents hold the other separators at which it cuts
    for number, text in enumerate(io.StringIO(read_text(file), newline=None), start=1):
        if text.strip() and not text.lstrip().startswith("#"):
            none = False
            try:
                yield _line(text.strip())
            except UserError as error:
                raise UserError(f"line {number} of {file}: {error}") from error
    if none:
        raise UserError(f"prompts={prompts}: there are none")


def _line(text: str) -> Line:
    """A prompt with its settings."""
    from dpo_sd.models.sampling import Sampler

    prompt, *flags = re.split(r"(?:^|\s+)--(?=\w)", text)
    found: dict[str, str | int | float] = {}
    for flag in flags:
        name, _, value = flag.strip().partition(" ")
        if name not in _FLAGS:
            known = ", ".join(f"--{each}" for each in _FLAGS)
            raise UserError(f"--{name} is unknown: use {known}, or give prompts as a list, where all is text")
        key, kind = _FLAGS[name]
        if key in found:
            raise UserError(f"--{name} is there twice")
        try:
            found[key] = kind(value.strip())
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise UserError(f"--{name} must have {what} behind it, got {value.strip()!r}") from None
    if not prompt.strip():
        raise UserError("there is no prompt before its settings")
    line = Line(prompt.strip(), **found)  # type: ignore[arg-type]
    if line.seed is not None and not 0 <= line.seed < 2**62:
        raise UserError(f"--d must be at least 0 and below 2^62, got {line.seed}")
    line.drawn_by(Sampler())
    return line


def _given(prompts: str | Sequence[str], seed: int) -> list[str]:
    if prompts == "shapes":
        return split_prompts(seed).train
    if prompts == "shapes:held_out":
        return split_prompts(seed).held_out
    if not isinstance(prompts, Sequence):
        raise UserError(f"prompts must be a text file or a list of prompts, got {prompts!r}")
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
