"""What watches a run, each on its own: files that end right, and what is said."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from peft.tuners.lora import LoraLayer
from PIL import Image
from safetensors import safe_open

from dpo_sd.callbacks.checkpoint import Checkpoint
from dpo_sd.callbacks.export import Export
from dpo_sd.callbacks.health import Health
from dpo_sd.callbacks.metrics import Metrics
from dpo_sd.callbacks.progress import Progress
from dpo_sd.callbacks.run_record import RunRecord
from dpo_sd.callbacks.samples import Samples
from dpo_sd.callbacks.verdict import Verdict
from dpo_sd.callbacks.watcher import Run, Watcher
from dpo_sd.data.batches import Batch, PreparedSamples, Prompts
from dpo_sd.data.datamodule import DataModule
from dpo_sd.data.source import PreparedData
from dpo_sd.errors import UserError
from dpo_sd.files.checksums import seal
from dpo_sd.judges.judge import Judge
from dpo_sd.lora.adapters import weights_of
from dpo_sd.lora.attaching import LoRA
from dpo_sd.lora.weights import WEIGHTS_NAME
from dpo_sd.lora.writing import reading_metadata, save_diffusers
from dpo_sd.losses import DiffusionDPOLoss, PairErrors
from dpo_sd.models.base import Base
from dpo_sd.models.families import FAMILIES
from dpo_sd.models.sampling import Sampler
from dpo_sd.shapes.captions import split_prompts
from dpo_sd.training.checkpoints import AtomicCheckpointIO
from dpo_sd.training.metrics_file import MetricsFile
from dpo_sd.training.optimizers import AdamW
from dpo_sd.training.step import Denoised, DiffusionModule

HELD_OUT = [f"prompt {i}" for i in range(9)]


def build(init_from: str | None = None) -> DiffusionModule:
    model = Base().load()
    LoRA(rank=2, init_from=init_from).attach(model)
    return DiffusionModule(model, DiffusionDPOLoss(), AdamW(lr=2e-3), max_steps=10)


@pytest.fixture(scope="module")
def module() -> DiffusionModule:
    module = build()
    module.identity = {"settings": {"framing": {"resolution": None}, "noising": {"offset": 0.0}}}
    return module


class Painter(Sampler):
    """Paints one colour for each network, and remembers what it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[str, list[str], list[int]]] = []

    def draw(
        self, model: Any, prompts: Sequence[str], seeds: Sequence[int], progress: str | None = None, embeds: Any = None
    ) -> list[Image.Image]:
        layer = next(module for module in model.unet.modules() if isinstance(module, LoraLayer))
        which = "base" if layer.disable_adapters else layer.active_adapters[0]
        self.asked.append((which, list(prompts), list(seeds)))
        colour = {"base": "red", "reference": "lime", "policy": "blue"}[which]
        return [Image.new("RGB", (64, 64), colour) for _ in prompts]


class Bluish(Judge):
    """Likes blue; the first held-out prompt is a tie to it."""

    name = "a judge"

    def scores(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        return [
            0.5 if prompt == HELD_OUT[0] else float(image.getpixel((0, 0)) == (0, 0, 255))
            for image, prompt in zip(images, prompts, strict=True)
        ]

    def properties(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> dict[str, list[float]]:
        return {"shape": [0.25 if image.getpixel((0, 0)) == (0, 0, 255) else 0.75 for image in images]}


TRAINED = ["first", "second", "third"]


def make_run(
    folder: Path | str = ".",
    step: int = 0,
    module: Any = None,
    judge: Judge | None = None,
    labeller: str | None = None,
    held_out: Sequence[str] = HELD_OUT,
    **trainer: Any,
) -> Any:
    """A run of ten updates that stands at `step`; more keywords become attributes of its trainer."""
    train = SimpleNamespace(prompts=Prompts(TRAINED, np.arange(3), None))
    data = SimpleNamespace(held_out_prompts=list(held_out), train=train)
    values = {"global_step": step, "max_steps": 10, "is_global_zero": True, "world_size": 1}
    fake: Any = SimpleNamespace(default_root_dir=str(folder), **values | trainer)
    source = SimpleNamespace(labeller=labeller)
    datamodule: Any = SimpleNamespace(sampler=Painter(), source=source, data=data)
    return Run(fake, module, datamodule, judge)


def at(run: Run, step: int) -> Run:
    """The same run after that update."""
    run.trainer.global_step = step  # type: ignore[misc]
    return run


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Checkpoint(every=0), "every must be at least 1, got 0"),
        (lambda: Checkpoint(keep=0), "keep must be at least 1, got 0"),
        (lambda: Samples(every=0), "every must be at least 1, got 0"),
        (lambda: Samples(n_prompts=0), "n_prompts must be at least 1, got 0"),
        (lambda: Samples(prompts=[]), r"prompts=\[\]: there are none"),
        (lambda: Verdict(n_prompts=1), "n_prompts must be at least 2, got 1"),
        (lambda: Verdict(seeds_per_prompt=0), "seeds_per_prompt must be at least 1, got 0"),
        (lambda: Progress(window=0), "window must be at least 1, got 0"),
        (lambda: Export(name="a/b"), "name must be a file name .* got 'a/b'"),
        (lambda: Export(name=""), "name must be a file name .* got ''"),
    ],
)
def test_settings_out_of_range_are_named(build, message):
    with pytest.raises(UserError, match=message):
        build()


