"""Writes a LoRA for other programs, or a model with it: `python -m dpo_sd.export lora=<run> format=kohya out=…`."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.utils import instantiate
from omegaconf import DictConfig

from dpo_sd.composition.application import entry_point
from dpo_sd.errors import UserError
from dpo_sd.files.atomic import replacing_folder
from dpo_sd.files.claims import held
from dpo_sd.lora.attaching import check_base, load_for_drawing
from dpo_sd.lora.names import kohya_convolutions, modules_of
from dpo_sd.lora.programs import diffusers_scales, loader_report, unmatched
from dpo_sd.lora.reading import read_lora
from dpo_sd.lora.weights import MAGNITUDE, LoRAFile
from dpo_sd.lora.writing import check_kohya, save_diffusers, save_kohya, save_peft
from dpo_sd.models.contents import Told, told_by_texts
from dpo_sd.models.families import PROGRAMS
from dpo_sd.models.ready import ready
from dpo_sd.models.skeletons import blank, on_meta

if TYPE_CHECKING:
    from torch import Tensor

    from dpo_sd.models.base import Base
    from dpo_sd.models.stable_diffusion import StableDiffusion

PROMPTS = ["a photo of a cat", "a small red circle on a blue background"]  # for which outputs are compared
TOLERANCE = 1e-3  # of the largest output: above the rounding of merged weights, far below what can be seen


def main() -> None:
    """`lora=` is short for `lora.path=`, since the group `lora` of trainings has nothing to say here."""
    sys.argv[1:] = [re.sub("^lora=", "lora.path=", argument) for argument in sys.argv[1:]]
    export()


@entry_point("export")
def export(cfg: DictConfig) -> None:
    """Writes `out`, reads it back and says who can load it; nothing is written over."""
    out = Path(cfg.out).expanduser()
    with held(out, beside=True):
        check_place(out, cfg.format)
        export_to(cfg, out)


def export_to(cfg: DictConfig, out: Path) -> None:
    """Writes what no other process writes."""
    base = instantiate(cfg.model)
    base.check()
    for line in base.to_fetch() if cfg.format == "merged" else []:
        print(f"model     {line}")
    if cfg.lora.path is not None:
        export_lora(read_lora(cfg.lora.path), base, cfg.format, out)
    elif cfg.format == "merged":
        write_merged(ready(base, "cpu"), None, out)
        print(f"wrote     {out}")
    else:
        raise UserError("lora has no value: give lora=<file or run folder>; only format=merged writes a model alone")


def export_lora(lora: LoRAFile, base: Base, form: str, out: Path) -> None:
    """Writes a LoRA, or the base with it, and compares both where the base's weights are at hand."""
    if form == "kohya":
        check_kohya(lora)
    at_hand = form == "merged" or Path(base.path).expanduser().exists()
    model = ready(base, "cpu") if at_hand else on_meta(base.name)
    lora = check_base(model, lora)
    print(f"lora      {lora.path}: {lora.summary()}")
    shape = blank(model)
    expected = outputs_with(model, lora) if at_hand else {}
    del model  # before another one is loaded
    if form == "merged":
        write_merged(base.load(), lora, out)
    else:
        write(lora, form, out, shape, base, at_hand)
    print(f"wrote     {out}")
    if form != "merged":
        check(lora, form, out, shape)
    if form == "kohya" and kohya_convolutions(lora.modules, shape.family):
        print("outputs   not compared: diffusers does not load the projections of SD 2 in Kohya's form")
    elif at_hand:
        compare(expected, outputs(loaded_by_its_library(base, form, out)), out)
    else:
        print(f"outputs   not compared: the weights of {base.path} were not loaded")


def check_place(out: Path, form: str) -> None:
    """Raises UserError if `out` cannot be what the form is, or is there already."""
    if form in ("kohya", "diffusers") and out.suffix != ".safetensors":
        raise UserError(f"out={out}: format={form} is a file, so its name must end in .safetensors")
    if form in ("peft", "merged") and out.suffix == ".safetensors":
        raise UserError(f"out={out}: format={form} is a folder, so its name must not end in .safetensors")
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UserError(f"out={out} exists: choose another name, or move it away")


def write(lora: LoRAFile, form: str, out: Path, shape: StableDiffusion, base: Base, at_hand: bool) -> None:
    """Writes a LoRA in Kohya's, diffusers' or PEFT's form.

    Args:
        shape: the base, without its weights.
        at_hand: whether it was loaded, so that its schedule is the true one; if not, what the LoRA's file says counts.
    """
    if form == "kohya":
        kept = {key: value for key, value in lora.metadata.items() if key.startswith(("ss_", "modelspec."))}
        for stale in ("modelspec.date", "modelspec.hash_sha256"):  # of another file
            kept.pop(stale, None)
        said = Told() if at_hand else told_by_texts(kept)
        prediction_type: Any = base.prediction_type or said.prediction_type or shape.prediction_type
        zero = shape.noise_scheduler.config["rescale_betas_zero_snr"] or bool(said.zero_terminal_snr)
        if base.zero_terminal_snr is not None:
            zero = base.zero_terminal_snr
        save_kohya(lora, out, base.name, prediction_type=prediction_type, zero_terminal_snr=zero, extra=kept)
    elif form == "diffusers":
        save_diffusers(lora, out)
    else:
        save_peft(lora, out, shape)


