"""Pictures in files on their way to latents: nothing stale, nothing twice, nothing left out in silence."""

from __future__ import annotations

import errno
import gc
import hashlib
import io
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.ImageFile import ImageFile
from torch.testing import assert_close

from dpo_sd.data.batches import Visits
from dpo_sd.data.cache import Cache
from dpo_sd.data.drawn import encode_images
from dpo_sd.data.frames import Framing
from dpo_sd.data.preparing import prepare
from dpo_sd.data.samples import ImageFiles, Samples, by_prompt
from dpo_sd.data.source import PreparedData
from dpo_sd.data.splitting import Split, held_back, split
from dpo_sd.data.usable import usable
from dpo_sd.errors import UserError
from dpo_sd.files.tensors import TensorStore, read_header
from dpo_sd.models.base import Base
from dpo_sd.models.families import AS_USUAL, FAMILIES
from dpo_sd.models.stable_diffusion import Fingerprints, StableDiffusion, TextEmbeds, encode_bytes

MIDDLE = (0.5, 0.5)


@pytest.fixture(scope="module")
def model() -> StableDiffusion:
    return Base().load()


@pytest.fixture(autouse=True)
def memory(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("DPO_SD_CACHE", str(tmp_path / "memory"))


class Encoded:
    """Pictures and prompts that went through the networks."""

    def __init__(self) -> None:
        self.pictures = self.prompts = 0

    def taken(self) -> tuple[int, int]:
        """Both numbers since the last time."""
        numbers, self.pictures, self.prompts = (self.pictures, self.prompts), 0, 0
        return numbers


@pytest.fixture
def encoded(monkeypatch) -> Encoded:
    counted = Encoded()
    encode, embed = StableDiffusion.encode_pixels, StableDiffusion.embed

    def encode_pixels(self: Any, pixels: torch.Tensor) -> torch.Tensor:
        counted.pictures += len(pixels)
        return encode(self, pixels)

    def embed_prompts(self: Any, prompts: Sequence[str]) -> TextEmbeds:
        counted.prompts += len(prompts)
        return embed(self, prompts)

    monkeypatch.setattr(StableDiffusion, "encode_pixels", encode_pixels)
    monkeypatch.setattr(StableDiffusion, "embed", embed_prompts)
    return counted


def draw(file: Path, number: int, size: tuple[int, int] = (64, 64)) -> None:
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    file.parent.mkdir(exist_ok=True)
    coarse.resize(size, Image.Resampling.BICUBIC).save(file)


def make(folder: Path, sizes: Sequence[Any] = ((64, 64),) * 6) -> list[str]:
    """A pair of each size, or of two sizes where two are given; its prompts."""
    for i, size in enumerate(sizes):
        both = (size, size) if isinstance(size[0], int) else size
        for k in range(2):
            draw(folder / f"{i}-{k}.png", 2 * i + k, both[k])
    return [f"prompt {i}" for i in range(len(sizes))]


def look(folder: Path, prompts: Sequence[str], validation: float = 0.2) -> Split:
    chosen, rejected = ([f"{i}-{k}.png" for i in range(len(prompts))] for k in range(2))
    return split(usable(folder, prompts, chosen, rejected).samples, validation, 0)


def prepared(
    model: StableDiffusion, folder: Path, prompts: Sequence[str], keep: Any = "all", half: bool = False, **framing: Any
) -> PreparedData:
    return prepare(model, look(folder, prompts), Framing(**framing), Cache(folder / "cache", keep, half))


class ByFours(Cache):
    """A cache whose shards hold four tensors."""

    def store(self, what: str) -> TensorStore:
        return TensorStore(self.folder / f"{what}-fp32", torch.float32, shard_size=4)


SIX_SIZES = [(144, 256), (160, 224), (176, 208), (192, 192), (208, 176), (224, 160)]  # each a bucket of 192²


def by_fours(model: StableDiffusion, folder: Path, prompts: Sequence[str]) -> PreparedData:
    """Encodes pairs of `SIX_SIZES`, of which the VAE takes one at a time, into shards of two pairs."""
    return prepare(model, look(folder, prompts), Framing(resolution=192), ByFours(folder / "cache"))


def read(data: PreparedData, prompt: str, side: str = "chosen", flip: bool = False, where: Any = MIDDLE) -> Any:
    """A picture of the sample with that prompt."""
    for part in (data.train, data.validation):
        for row in range(len(part)):
            if part.prompts[row] == prompt:
                return getattr(part, side).read(row, flip, where)
    raise KeyError(prompt)


# ------------------------------------------------------------------------------------------------------- what is handed


def test_latents_and_embeddings_are_those_of_their_pictures_and_prompts(model, tmp_path):
    prompts = make(tmp_path)
    data = prepared(model, tmp_path, prompts)
    for i, prompt in enumerate(prompts):
        for k, side in enumerate(("chosen", "rejected")):
            expected = encode_images(model, [Image.open(tmp_path / f"{i}-{k}.png")])[0]
            latents, time_ids = read(data, prompt, side)
            assert_close(latents, expected, rtol=1e-4, atol=1e-4)
            assert time_ids.tolist() == [64, 64, 0, 0, 64, 64]
    for row in range(len(data.train)):
        for dropped in (False, True):
            embeds = data.train.prompts.embeds(row, dropped)
            assert embeds is not None and embeds.pooled is None
            text = "" if dropped else data.train.prompts[row]
            assert_close(embeds.hidden, model.encode_prompts([text]).hidden[0], rtol=1e-4, atol=1e-5)


def test_both_pictures_of_a_pair_share_a_size_and_are_told_their_own_original_ones(model, tmp_path):
    """200x100 and 100x100 are 1.41:1 together: of the buckets of 128² in steps of 16 that is 144x96 or 160x96."""
    prompts = make(tmp_path, [((200, 100), (100, 100)), (64, 64)])
    data = prepared(model, tmp_path, prompts, resolution=128)
    chosen, ids = read(data, "prompt 0", "chosen")
    rejected, other_ids = read(data, "prompt 0", "rejected")
    assert chosen.shape == rejected.shape and chosen.shape[2] > chosen.shape[1]
    height, width = (8 * side for side in chosen.shape[1:])
    assert ids[:2].tolist() == [100, 200] and other_ids[:2].tolist() == [100, 100]
    assert ids[4:].tolist() == other_ids[4:].tolist() == [height, width]
    assert ids[3] == round((200 * max(width / 200, height / 100) - width) / 2) and other_ids[2] > 0
    assert ids[2] == other_ids[3] == 0


def test_sizes_and_upscaling_are_reported(model, tmp_path):
    prompts = make(tmp_path, [(200, 100), (64, 64), (32, 32)])
    paths = [f"{i}-0.png" for i in range(3)]
    samples = usable(tmp_path, prompts, paths).samples
    report = prepare(model, Split(samples, samples, []), Framing(), Cache(tmp_path / "cache")).report
    assert report[:2] == [
        "1 training pictures are smaller than the training size and are scaled up",
        "training sizes: 64x64: 2, 80x48: 1",
    ]


def test_a_resolution_that_the_unet_cannot_take_is_named_with_its_neighbours(model, tmp_path):
    prompts = make(tmp_path)
    with pytest.raises(UserError, match=r"framing.resolution=72 is no multiple of 16 pixels.*use 64 or 80"):
        prepared(model, tmp_path, prompts, resolution=72)


def test_weights_are_1_on_average_and_follow_the_number_of_pairs_of_a_prompt(model, tmp_path):
    make(tmp_path)
    found = look(tmp_path, ["often"] * 4 + ["once", "other"])
    assert by_prompt(["often"] * 4 + ["once"]).tolist() == [0.25] * 4 + [1]
    weighted = replace(found.train, weight=by_prompt(found.train.prompts))
    data = prepare(model, replace(found, train=weighted), Framing(), Cache(tmp_path / "cache"))
    assert data.train.weight.mean() == pytest.approx(1)


# ------------------------------------------------------------------------------------------------------------ the cache


def test_what_was_encoded_once_is_read_again(model, tmp_path, encoded):
    prompts = make(tmp_path)
    first = prepared(model, tmp_path, prompts)
    assert encoded.taken() == (12, 7)  # and the empty prompt
    again = prepared(model, tmp_path, prompts)
    assert encoded.taken() == (0, 0)
    assert again.fingerprint == first.fingerprint
    for prompt in prompts:
        assert torch.equal(read(first, prompt)[0], read(again, prompt)[0])


def test_an_edited_picture_is_encoded_again_and_nothing_else(model, tmp_path, encoded):
    prompts = make(tmp_path)
    before = prepared(model, tmp_path, prompts)
    encoded.taken()
    draw(tmp_path / "3-1.png", 99)
    after = prepared(model, tmp_path, prompts)
    assert encoded.taken() == (1, 0)
    assert not torch.equal(read(after, "prompt 3", "rejected")[0], read(before, "prompt 3", "rejected")[0])
    assert torch.equal(read(after, "prompt 3")[0], read(before, "prompt 3")[0])


def test_an_edited_caption_is_encoded_again_and_nothing_else(model, tmp_path, encoded):
    prompts = make(tmp_path)
    prepared(model, tmp_path, prompts)
    encoded.taken()
    prompts[2] = "a prompt of another kind"
    data = prepared(model, tmp_path, prompts)
    assert encoded.taken() == (0, 1)
    part = next(part for part in (data.train, data.validation) if prompts[2] in part.prompts.texts)
    row = [part.prompts[row] for row in range(len(part))].index(prompts[2])
    embeds = part.prompts.embeds(row, False)
    assert embeds is not None
    assert_close(embeds.hidden, model.encode_prompts([prompts[2]]).hidden[0])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"resolution": 96}, (12, 0)),
        ({"flip": True}, (12, 0)),  # the mirrored ones are added
        ({"half": True}, (12, 7)),
        ({"vae": "another"}, (12, 0)),
        ({"text": "another"}, (0, 7)),
        ({"model": "another"}, (0, 0)),  # another UNet
    ],
)
def test_another_setting_or_network_encodes_what_depends_on_it(model, tmp_path, encoded, change, expected):
    prompts = make(tmp_path)
    prepared(model, tmp_path, prompts)
    encoded.taken()
    networks = {name: value for name, value in change.items() if name in Fingerprints._fields}
    changed = replace(model, fingerprints=model.fingerprints._replace(**networks))
    prepared(changed, tmp_path, prompts, **{name: value for name, value in change.items() if name not in networks})
    assert encoded.taken() == expected
    prepared(model, tmp_path, prompts)  # and what there was is there still
    assert encoded.taken() == (0, 0)


