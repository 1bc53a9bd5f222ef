"""The export command: every form, read back and compared, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Ended
from safetensors.torch import load_file, save_file
from small_model import ones
from twins import make_folder, make_single_file

from dpo_sd.export import outputs
from dpo_sd.lora.adapters import adapter_state, load_adapter_state, using, weights_of
from dpo_sd.lora.attaching import LoRA, load_for_drawing
from dpo_sd.lora.reading import read_lora
from dpo_sd.lora.weights import PEFT_CONFIG, WEIGHTS_NAME
from dpo_sd.lora.writing import save_diffusers, save_kohya
from dpo_sd.models.base import Base

Export = Callable[..., Ended]


@pytest.fixture(scope="module")
def export(command: Callable[..., Ended]) -> Export:
    return lambda *arguments: command(*arguments, program="export")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that trained attention, convolutions and the text encoder of the shipped model."""
    folder, model = tmp_path_factory.mktemp("run"), Base().load()
    LoRA(rank=4, alpha=1, target_modules=["to_q", "conv1", "proj_in"], text_encoder=True).attach(model)
    generator = torch.Generator().manual_seed(1)
    state = {key: torch.randn(value.shape, generator=generator) * 0.1 for key, value in adapter_state(model).items()}
    load_adapter_state(model, "policy", state)
    save_diffusers(weights_of(model), folder / "lora" / WEIGHTS_NAME)
    return folder


def refused(ended: Ended, *words: str) -> None:
    assert ended.code == 1
    assert ended.err.startswith("error: ") and ended.err.count("\n") == 1, ended.err
    assert not [word for word in words if word not in ended.err], ended.err


def test_a_run_goes_through_all_forms_and_back_without_a_change(export: Export, run: Path, tmp_path: Path) -> None:
    source = run
    for form, name in (("peft", "peft"), ("kohya", "k.safetensors"), ("diffusers", "d.safetensors"), ("peft", "again")):
        ended = export(f"lora={source}", f"format={form}", f"out={tmp_path / name}")
        assert ended.code == 0, ended.err
        assert "weights   37 modules read back, differing by nothing" in ended.out
        assert "outputs   differ from those of the LoRA that was read: text by nothing, unet by nothing" in ended.out
        source = tmp_path / name
    before, after = read_lora(run), read_lora(source)
    assert before.alphas == after.alphas
    assert all(torch.equal(tensor, after.state[key]) for key, tensor in before.state.items())


def test_the_report_counts_keys_and_is_honest_about_a_model_that_others_do_not_have(
    export: Export, run: Path, tmp_path: Path
) -> None:
    ended = export(f"lora={run}", f"out={tmp_path / 'x.safetensors'}")
    assert ended.out.splitlines()[2:5] == [
        "weights   37 modules read back, differing by nothing",
        "diffusers 0 unmatched keys of 111",
        "          (ComfyUI, A1111 and InvokeAI have no model of this size)",
    ]
    assert "rank 4, alpha 1, scale 0.25, 29 modules" in ended.out
    assert "text_encoder rank 4, alpha 1, scale 0.25, 8 modules" in ended.out


def test_merged_is_a_whole_pipeline_that_draws_as_the_lora_did(export: Export, run: Path, tmp_path: Path) -> None:
    ended = export(f"lora={run}", "format=merged", f"out={tmp_path / 'styled'}")
    assert ended.code == 0, ended.err
    merged, model = Base(path=str(tmp_path / "styled")).load(), Base().load()
    load_for_drawing(model, [(run, 1.0)])
    for name, value in outputs(model).items():
        torch.testing.assert_close(outputs(merged)[name], value, rtol=1e-4, atol=1e-5)
    with using(model, "base"):
        assert not torch.allclose(outputs(model)["unet"], outputs(merged)["unet"], rtol=1e-2)
    files = {file.name for file in (tmp_path / "styled").rglob("*") if file.is_file()}
    assert {"model_index.json", "model.safetensors", "tokenizer.json", "scheduler_config.json"} <= files
    assert merged.noise_scheduler.config["beta_start"] == model.noise_scheduler.config["beta_start"]
    assert [path.name for path in tmp_path.iterdir()] == ["styled"]


