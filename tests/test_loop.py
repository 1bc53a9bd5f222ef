"""From a style to a better LoRA: each command reads what the one before it wrote, nothing moved or renamed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from dpo_sd.lora.reading import read_lora
from dpo_sd.preferences.reading import read_preferences

SMALL = (
    "pairs_per_update=4",
    "hardware.micro_batch=4",
    "trainer.max_steps=2",
    "trainer.validate_every=2",
    "sampler.steps=2",
    "callbacks.samples.n_prompts=2",
    "callbacks.verdict.n_prompts=4",
)


@pytest.fixture(scope="module")
def loop(command, tmp_path_factory) -> Path:
    """Folder with the runs `style` and `dpo` and the pairs between them."""
    folder = tmp_path_factory.mktemp("loop")

    def run(*arguments: str, program: str = "train") -> None:
        ended = command(*arguments, program=program)
        assert ended.code == 0, ended.err
        (folder / f"{program}.out").write_text(ended.out)

    style, pairs = folder / "style", folder / "pairs"
    few = ("data.n_pictures=16", "data.n_validation=2")
    run("experiment=style_sft", *SMALL, *few, f"hydra.run.dir={style}", f"cache_dir={folder}")
    prompts = ",".join(f"a large {colour} circle on a black background" for colour in ("red", "blue", "cyan", "pink"))
    run(f"loras={style}", f"prompts=[{prompts}]", "num_sets=2", "sampler.steps=2", f"out={pairs}", program="generate")
    run(f"pairs={pairs}", "annotator=oracle", "judge.style=outlined", program="annotate")
    judged = ("judge=oracle", "judge.style=outlined", "callbacks.verdict.prompts=shapes:held_out")
    refined = (f"data.pairs={pairs}", "data.validation=2", f"lora.init_from={style}")
    run("experiment=style_dpo", *SMALL, *judged, *refined, f"hydra.run.dir={folder / 'dpo'}", f"cache_dir={folder}")
    return folder


def test_the_pairs_are_those_of_the_style_lora_and_all_are_judged(loop):
    preferences = read_preferences(loop / "pairs")
    assert len(preferences) == 8
    assert {each.pair.model_0 for each in preferences} == {"tiny + style_sft"}
    decided = [each for each in preferences if each.status in ("image_0", "image_1")]
    rows = [json.loads(line) for line in (loop / "pairs" / "metadata.jsonl").read_text().splitlines()]
    assert len(rows) == len(decided) > 0


def test_the_policy_begins_at_the_style_lora_and_leaves_it(loop):
    style, policy = (read_lora(loop / name) for name in ("style", "dpo"))
    assert style.ranks == policy.ranks and style.modules == policy.modules
    assert any(not torch.equal(style.state[key], policy.state[key]) for key in style.state)
    assert json.loads((loop / "dpo" / "run.json").read_text())["parents"] == [str(loop / "style")]


def test_the_run_says_what_it_trained_on_and_ends_in_a_verdict_on_other_prompts_with_the_style_measured(loop):
    out = (loop / "train.out").read_text()
    assert "8 pairs: " in out and "others" in out
    verdict = json.loads((loop / "dpo" / "summary.json").read_text())["verdict"]
    assert verdict["judge"] == "oracle: centred, in the outlined style"
    assert {"style", "colour", "overall"} <= verdict["properties"].keys()


def test_the_sheet_shows_base_style_lora_and_policy(loop):
    sheet = Image.open(loop / "dpo" / "samples" / "step=000002.png")
    two_rows = Image.open(loop / "style" / "samples" / "step=000002.png")
    assert sheet.height > two_rows.height and sheet.width == two_rows.width
