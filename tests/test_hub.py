"""The Hub, by one of our own on the loopback: what is fetched of a repository, and what is said when that fails."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import config as datasets_config
from huggingface_hub import constants
from mock_hub import COMMIT, Hub, serving
from PIL import Image
from safetensors.torch import load_file, save_file

from dpo_sd.data.cache import Cache
from dpo_sd.data.pickapic import PickAPic
from dpo_sd.data.splitting import Split
from dpo_sd.errors import UserError
from dpo_sd.models.base import Base
from dpo_sd.models.families import FAMILIES
from dpo_sd.models.hub import REPOSITORIES

README = Path(__file__).parent.parent / "README.md"
MODEL, SET = "some/model", "owner/set"
SETTINGS = {"model_index.json", "scheduler/scheduler_config.json", "unet/config.json", "vae/config.json"}
SETTINGS |= {"text_encoder/config.json", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"}
SECOND = {"text_encoder_2/config.json", "tokenizer_2/tokenizer.json", "tokenizer_2/tokenizer_config.json"}
WEIGHTS = {
    "unet": "unet/diffusion_pytorch_model",
    "vae": "vae/diffusion_pytorch_model",
    "text_encoder": "text_encoder/model",
    "text_encoder_2": "text_encoder_2/model",
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub without repositories, and an empty cache."""
    with serving(tmp_path / "hub") as hub:
        for name, value in (
            ("ENDPOINT", hub.url),
            ("HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"),
            ("HF_HUB_CACHE", str(tmp_path / "cache")),
            ("HUGGINGFACE_HUB_CACHE", str(tmp_path / "cache")),
            ("HF_HUB_OFFLINE", False),
            ("HF_HUB_DISABLE_PROGRESS_BARS", True),
        ):
            monkeypatch.setattr(constants, name, value)
        for name, value in (
            ("HF_ENDPOINT", hub.url),
            ("HF_HUB_OFFLINE", False),
            ("HF_DATASETS_CACHE", tmp_path / "datasets"),
            ("STREAMING_READ_MAX_RETRIES", 1),
            ("STREAMING_READ_RETRY_INTERVAL", 0.05),
            ("STREAMING_READ_SERVER_UNAVAILABLE_RETRY_INTERVAL", 0.05),
        ):
            monkeypatch.setattr(datasets_config, name, value)
        yield hub


@pytest.fixture
def publish(hub: Hub, twin: Callable[[str], Path]) -> Callable[..., Path]:
    """`publish("sd15", half=["unet"])`: that twin with all that real repositories hold beside what is needed.

    `half` are the parts that have a half-precision variant.
    """

    def publish(family: str, half: tuple[str, ...] = tuple(WEIGHTS), name: str = MODEL) -> Path:
        folder = shutil.copytree(twin(family), hub.root / "models" / name)
        for part, stem in WEIGHTS.items():
            if not (folder / part).is_dir():
                continue
            tensors = load_file(folder / f"{stem}.safetensors")
            if part in half:
                halved = {key: tensor.half() for key, tensor in tensors.items()}
                save_file(halved, folder / f"{stem}.fp16.safetensors", metadata={"format": "pt"})
            for beside in (".non_ema.safetensors", ".bin", ".fp16.bin", ".onnx", ".msgpack", ".safetensors.index.json"):
                (folder / f"{stem}{beside}").write_bytes(b"needless")
            (folder / part / "flax_model.msgpack").write_bytes(b"needless")
        for beside in (
            "README.md",
            "v1.ckpt",
            "v1.safetensors",
            "safety_checker/model.safetensors",
            "vae_1_0/config.json",
        ):
            (folder / beside).parent.mkdir(exist_ok=True)
            (folder / beside).write_bytes(b"needless")
        return folder

    return publish


def weights(*parts: str, variant: str = "") -> set[str]:
    return {f"{WEIGHTS[part]}{variant}.safetensors" for part in parts}


def refused(call: Callable[[], Any]) -> str:
    """The one line that it ends in."""
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------------ the table


