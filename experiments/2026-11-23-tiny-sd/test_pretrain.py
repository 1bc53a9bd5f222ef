"""How the tiny model was trained: killed and continued to the same weights, on what it may see, to the shipped form."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pretrain
import pytest
import torch
from card import PROPERTIES, write_card
from diffusers import StableDiffusionPipeline
from transformers import CLIPTokenizer

from dpo_sd.models.base import Base
from dpo_sd.models.families import TINY
from dpo_sd.shapes.scenes import KINDS, held_out

SMALL = pretrain.Sizes(2, 2, 2, 2, vae_images=32, unet_images=32, decoder_images=32, save_every=1)


@pytest.fixture
def run(monkeypatch) -> Callable[..., Path]:
    """`run(folder, dies_at)`: all stages, two updates each; dies in the n-th update from its start."""
    step = torch.optim.AdamW.step

    def run(folder: Path, dies_at: int | None = None) -> Path:
        updates = []

        def update(self: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
            updates.append(self)
            if len(updates) == dies_at:
                raise KeyboardInterrupt
            return step(self, *args, **kwargs)

        monkeypatch.setattr(torch.optim.AdamW, "step", update)
        return pretrain.pretrain(folder, 0, torch.device("cpu"), SMALL)

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


def test_images_and_batches_are_functions_of_seed_and_number():
    for make in (lambda seed, i: pretrain.captioned_image(seed, i)[0], pretrain.varied_image):
        assert np.array_equal(make(0, 5), make(0, 5))
        assert not np.array_equal(make(0, 5), make(0, 6))
        assert not np.array_equal(make(0, 5), make(1, 5))
    batches = [tuple(pretrain.batch_indices(*at, 1000, 16)) for at in ((0, 1), (0, 1), (0, 2), (1, 1))]
    assert batches[0] == batches[1] and len(set(batches)) == 3


def test_held_out_combinations_are_never_trained_on():
    assert set(pretrain.SEEN_KINDS) | {kind for kind in KINDS if held_out(kind)} == set(KINDS)
    assert not any(held_out(kind) for kind in pretrain.SEEN_KINDS)


def test_the_card_says_in_numbers_what_the_model_can_do(tmp_path):
    folder = Path(shutil.copytree(TINY, tmp_path / "tiny-sd"))
    for name in ("README.md", "samples.png"):
        (folder / name).unlink()
    write_card(folder, per_row=2)
    rows = [line.split(" | ") for line in (folder / "README.md").read_text().splitlines() if line.startswith("| ")]
    assert len(rows) == 5 and {len(row) for row in rows} == {len(PROPERTIES) + 2}  # a heading, four sets
    assert (folder / "samples.png").is_file()


def test_the_shipped_tokenizer_is_the_one_that_pretraining_builds():
    assert pretrain.build_tokenizer().get_vocab() == CLIPTokenizer.from_pretrained(TINY / "tokenizer").get_vocab()


def test_what_ships_has_the_form_that_pretraining_builds():
    built, model = {"vae": pretrain.build_vae(), **pretrain.build_denoiser(pretrain.build_tokenizer())}, Base().load()
    shipped = {"vae": model.vae, **model.networks}
    for name, part in built.items():
        forms = (
            {key: tuple(value.shape) for key, value in each.state_dict().items()} for each in (part, shipped[name])
        )
        assert next(forms) == next(forms), name