# ------------------------------------------------------------------------------------------------------------ metrics.c


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


def test_a_row_is_on_disk_as_soon_as_it_is_logged(tmp_path):
    log = MetricsFile(tmp_path / "metrics.csv")
    log.log_metrics({"loss": 0.1 + 0.2}, 1)
    assert rows(log.file) == [{"step": "1", "loss": "0.30000000000000004"}]  # to the bit
    log.log_metrics({"loss": 0.5}, 2)
    assert rows(log.file)[1] == {"step": "2", "loss": "0.5"}


def test_a_metric_that_comes_later_gets_a_column_and_empty_cells_before(tmp_path):
    log = MetricsFile(tmp_path / "metrics.csv")
    log.log_metrics({"loss": 1.0}, 1)
    log.log_metrics({"val": 2.0}, 2)
    log.log_metrics({"loss": 3.0, "val": 4.0}, 3)
    assert rows(log.file) == [
        {"step": "1", "loss": "1.0", "val": ""},
        {"step": "2", "loss": "", "val": "2.0"},
        {"step": "3", "loss": "3.0", "val": "4.0"},
    ]


@pytest.mark.parametrize("torn", ["", "1", "4", "4,0.", "4,0.1,0."])
def test_a_continued_file_ends_as_if_nothing_had_happened(tmp_path, torn):
    """Rows of updates that are made again go, and so does the row that was being written, "1" of "12" for example."""
    whole, killed = MetricsFile(tmp_path / "whole.csv"), MetricsFile(tmp_path / "killed.csv")
    values = [{"loss": step / 7, "lr": 1e-3, **({"val": 0.5} if step == 3 else {})} for step in range(1, 6)]
    for step, value in enumerate(values, start=1):
        whole.log_metrics(value, step)
        if step <= 3:
            killed.log_metrics(value, step)
    with killed.file.open("a") as file:
        file.write(torn)
    continued = MetricsFile(tmp_path / "killed.csv")
    continued.resume(2)
    for step, value in enumerate(values[2:], start=3):
        continued.log_metrics(value, step)
    assert continued.file.read_bytes() == whole.file.read_bytes()


def test_a_run_that_begins_again_begins_its_file_again(tmp_path):
    MetricsFile(tmp_path / "metrics.csv").log_metrics({"loss": 1.0}, 0)
    Metrics(validate_every=0).on_start(make_run(loggers=[MetricsFile(tmp_path / "metrics.csv")]))
    assert rows(tmp_path / "metrics.csv") == []