def write_merged(model: StableDiffusion, lora: LoRAFile | None, out: Path) -> None:
    """Writes a model with a LoRA merged into its weights, as a diffusers folder that appears whole or not at all."""
    from diffusers import DDIMScheduler

    there = modules_of(model)
    if lora is not None:
        for name in lora.modules:
            module: Any = model.networks[name.partition(".")[0]].get_submodule(there[name])
            module.weight.copy_(lora.adapted(name, module.weight))
    pipeline: Any = model.pipeline()
    pipeline.scheduler = DDIMScheduler.from_config(model.noise_scheduler.config)  # DDPM would draw for minutes
    try:
        with replacing_folder(out) as unfinished:
            pipeline.save_pretrained(unfinished, safe_serialization=True)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error}") from error


def check(lora: LoRAFile, form: str, out: Path, shape: StableDiffusion) -> None:
    """Reads a LoRA back and reports it; raises UserError if it is not the same, or a key would be left unread."""
    again = check_base(shape, read_lora(out))
    differences = [difference(lora.change(module), again.change(module)) for module in lora.modules]
    differences += [difference(lora.state[key], again.state[key]) for key in lora.state if key.endswith(MAGNITUDE)]
    if again.alphas.keys() != lora.alphas.keys() or max(differences) > TOLERANCE:
        raise UserError(f"{out} does not hold what {lora.path} does: please report this")
    print(f"weights   {len(lora.modules)} modules read back, differing by {_words(max(differences))}")
    if form == "kohya":
        convolutions = kohya_convolutions(lora.modules, shape.family)
        programs = [program for program in PROGRAMS if program != "diffusers" or not convolutions]
        check_programs({name: alpha / again.ranks[name] for name, alpha in again.alphas.items()}, out, shape, programs)
        if convolutions:
            print("          (diffusers refuses the projections of SD 2 in this form: give it format=diffusers)")
        said = again.metadata["modelspec.prediction_type"], again.metadata["ss_zero_terminal_snr"]
        print("metadata  of a base that predicts {}, zero terminal SNR: {}".format(*said))
    elif form == "diffusers":
        if baked := sum(alpha != again.ranks[name] for name, alpha in again.alphas.items()):
            print(f"          ({baked} alphas are multiplied into the weights: not every program reads them here)")
        check_programs(dict.fromkeys(again.alphas, 1.0), out, shape, ["diffusers"])
    elif again.networks != ["unet"]:
        print("          (text encoders are there twice, by the names of older and of newer transformers)")


def check_programs(strengths: Mapping[str, float], out: Path, shape: StableDiffusion, programs: Sequence[str]) -> None:
    """Reports what programs read of a file; raises UserError if they leave a key unread, or change its strength.

    Args:
        strengths: by module, the factor of what it adds.
    """
    for line in loader_report(out, shape):
        if line.startswith(tuple(programs)):
            print(line)
    if without := [program for program in programs if program not in shape.family.programs]:
        print(f"          ({', '.join(without[:-1])} and {without[-1]} have no model of this size)")
    left = {program: keys for program, keys in unmatched(out, shape).items() if keys and program in programs}
    if left:
        raise UserError(f"{out} is written, but {' and '.join(left)} would leave out what is named above")
    scales = diffusers_scales(out, shape) if "diffusers" in programs else strengths
    wrong = [name for name, strength in strengths.items() if scales[name] != strength]
    if wrong:
        raise UserError(f"{out} is written, but diffusers takes {len(wrong)} modules at another strength: {wrong[0]}")


def loaded_by_its_library(base: Base, form: str, out: Path) -> StableDiffusion:
    """The base with what was written, loaded as the users of that form load it."""
    from dpo_sd.models.base import Base

    if form == "merged":
        merged = Base(base.name, path=str(out))
        merged.reading = base.reading
        return merged.load()
    model = base.load()
    if form == "peft":
        from peft import PeftModel

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft's, about transformers
            for name, network in model.networks.items():
                if (out / name).is_dir():
                    PeftModel.from_pretrained(network, out / name)
    else:
        pipeline: Any = model.pipeline()
        pipeline.load_lora_weights(str(out.parent), weight_name=out.name, local_files_only=True)
    return model


def outputs_with(model: StableDiffusion, lora: LoRAFile) -> dict[str, Tensor]:
    load_for_drawing(model, [(lora.path, 1.0)])
    return outputs(model)


def outputs(model: StableDiffusion) -> dict[str, Tensor]:
    """Outputs of text encoders and UNet for two prompts and two noises."""
    import torch

    generator = torch.Generator().manual_seed(0)
    config: Any = model.unet.config
    side = min(16, config.sample_size)  # small, so that it takes seconds on a CPU
    latents = torch.randn(2, config.in_channels, side, side, generator=generator)
    with torch.inference_mode():
        embeds = model.embed(PROMPTS)
        added = model.added(embeds.pooled, torch.full((2, 6), 8.0 * side))
        noise: Any = model.unet(latents, torch.tensor([20, 700]), embeds.hidden, added_cond_kwargs=added)
    return {"text": embeds.hidden, "unet": noise.sample}


def compare(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], out: Path) -> None:
    """Prints by how much outputs differ; raises UserError if it can be seen."""
    apart = {name: difference(value, found[name]) for name, value in expected.items()}
    words = ", ".join(f"{name} by {_words(value)}" for name, value in apart.items())
    print(f"outputs   differ from those of the LoRA that was read: {words}")
    if not max(apart.values()) <= TOLERANCE:
        raise UserError(
            f"{out} is written, but its outputs are not those of the LoRA that was read: please report this"
        )


def difference(expected: Tensor, found: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    return float((expected - found).abs().max() / expected.abs().max().clamp(min=1e-12))


def _words(difference: float) -> str:
    return f"{difference:.0e} of the largest value" if difference else "nothing"


if __name__ == "__main__":
    main()