def test_another_crop_of_the_same_picture_is_another_latent(model, tmp_path, encoded):
    """The pair of a picture decides its size: with a square one 2:1 is cut otherwise than with its like."""
    prompts = make(tmp_path, [((128, 64), (128, 64)), ((128, 64), (32, 64))])
    (tmp_path / "1-0.png").write_bytes((tmp_path / "0-0.png").read_bytes())
    data = prepared(model, tmp_path, prompts)
    assert encoded.taken()[0] == 4
    assert read(data, "prompt 0")[0].shape != read(data, "prompt 1")[0].shape


def test_one_picture_in_many_pairs_is_encoded_once(model, tmp_path, encoded):
    prompts = make(tmp_path)
    for i in range(1, 6):
        (tmp_path / f"{i}-0.png").write_bytes((tmp_path / "0-0.png").read_bytes())
    prepared(model, tmp_path, prompts)
    assert encoded.taken()[0] == 2 * 1 + 6 - 1


def test_mirrored_latents_are_those_of_mirrored_pictures(model, tmp_path):
    """Not latents that are mirrored: the VAE is not symmetric."""
    prompts = make(tmp_path, [(64, 64), (100, 60), (64, 64)])
    data = prepared(model, tmp_path, prompts, buckets=False, flip=True)
    off = prepared(model, tmp_path, prompts, keep="off", buckets=False, flip=True)
    for prompt in prompts:
        (pixels, ids), (latents, same_ids) = read(off, prompt, flip=True), read(data, prompt, flip=True)
        assert torch.equal(pixels.flip(-1), read(off, prompt)[0]) and torch.equal(ids, same_ids)
        with torch.no_grad():
            assert_close(latents, encode_bytes(model, pixels[None])[0], rtol=1e-3, atol=1e-3)
    # 100x60 is scaled to 107x64, and of the 43 columns that are cut off 22 lie on one side and 21 on the other
    assert read(data, prompts[1])[1][3] == 22 and read(data, prompts[1], flip=True)[1][3] == 21