def test_without_a_lora_the_model_itself_is_written(export: Export, tmp_path: Path) -> None:
    ended = export("format=merged", f"out={tmp_path / 'alone'}")
    assert ended.code == 0, ended.err
    weights = "unet/diffusion_pytorch_model.safetensors"
    written, shipped = load_file(tmp_path / "alone" / weights), load_file(Path(Base().path) / weights)
    assert all(torch.equal(value.float(), written[key]) for key, value in shipped.items())
    refused(export("format=kohya", f"out={tmp_path / 'x.safetensors'}"), "give lora=<file or run folder>")


@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl"])
def test_a_lora_of_a_real_model_is_checked_without_its_weights(export: Export, tmp_path: Path, family: str) -> None:
    lora = ones(family, "attn2.to_k", "conv1", "q_proj", "k_proj", "v_proj", "out_proj")  # type: ignore[arg-type]
    save_diffusers(lora, tmp_path / "d.safetensors")
    ended = export(f"lora={tmp_path / 'd.safetensors'}", f"out={tmp_path / 'k.safetensors'}", f"model={family}")
    assert ended.code == 0, ended.err
    total = 3 * len(lora.modules)
    for program in ("ComfyUI  ", "A1111    ", "InvokeAI ", "diffusers"):
        assert f"{program} 0 unmatched keys of {total}\n" in ended.out
    assert "outputs   not compared: the weights of" in ended.out
    again = read_lora(tmp_path / "k.safetensors")
    assert again.alphas == lora.alphas
    assert again.metadata["modelspec.prediction_type"] == ("v" if family == "sd21" else "epsilon")


def test_keys_that_a_program_would_leave_out_end_in_an_error_that_names_it(export: Export, tmp_path: Path) -> None:
    save_kohya(ones("sdxl", "text_projection", "layers.0.self_attn.out_proj"), tmp_path / "x.safetensors", "sdxl")
    ended = export(f"lora={tmp_path / 'x.safetensors'}", f"out={tmp_path / 'y.safetensors'}", "model=sdxl")
    assert "A1111     3 unmatched keys of 9 (first: lora_te2_text_projection.alpha)" in ended.out
    refused(ended, "A1111 would leave out what is named above")


def test_what_a_kohya_file_says_of_itself_is_kept(export: Export, run: Path, tmp_path: Path) -> None:
    lora = read_lora(run)
    first = save_kohya(
        lora, tmp_path / "first.safetensors", "tiny", extra={"ss_steps": "300", "modelspec.trigger": "x"}
    )
    assert export(f"lora={first}", f"out={tmp_path / 'second.safetensors'}").code == 0
    metadata = read_lora(tmp_path / "second.safetensors").metadata
    assert (metadata["ss_steps"], metadata["modelspec.trigger"], metadata["ss_output_name"]) == ("300", "x", "second")


def test_alphas_of_the_diffusers_form_are_in_its_weights_and_the_report_says_so(
    export: Export, run: Path, tmp_path: Path
) -> None:
    ended = export(f"lora={run}", "format=diffusers", f"out={tmp_path / 'd.safetensors'}")
    assert "(37 alphas are multiplied into the weights: not every program reads them here)" in ended.out
    assert set(read_lora(tmp_path / "d.safetensors").alphas.values()) == {1}
    state, source = load_file(tmp_path / "d.safetensors"), read_lora(run).state
    assert all(torch.equal(tensor, source[key] * (0.25 if "lora_B" in key else 1)) for key, tensor in state.items())