class TwoSizes:
    """Pictures, every other one wider."""

    def read(self, row: int, flip: bool, where: tuple[float, float]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(4, 2, 2 + row % 2), torch.zeros(6)


def run_on_five_pairs(module: DiffusionModule) -> Run:
    """Enough of a run for a validation on pairs of two sizes."""
    pictures, ones = TwoSizes(), np.ones(5, np.float32)
    prompts = Prompts(["prompt"], np.zeros(5, int), None)
    samples = PreparedSamples(pictures, pictures, prompts, ones, ones, np.arange(5), np.arange(5) % 2)
    source: Any = SimpleNamespace(caption_dropout=0.0)
    data = DataModule(PreparedData(samples, samples, [], []), source, Sampler(), 8, 8, seed=0, num_train_timesteps=1000)
    trainer: Any = SimpleNamespace(
        global_rank=0,
        world_size=1,
        strategy=SimpleNamespace(batch_to_device=lambda batch: batch),
        precision_plugin=SimpleNamespace(forward_context=nullcontext),
    )
    return Run(trainer, module, data)


def test_the_reference_is_asked_once_about_the_grid_and_the_policy_every_time(module, monkeypatch):
    asked = []

    def denoised(part: Batch) -> Denoised:
        asked.append(len(part.index))
        n = 0.5 * torch.tensor(part.index) + part.timesteps / 1000 + len(asked)
        return Denoised(PairErrors(n, 2 * n), None)

    monkeypatch.setattr(module, "denoised", denoised)
    metrics, run = Metrics(), run_on_five_pairs(module)
    first = metrics.validate(run)
    both = len(asked)
    second = metrics.validate(run)
    assert 2 * (len(asked) - both) == both > 0
    assert first["val/chosen_drift"] == pytest.approx(1)  # asked just after the reference
    assert second["val/chosen_drift"] > 1  # of the errors that the first validation kept
    module.set_training(False)


def test_validation_averages_the_four_noises_of_each_pair_though_sizes_differ(module, monkeypatch):
    """Margins of pair i are 1, 1, 1 and i - 4: pair 0 loses, pair 1 is a tie, and the three others win."""

    def losses(part: Batch, _: Any) -> dict[str, torch.Tensor]:
        late = zip(part.index, (part.timesteps == 875).tolist(), strict=True)
        margins = torch.tensor([i - 4.0 if is_late else 1.0 for i, is_late in late])
        return {"loss": torch.ones(len(margins)), "reward_margin": margins}

    monkeypatch.setattr(module, "losses", losses)
    metrics = Metrics().validate(run_on_five_pairs(module))
    module.set_training(False)
    assert metrics["val/reward_accuracy"] == pytest.approx(3.5 / 5)
    assert metrics["val/reward_margin/t875"] == pytest.approx(-2)
    assert metrics["val/reward_margin/t125"] == 1


# ------------------------------------------------------------------------------------------------------------ checkpoin


def save_steps(folder: Path, steps: range, keep: int = 2) -> None:
    def save_checkpoint(path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        path.write_text(path.name)

    for step in steps:
        Checkpoint(keep=keep).save(make_run(folder, step, save_checkpoint=save_checkpoint))


@pytest.mark.parametrize("linked", [True, False])
def test_the_newest_checkpoints_stay_and_last_is_the_newest(tmp_path, monkeypatch, linked):
    def no_links(*names: Any) -> None:
        raise OSError("no hard links here")

    if not linked:
        monkeypatch.setattr("os.link", no_links)
    save_steps(tmp_path, range(0, 600, 100))
    names = sorted(file.name for file in (tmp_path / "checkpoints").iterdir())
    assert names == ["last.ckpt", "step=000400.ckpt", "step=000500.ckpt"]
    assert (tmp_path / "checkpoints" / "last.ckpt").read_text() == "step=000500.ckpt"


def test_a_checkpoint_of_a_former_attempt_that_is_further_on_is_not_the_last(tmp_path):
    save_steps(tmp_path, range(1, 4))
    save_steps(tmp_path, range(2, 3))
    assert (tmp_path / "checkpoints" / "last.ckpt").read_text() == "step=000002.ckpt"
    assert not (tmp_path / "checkpoints" / "step=000003.ckpt").exists()


def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    """torch reports a full disk as a RuntimeError about its file writer."""
    file, io = tmp_path / "checkpoints" / "last.ckpt", AtomicCheckpointIO()
    io.save_checkpoint({"step": 1}, file)

    def full(state: Any, place: Any) -> None:
        Path(place).write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match=rf"{file} cannot be written \(No space left on device\)"):
        io.save_checkpoint({"step": 2}, file)
    assert torch.load(file, weights_only=True) == {"step": 1}
    assert list(file.parent.iterdir()) == [file]


def test_a_folder_in_which_nothing_can_be_written_is_named(tmp_path):
    (tmp_path / "checkpoints").write_text("a file in its place")
    with pytest.raises(UserError, match=r"checkpoints.*cannot be written"):
        AtomicCheckpointIO().save_checkpoint({}, tmp_path / "checkpoints" / "last.ckpt")


def test_a_checkpoint_with_code_in_it_is_not_run(tmp_path):
    class Attack:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"adapters": Attack()}, tmp_path / "last.ckpt")
    seal(tmp_path / "last.ckpt")
    with pytest.raises(UserError, match=r"not a whole checkpoint of dpo_sd \(UnpicklingError\)"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "last.ckpt", weights_only=False)
    assert not (tmp_path / "ran").exists()


