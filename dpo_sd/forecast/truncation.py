"""Prompts longer than the text encoder reads, counted before the model is there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_sd.forecast.units import counted
from dpo_sd.models.families import VOCABULARY, longer

if TYPE_CHECKING:
    from dpo_sd.models.base import Base


def truncation_line(base: Base, prompts: Sequence[str]) -> str:
    """Line of the plan on the prompts that are cut, as far as the vocabulary is on this computer."""
    folder = vocabulary(base)
    if folder is None:
        return "prompts cut at the text encoder's limit: not known before the vocabulary is downloaded"
    from transformers import CLIPTextConfig

    from dpo_sd.models.loading import read_tokenizer

    beside = folder.parent / "text_encoder"
    encoder = beside if (beside / "config.json").is_file() else base.family.folder / "text_encoder"
    first = next(iter(base.family.encoders.values()))
    tokenizer = read_tokenizer(folder, CLIPTextConfig.from_pretrained(encoder), first.pad)
    most = base.reading.chunks * (tokenizer.model_max_length - 2) + 2  # with the marks of the ends
    long = [prompt for prompt in prompts if len(tokenizer(prompt).input_ids) > most]
    first_three = ", ".join(repr(prompt[:60]) for prompt in long[:3])
    named = f": {first_three}{longer(base.family, base.reading)}" if long else ""
    are = "is" if len(long) == 1 else "are"
    return f"{len(long)} of {counted(len(prompts), 'prompt')} {are} cut at the text encoder's limit{named}"


def vocabulary(base: Base) -> Path | None:
    """The folder of a base's tokenizer, if it is on this computer."""
    from huggingface_hub import try_to_load_from_cache

    if base.config is None and Path(base.path).expanduser().is_file():
        return VOCABULARY
    for place in (base.path, base.config or ""):
        if (local := Path(place).expanduser() / "tokenizer").is_dir():
            return local
    where = base.path if "/" in base.path and not Path(base.path).exists() else base.config
    cached = try_to_load_from_cache(where, "tokenizer/vocab.json") if where and not Path(where).exists() else None
    return Path(cached).parent if isinstance(cached, str) else None