def test_projections_of_sd_2_in_kohyas_form_are_for_all_but_diffusers(export: Export, tmp_path: Path) -> None:
    lora = ones("sd21", "proj_in", "attn2.to_k")
    save_diffusers(lora, tmp_path / "d.safetensors")
    ended = export(f"lora={tmp_path / 'd.safetensors'}", f"out={tmp_path / 'k.safetensors'}", "model=sd21")
    assert ended.code == 0, ended.err
    assert "weights   32 modules read back, differing by nothing" in ended.out
    assert ended.out.count(" 0 unmatched keys of 96\n") == 3
    assert "(diffusers refuses the projections of SD 2 in this form: give it format=diffusers)" in ended.out
    ended = export(
        f"lora={tmp_path / 'k.safetensors'}", "format=diffusers", f"out={tmp_path / 'e.safetensors'}", "model=sd21"
    )
    assert ended.code == 0 and "diffusers 0 unmatched keys of 64\n" in ended.out, ended.err
    assert (tmp_path / "d.safetensors").read_bytes() == (tmp_path / "e.safetensors").read_bytes()


def test_what_a_file_says_of_its_base_counts_where_the_base_is_not_loaded(export: Export, tmp_path: Path) -> None:
    lora = ones("sdxl", "attn2.to_k")
    velocity = save_kohya(
        lora, tmp_path / "v.safetensors", "sdxl", prediction_type="v_prediction", zero_terminal_snr=True,
        extra={"modelspec.date": "2020-01-01", "modelspec.hash_sha256": "0x0"},
    )  # fmt: skip
    ended = export(f"lora={velocity}", f"out={tmp_path / 'k.safetensors'}", "model=sdxl")
    assert "metadata  of a base that predicts v, zero terminal SNR: True" in ended.out
    metadata = read_lora(tmp_path / "k.safetensors").metadata
    assert not {"modelspec.date", "modelspec.hash_sha256"} & metadata.keys()
    ended = export(
        f"lora={velocity}", f"out={tmp_path / 'e.safetensors'}", "model=sdxl", "model.prediction_type=epsilon",
        "model.zero_terminal_snr=false",
    )  # fmt: skip
    assert "metadata  of a base that predicts epsilon, zero terminal SNR: False" in ended.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["format=kohya", "out=styled"], ["format=kohya is a file", "must end in .safetensors"]),
        (["format=peft", "out=x.safetensors"], ["format=peft is a folder"]),
        (
            ["format=koyha", "out=x.safetensors"],
            ["format must be one of kohya, diffusers, peft, merged", "mean kohya?"],
        ),
        ([], ["out has no value"]),
        (["out=x.safetensors", "lora.pth=x"], ["lora.pth: no such setting", "lora.path"]),
    ],
)
def test_a_mistake_is_named_before_anything_loads(
    export: Export, run: Path, arguments: list[str], words: list[str]
) -> None:
    refused(export(f"lora={run}", *arguments), *words)