def test_prompts_are_left_to_the_step_with_cache_latents(model, tmp_path, encoded):
    data = prepared(model, tmp_path, make(tmp_path), keep="latents")
    assert encoded.taken() == (12, 0)
    assert data.train.prompts.embeds(0, False) is None


def test_without_a_cache_nothing_is_written_and_the_pixels_give_the_same_latents(model, tmp_path, encoded):
    prompts = make(tmp_path, [(64, 64), (100, 60), (48, 90), (64, 64)])
    off = prepared(model, tmp_path, prompts, keep="off")
    assert encoded.taken() == (0, 0) and not (tmp_path / "cache").exists()
    kept = prepared(model, tmp_path, prompts)
    for prompt in prompts:
        for side in ("chosen", "rejected"):
            (pixels, ids), (latents, same_ids) = read(off, prompt, side), read(kept, prompt, side)
            assert pixels.dtype == torch.uint8 and torch.equal(ids, same_ids)
            with torch.no_grad():
                assert_close(encode_bytes(model, pixels[None])[0], latents, rtol=1e-3, atol=1e-3)
    assert off.fingerprint == kept.fingerprint


def test_random_crops_and_flips_are_the_same_in_both_pictures_of_a_pair(model, tmp_path):
    """The rejected picture is a copy of the chosen one but for one pixel in a corner."""
    make(tmp_path, [(300, 100), (300, 100)])
    for i in range(2):
        picture = Image.open(tmp_path / f"{i}-0.png")
        picture.putpixel((0, 0), (1, 2, 3))
        picture.save(tmp_path / f"{i}-1.png")
    found = look(tmp_path, ["a", "b"])
    framing = Framing(buckets=False, random_crop=True, flip=True)
    data = prepare(model, found, framing, Cache(tmp_path / "cache", "off"))
    visits = Visits(data.train, 0, 1000)
    seen = [visits[0, draw] for draw in range(12)]
    lefts = {float(visit.chosen_time_ids[3]) for visit in seen}
    assert len(lefts) > 6  # of three squares side by side, at random
    for visit in seen:
        assert visit.rejected is not None and visit.rejected_time_ids is not None
        assert torch.equal(visit.chosen_time_ids, visit.rejected_time_ids)
        assert (visit.chosen.float() - visit.rejected.float()).abs().mean() < 1
        assert visit.noise.shape == (4, 8, 8)