def test_every_repository_that_is_taken_by_default_stands_in_the_table_and_in_the_readme():
    named = {family.repository for family in FAMILIES.values()} - {None} | {PickAPic().dataset.path}
    assert named == {known.name for known in REPOSITORIES.values()}
    for option, known in REPOSITORIES.items():
        assert f"| `{option}` | `{known.name}` | {known.licence} | {known.seen} |" in README.read_text(encoding="utf-8")


# ----------------------------------------------------------------------------------------------- exactly what is needed


@pytest.mark.parametrize(("family", "second"), [("tiny", False), ("sd21", False), ("sdxl", True)])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_exactly_the_files_of_a_family_are_fetched_and_none_again(hub, publish, family, second, stored):
    folder, parts = publish("sd15" if family == "tiny" else family), ["unet", "vae", "text_encoder"]
    base = Base(family, MODEL)
    model = base.load(stored)
    variant = "" if stored == "float32" else ".fp16"
    parts += ["text_encoder_2"] * second
    needed = SETTINGS | (SECOND if second else set()) | weights(*parts, variant=variant)
    here = base.files(stored)
    assert {file.relative_to(here).as_posix() for file in here.rglob("*") if file.is_file()} == needed
    assert hub.fetched() <= needed  # what is there twice, such as a vocabulary, comes once
    assert base.commit == COMMIT
    same = Base(family, str(folder), variant=variant[1:] or None)
    assert model.fingerprints == same.fingerprints() == base.fingerprints(stored)
    hub.asked.clear()
    Base(family, MODEL).files(stored)
    assert not hub.fetched()


def test_a_variant_that_a_part_lacks_is_said_and_its_plain_weights_are_taken(hub, publish):
    publish("sd15", half=("unet",))
    base = Base("tiny", MODEL)
    base.load("bfloat16")
    assert hub.fetched() == SETTINGS | weights("unet", variant=".fp16") | weights("vae", "text_encoder")
    first, *others = base.notes
    assert first.startswith(f"{MODEL}: its variant fp16 is taken") and "model.variant=plain" in first
    assert [note.partition(" has no ")[2] for note in others] == ["variant fp16: plain weights taken"] * 2


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "int8"])
def test_a_repository_without_half_precision_gives_its_plain_weights_and_says_so_once(hub, publish, stored):
    publish("sd15", half=())
    base = Base("tiny", MODEL)
    base.load(stored)
    assert hub.fetched() == SETTINGS | weights("unet", "vae", "text_encoder")
    assert base.notes == [f"{MODEL} has no variant fp16: its plain weights are taken"]


def test_the_variant_is_what_the_setting_says_whatever_the_precision(hub, publish):
    publish("sd15")
    plain, half = Base("tiny", MODEL, variant="plain"), Base("tiny", MODEL, variant="fp16")
    assert plain.fingerprints("bfloat16") == plain.fingerprints("float32") == Base("tiny", MODEL).fingerprints()
    assert half.fingerprints("bfloat16") == half.fingerprints() == Base("tiny", MODEL).fingerprints("int8")
    assert half.fingerprints() != plain.fingerprints() and plain.notes == []


def test_a_variant_that_lies_beside_the_plain_weights_in_a_local_folder_changes_nothing(publish):
    folder = publish("sd15")
    for index in folder.rglob("*.index.json"):
        index.unlink()
    base = Base("tiny", str(folder))
    assert base.load("bfloat16").fingerprints == base.fingerprints() and base.notes == []


def test_pickles_are_fetched_only_where_they_are_trusted_and_alone(hub, publish):
    folder = publish("sd15", half=())
    tensors = load_file(folder / "unet/diffusion_pytorch_model.safetensors")
    torch.save(tensors, folder / "unet/diffusion_pytorch_model.bin")
    for name in ("diffusion_pytorch_model", "diffusion_pytorch_model.non_ema"):
        (folder / f"unet/{name}.safetensors").unlink()
    refused(Base("tiny", MODEL).load)
    assert not any(name.endswith(".bin") for name in hub.fetched())
    Base("tiny", MODEL, pickle=True).load()
    assert {name for name in hub.fetched() if name.endswith(".bin")} == {"unet/diffusion_pytorch_model.bin"}


