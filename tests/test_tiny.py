"""The tiny model that ships: its vocabulary, its files, its form; nothing here depends on how well it draws."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from transformers import CLIPTokenizer

from dpo_sd.models.families import TINY
from dpo_sd.shapes.captions import caption, random_caption
from dpo_sd.shapes.scenes import BACKGROUNDS, COLOURS, KINDS, POSITIONS, SHAPES, SIZES, STYLES, random_scene


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(TINY / "tokenizer")


def middle(tokenizer: CLIPTokenizer, text: str) -> list[int]:
    """Tokens between the two ends."""
    ids: Any = tokenizer(text).input_ids
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    return ids[1:-1]


def test_every_word_of_every_caption_is_one_token(tokenizer):
    rng = np.random.default_rng(1)
    texts = {caption(kind, position) for kind in KINDS[::7] for position in (None, *POSITIONS)}
    texts |= {random_caption(rng, random_scene(rng, kind), bool(i % 2)) for kind in KINDS for i in range(2)}
    texts |= {f"in the {style} style" for style in STYLES}
    words = {word.strip(",") for text in texts for word in text.split()}
    assert {*SIZES, *COLOURS, *SHAPES, *BACKGROUNDS, *STYLES} <= words
    assert {word: len(middle(tokenizer, word)) for word in words} == dict.fromkeys(words, 1)
    assert max(map(len, tokenizer(sorted(texts)).input_ids)) <= tokenizer.model_max_length


@pytest.mark.parametrize(
    "text",
    [
        "antidisestablishmentarianism",
        "ünïcödé 漢字",
        "🔴🟦👩‍👩‍👧",
        "مرحبا بالعالم",
        "12 345",
        "a,red;circle!?",
        "\u0301\u200d\x00",
    ],
)
def test_words_that_it_does_not_know_come_back_whole(tokenizer, text):
    ids = middle(tokenizer, text)
    assert ids and not {tokenizer.unk_token_id, tokenizer.bos_token_id} & set(ids)
    assert "".join(tokenizer.decode(ids).split()) == "".join(text.split())


def test_case_does_not_matter(tokenizer):
    assert middle(tokenizer, "A Small RED circle") == middle(tokenizer, "a small red circle")


def test_the_vocabulary_is_bytes_and_words_without_gaps(tokenizer):
    vocabulary = tokenizer.get_vocab()
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
    # 256 bytes, each also as the end of a word, and two ends
    assert sorted(vocabulary, key=vocabulary.__getitem__)[512:514] == ["<|startoftext|>", "<|endoftext|>"]
    assert len(vocabulary) < 1024


# --------------------------------------------------------------------------------------------------------------- files


def test_the_shipped_folder_is_small_and_holds_no_pickles():
    files = [file for file in TINY.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 20e6
    assert {file.suffix for file in files} <= {".safetensors", ".json", ".txt", ".md", ".png"}


def test_all_shipped_weights_are_fp16():
    files = sorted(TINY.rglob("*.safetensors"))
    assert [file.parent.name for file in files] == ["text_encoder", "unet", "vae"]
    for path in files:
        with safe_open(path, "pt") as file:
            kinds = {file.get_slice(key).get_dtype() for key in file.keys() if not key.endswith("position_ids")}  # noqa: SIM118
        assert kinds == {"F16"}


def test_the_shipped_folder_is_a_stable_diffusion_pipeline():
    pipeline: Any = StableDiffusionPipeline.from_pretrained(TINY, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.scheduler.config.prediction_type == "epsilon"
    assert pipeline.vae_scale_factor == 8
    assert pipeline.text_encoder.config.vocab_size == len(pipeline.tokenizer)
    assert pipeline.text_encoder.config.eos_token_id == pipeline.tokenizer.eos_token_id
    assert pipeline.text_encoder.config.max_position_embeddings == pipeline.tokenizer.model_max_length
    assert pipeline.unet.config.cross_attention_dim == pipeline.text_encoder.config.hidden_size
    (image,) = pipeline("a red circle", num_inference_steps=1, generator=torch.Generator().manual_seed(0)).images
    assert image.size == (64, 64)