# ------------------------------------------------------------------------------------------------------ what goes wrong


def test_a_killed_encoding_goes_on_where_it_was(model, tmp_path, encoded, monkeypatch):
    prompts, counted = make(tmp_path, SIX_SIZES), StableDiffusion.encode_pixels

    def killed(self: Any, pixels: torch.Tensor) -> torch.Tensor:
        if encoded.pictures >= 6:
            raise KeyboardInterrupt
        return counted(self, pixels)

    with monkeypatch.context() as patch:
        patch.setattr(StableDiffusion, "encode_pixels", killed)
        with pytest.raises(KeyboardInterrupt):
            by_fours(model, tmp_path, prompts)
    assert encoded.taken() == (6, 0)
    by_fours(model, tmp_path, prompts)
    assert encoded.taken()[0] == 12 - 4  # the third pair waited for its shard


def test_a_full_disk_keeps_what_is_complete_and_says_so(model, tmp_path, encoded, monkeypatch):
    import safetensors.torch

    prompts, save, written = make(tmp_path, SIX_SIZES), safetensors.torch.save_file, []

    def fills(tensors: Any, file: Path, *rest: Any) -> None:
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(file)
        save(tensors, file, *rest)

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", fills)
        with pytest.raises(UserError, match=r"No space left on device.*what is complete is kept"):
            by_fours(model, tmp_path, prompts)
    encoded.taken()
    by_fours(model, tmp_path, prompts)
    assert encoded.taken()[0] == 12 - 8


def test_what_the_disk_cannot_hold_is_refused_before_it_is_begun(model, tmp_path, encoded, monkeypatch):
    prompts = make(tmp_path)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=100))
    with pytest.raises(UserError, match=r"the cache needs .* GiB for \d+ latents, and .* has .* GiB left.*cache=off"):
        prepared(model, tmp_path, prompts)
    assert encoded.taken() == (0, 0)