def test_nothing_is_written_over(export: Export, run: Path, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x").write_text("mine")
    refused(export(f"lora={run}", f"out={tmp_path / 'x.safetensors'}"), "exists: choose another name")
    refused(export(f"lora={run}", "format=peft", f"out={tmp_path / 'folder'}"), "exists: choose another name")
    assert (tmp_path / "x.safetensors").read_text() == (tmp_path / "folder" / "x").read_text() == "mine"


def test_a_lora_of_another_family_is_refused_and_nothing_is_written(export: Export, run: Path, tmp_path: Path) -> None:
    save_kohya(ones("sdxl", "attn2.to_k"), tmp_path / "x.safetensors", "sdxl")
    ended = export(f"lora={tmp_path / 'x.safetensors'}", f"out={tmp_path / 'y.safetensors'}", "model=sd15")
    refused(ended, "was made for another base", "it looks like sdxl, this model is sd15: use model=sdxl")
    refused(export(f"lora={run}", f"out={tmp_path / 'y.safetensors'}", "model=sd15"), "; this model is sd15")
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


def test_the_folder_of_pefts_form_is_what_peft_reads(export: Export, run: Path, tmp_path: Path) -> None:
    assert export(f"lora={run}", "format=peft", f"out={tmp_path / 'peft'}").code == 0
    config = json.loads((tmp_path / "peft" / "text_encoder" / PEFT_CONFIG).read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"], len(config["target_modules"])) == ("LORA", 4, 1, 8)


def test_a_lora_that_does_not_survive_is_an_error(run: Path, tmp_path: Path) -> None:
    from dpo_sd.errors import UserError
    from dpo_sd.export import check
    from dpo_sd.models.skeletons import on_meta

    lora = read_lora(run)
    state = load_file(save_kohya(lora, tmp_path / "x.safetensors", "tiny"))
    save_file(
        {key: value * (1.1 if "lora_up" in key else 1) for key, value in state.items()}, tmp_path / "x.safetensors"
    )
    with pytest.raises(UserError, match="does not hold what"):
        check(lora, "kohya", tmp_path / "x.safetensors", on_meta("tiny"))


def test_a_twin_of_sdxl_keeps_both_text_encoders_in_every_form(export: Export, tmp_path: Path) -> None:
    base = make_folder(tmp_path / "base", "sdxl")
    model = Base("sdxl", path=str(base)).load()
    LoRA(rank=2, alpha=3, target_modules=["to_k", "conv", "linear_1"], text_encoder=True).attach(model)
    for name, tensor in weights_of(model).state.items():
        tensor.normal_(generator=torch.Generator().manual_seed(len(name))).mul_(0.1)
    source = save_kohya(weights_of(model), tmp_path / "x.safetensors", "sdxl")
    for form, name in (("peft", "peft"), ("diffusers", "d.safetensors"), ("kohya", "k.safetensors"), ("merged", "all")):
        ended = export(f"lora={source}", f"format={form}", f"out={tmp_path / name}", "model=sdxl", f"model.path={base}")
        assert ended.code == 0, ended.err
        # alpha / rank is 1.5, which rounds B where it is multiplied into it
        assert form in ("merged", "diffusers") or "text by nothing, unet by nothing" in ended.out
        assert form != "diffusers" or "alphas are multiplied into the weights" in ended.out
        assert form != "kohya" or ended.out.count(" 0 unmatched keys of ") == 4
    assert read_lora(tmp_path / "k.safetensors").networks == ["unet", "text_encoder", "text_encoder_2"]


def test_a_pickled_checkpoint_becomes_a_safe_folder(export: Export, tmp_path: Path) -> None:
    single = make_single_file(tmp_path, "sd15")
    torch.save({"state_dict": load_file(single.file)}, tmp_path / "old.ckpt")
    place = ("model=sd15", f"model.path={tmp_path / 'old.ckpt'}", f"model.config={single.config}")
    refused(export("format=merged", f"out={tmp_path / 'safe'}", *place), "is a pickle", "python -m dpo_sd.export")
    ended = export("format=merged", f"out={tmp_path / 'safe'}", *place, "model.pickle=true")
    assert ended.code == 0, ended.err
    safe, whole = (Base("sd15", path=str(path)).load() for path in (tmp_path / "safe", single.folder))
    for name, value in outputs(whole).items():
        torch.testing.assert_close(outputs(safe)[name], value)


def test_each_checkpoint_that_is_kept_has_its_lora_and_is_read_as_one(train, tmp_path):
    run = tmp_path / "run"
    ended = train(run, "callbacks.checkpoint.every=2", "callbacks.checkpoint.keep=2", "lora.alpha=3", "name=taste")
    assert ended.code == 0, ended.err
    kept = sorted(file.stem.removeprefix("step=") for file in (run / "checkpoints").glob("step=*.ckpt"))
    assert kept == ["000004", "000006"]
    snapshots = sorted(file.stem for file in (run / "lora").glob("taste-*"))
    assert snapshots == [f"taste-{step}" for step in kept]
    for step in kept:
        of_file, of_checkpoint = (
            read_lora(run / place)
            for place in (f"lora/taste-{step}.safetensors", f"checkpoints/step={step}.ckpt")
        )  # fmt: skip
        assert of_file.alphas == of_checkpoint.alphas and set(of_file.alphas.values()) == {3.0}
        assert all(torch.equal(of_file.state[key], value) for key, value in of_checkpoint.state.items())
    assert "taste-000004" not in ended.out
