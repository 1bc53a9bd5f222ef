"""Captions of scenes, and what a caption demands of an image."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dpo_sd.errors import UserError
from dpo_sd.noise import order
from dpo_sd.shapes.scenes import BACKGROUNDS, COLOURS, KINDS, SHAPES, SIZES, Scene


@dataclass(frozen=True)
class Demand:
    """The demands of a caption; None where it leaves the choice open."""

    shape: str
    colour: str | None = None
    size: str | None = None
    background: str | None = None
    position: str | None = None


def caption(kind: tuple[str, str, str, str], position: str | None = None) -> str:
    """The full caption: "a small red circle at the top left on a blue background"; the position may be left open."""
    size, colour, shape, background = kind
    return f"a {size} {colour} {shape}{_place(position)} on a {background} background"


def random_caption(rng: np.random.Generator, scene: Scene, name_position: bool) -> str:
    """One of six ways to describe a scene, some of which leave the size or the background open."""
    size, colour, shape, background = scene.kind
    place = _place(scene.position if name_position else None)
    form = rng.choice(6, p=[0.5, 0.1, 0.1, 0.1, 0.1, 0.1])
    if form == 0:
        return caption(scene.kind, scene.position if name_position else None)
    if form == 1:
        return f"{article(colour)} {colour} {shape}{place} on a {background} background"
    if form == 2:
        return f"a {size} {colour} {shape}{place}"
    if form == 3:
        return f"{size} {colour} {shape}{place}, {background} background"
    if form == 4:
        return f"a {background} background with a {size} {colour} {shape}{place}"
    return f"{colour} {shape}{place} on {background}"


def article(word: str) -> str:
    """The indefinite article of a word."""
    return "an" if word[0] in "aeiou" else "a"


def _place(position: str | None) -> str:
    if position is None:
        return ""
    return " in the centre" if position == "centre" else f" at the {position}"


_ANY_COLOUR = "|".join(dict.fromkeys([*COLOURS, *BACKGROUNDS]))
_BACKGROUND = re.compile(rf"\b({_ANY_COLOUR}) background\b|\bon ({_ANY_COLOUR})\b(?! (?:{'|'.join(SHAPES)})\b)")
_POSITION = re.compile(r"\b(?:(top|bottom) (left|right)|(top|bottom|left|right)|(centre|center|middle))\b")


def parse(text: str) -> Demand:
    """The demands of a caption.

    Raises:
        UserError: if the text names no shape of this world, or a colour that nothing has in it.
    """
    words = text.lower().replace("grey", "gray")
    background = _BACKGROUND.search(words)
    subject = words if background is None else words[: background.start()] + " " + words[background.end() :]
    shape = re.search(rf"\b({'|'.join(SHAPES)})\b", subject)
    if shape is None:
        raise UserError(f"{text!r} names no shape of the shapes world: write one of {', '.join(SHAPES)}")
    colour = re.search(rf"\b({_ANY_COLOUR})\b", subject)
    size = re.search(rf"\b({'|'.join(SIZES)})\b", subject)
    _known(text, colour[1] if colour else None, COLOURS, "shape")
    _known(text, (background[1] or background[2]) if background else None, BACKGROUNDS, "background")
    place = _POSITION.search(subject)
    position = None
    if place is not None:
        vertical, horizontal, single, _ = place.groups()
        position = f"{vertical} {horizontal}" if vertical else single or "centre"
    return Demand(
        shape=shape[1],
        colour=colour[1] if colour else None,
        size=size[1] if size else None,
        background=(background[1] or background[2]) if background else None,
        position=position,
    )


def _known(text: str, colour: str | None, colours: Iterable[str], what: str) -> None:
    if colour is not None and colour not in colours:
        raise UserError(f"{text!r}: no {what} of the shapes world is {colour}: write one of {', '.join(colours)}")


def kind(text: str) -> tuple[str, str, str, str]:
    """The combination that a full caption describes.

    Raises:
        UserError: if the caption cannot be read or leaves something open.
    """
    demand = parse(text)
    named = demand.size, demand.colour, demand.shape, demand.background
    if None in named:
        raise UserError(f"{text!r} leaves the size, the colour or the background open: write {caption(KINDS[0])!r}")
    return named  # type: ignore[return-value]


class PromptSplit(NamedTuple):
    """Full captions in three parts that share none."""

    train: list[str]
    validation: list[str]
    held_out: list[str]


def split_prompts(seed: int) -> PromptSplit:
    """Splits the full captions of all kinds of scenes: 60 % for training, 10 % for validation, 30 % to be judged.

    Args:
        seed: seed of the split, in [0, 2^64).
    """
    prompts = [caption(KINDS[i]) for i in order(seed, 0, len(KINDS))]
    first, second = round(0.6 * len(prompts)), round(0.7 * len(prompts))
    return PromptSplit(prompts[:first], prompts[first:second], prompts[second:])