def test_a_damaged_shard_is_said_and_what_it_held_is_encoded_again(model, tmp_path, encoded):
    prompts = make(tmp_path, SIX_SIZES)
    before = by_fours(model, tmp_path, prompts)
    encoded.taken()
    broken = sorted((tmp_path / "cache" / "latents-fp32").glob("*.safetensors"))[0]
    held = len(read_header(broken).names)
    broken.write_bytes(broken.read_bytes()[:-5])
    after = by_fours(model, tmp_path, prompts)
    assert encoded.taken() == (held, 0) and 0 < held < 12
    assert any(str(broken) in line and "computed anew" in line for line in after.report)
    for prompt in prompts:
        assert_close(read(after, prompt)[0], read(before, prompt)[0], rtol=1e-4, atol=1e-4)
    by_fours(model, tmp_path, prompts)
    assert encoded.taken() == (0, 0)


def test_damaged_prompts_are_said_too(model, tmp_path, encoded):
    prompts = make(tmp_path)
    prepared(model, tmp_path, prompts)
    encoded.taken()
    for file in (tmp_path / "cache" / "hidden-fp32").glob("*.safetensors"):
        file.write_bytes(b"")
    assert any("hidden-fp32" in line and "computed anew" in line for line in prepared(model, tmp_path, prompts).report)
    assert encoded.taken() == (0, 7)


def cut(file: Path, number: int) -> None:
    """Its header stays whole, its pixels do not."""
    rng = np.random.default_rng(number)
    whole = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(whole, "JPEG")
    file.write_bytes(whole.getvalue()[:2000])


@pytest.mark.parametrize("keep", ["all", "off"])
def test_pictures_that_cannot_be_read_to_their_end_are_left_out_and_named(model, tmp_path, keep):
    prompts = make(tmp_path)
    cut(tmp_path / "2-1.png", 0)
    for _ in range(2):
        data = prepared(model, tmp_path, prompts, keep=keep)
        assert "prompt 2" not in {*data.train.prompts.texts, *data.validation.prompts.texts}
        assert len(data.train) + len(data.validation) == 5
        assert any("left out 1 of" in line and "2-1.png" in line for line in data.report)


def test_without_a_cache_pictures_are_checked_once(model, tmp_path, monkeypatch):
    prompts, now, decode = make(tmp_path), time.time, ImageFile.load
    monkeypatch.setattr(time, "time", lambda: now() + 10)  # the files are no longer new
    decoded: list[str] = []
    monkeypatch.setattr(ImageFile, "load", lambda image: decoded.append(image.filename) or decode(image))
    prepared(model, tmp_path, prompts, keep="off")
    assert len(set(decoded)) == 12
    decoded.clear()
    prepared(model, tmp_path, prompts, keep="off")
    assert decoded == []


@pytest.mark.parametrize("keep", ["all", "off"])
def test_when_no_picture_can_be_read_to_its_end_that_is_the_error(model, tmp_path, keep):
    prompts = make(tmp_path)
    for i in range(6):
        cut(tmp_path / f"{i}-0.png", i)
    with pytest.raises(UserError, match=r"no training sample can be read: image .*-0.png cannot be read to its end"):
        prepared(model, tmp_path, prompts, keep=keep)


def test_files_that_are_missing_broken_or_the_same_are_left_out_and_named(tmp_path):
    prompts = make(tmp_path)
    (tmp_path / "0-0.png").unlink()
    (tmp_path / "1-1.png").write_text("<html>")
    (tmp_path / "2-0.png").write_bytes((tmp_path / "2-1.png").read_bytes())
    chosen, rejected = ([f"{i}-{k}.png" for i in range(6)] for k in range(2))
    samples, rows, (unreadable, same) = usable(tmp_path, prompts, chosen, rejected, label=range(6))
    assert rows == [3, 4, 5] and samples.prompts == prompts[3:] and samples.label.tolist() == [3, 4, 5]
    assert "left out 2 of 6 that cannot be read" in unreadable
    assert "0-0.png does not exist" in unreadable and "1-1.png" in unreadable
    assert same == "left out 1 of 6 whose two pictures are the same file: 2-0.png"