def test_weights_in_several_files_are_fetched_with_their_index(hub, publish, twin):
    from diffusers import UNet2DConditionModel

    folder = publish("sd15", half=())
    whole = UNet2DConditionModel.from_pretrained(twin("sd15") / "unet")
    for file in (folder / "unet").glob("diffusion*"):
        file.unlink()
    whole.save_pretrained(folder / "unet", max_shard_size="200KB")
    assert len(list((folder / "unet").glob("*.safetensors"))) > 1
    model = Base("tiny", MODEL).load()
    assert all(torch.equal(whole.state_dict()[name], tensor) for name, tensor in model.unet.state_dict().items())


def test_of_a_base_with_another_vae_the_own_one_stays_on_the_hub(hub, publish):
    publish("sd15")
    publish("sd15", name="some/vae")
    base = Base("tiny", MODEL, vae="some/vae")
    assert [line.partition(":")[0] for line in base.to_fetch()] == [f"the weights of {MODEL}", "the VAE of some/vae"]
    base.load()
    sent = [path for method, path, _ in hub.asked if method == "GET" and path.endswith(".safetensors")]
    assert sorted(path.split("/resolve/")[0] + "/" + path.rpartition("/")[2] for path in sent) == [
        f"/{MODEL}/diffusion_pytorch_model.safetensors",
        f"/{MODEL}/model.safetensors",
        "/some/vae/diffusion_pytorch_model.safetensors",
    ]


def test_of_a_vae_alone_one_file_is_fetched(hub, publish):
    folder = publish("sd15")
    shutil.copytree(folder / "vae", hub.root / "models/some/vae")
    (hub.root / "models/some/vae/sdxl_vae.safetensors").write_bytes(b"needless")
    Base(vae="some/vae").load()
    assert hub.fetched() == {"config.json", "diffusion_pytorch_model.safetensors"}


# --------------------------------------------------------------------------------------------------------- single files


def test_a_single_file_needs_nothing_of_the_hub(hub, single_file):
    base = Base("sd15", str(single_file("sd15").file))
    assert base.to_fetch() == [] and base.fingerprints() == base.fingerprints("bfloat16")
    assert hub.asked == []


def test_a_single_file_with_settings_of_a_repository_says_so_and_only_they_are_fetched(hub, publish, single_file):
    publish("sd15", name=REPOSITORIES["sd15"].name)
    file = single_file("sd15").file
    base = Base("sd15", str(file), config=REPOSITORIES["sd15"].name)
    (line,) = base.to_fetch()
    assert line.startswith(f"for {file}, the settings and the vocabulary (*/*.json, tokenizer*/*.txt: a few MB) of ")
    assert "(CreativeML Open RAIL-M): fetched from the Hub once; a diffusers folder as model.config would need" in line
    assert hub.asked == []
    base.fingerprints()
    assert hub.fetched() == SETTINGS
    assert base.to_fetch() == [] and Base("sd15", str(file), config=str(single_file("sd15").config)).to_fetch() == []


