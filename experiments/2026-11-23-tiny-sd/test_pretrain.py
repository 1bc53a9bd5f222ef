"""How the tiny model is made, and what ships: nothing here depends on how well it draws."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pretrain
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from transformers import CLIPTokenizer

from dpo_sd.models.base import Base
from dpo_sd.models.families import TINY
from dpo_sd.shapes.captions import caption, random_caption
from dpo_sd.shapes.scenes import BACKGROUNDS, COLOURS, KINDS, POSITIONS, SHAPES, SIZES, STYLES, held_out, random_scene

STEPS = {"VAE_STEPS": 2, "UNET_STEPS": (2, 2), "DECODER_STEPS": 2}


# -------------------------------------------------------------------------------------------------------------- trainin


@pytest.fixture
def run(monkeypatch) -> Callable[..., None]:
    """`run(folder, dies_at)`: all stages on 32 pictures, two steps each; dies in the n-th step from its start."""
    for name, steps in STEPS.items():
        monkeypatch.setattr(pretrain, name, steps)
    monkeypatch.setattr(pretrain, "build_tokenizer", functools.cache(pretrain.build_tokenizer))
    for name in ("train_vae", "train_denoiser", "train_decoder"):
        monkeypatch.setattr(pretrain, name, functools.partial(getattr(pretrain, name), n_pictures=32))
    monkeypatch.setattr(pretrain, "_many", lambda make, seed, n, description: [make(seed, i) for i in range(n)])
    monkeypatch.setattr(pretrain, "write_card", lambda folder: None)
    train = pretrain.Stage.run

    def run(folder: Path, dies_at: int | None = None) -> None:
        steps = []

        def stage(self: pretrain.Stage, losses: Callable[[int], Any]) -> None:
            def counted(step: int) -> Any:
                steps.append(step)
                if len(steps) == dies_at:
                    raise KeyboardInterrupt
                return losses(step)

            train(self, counted, save_every=1)

        monkeypatch.setattr(pretrain.Stage, "run", stage)
        pretrain.pretrain(folder, seed=0, device=torch.device("cpu"))

    return run


def weights(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted((folder / "tiny-sd").rglob("*.safetensors"))}


def test_a_run_that_was_killed_in_every_stage_gives_the_weights_of_one_that_was_not(tmp_path, run):
    run(tmp_path / "whole")
    for dies_at in (2, 3, 3, 3):  # in the second step of each stage
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "killed", dies_at)
    run(tmp_path / "killed")
    whole, killed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert len(whole) == 3 and killed == whole

    scheduler = json.loads((tmp_path / "whole" / "tiny-sd" / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == "epsilon"
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "whole" / "tiny-sd", torch_dtype=torch.float32)
    assert pipeline.vae.config.scaling_factor != 0.18215  # of these latents, not diffusers' own


def test_pictures_and_batches_are_functions_of_seed_and_number():
    for make in (lambda seed, i: pretrain.scene_picture(seed, i)[0], pretrain.varied_picture):
        assert np.array_equal(make(0, 5), make(0, 5))
        assert not np.array_equal(make(0, 5), make(0, 6))
        assert not np.array_equal(make(0, 5), make(1, 5))
    batches = [tuple(pretrain.batch_indices(*at, 1000, 16)) for at in ((0, 1), (0, 1), (0, 2), (1, 1))]
    assert batches[0] == batches[1] and len(set(batches)) == 3


def test_held_out_combinations_are_never_trained_on():
    assert set(pretrain.SEEN_KINDS) | {kind for kind in KINDS if held_out(kind)} == set(KINDS)
    assert not any(held_out(kind) for kind in pretrain.SEEN_KINDS)


# ------------------------------------------------------------------------------------------------------------- tokenize


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(TINY / "tokenizer")


def middle(tokenizer: CLIPTokenizer, text: str) -> list[int]:
    """Tokens between the two ends."""
    ids: Any = tokenizer(text).input_ids
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    return ids[1:-1]


def test_the_shipped_tokenizer_is_the_one_that_pretraining_builds(tokenizer):
    assert pretrain.build_tokenizer().get_vocab() == tokenizer.get_vocab()


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


# ---------------------------------------------------------------------------------------------------------- what ships


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


def test_what_ships_has_the_form_that_pretraining_builds(tokenizer):
    built, model = {"vae": pretrain.build_vae(), **pretrain.build_denoiser(tokenizer)}, Base().load()
    shipped = {"vae": model.vae, **model.networks}
    for name, part in built.items():
        forms = (
            {key: tuple(value.shape) for key, value in each.state_dict().items()} for each in (part, shipped[name])
        )
        assert next(forms) == next(forms), name


def test_the_shipped_folder_is_a_stable_diffusion_pipeline():
    pipeline: Any = StableDiffusionPipeline.from_pretrained(TINY, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.scheduler.config.prediction_type == "epsilon"
    assert pipeline.vae_scale_factor == 8
    assert pipeline.text_encoder.config.vocab_size == len(pipeline.tokenizer)
    assert pipeline.text_encoder.config.eos_token_id == pipeline.tokenizer.eos_token_id
    assert pipeline.text_encoder.config.max_position_embeddings == pipeline.tokenizer.model_max_length
    assert pipeline.unet.config.cross_attention_dim == pipeline.text_encoder.config.hidden_size
    (picture,) = pipeline("a red circle", num_inference_steps=1, generator=torch.Generator().manual_seed(0)).images
    assert picture.size == (64, 64)
