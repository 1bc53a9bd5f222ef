"""Prompts, and their embeddings by the text encoders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from dpo_sd.lora.adapters import adapter_key
from dpo_sd.models.families import longer

if TYPE_CHECKING:
    from dpo_sd.data.batches import Prompts
    from dpo_sd.data.cache import Cache
    from dpo_sd.models.stable_diffusion import StableDiffusion


def encode_texts(
    model: StableDiffusion, texts: Sequence[str], rows: Sequence[int], cache: Cache
) -> tuple[Prompts, list[str]]:
    """Prompts with their embeddings, and lines for the report on damage in the cache.

    The embeddings are kept in the cache, or left out where the step asks the text encoders itself.

    Args:
        texts: prompts, each once.
        rows: the number in `texts` of each sample's prompt.
    """
    import numpy as np
    from tqdm import tqdm

    from dpo_sd.data.batches import Prompts
    from dpo_sd.files.tensors import content_key

    if cache.keep != "all":
        return Prompts(texts, np.asarray(rows), None), []
    stores = [cache.store("hidden"), *([cache.store("pooled")] if model.family.pooled else [])]
    wanted = [*texts, ""]
    encoder = [model.fingerprints.text, adapter_key(model, "policy", "text_encoder")]  # a LoRA may change it too
    keys = [content_key(kind="text 1", encoder=encoder, text=text) for text in wanted]
    lacking = np.any([store.lacks(keys) for store in stores], axis=0)
    todo = [(key, text) for key, text, lacks in zip(keys, wanted, lacking, strict=True) if lacks]
    with model.working(*model.text_encoders), tqdm(total=len(todo), desc="encoding prompts", disable=not todo) as bar:
        for start in range(0, len(todo), 64):
            part = todo[start : start + 64]
            embeds = model.encode_prompts([text for _, text in part])
            for store, tensors in zip(stores, (each for each in embeds if each is not None), strict=True):
                for (key, _), tensor in zip(part, tensors, strict=True):
                    store.put(key, tensor)
            bar.update(len(part))
    for store in stores:
        store.flush()
    hidden, *pooled = (store.rows(keys) for store in stores)
    notes = [note for store in stores for note in store.notes]
    return Prompts(texts, np.asarray(rows), hidden, pooled[0] if pooled else None), notes


def too_long(model: StableDiffusion, prompts: Sequence[str]) -> Iterator[str]:
    """A line for the report where prompts are longer than the text encoder reads."""
    if long := model.truncated(prompts):
        named = ", ".join(repr(prompt[:100]) for prompt in long[:5])
        limit = f"the text encoder's limit of {model.max_tokens} tokens: {named}{longer(model.family, model.reading)}"
        yield f"{len(long)} prompts are cut at {limit}"