def test_what_is_not_there_is_refused_offline_before_anything_starts(hub, single_file, monkeypatch, command, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    file = single_file("sd15").file
    for words in (["model=sd21"], ["model=sd15", f"model.path={file}", "model.config=some/model"]):
        ended = command(*words, f"hydra.run.dir={tmp_path / 'run'}", "data=shapes")
        assert ended.code == 1 and all(line.startswith("hardware") for line in ended.out.splitlines())
        named = "some/model" if len(words) > 1 else REPOSITORIES["sd21"].name
        assert ended.err.startswith(f"error: {named} is not on this computer and HF_HUB_OFFLINE is set")
        assert ended.err.count("\n") == 1


# -------------------------------------------------------------------------------------------------------------- offline


def test_what_was_fetched_is_read_without_a_network(hub, publish, monkeypatch):
    publish("sd15")
    online = Base("tiny", MODEL).load("bfloat16")
    hub.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    base = Base("tiny", MODEL)
    assert base.to_fetch() == [] and base.load("bfloat16").fingerprints == online.fingerprints
    assert base.commit == COMMIT and hub.asked == []


def test_without_a_network_the_plain_weights_serve_where_only_they_are_there(hub, publish, monkeypatch):
    publish("sd15")
    plain = Base("tiny", MODEL).load()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    base = Base("tiny", MODEL)
    assert base.load("bfloat16").fingerprints == plain.fingerprints
    assert base.notes == [f"{MODEL}: HF_HUB_OFFLINE is set, and of its weights only the plain ones are here: so taken"]
    message = refused(Base("tiny", MODEL, variant="fp16").load)
    lacking = "unet/diffusion_pytorch_model.fp16.safetensors"
    assert message.startswith(f"{lacking} of {MODEL} is not on this computer and HF_HUB_OFFLINE is set")


# ------------------------------------------------------------------------------------------------------ what goes wrong


def test_a_download_that_breaks_once_goes_on_in_the_middle_of_the_file(hub, publish, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    publish("sd15")
    hub.cut = [100_000]
    Base("tiny", MODEL).load()
    assert [wanted for wanted in hub.ranges() if wanted] == ["bytes=100000-"]


def test_a_download_that_keeps_breaking_is_one_line_and_the_next_start_goes_on(hub, publish, monkeypatch):
    publish("sd15")
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between two tries
    hub.cut = [50_000] * 20
    message = refused(Base("tiny", MODEL).load)
    assert message.startswith(f"{MODEL} is not on this computer and the Hub cannot be reached")
    hub.cut.clear()
    hub.asked.clear()
    Base("tiny", MODEL).load()
    assert hub.fetched() <= weights("unet", "vae", "text_encoder")


def test_a_repository_of_another_family_is_refused_before_its_weights_are_fetched(hub, publish):
    publish("sdxl")
    assert refused(Base("sd21", MODEL).load) == f"{MODEL} is of the family sdxl: use model=sdxl model.path={MODEL}"
    assert not any(name.endswith(".safetensors") for name in hub.fetched())


def test_repositories_that_are_no_pipeline_are_refused_before_anything_large_is_fetched(hub, publish):
    folder = publish("sd15")
    shutil.rmtree(folder / "vae")
    assert refused(Base("tiny", MODEL).load).startswith(f"model.path={MODEL} lacks vae")
    lora = hub.root / "models/some/lora"
    lora.mkdir()
    (lora / "pytorch_lora_weights.safetensors").write_bytes(b"needless")
    assert "no diffusers pipeline there" in refused(Base("tiny", "some/lora").load)
    shutil.copytree(lora, hub.root / "models/some/peft")
    (hub.root / "models/some/peft/adapter_config.json").write_text("{}")
    assert "is a LoRA, not a model" in refused(Base("tiny", "some/peft").load)
    assert not any(name.endswith(".safetensors") for name in hub.fetched())


def test_a_repository_that_is_gone_asks_for_consent_or_does_not_answer_is_one_line(hub, publish, monkeypatch):
    gone = refused(Base("sdxl").load)
    assert gone.startswith(
        "the Hub has no public stabilityai/stable-diffusion-xl-base-1.0, which was there in 2026: check its name, or "
        "hf auth login, or give another repository or a diffusers folder or a single file as model.path"
    )
    publish("sd15")
    hub.gated.add(MODEL)
    assert (
        refused(Base("tiny", MODEL).load)
        == f"{MODEL} asks for consent: accept its terms on its page, then hf auth login"
    )
    hub.gated.clear()
    hub.wait = 1.0
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.05)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert "the Hub cannot be reached" in refused(Base("tiny", MODEL).load)


# ----------------------------------------------------------------------------------------------------------- Pick-a-Pic


@pytest.fixture
def pairs(hub: Hub) -> Path:
    """A dataset in Pick-a-Pic's layout."""
    folder = hub.root / "datasets" / SET / "data"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)

    def jpeg() -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(buffer, "JPEG", quality=95)
        return buffer.getvalue()

    for split, number, rows in (*(("train", n, 4) for n in range(4)), ("validation", 0, 4), ("test_unique", 0, 4)):
        table = {
            "caption": [f"{split} {number} {row}" for row in range(rows)],
            "jpg_0": [jpeg() for _ in range(rows)],
            "jpg_1": [jpeg() for _ in range(rows)],
            "label_0": [float(row % 2) for row in range(rows)],
            "label_1": [float(1 - row % 2) for row in range(rows)],
            "has_label": [True] * rows,
            "are_different": [True] * rows,
        }
        pq.write_table(pa.table(table), folder / f"{split}-{number:05d}-of-00004-0a1b.parquet", row_group_size=2)
    return folder


