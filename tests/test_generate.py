"""Drawing pair folders: what is drawn, that it goes on where it stopped, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dpo_sd import generate
from dpo_sd.data.prompts import Line, read_lines, read_prompts
from dpo_sd.errors import UserError
from dpo_sd.forecast.explaining import drawing_explained
from dpo_sd.lora.adapters import policy_parameters, weights_of
from dpo_sd.lora.attaching import LoRA
from dpo_sd.lora.weighted import parse_lora
from dpo_sd.lora.weights import WEIGHTS_NAME
from dpo_sd.lora.writing import save_diffusers
from dpo_sd.models.base import Base
from dpo_sd.models.sampling import Sampler
from dpo_sd.models.stable_diffusion import StableDiffusion
from dpo_sd.noise import image_seed
from dpo_sd.preferences.pair_folder import current, read_pairs
from dpo_sd.training.hardware import Hardware

RED, GREEN = "a large red circle on a white background", "a large green star on a black background"


@pytest.fixture(scope="module")
def draw(command, tmp_path_factory) -> Callable:
    """`draw(folder, *overrides)`: generate with two steps of the sampler."""

    def draw(folder: Path, *overrides: str, prompts: str = f"[{RED},{GREEN}]", **options):
        settings = (f"out={folder}", f"prompts={prompts}", "sampler.steps=2", *overrides)
        return command(*settings, program="generate", **options)

    return draw


@pytest.fixture(scope="module")
def drawn(draw, tmp_path_factory) -> Path:
    """Two prompts, three pictures each; never changed by a test."""
    folder = tmp_path_factory.mktemp("pairs") / "drawn"
    ended = draw(folder, "set_size=3")
    assert ended.code == 0, ended.err
    assert "6 pairs; choose the better pictures with\n  python -m dpo_sd.annotate pairs=" in ended.out
    return folder


@pytest.fixture(scope="module")
def lora(tmp_path_factory) -> Path:
    """A LoRA of the tiny model that changes its pictures."""
    model = Base().load()
    LoRA(rank=2).attach(model)
    for parameter in policy_parameters(model)["unet"]:
        parameter.data.fill_(0.1)
    return save_diffusers(weights_of(model), tmp_path_factory.mktemp("lora") / WEIGHTS_NAME)


def pictures(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*.png"))}


# ---- prompts and LoRAs


def test_a_text_file_gives_a_prompt_a_line_without_blanks_and_comments_and_each_once(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\ufeff a red fox \n\n# not this\n  #nor this\nein grüner Vogel, 緑\na red fox\n", encoding="utf-8")
    assert read_prompts(str(file)) == ["a red fox", "ein grüner Vogel, 緑"]


def test_a_list_and_the_shapes_world_give_prompts():
    assert read_prompts(["b", " a ", "b"]) == ["b", "a"]
    assert len(read_prompts("shapes")) == 312


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "there are none"), (b"# only this\n\n", "there are none"), (b"\xff\xfe\x00", "no text in UTF-8")],
)
def test_a_file_without_prompts_is_refused(tmp_path, content, message):
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_prompts(str(file))


def test_prompts_that_are_no_file_are_refused_with_what_to_write(tmp_path):
    with pytest.raises(UserError, match=r"no such file: .* a list such as .*, or shapes"):
        read_prompts(str(tmp_path / "none.txt"))
    with pytest.raises(UserError, match="an empty prompt"):
        read_prompts(["a", " "])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_only_the_end_of_a_line_ends_a_prompt(encoding, tmp_path):
    file = tmp_path / "prompts.txt"
    text = "a red\u2028fox\r\na blue\x85bird\n\x0b# a\x0bgreen\x0cfrog\ra\x1ccat"
    file.write_bytes(text.encode(encoding))
    assert read_prompts(str(file)) == ["a red\u2028fox", "a blue\x85bird", "a\x1ccat"]


def test_bytes_that_are_no_text_are_no_prompt(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("a fox\nein Bär".encode("latin-1"))
    with pytest.raises(UserError, match=r"prompts.txt is no text in UTF-8 .line 2, offset 11: byte 0xe4."):
        read_prompts(str(file))
    with pytest.raises(UserError, match=r"'a fox .udce4' holds half of a character, or bytes that are not UTF-8"):
        read_prompts(["a fox \udce4"])


def test_a_prompt_of_a_file_may_have_settings_in_kohyas_words(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a fox --n bad hands, blurry --w 64 --h 96 --d 7 --s 3 --l 2.5\na cat -- asleep\na fox\n")
    lines = read_lines(str(file))
    assert lines == [Line("a fox", "bad hands, blurry", 64, 96, 7, 3, 2.5), Line("a cat -- asleep"), Line("a fox")]
    own = lines[0].drawn_by(Sampler(scheduler="ddim", batch_size=2))
    assert (own.negative_prompt, own.width, own.height, own.steps, own.guidance) == (
        "bad hands, blurry",
        64,
        96,
        3,
        2.5,
    )
    assert (own.scheduler, own.batch_size) == ("ddim", 2)
    assert lines[2].drawn_by(sampler := Sampler()) is sampler
    assert read_lines(["a fox --w 64"]) == [Line("a fox --w 64")]
    with pytest.raises(UserError, match="all are drawn alike here: leave out the settings behind 'a fox'"):
        read_prompts(str(file))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a fox --ar 16:9", "line 2 of .*prompts.txt: --ar is unknown: use --n, --w, --h, --d, --s, --l, or give"),
        ("a fox --w wide", "line 2 of .*: --w must have a whole number behind it, got 'wide'"),
        ("a fox --w 100", "line 2 of .*: prompt 'a fox': width must be a multiple of 8 pixels, got 100"),
        ("a fox --l 1 --n bad", "line 2 of .*: negative_prompt='bad' has no effect at guidance 1"),
        ("a fox --d -1", "line 2 of .*: --d must be at least 0"),
        ("a fox --s 3 --s 4", "line 2 of .*: --s is there twice"),
        ("--w 64", "line 2 of .*: there is no prompt before its settings"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_their_line(line, message, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text(f"a cat\n{line}\n")
    with pytest.raises(UserError, match=message.replace("negative_prompt=", ".*negative_prompt=")):
        read_lines(str(file))


def test_prompts_with_settings_are_drawn_and_recorded_with_them(draw, drawn, tmp_path):
    """The same prompt without settings gives the same bytes as ever, whatever stands beside it."""
    file = tmp_path / "prompts.txt"
    file.write_text(f"{RED}\n{RED} --n blurry --w 48 --h 80 --d 5 --s 3\n")
    folder = tmp_path / "pairs"
    ended = draw(folder, "set_size=3", prompts=str(file))
    assert ended.code == 0, ended.err
    before, now = pictures(drawn), pictures(folder)
    assert len(now) == 6 and sum(before.get(name) == data for name, data in now.items()) == 3
    own = [pair for pair in read_pairs(folder) if pair.settings["steps"] == 3]
    assert len(own) == 3 and {*(pair.seed_0 for pair in own), *(pair.seed_1 for pair in own)} == {5, 6, 7}
    with Image.open(folder / own[0].image_0) as image:
        text = json.loads(image.text["dpo_sd"])  # type: ignore[attr-defined]
        assert image.size == (48, 80)
    assert (text["negative_prompt"], text["width"], text["height"], text["steps"]) == ("blurry", 48, 80, 3)
    again = draw(folder, "set_size=3", prompts=str(file))
    assert "6 drawn before" in again.out and pictures(folder) == now


@pytest.mark.parametrize("prompts", [["a", None], [["a", "b"], "c"], [{"a": "b"}], [True]])
def test_what_is_no_text_is_no_prompt(prompts):
    with pytest.raises(UserError, match="is no prompt: give texts, in quotes"):
        read_prompts(prompts)


def test_a_lora_is_read_with_and_without_weight(lora):
    plain, weighted, folder = parse_lora(str(lora)), parse_lora(f"{lora}:-0.5"), parse_lora(f"{lora.parent}:0.8")
    assert (plain.weight, weighted.weight, folder.weight) == (1, -0.5, 0.8)
    assert {each.sha256 for each in (plain, weighted, folder)} == {hashlib.sha256(lora.read_bytes()).hexdigest()}


@pytest.mark.parametrize("weight", ["nan", "inf"])
def test_a_weight_that_is_not_finite_is_refused(lora, weight):
    with pytest.raises(UserError, match="must be a finite number"):
        parse_lora(f"{lora}:{weight}")


def test_a_colon_in_a_path_is_no_weight(tmp_path):
    with pytest.raises(UserError, match=r"a:b\.safetensors does not exist"):
        parse_lora(str(tmp_path / "a:b.safetensors"))


# ---- what is drawn


def test_all_pairs_of_a_set_stand_under_one_ranking(drawn):
    pairs = read_pairs(drawn)
    assert [pair.prompt for pair in pairs] == [RED] * 3 + [GREEN] * 3
    assert len({pair.ranking_id for pair in pairs}) == 2
    assert [(pair.image_0[-5], pair.image_1[-5]) for pair in pairs[:3]] == [("0", "1"), ("0", "2"), ("1", "2")]
    for pair in pairs:
        for k, (image, uid) in enumerate([(pair.image_0, pair.image_0_uid), (pair.image_1, pair.image_1_uid)]):
            assert hashlib.sha256((drawn / image).read_bytes()).hexdigest() == uid, k
        assert (pair.model_0, pair.model_1) == ("tiny", "tiny")


def test_a_pictures_seed_is_a_function_of_seed_prompt_set_and_number(drawn):
    pair = read_pairs(drawn)[1]
    assert (pair.seed_0, pair.seed_1) == (image_seed(0, RED, 0, 0), image_seed(0, RED, 0, 2))


def test_a_picture_tells_what_drew_it(drawn):
    pair = read_pairs(drawn)[0]
    text = Image.open(drawn / pair.image_0).text  # type: ignore[attr-defined]
    assert (text["prompt"], text["seed"]) == (RED, str(pair.seed_0))
    made_by = json.loads(text["dpo_sd"])
    assert made_by["model_fingerprint"] == Base().fingerprints().model and made_by["loras"] == []
    assert made_by == json.loads((drawn / "generate.json").read_text())


def test_sets_of_two_need_no_ranking(draw, tmp_path):
    assert draw(tmp_path, prompts=f"[{RED}]").code == 0
    (pair,) = read_pairs(tmp_path)
    assert pair.ranking_id is None


def test_more_prompts_and_sets_change_nothing_that_is_there(draw, drawn, tmp_path):
    assert draw(tmp_path, "set_size=3", prompts=f"[{GREEN}]").code == 0
    before, pairs = pictures(tmp_path), read_pairs(tmp_path)
    prompts = f"[a large cyan cross on a white background,{GREEN},{RED}]"
    ended = draw(tmp_path, "set_size=3", "num_sets=2", prompts=prompts)
    assert "18 pictures, 3 drawn before" in ended.out
    after = pictures(tmp_path)
    assert len(after) == 18 and before.items() <= after.items()
    assert {pair.pair_id for pair in pairs} < {pair.pair_id for pair in read_pairs(tmp_path)}
    for name in pictures(drawn):  # drawn in another company, which changes rounding only
        one, other = (np.asarray(Image.open(folder / name), int) for folder in (drawn, tmp_path))
        assert abs(one - other).max() <= 2


def test_pairs_of_prompts_that_are_left_out_later_stay(draw, tmp_path):
    draw(tmp_path)
    assert draw(tmp_path, prompts=f"[{GREEN}]").code == 0
    assert {pair.prompt for pair in read_pairs(tmp_path)} == {RED, GREEN}


def test_a_killed_drawing_goes_on_to_the_same_folder(draw, drawn, tmp_path):
    def dies_at_the_fourth_picture() -> None:
        save, saved = generate.save_png, []

        def save_png(*arguments):
            saved.append(arguments)
            if len(saved) == 4:
                raise KeyboardInterrupt
            save(*arguments)

        generate.save_png = save_png  # type: ignore[assignment]

    ended = draw(tmp_path, "set_size=3", patch=dies_at_the_fourth_picture)
    assert ended.code == 130 and "the same command goes on" in ended.out
    assert len(pictures(tmp_path)) == 3
    assert len(read_pairs(tmp_path)) == 3  # of the set that is complete
    ended = draw(tmp_path, "set_size=3")
    assert "6 pictures, 3 drawn before" in ended.out
    assert pictures(tmp_path) == pictures(drawn)
    assert (tmp_path / "pairs.jsonl").read_bytes() == (drawn / "pairs.jsonl").read_bytes()


def test_a_picture_that_was_cut_short_is_drawn_anew(draw, drawn, tmp_path):
    folder = shutil.copytree(drawn, tmp_path / "copied")
    empty, cut = sorted(folder.rglob("*.png"))[:2]
    empty.write_bytes(b"")
    cut.write_bytes(cut.read_bytes()[:-20])
    ended = draw(folder, "set_size=3")
    assert "6 pictures, 4 drawn before" in ended.out
    assert all(f"drawn anew: image {file}" in ended.out for file in (empty, cut))
    assert pictures(folder) == pictures(drawn)
    assert (folder / "pairs.jsonl").read_bytes() == (drawn / "pairs.jsonl").read_bytes()


def test_a_drawing_that_ended_before_its_first_pair_goes_on_also_with_other_settings(draw, tmp_path):
    def dies_at_once() -> None:
        def save_png(*_):
            raise KeyboardInterrupt

        generate.save_png = save_png  # type: ignore[assignment]

    assert draw(tmp_path, prompts=f"[{RED}]", patch=dies_at_once).code == 130
    assert draw(tmp_path, "seed=1", prompts=f"[{RED}]").code == 0  # nothing is there that it could not go with
    assert len(read_pairs(tmp_path)) == 1


def test_a_picture_that_was_replaced_is_listed_anew_beside_the_former_pair(draw, tmp_path):
    draw(tmp_path, prompts=f"[{RED}]")
    (pair,) = read_pairs(tmp_path)
    (tmp_path / pair.image_1).write_bytes((tmp_path / pair.image_0).read_bytes())
    ended = draw(tmp_path, prompts=f"[{RED}]")
    assert "1 pair is of pictures that have changed since" in ended.out
    former, anew = read_pairs(tmp_path)  # votes on the former pair keep what they are about
    assert former == pair and anew.image_1_uid == anew.image_0_uid
    assert current([former, anew]) == [anew]


def test_loras_change_the_pictures_by_their_weights(draw, drawn, lora, tmp_path):
    seen = []
    for number, loras in enumerate((f"{lora}", f"{lora}:0.5", f"[{lora}:0.5,{lora}:0.5]")):
        ended = draw(tmp_path / str(number), f"loras={loras}", prompts=f"[{RED}]")
        assert ended.code == 0, ended.err
        (pair,) = read_pairs(tmp_path / str(number))
        seen.append(Image.open(tmp_path / str(number) / pair.image_0).tobytes())
    whole, half, halves = seen
    assert len({whole, half, Image.open(drawn / read_pairs(drawn)[0].image_0).tobytes()}) == 3
    difference = max(abs(a - b) for a, b in zip(whole, halves, strict=True))
    assert difference <= 2  # twice half is the whole, but for rounding
    assert read_pairs(tmp_path / "1")[0].model_0 == "tiny + pytorch_lora_weights:0.5"


# ---- what is refused


@pytest.mark.parametrize(
    ("batch", "memory_gib", "told"),
    [
        (8, 24, ["Go on with sampler.batch_size=4.", "sampler.width and sampler.height", "hardware=1x16gb"]),
        (1, 8, ["sampler.width and sampler.height", "hardware.weights=int8"]),
    ],
)
def test_a_card_that_is_exhausted_is_one_message_with_what_takes_less(batch, memory_gib, told):
    hardware = Hardware("cuda", "bf16-mixed", "bfloat16", memory_gib=memory_gib)
    with pytest.raises(UserError) as error, drawing_explained(Sampler(batch_size=batch), hardware):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.\nsecond line")
    message = str(error.value)
    assert message.startswith("out of memory in drawing (CUDA out of memory. Tried to allocate 1 GiB.)")
    assert all(part in message for part in told) and "\n" not in message
    assert ("sampler.batch_size" in message) is (batch > 1) and ("hardware=" in message) is (memory_gib > 8)


def test_an_exhausted_card_keeps_what_is_drawn_and_the_pairs_of_it(draw, tmp_path):
    def is_exhausted_at_the_second_batch() -> None:
        decode, calls = StableDiffusion.decode_latents, []

        def decode_latents(model, latents):
            calls.append(latents)
            if len(calls) == 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return decode(model, latents)

        StableDiffusion.decode_latents = decode_latents  # type: ignore[method-assign]

    ended = draw(tmp_path, "sampler.batch_size=2", patch=is_exhausted_at_the_second_batch)
    assert ended.code == 1 and "Go on with sampler.batch_size=1." in ended.err and "Traceback" not in ended.err
    assert len(read_pairs(tmp_path)) == 1
    assert draw(tmp_path, "sampler.batch_size=1").code == 0 and len(read_pairs(tmp_path)) == 2


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("set_size=2", "set_size (there 3, here 2)"),
        ("seed=1", "seed (there 0, here 1)"),
        ("sampler.guidance=5", "guidance (there 4.0, here 5.0)"),
        ("sampler.guidance_rescale=0.5", "guidance_rescale (there 0.0, here 0.5)"),
        ("sampler.negative_prompt=blur", "negative_prompt (there '', here 'blur')"),
    ],
)
def test_a_folder_made_with_other_settings_is_refused_naming_them(draw, drawn, setting, named):
    before = pictures(drawn)
    ended = draw(drawn, "set_size=3", setting)
    assert ended.code == 1 and f"was drawn with other settings: {named}" in ended.err
    assert pictures(drawn) == before


def test_a_folder_with_another_lora_is_refused(draw, drawn, lora):
    ended = draw(drawn, "set_size=3", f"loras={lora}")
    assert ended.code == 1 and "loras (there [], here [" in ended.err


def test_a_folder_of_pairs_from_elsewhere_is_refused(draw, tmp_path):
    (tmp_path / "pairs.jsonl").write_text("{}")
    ended = draw(tmp_path)
    assert ended.code == 1 and "did not draw" in ended.err
    assert (tmp_path / "pairs.jsonl").read_text() == "{}"


@pytest.mark.parametrize("record", ["5", "null", '{"loras": 3}', "{", b"\xff"])
def test_a_damaged_record_of_the_settings_is_one_message(draw, drawn, tmp_path, record):
    shutil.copytree(drawn, tmp_path / "copy")
    file = tmp_path / "copy" / "generate.json"
    if record == '{"loras": 3}':
        record = json.dumps(json.loads(file.read_text()) | json.loads(record))
    file.write_bytes(record if isinstance(record, bytes) else record.encode())
    ended = draw(tmp_path / "copy", "set_size=3")
    assert ended.code == 1 and "generate.json is damaged" in ended.err and len(ended.err.splitlines()) == 1


def test_a_broken_list_of_pairs_is_refused_before_anything_is_drawn(draw, drawn, tmp_path):
    shutil.copytree(drawn, tmp_path / "copy")
    (tmp_path / "copy" / "pairs.jsonl").write_text("{}\n")
    ended = draw(tmp_path / "copy", "set_size=3", "num_sets=2")
    assert ended.code == 1 and "line 1: the key" in ended.err
    assert pictures(tmp_path / "copy") == pictures(drawn)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("set_size=1", "set_size must be at least 2, got 1"),
        ("num_sets=0", "num_sets must be at least 1, got 0"),
        ("seed=-1", "seed must be at least 0"),
        ("loras=[3]", "loras must be a file or a run folder"),
        ("loras=nowhere.safetensors", "nowhere.safetensors does not exist"),
        ("sampler.width=60", "width must be a multiple of 8 pixels, got 60"),
        ("lora=full", "lora is a group of other commands"),
        ("sampler.stps=3", "sampler.stps: no such setting; did you mean sampler.steps?"),
    ],
)
def test_a_mistake_is_one_message_and_nothing_is_drawn(draw, tmp_path, setting, message):
    ended = draw(tmp_path / "x", setting)
    assert ended.code == 1 and message in ended.err and "Traceback" not in ended.err
    assert not (tmp_path / "x" / "images").exists()


def test_a_folder_must_be_named(command):
    ended = command("prompts=shapes", program="generate")
    assert ended.code == 1 and "out has no value: give out=<value>" in ended.err
