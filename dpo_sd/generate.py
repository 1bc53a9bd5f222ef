"""Draws sets of images as a pair folder: `python -m dpo_sd.generate prompts=prompts.txt out=pairs/style`."""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hydra.utils import instantiate
from omegaconf import DictConfig

from dpo_sd.composition.application import entry_point
from dpo_sd.composition.presets import preset, say_choice
from dpo_sd.data.prompts import Line, read_lines
from dpo_sd.errors import UserError, in_shell
from dpo_sd.files.claims import held
from dpo_sd.files.hashes import sha256
from dpo_sd.files.images import decoding_problems, has_png_end, save_png
from dpo_sd.lora.attaching import load_for_drawing
from dpo_sd.lora.weighted import lora_name, parse_lora
from dpo_sd.models.families import longer
from dpo_sd.models.sampling import LEFT_OUT
from dpo_sd.noise import image_seed
from dpo_sd.preferences.drawn_with import read_record, write_record
from dpo_sd.preferences.pair_folder import PAIRS, Pair, current, pair_id, read_pairs, write_pairs

if TYPE_CHECKING:
    from dpo_sd.lora.weighted import WeightedLoRA
    from dpo_sd.models.sampling import Sampler
    from dpo_sd.models.stable_diffusion import StableDiffusion


@entry_point("generate")
def main(cfg: DictConfig) -> None:
    """Draws what is missing in the folder `out`, and lists the pairs."""
    say_choice()
    folder = Path(cfg.out).expanduser()
    with held(folder):
        generate(cfg, folder)


def generate(cfg: DictConfig, folder: Path) -> None:
    """Draws into a folder that no other process has."""
    lines = read_lines(cfg.prompts, cfg.seed)
    loras = [parse_lora(text) for text in ([cfg.loras] if isinstance(cfg.loras, str) else cfg.loras)]
    hardware, sampler, base = (instantiate(cfg[group]) for group in ("hardware", "sampler", "model"))
    hardware.check(preset=preset())
    base.check()
    for line in base.to_fetch():
        print(f"model   {line}")
    about = {
        "model": base.name,
        "model_fingerprint": base.fingerprints(hardware.weights).model,
        "loras": [lora._asdict() for lora in loras],
        "weights": hardware.weights,
        "seed": cfg.seed,
        "set_size": cfg.set_size,
    }
    schedule = base.schedule()

    def made_for(line: Line) -> dict[str, Any]:
        return about | line.drawn_by(sampler).settings(schedule)

    made_by = about | sampler.settings(schedule)
    check_same_folder(folder, made_by)
    for line in lines:
        line.drawn_by(sampler)  # refused now, or it would be in the middle of the drawing
    images = planned(lines, cfg.num_sets, cfg.set_size, cfg.seed)
    remove_broken(folder, images)
    missing = [image for image in images if not (folder / image.file).exists()]
    print(f"{folder}: {len(lines)} prompts, {len(images)} pictures, {len(images) - len(missing)} drawn before")
    write_record(folder, made_by)
    try:
        if missing:
            from dpo_sd.forecast.explaining import drawing_explained
            from dpo_sd.models.ready import ready

            with drawing_explained(sampler, hardware):
                draw(ready(base, hardware.device, hardware.weights), loras, sampler, missing, folder, made_for)
    except KeyboardInterrupt:
        print("stopped; the same command goes on")
        raise
    finally:
        pairs = list_pairs(folder, images, made_for)
    print(
        f"{len(pairs)} pairs; choose the better pictures with\n  python -m dpo_sd.annotate {in_shell('pairs', folder)}"
    )


MadeFor = Callable[[Line], dict[str, Any]]  # the settings that draw a prompt, for records


class SetImage(NamedTuple):
    """An image of a set, all of one prompt.

    Args:
        line: the prompt, with settings of its own if it has some.
        set_index: number of the set among those of the prompt.
        k: number of the image in its set.
        seed: seed of its first noise.
    """

    line: Line
    set_index: int
    k: int
    seed: int

    @property
    def prompt(self) -> str:
        return self.line.prompt

    @property
    def set_id(self) -> str:
        own = json.dumps(self.line.settings, sort_keys=True) if self.line.settings else ""
        prompt_id = hashlib.sha256((self.prompt + own).encode("utf-8", "surrogatepass")).hexdigest()[:12]
        return f"{prompt_id}/{self.set_index:03d}"

    @property
    def file(self) -> str:
        """Its path in the pair folder."""
        return f"images/{self.set_id}-{self.k}.png"


def planned(lines: Sequence[Line], num_sets: int, set_size: int, seed: int) -> list[SetImage]:
    """All images of all sets, set by set; those of a prompt with a seed of its own count up from it."""

    def of(line: Line, set_index: int, k: int) -> int:
        if line.seed is not None:
            return line.seed + set_index * set_size + k
        return image_seed(seed, line.prompt, set_index, k)

    return [
        SetImage(line, set_index, k, of(line, set_index, k))
        for line in lines
        for set_index in range(num_sets)
        for k in range(set_size)
    ]