def test_checkpoints_come_every_so_many_updates_and_at_the_end(tmp_path):
    saved: list[str] = []
    run = make_run(tmp_path, is_global_zero=False, save_checkpoint=lambda file: saved.append(file.name))
    checkpoint = Checkpoint(every=4)
    for step in range(1, 11):
        checkpoint.on_update(at(run, step))
    assert saved == ["step=000004.ckpt", "step=000008.ckpt", "step=000010.ckpt"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_first_signal_saves_and_stops_a_second_one_ends_at_once(tmp_path, capsys, number):
    saved: list[str] = []

    def save_checkpoint(file: Path) -> None:
        saved.append(file.name)
        file.parent.mkdir()
        file.touch()

    callback, run = Checkpoint(), make_run(tmp_path, step=3, save_checkpoint=save_checkpoint)
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    callback.on_start(run)
    try:
        signal.raise_signal(number)
        assert "once more to stop at once" in capsys.readouterr().out
        with pytest.raises(KeyboardInterrupt):  # which Lightning turns into an orderly end
            callback.on_update(run)
        assert saved == ["step=000003.ckpt"]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    finally:
        callback.teardown(run.trainer, run.module, "fit")
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_run_that_is_over_its_hours_saves_and_stops_unless_it_is_done(tmp_path, capsys):
    saved: list[str] = []
    callback = Checkpoint(max_hours=1e-9)
    run = make_run(tmp_path, is_global_zero=False, save_checkpoint=lambda file: saved.append(file.name))
    with pytest.raises(KeyboardInterrupt):
        callback.on_update(at(run, 3))
    callback.on_update(at(run, 10))
    assert saved == ["step=000003.ckpt", "step=000010.ckpt"]
    with pytest.raises(UserError, match="max_hours must be positive, or null for no limit, got 0"):
        Checkpoint(max_hours=0)


@pytest.mark.parametrize(
    ("metric", "values", "best"),
    [("val/reward_accuracy", [0.5, 0.7, 0.6, 0.7, 0.4], 4), ("val/loss", [3.0, 2.0, 1.0, 1.5, 2.5], 6)],
)
def test_the_best_checkpoint_stays_beside_the_newest_also_where_a_run_goes_on(tmp_path, metric, values, best):
    def save_checkpoint(file: Path) -> None:
        file.parent.mkdir(exist_ok=True)
        file.touch()

    callback = Checkpoint(every=2, keep=1, best=metric)
    run = make_run(tmp_path, save_checkpoint=save_checkpoint)
    for step, value in zip(range(2, 12, 2), values, strict=True):
        run.metrics[metric] = value
        callback.on_update(at(run, step))
        going_on = Checkpoint(every=2, keep=1, best=metric)
        going_on.load_state_dict(callback.state_dict())
        callback = going_on
    there = sorted(file.name for file in (tmp_path / "checkpoints").iterdir())
    assert there == sorted({"last.ckpt", f"step={best:06d}.ckpt", "step=000010.ckpt"})
    assert callback.summary() == {"best_checkpoint": {"step": best, metric: values[best // 2 - 1]}}
    assert f"update {best}, {metric}" in callback.report()


def test_a_run_that_goes_on_by_another_metric_forgets_the_best_and_no_number_is_never_the_best(tmp_path):
    run = make_run(tmp_path, is_global_zero=False, save_checkpoint=lambda file: None)
    callback = Checkpoint(every=1, best="val/loss")
    for step, value in ((1, math.nan), (2, 2.0), (3, math.nan)):
        run.metrics["val/loss"] = value
        callback.on_update(at(run, step))
    assert callback.summary() == {"best_checkpoint": {"step": 2, "val/loss": 2.0}}
    for metric in (None, "val/reward_accuracy"):
        other = Checkpoint(best=metric)
        other.load_state_dict(callback.state_dict())
        assert other.summary() == {} and other.report() == ""


def test_a_best_by_a_value_that_the_validation_lacks_is_refused_before_the_first_update(tmp_path):
    run = make_run(tmp_path)
    run.metrics["val/loss"] = 1.0
    with pytest.raises(UserError, match=r"best=val/win_rate: the validation has no such value; it has val/loss"):
        Checkpoint(best="val/win_rate").on_start(run)


# ----------------------------------------------------------------------------------------------------------------- heal


def health(losses: list[float]) -> None:
    """The check of update 7, whose pairs have these losses."""
    seen = {"loss": torch.tensor(losses), "index": torch.arange(len(losses))}
    strategy = SimpleNamespace(all_gather=lambda value: value)
    Health().before_update(make_run(step=6, module=SimpleNamespace(seen=lambda: seen), strategy=strategy))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_names_the_update_and_the_samples(value):
    with pytest.raises(UserError, match=r"not finite at update 7, on 2 pairs.*'first', 'third'"):
        health([value, 0.5, value])


def test_finite_losses_pass():
    health([0.1, 1e30, 0.0])


# ---------------------------------------------------------------------------------------------------------------- sampl


def columns(sheet: Image.Image, line: int, n: int) -> list[Any]:
    return [sheet.getpixel((74 + column * 142 + 68, 6 + line * 142 + 68)) for column in range(n)]


def test_a_sheet_shows_base_and_policy_on_the_same_prompts_and_seeds(tmp_path, module):
    run = make_run(tmp_path, module=module)
    Samples(n_prompts=3).on_start(run)
    sheet = Image.open(tmp_path / "samples" / "step=000000.png").convert("RGB")
    assert columns(sheet, 0, 3) == [(255, 0, 0)] * 3
    assert columns(sheet, 1, 3) == [(0, 0, 255)] * 3
    (base, *first), (policy, *second) = run.data.sampler.asked
    assert (base, policy) == ("base", "policy")
    assert first == second and first[0] == HELD_OUT[:3] and len(set(first[1])) == 3


def test_what_training_does_not_change_is_drawn_once(tmp_path, module):
    callback, run = Samples(every=5, prompts=["mine"]), make_run(tmp_path, module=module)
    callback.on_start(run)
    for step in range(1, 11):
        callback.on_update(at(run, step))
    assert [which for which, _, _ in run.data.sampler.asked] == ["base", "policy", "policy", "policy"]
    assert {tuple(prompts) for _, prompts, _ in run.data.sampler.asked} == {("mine",)}
    names = sorted(file.name for file in (tmp_path / "samples").iterdir())
    assert names == ["step=000000.png", "step=000005.png", "step=000010.png"]


def test_prompts_of_a_file_are_drawn_in_their_order_with_their_own_seeds_and_sizes(tmp_path, module, monkeypatch):
    (tmp_path / "prompts.txt").write_text("one --w 32 --d 7\ntwo\nthree --w 32 --d 9\n")
    asked: list[tuple[Any, list[str], list[int]]] = []

    def sides(names: Any, model: Any, sampler: Sampler, prompts: list[str], seeds: list[int]) -> dict[str, Any]:
        asked.append((sampler.width, prompts, seeds))
        return {name: [Image.new("RGB", (32, 64), f"#{len(prompt):02x}0000") for prompt in prompts] for name in names}

    monkeypatch.setattr("dpo_sd.callbacks.samples.draw_sides", sides)
    Samples(prompts=str(tmp_path / "prompts.txt")).on_start(make_run(tmp_path, module=module))
    assert asked[0] == (32, ["one", "three"], [7, 9]) and asked[1][:2] == (None, ["two"])
    sheet = Image.open(tmp_path / "samples" / "step=000000.png").convert("RGB")
    assert columns(sheet, 0, 3) == [(3, 0, 0), (3, 0, 0), (5, 0, 0)]
    assert sheet.getpixel((74 + 5, 6 + 68)) == (255, 255, 255)  # beside a picture that is not square


def test_a_lora_that_training_started_from_has_a_row_of_its_own(tmp_path, module):
    started = build(str(save_diffusers(weights_of(module.model), tmp_path / WEIGHTS_NAME)))
    Samples(n_prompts=2).on_start(make_run(tmp_path, module=started))
    sheet = Image.open(tmp_path / "samples" / "step=000000.png").convert("RGB")
    assert [columns(sheet, line, 1)[0] for line in range(3)] == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]


def test_a_continued_run_does_not_draw_its_beginning_again(tmp_path, module):
    run = make_run(tmp_path, step=4, module=module)
    Samples().on_start(run)
    assert not run.data.sampler.asked


# ---------------------------------------------------------------------------------------------------------------- verdi


def judged(module: DiffusionModule, judge: Judge | None = None, **settings: Any) -> tuple[Verdict, Any]:
    """A verdict on five prompts, unless told otherwise, and the run that it was made on."""
    options: dict[str, Any] = {"n_prompts": 5, "seeds_per_prompt": 2}
    verdict = Verdict(**options | settings)
    run = make_run(step=10, module=module, judge=judge or Bluish())
    verdict.on_end(run)
    return verdict, run


def test_reference_and_policy_draw_the_same_prompts_with_the_same_seeds(module):
    _, run = judged(module)
    (reference, *first), (policy, *second) = run.data.sampler.asked
    assert (reference, policy) == ("base", "policy")  # without a LoRA to start from, the reference is the base
    assert first == second
    assert first[0] == [prompt for prompt in HELD_OUT[:5] for _ in range(2)]
    assert len(set(first[1])) == 10


def test_the_images_of_the_verdict_are_not_those_of_the_samples(tmp_path, module):
    _, run = judged(module)
    other = make_run(tmp_path, module=module)
    Samples(n_prompts=5).on_start(other)
    seeds = [{*asked[2]} for asked in (run.data.sampler.asked[0], other.data.sampler.asked[0])]
    assert seeds[0].isdisjoint(seeds[1])


def test_the_verdict_of_the_summary_is_the_comparison_by_the_runs_judge(module):
    """Of five prompts the policy wins four, and one is a tie: 4.5 / 5."""
    verdict = judged(module)[0].summary()["verdict"]
    assert (verdict["win_rate"], verdict["n_prompts"], verdict["judge"]) == (pytest.approx(0.9), 5, "a judge")


def test_an_interrupted_run_gets_no_verdict(module):
    verdict, run = Verdict(), make_run(step=9, module=module, judge=Bluish())
    verdict.on_end(run)
    assert verdict.summary() == {"verdict": None} and verdict.report() == ""
    assert not run.data.sampler.asked


def test_without_a_judge_nothing_is_drawn_and_there_is_no_verdict(module):
    verdict, run = Verdict(), make_run(step=10, module=module)
    verdict.on_end(run)
    assert verdict.summary() == {"verdict": None} and not run.data.sampler.asked


def test_the_report_says_rate_interval_number_judge_scores_and_control(module):
    verdict, _ = judged(module)
    result = verdict.summary()["verdict"]
    low, high = (f"{100 * result[name]:.0f}" for name in ("low", "high"))
    report = verdict.report()
    assert f"The policy wins 90 % [{low}, {high}] n=5 against its reference" in report
    assert float(low) < 50 and "held-out prompts, which are too few to tell any win rate from chance." in report
    assert "a judge" in report
    assert "0.10 → 0.90" in report
    assert "0.750 → 0.250" in report
    assert "A/A control   50 %" in report


def test_a_verdict_says_beforehand_what_it_can_show():
    run = make_run(judge=Bluish(), held_out=[str(i) for i in range(512)])
    few, many, all_there_are = (Verdict(n_prompts=n).promise(run) for n in (16, 512, 600))
    assert "on 16 held-out prompts, a win rate of 8" in few
    assert "on 512 held-out prompts, a win rate of 56 %" in many.replace("%", " %").replace("  ", " ")
    assert "on 512 held-out prompts (there are no 600)" in all_there_are
    assert "4 held-out prompts cannot tell any win rate" in Verdict(n_prompts=4).promise(run)
    assert "only people can judge" in Verdict().promise(make_run())


def test_that_the_judge_also_labelled_is_said_before_and_after(module):
    same, other = (make_run(step=10, module=module, judge=Bluish(), labeller=name) for name in ("a judge", "another"))
    reports = []
    for run in (same, other):
        verdict = Verdict(n_prompts=5)
        assert ("the same judge labelled the pairs" in verdict.promise(run)) is (run is same)
        verdict.on_end(run)
        assert verdict.summary()["verdict"]["labelled_by"] == run.data.source.labeller
        reports.append("by the same judge" in verdict.report())
    assert reports == [True, False]


def test_prompts_of_ones_own_are_judged_less_those_that_training_has_seen(module):
    verdict, run = judged(module, prompts=["second", "mine", "yours", HELD_OUT[0]], n_prompts=2)
    assert run.data.sampler.asked[0][1] == ["mine", "mine", "yours", "yours"]
    assert "on 2 held-out prompts" in verdict.promise(run) or "2 held-out prompts cannot" in verdict.promise(run)
    assert "1 that training has seen are left out" in verdict.promise(run)


def test_prompts_that_training_has_seen_all_of_are_refused():
    with pytest.raises(UserError, match="training has seen all of them"):
        Verdict(prompts=["first", "third"]).promise(make_run(judge=Bluish()))


def test_the_held_out_prompts_of_the_shapes_world_are_in_none_of_its_pairs():
    prompts, split = Verdict(prompts="shapes:held_out").prompts, split_prompts(0)
    assert prompts is not None
    assert prompts == split.held_out and set(prompts).isdisjoint([*split.train, *split.validation])


def test_prompts_without_a_judge_are_refused_and_a_judge_is_asked_about_them():
    asked = []

    class Choosy(Bluish):
        def check(self, size: tuple[int, int], prompts: Sequence[str]) -> None:
            asked.append((size, list(prompts)))
            if "mine" in prompts:
                raise UserError("not this one")

    with pytest.raises(UserError, match=r"verdict\.prompts is given, but nobody judges"):
        Verdict(prompts=["mine"]).check(None, (64, 64), [])
    Verdict().check(None, (64, 64), [])
    with pytest.raises(UserError, match="a judge cannot judge this run: not this one"):
        Verdict(prompts=["mine"]).check(Choosy(), (64, 64), ["theirs"])
    Verdict().check(Choosy(), (128, 64), ["theirs"])
    assert asked == [((64, 64), ["mine"]), ((128, 64), ["theirs"])]


def test_a_judge_that_fails_is_remembered_and_loses_nothing_else(module):
    class Broken(Bluish):
        def scores(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
            raise ZeroDivisionError("in the judge")

    verdict, _ = judged(module, Broken())
    assert verdict.summary() == {"verdict": None}
    assert isinstance(verdict.failure, ZeroDivisionError)


# -------------------------------------------------------------------------------------------------------------- watcher


def test_a_watcher_is_told_of_updates_and_not_of_micro_batches():
    seen: list[Any] = []

    class Mine(Watcher):
        def on_update(self, run: Run) -> None:
            seen.append(run.step)

    watcher, trainer = Mine(), SimpleNamespace(accumulate_grad_batches=2, global_step=0, max_steps=3)
    watcher.run = Run(trainer, *[SimpleNamespace()] * 2)  # type: ignore[arg-type]
    for batch_idx in range(6):
        trainer.global_step = (batch_idx + 1) // 2
        watcher.on_train_batch_end(trainer, watcher.run.module, None, None, batch_idx)  # type: ignore[arg-type]
    assert seen == [1, 2, 3]


def test_a_watcher_is_told_once_of_the_end_even_where_there_was_no_update_left_to_make():
    ends: list[int] = []

    class Mine(Watcher):
        def on_end(self, run: Run) -> None:
            ends.append(run.step)

    for has_trained in (True, False):
        watcher, module = Mine(), SimpleNamespace(to=lambda device: None)
        trainer: Any = SimpleNamespace(global_step=4, strategy=SimpleNamespace(root_device="cpu"))
        watcher.run = Run(trainer, module, SimpleNamespace())  # type: ignore[arg-type]
        if has_trained:
            watcher.on_train_end(trainer, module)  # type: ignore[arg-type]
        watcher.on_fit_end(trainer, module)  # type: ignore[arg-type]
    assert ends == [4, 4]


# ----------------------------------------------------------------------------------------------------- export and recor


def test_a_checkpoint_brings_both_lora_files(tmp_path, module):
    folder = tmp_path / "quickstart" / "2026-01-01_00-00-00"
    Export("quickstart").on_checkpoint(make_run(folder, 6, module))
    files = {file.name: file for file in (folder / "lora").iterdir()}
    assert set(files) == {"pytorch_lora_weights.safetensors", "quickstart.safetensors", "quickstart-000006.safetensors"}
    with safe_open(files["quickstart.safetensors"], "pt") as file:
        metadata = file.metadata()
    assert {name: metadata[name] for name in ("ss_steps", "ss_learning_rate", "ss_resolution")} == {
        "ss_steps": "6",
        "ss_learning_rate": "0.002",
        "ss_resolution": "(64, 64)",
    }


def test_a_lora_says_how_prompts_were_read_where_that_is_not_as_usual():
    family = FAMILIES["sd15"]
    assert reading_metadata(family, family.reading()) == {}
    assert reading_metadata(family, family.reading(225, 2)) == {"ss_max_token_length": "225", "ss_clip_skip": "2"}


def test_a_lora_says_the_resolution_that_it_was_trained_at(tmp_path, module):
    module.identity["settings"]["framing"]["resolution"] = 48
    Export("mine").on_end(make_run(tmp_path, module=module))
    with safe_open(tmp_path / "lora" / "mine.safetensors", "pt") as file:
        assert file.metadata()["ss_resolution"] == "(48, 48)"


def test_a_loss_or_a_weight_that_is_no_number_is_not_kept(tmp_path, module):
    health, run = Health(), make_run(tmp_path, 6, module)
    run.metrics["val/loss"] = math.nan
    with pytest.raises(
        UserError, match="loss on the validation pairs is not finite after update 6; the last checkpoint"
    ):
        health.on_update(run)
    health.on_checkpoint(run)
    next(iter(weights_of(module.model).state.values())).fill_(math.inf)
    with pytest.raises(UserError, match="weights are not finite after update 6"):
        health.on_checkpoint(run)


def test_the_end_brings_the_lora_files_without_checkpoints_too(tmp_path, module):
    Export("mine").on_end(make_run(tmp_path, module=module))
    assert (tmp_path / "lora" / "mine.safetensors").is_file()


def make_record(folder: Path, overrides: Sequence[str] = ("seed=3",)) -> RunRecord:
    return RunRecord(folder, {"seed": 3, "loss": {"beta": 2000.0}}, list(overrides))


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


def test_a_run_is_on_record_before_anything_expensive(tmp_path):
    record = make_record(tmp_path)
    record.begin()
    assert OmegaConf.load(tmp_path / "config.yaml") == record.config
    run = read(tmp_path / "run.json")
    assert (run["overrides"], run["seed"]) == (["seed=3"], 3)
    assert {"command", "started", "version", "commit", "python", "packages"} <= set(run)
    record.add(data="fingerprint")
    assert read(tmp_path / "run.json") == {**run, "data": "fingerprint"}


def test_what_a_killed_start_was_writing_is_cleared_away(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    for name in (".last.ckpt.123.partial", "last.ckpt"):
        (tmp_path / "checkpoints" / name).touch()
    make_record(tmp_path).begin()
    assert [file.name for file in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"]


def test_a_continued_run_stays_what_it_was_and_lists_its_starts(tmp_path):
    first = make_record(tmp_path)
    first.begin()
    for workers in (1, 2):
        make_record(tmp_path, ["seed=3", f"hardware.num_workers={workers}"]).begin()
    run = read(tmp_path / "run.json")
    assert run["started"] == first.record["started"]
    assert run["overrides"] == ["seed=3", "hardware.num_workers=2"]
    assert [start["overrides"][1] for start in run["continued"]] == ["hardware.num_workers=1", "hardware.num_workers=2"]


def test_the_time_of_a_run_goes_on_after_a_resume(tmp_path):
    continued = make_record(tmp_path)
    continued.load_state_dict({"wall_time_s": 1000.0})
    assert 1000 < continued.state_dict()["wall_time_s"] < 1100


def test_the_summary_holds_the_last_metrics_and_what_the_watchers_add_in_a_fixed_order(tmp_path, module):
    class Mine(Watcher):
        def summary(self) -> dict[str, Any]:
            return {"mine": 7}

    verdict, run = judged(module)
    run = replace(run, metrics={"train/loss": 0.25})
    summary = make_record(tmp_path).finish(run, [Metrics(), Mine(), verdict])
    assert read(tmp_path / "summary.json") == summary
    first = ["steps", "skipped_steps", "metrics", "wall_time_s", "peak_memory_gib", "peak_gpu_memory_gib"]
    assert list(summary) == [*first, "verdict", "mine"]
    assert (summary["steps"], summary["metrics"], summary["mine"]) == (10, {"train/loss": 0.25}, 7)
    assert summary["verdict"]["win_rate"] == pytest.approx(0.9)
    assert summary["wall_time_s"] >= 0 and summary["peak_memory_gib"] > 0