def prompts(found: Any) -> set[str]:
    assert isinstance(found, Split)
    return {*found.train.prompts, *found.validation.prompts}


@pytest.mark.parametrize(("split", "files"), [("train", 4), ("validation", 1), ("test_unique", 1)])
def test_a_split_is_streamed_by_ranges_of_its_own_files(hub, pairs, tmp_path, split, files):
    source = PickAPic(SET, split=split, max_pairs=None)
    found = source.look(Cache(tmp_path / "kept"), fetch=True)
    assert len(prompts(found)) == 4 * files and all(each.startswith(split) for each in prompts(found))
    assert all(hub.ranges())
    others = {file for file in hub.fetched() if not file.startswith(f"data/{split}-")}
    assert len(hub.fetched() - others) == files and len(others) <= 1  # one file tells the columns of all splits
    assert source.commit == COMMIT and f"{SET} at commit {COMMIT}, {split}: " in found.report[0]


def test_a_few_pairs_are_of_one_file_and_later_starts_ask_for_nothing(hub, pairs, tmp_path, monkeypatch):
    cache = Cache(tmp_path / "kept")
    first = PickAPic(SET, max_pairs=4).look(cache, fetch=True)
    assert 1 <= len(hub.fetched()) <= 2  # the first one tells the columns
    hub.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    again = PickAPic(SET, max_pairs=4)
    assert prompts(again.look(cache, fetch=True)) == prompts(first)
    assert again.commit == COMMIT and hub.asked == []


def test_pick_a_pic_that_is_gone_names_another_way(hub, tmp_path):
    message = refused(lambda: PickAPic().look(Cache(tmp_path / "kept"), fetch=True))
    assert message == (
        "the Hub has no public dataset liuhuohuo2/pick-a-pic-v2, which was there in 2026-09: check its name, or hf "
        "auth login, or give another repository or a local folder of parquet files as data.path"
    )


def test_a_dataset_that_asks_for_consent_or_breaks_off_is_one_line_and_goes_on(hub, pairs, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between two tries
    cache = Cache(tmp_path / "kept")
    hub.gated.add(SET)
    assert "asks for consent" in refused(lambda: PickAPic(SET, max_pairs=None).look(cache, fetch=True))
    hub.gated.clear()
    hub.cut = [3000] * 50
    message = refused(lambda: PickAPic(SET, max_pairs=None).look(cache, fetch=True))
    assert message.startswith(f"{SET}: the Hub cannot be read (") and "start again with a network" in message
    hub.cut.clear()
    assert len(prompts(PickAPic(SET, max_pairs=None).look(cache, fetch=True))) == 16


def test_a_run_says_what_it_fetches_and_records_the_commits_of_model_and_data(hub, pairs, publish, train, tmp_path):
    publish("sd15")
    words = ("data=pickapic", f"data.path={SET}", f"model.path={MODEL}", "~callbacks.verdict", "lora.rank=2")
    ended = train(tmp_path / "run", *words, f"cache_dir={tmp_path / 'kept'}", without=("data.n_", "callbacks.verdict"))
    assert ended.code == 0, ended.err
    assert f"model   the weights of {MODEL}: fetched from the Hub once" in ended.out
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["model_commit"] == record["data_commit"] == COMMIT