def test_each_reason_is_of_the_file_that_it_names(tmp_path):
    """Files are looked at one by one while others before them are missing."""
    make(tmp_path)
    for i in (0, 2, 3):
        (tmp_path / f"{i}-0.png").unlink()
    (tmp_path / "4-0.png").write_text("<html>")
    samples, rows, _ = usable(tmp_path, ["p"] * 6, [f"{i}-0.png" for i in range(6)])
    assert rows == [1, 5]
    assert [
        hashlib.sha256((tmp_path / path).read_bytes()).hexdigest().encode() for path in samples.chosen.paths
    ] == list(samples.chosen.sha256)


def test_turned_pictures_have_the_size_they_are_seen_at(model, tmp_path):
    """EXIF orientation 6: stored as 100x60, seen as 60x100."""
    prompts = make(tmp_path, [(64, 64)] * 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.open(tmp_path / "0-0.png").resize((100, 60))
    picture.save(tmp_path / "0-0.png", exif=exif)
    picture.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "1-0.png")
    for i in range(2):
        draw(tmp_path / f"{i}-1.png", 7 + i, (60, 100))
    data = prepared(model, tmp_path, prompts, resolution=128)
    turned, straight = (read(data, f"prompt {i}") for i in range(2))
    assert turned[1].tolist() == straight[1].tolist() and turned[1][:2].tolist() == [100, 60]
    assert torch.equal(turned[0], straight[0])


# ----------------------------------------------------------------------------------------------------------- many files


class Pretender:
    """Stands for the model, with a VAE that does nothing."""

    factor, resolution, family, max_tokens, networks, text_encoders = 8, 64, FAMILIES["tiny"], 77, {}, []
    reading = AS_USUAL
    fingerprints, device, working = Fingerprints("model", "vae", "text"), "cpu", StableDiffusion.working

    def __init__(self, model: StableDiffusion):
        self.unet, self.vae, self.name = model.unet, model.vae, model.name

    def truncated(self, prompts: Sequence[str]) -> list[str]:
        return []

    def encode_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels[:, [0, 1, 2, 0], ::8, ::8]

    def encode_prompts(self, prompts: Sequence[str]) -> TextEmbeds:
        return TextEmbeds(torch.zeros(len(prompts), 4, 8), None)


def resident() -> float:
    """MiB."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_many_pairs_need_little_memory_and_no_time_at_the_second_start(model, tmp_path):
    """Of ten thousand pairs; a hundred thousand are measured in the same way and stay below 100 MB and 5 s."""
    n, pretender = 10_000, Pretender(model)
    Image.new("RGB", (80, 64), "red").save(tmp_path / "the only one.bmp")

    def side(name: str) -> ImageFiles:
        digests = [hashlib.sha256(f"{name} {i}".encode()).hexdigest() for i in range(n)]
        sizes = np.random.default_rng(0).integers(64, 400, (n, 2)).astype(np.int32)
        return ImageFiles(tmp_path, ["the only one.bmp"] * n, np.array(digests, "S64"), sizes)

    ones = np.ones(n, np.float32)
    found = split(Samples([f"prompt {i % 500}" for i in range(n)], side("a"), side("b"), ones, ones), 0.1, 0)
    before = resident()
    prepare(pretender, found, Framing(), Cache(tmp_path))  # type: ignore[arg-type]
    start = time.perf_counter()
    data = prepare(pretender, found, Framing(), Cache(tmp_path))  # type: ignore[arg-type]
    assert time.perf_counter() - start < 2
    visits = Visits(data.train, 0, 1000)
    start = time.perf_counter()
    for row in range(1000):
        visits[row, 0]
    assert time.perf_counter() - start < 1.5  # the tiny UNet needs about 4 s for these
    assert resident() - before < 60


@pytest.mark.parametrize(
    ("validation", "n", "apart"),
    [(0.1, 50, 5), (0.1, 3, 1), (0.5, 2, 1), (0.1, 10_000, 128), (1, 50, 1), (500, 10_000, 500), (10, 20, 10)],
)
def test_a_share_is_held_back_as_far_as_it_is_of_use_and_a_number_to_the_letter(validation, n, apart):
    assert held_back(validation, n) == apart


def test_more_than_half_is_not_held_back():
    with pytest.raises(UserError, match="validation=11 holds back more than half of 20: use at most 10, or a share"):
        held_back(11, 20)