def check_same_folder(folder: Path, made_by: dict[str, Any]) -> None:
    """Raises UserError, naming the settings that differ, if the folder was not drawn with these settings."""
    if not (folder / PAIRS).exists() and not any((folder / "images").rglob("*.png")):
        return
    before = read_record(folder)
    if before is None:
        raise UserError(f"{folder} holds pairs that this command did not draw: choose another folder with out=")
    if (folder / PAIRS).exists():
        read_pairs(folder)  # refused now, or it would be after the drawing
    before, made_by = LEFT_OUT | before, LEFT_OUT | made_by
    if sorted(before) != sorted(made_by):
        raise UserError(f"{folder} was drawn by another version of this program: choose another folder with out=")
    differing = [key for key in made_by if _identity(before, key) != _identity(made_by, key)]
    if differing:
        named = ", ".join(f"{key} (there {_named(before, key)!r}, here {_named(made_by, key)!r})" for key in differing)
        raise UserError(
            f"{folder} was drawn with other settings: {named}. Leave them as they were to go on with that folder, "
            "or choose another one with out="
        )


def _identity(made_by: dict[str, Any], key: str) -> Any:
    # a moved file is the same LoRA
    return [(lora["sha256"], lora["weight"]) for lora in made_by[key]] if key == "loras" else made_by[key]


def _named(made_by: dict[str, Any], key: str) -> Any:
    return [f"{lora['path']}:{lora['weight']:g}" for lora in made_by[key]] if key == "loras" else made_by[key]


def remove_broken(folder: Path, images: Sequence[SetImage]) -> None:
    """Deletes the pictures that cannot be read to their end, as a copy that was cut short leaves them, and says so."""
    from tqdm import tqdm

    files = [file for image in images if (file := folder / image.file).is_file()]
    found = tqdm(decoding_problems(files, unreadable=False), "checking pictures", len(files), unit="picture", delay=2)
    for file, problem in zip(files, list(found), strict=True):
        if not problem and not has_png_end(file):
            problem = f"image {file} lacks its end"
        if problem:
            print(f"drawn anew: {problem}")
            file.unlink()


def draw(
    model: StableDiffusion,
    loras: Sequence[WeightedLoRA],
    sampler: Sampler,
    images: Sequence[SetImage],
    folder: Path,
    made_for: MadeFor,
) -> None:
    """Draws the images, and writes each with the settings that drew it in its text chunk."""
    from tqdm import tqdm

    for line in load_for_drawing(model, [(lora.path, lora.weight) for lora in loras]):
        print(f"lora    {line}")
    for prompt in model.truncated(list(dict.fromkeys(image.prompt for image in images)))[:5]:
        print(f"cut at the text encoder's limit: {prompt!r}{longer(model.family, model.reading)}")
    started = time.monotonic()
    alike: dict[Line, list[SetImage]] = {}
    for image in images:
        alike.setdefault(image.line._replace(prompt="", seed=None), []).append(image)
    with tqdm(total=len(images), desc="drawing", unit="picture") as bar:
        for settings, those in alike.items():
            own, made_by = settings.drawn_by(sampler), json.dumps(made_for(settings))
            drawn = own.stream(model, [image.prompt for image in those], [image.seed for image in those])
            for image, pixels in zip(those, drawn, strict=True):
                text = {"prompt": image.prompt, "seed": str(image.seed), "dpo_sd": made_by}
                save_png(pixels, folder / image.file, text)
                bar.update()
    print(f"{len(images) / (time.monotonic() - started):.1f} pictures a second")


def list_pairs(folder: Path, images: Sequence[SetImage], made_for: MadeFor) -> list[Pair]:
    """Adds the pairs of the complete sets to pairs.jsonl, and returns all that it lists."""
    earlier = read_pairs(folder) if (folder / PAIRS).exists() else []
    pairs = list({pair.pair_id: pair for pair in [*earlier, *listed(folder, images, made_for)]}.values())
    if outdated := len(pairs) - len(current(pairs)):
        are = "pairs are" if outdated > 1 else "pair is"
        print(f"{outdated} {are} of pictures that have changed since, and listed anew beside the former ones")
    if pairs:  # an empty list would be refused
        write_pairs(folder, pairs)
    return pairs


def listed(folder: Path, images: Sequence[SetImage], made_for: MadeFor) -> list[Pair]:
    """All pairs of the sets that are complete on disk; those of a larger set share a `ranking_id`."""
    pairs = []
    for _, group in itertools.groupby(images, key=lambda image: (image.line, image.set_index)):
        members = list(group)
        if all((folder / member.file).exists() for member in members):
            pairs += pairs_of_set(folder, members, made_for(members[0].line))
    return pairs


def pairs_of_set(folder: Path, members: Sequence[SetImage], made_by: dict[str, Any]) -> Iterator[Pair]:
    """Every two images of a set."""
    drawn_by = made_by["model"]
    for lora in made_by["loras"]:
        drawn_by += f" + {lora_name(Path(lora['path']))}" + (f":{lora['weight']:g}" if lora["weight"] != 1 else "")
    settings = {key: value for key, value in made_by.items() if key not in ("loras", "seed")}
    hashed = [(member, sha256(folder / member.file)) for member in members]
    for (one, one_uid), (other, other_uid) in itertools.combinations(hashed, 2):
        yield Pair(
            pair_id=pair_id(one.prompt, one_uid, other_uid),
            prompt=one.prompt,
            image_0=one.file,
            image_1=other.file,
            image_0_uid=one_uid,
            image_1_uid=other_uid,
            ranking_id=one.set_id if len(members) > 2 else None,
            model_0=drawn_by,
            model_1=drawn_by,
            seed_0=one.seed,
            seed_1=other.seed,
            settings=settings,
        )


if __name__ == "__main__":
    main()
