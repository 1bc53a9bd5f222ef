"""The families of Stable Diffusion: all that differs between them, declared once."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from dpo_sd.errors import UserError
from dpo_sd.models.hub import REPOSITORIES

if TYPE_CHECKING:
    from torch import Tensor

    from dpo_sd.losses import PredictionType

FamilyName = Literal["tiny", "sd15", "sd21", "sdxl"]
SHIPPED: FamilyName = "tiny"  # the family whose weights come with the package
ASSETS = Path(__file__).parent.parent / "assets"
TINY = ASSETS / "tiny-sd"
VOCABULARY = ASSETS / "clip"  # of all text encoders of the families that are published
PROGRAMS = ("ComfyUI", "A1111", "InvokeAI", "diffusers")  # which load LoRA files


_NO_SAFETY_CHECKER = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


class TextEncoder(NamedTuple):
    """A text encoder of a family.

    Args:
        kind: name of its class in transformers.
        layer: the hidden state that cross-attention reads, counted from the end; None reads the last one, normed.
        pooled: whether the UNet is also told its pooled projection, for which all of its layers are read.
        kohya: beginning of the names that Kohya's trainer gives its modules.
        prefix: beginning of its tensors' names in a single file.
        a1111: the beginnings that A1111 knows for this family.
        pad: the token of CLIP's vocabulary that fills a prompt up; it was trained with it.
    """

    kind: str = "CLIPTextModel"
    layer: int | None = None
    pooled: bool = False
    kohya: str = "lora_te_"
    prefix: str = "cond_stage_model.transformer."
    a1111: tuple[str, ...] = ("lora_te_",)
    pad: str = "<|endoftext|>"


MOST_CHUNKS = 10


class Reading(NamedTuple):
    """How the text encoders read a prompt.

    Args:
        chunks: pieces that a prompt is cut into, each read on its own between the marks of both ends; their hidden
            states follow each other, as in A1111, ComfyUI and InvokeAI.
        clip_skip: the layer whose output is read, normed, counted from the end as A1111 and Kohya's trainer count: 1 is
            the last one. diffusers counts the layers that are left out, one less.
    """

    chunks: int = 1
    clip_skip: int = 1


AS_USUAL = Reading()


class BaseNames(NamedTuple):
    """Names of a base in the metadata of Kohya's files: `ss_base_model_version` and `modelspec.architecture`."""

    version: str
    architecture: str


@dataclass(frozen=True)
class Family:
    """All that differs between the families of Stable Diffusion.

    Args:
        name: the option of the group `model`.
        width: features of the text that cross-attention reads, by which networks and files are told apart.
        kohya: what Kohya's files call the base.
        kohya_velocity: what they call a base that predicts velocity, where that has names of its own.
        kohya_v2: whether they count it among the SD 2.
        encoders: the text encoders, by the names that diffusers gives them; vocabularies are named alike.
        repository: the family's own pipeline on the Hub; None where it ships with the package.
        pipeline: name of its class in diffusers.
        pipeline_settings: what that class is made with, beside the networks.
        addition: the UNet's `addition_embed_type`; a UNet that has one is told pooled text and sizes.
        file_mark: beginning of names that only single files of this family hold.
        sgm_names: whether LoRA files name the UNet's modules as Stability's code (sgm) does.
        programs: the ones among `PROGRAMS` that have a model of this family.
        skips: whether its models are used with the last layers of the text encoder left out; the others were trained on
            the last but one.
        steps, guidance: what its images are drawn with, as in `Sampler`, unless told otherwise.
    """

    name: FamilyName
    width: int
    kohya: BaseNames
    kohya_velocity: BaseNames | None = None
    kohya_v2: bool = False
    encoders: Mapping[str, TextEncoder] = field(default_factory=lambda: {"text_encoder": TextEncoder()})
    repository: str | None = None
    pipeline: str = "StableDiffusionPipeline"
    pipeline_settings: Mapping[str, Any] = field(default_factory=lambda: _NO_SAFETY_CHECKER)
    addition: str | None = None
    file_mark: str | None = None
    sgm_names: bool = False
    programs: tuple[str, ...] = PROGRAMS
    skips: bool = False
    steps: int = 30
    guidance: float = 7.5

    @property
    def place(self) -> str:
        """The family's own pipeline: a repository on the Hub, or a folder of the package."""
        return self.repository or str(TINY)

    @property
    def networks(self) -> tuple[str, ...]:
        """The networks that a LoRA can adapt, as diffusers names them."""
        return ("unet", *self.encoders)

    @property
    def parts(self) -> tuple[str, ...]:
        """The folders of a pipeline in diffusers' layout, in the order in which fingerprints hash them."""
        first, *further = [(name, tokenizer_of(name)) for name in self.encoders]
        return ("unet", "vae", *first, "scheduler", *(part for parts in further for part in parts))

    @property
    def pooled(self) -> bool:
        """Whether the UNet is told pooled text and sizes beside the hidden states of the text."""
        return self.addition is not None

    @property
    def folder(self) -> Path:
        """The settings of all networks at their real shapes, in diffusers' layout, without weights or vocabulary."""
        return ASSETS / "families" / self.name if self.repository else TINY

    def place_of(self, settings: Path, part: str) -> Path:
        """The folder of a part: that among the settings, or CLIP's vocabulary beside the family's own settings."""
        shared = self.repository is not None and settings == self.folder and part.startswith("tokenizer")
        return VOCABULARY if shared else settings / part

    def settings(self, part: str) -> dict[str, Any]:
        """The settings of a part at its real shape."""
        file = "scheduler_config.json" if part == "scheduler" else "config.json"
        return json.loads((self.folder / part / file).read_text(encoding="utf-8"))

    @property
    def chunk(self) -> int:
        """Tokens of a prompt that its text encoders read at once, without the marks of the two ends."""
        return self.settings("text_encoder")["max_position_embeddings"] - 2

    def reading(self, max_tokens: int | None = None, clip_skip: int | None = None) -> Reading:
        """How its models read prompts with these settings of `Base`.

        Raises:
            UserError: if they cannot.
        """
        tokens = self.chunk if max_tokens is None else max_tokens
        chunks, rest = divmod(tokens, self.chunk)
        if rest or not 1 <= chunks <= MOST_CHUNKS:
            near = min(max(1, round(tokens / self.chunk)), MOST_CHUNKS) * self.chunk
            raise UserError(
                f"model.max_tokens={max_tokens}: {self.name} reads prompts in chunks of {self.chunk} tokens, at most "
                f"{MOST_CHUNKS} of them: use {near}"
            )
        layers = self.settings("text_encoder")["num_hidden_layers"]
        clip_skip = 1 if clip_skip is None else clip_skip
        if not 1 <= clip_skip <= layers:
            raise UserError(f"model.clip_skip must be between 1 (the last layer) and {layers}, got {clip_skip}")
        if clip_skip > 1 and not self.skips:
            raise UserError(
                f"model.clip_skip={clip_skip}: {self.name} was trained on the last layer but one, which is read "
                "already: leave it out"
            )
        return Reading(chunks, clip_skip)

    @property
    def resolution(self) -> int:
        """Width and height in pixels of the images that the family was trained on."""
        factor = 2 ** (len(self.settings("vae")["block_out_channels"]) - 1)
        return factor * self.settings("unet")["sample_size"]

    def added(self, pooled: Tensor | None, time_ids: Tensor | None) -> dict[str, Tensor | None] | None:
        """Conditioning of the UNet beside latents, timesteps and hidden states, as its `added_cond_kwargs`.

        Args:
            pooled: (n, width), the pooled text.
            time_ids: (n, 6), pixels: height and width of the original image, top and left of the crop, height and
                width of the training image.
        """
        return {"text_embeds": pooled, "time_ids": time_ids} if self.pooled else None

    def base_names(self, prediction_type: PredictionType) -> BaseNames:
        """Names of a base of this family that predicts noise or velocity, in Kohya's files."""
        velocity = self.kohya_velocity if prediction_type == "v_prediction" else None
        return velocity or self.kohya


_SD1 = BaseNames("sd_v1", "stable-diffusion-v1")
_CLIP_L = TextEncoder(a1111=("lora_te_", "lora_te1_"))  # which SD 2 has not

FAMILIES: Mapping[FamilyName, Family] = {
    family.name: family
    for family in (
        Family("tiny", width=128, kohya=_SD1, programs=("diffusers",), skips=True, steps=12, guidance=4.0),
        Family(
            "sd15",
            width=768,
            kohya=_SD1,
            encoders={"text_encoder": _CLIP_L},
            repository=REPOSITORIES["sd15"].name,
            skips=True,
        ),
        Family(
            "sd21",
            width=1024,
            kohya=BaseNames("sd_v2", "stable-diffusion-v2-512"),
            kohya_velocity=BaseNames("sd_v2_v", "stable-diffusion-v2-768-v"),
            kohya_v2=True,
            encoders={"text_encoder": TextEncoder(prefix="cond_stage_model.model.", pad="!")},
            repository=REPOSITORIES["sd21"].name,
        ),
        Family(
            "sdxl",
            width=2048,
            kohya=BaseNames("sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
            encoders={
                "text_encoder": TextEncoder(
                    layer=-2, kohya="lora_te1_", prefix="conditioner.embedders.0.transformer.", a1111=("lora_te1_",)
                ),
                "text_encoder_2": TextEncoder(
                    "CLIPTextModelWithProjection",
                    layer=-2,
                    pooled=True,
                    kohya="lora_te2_",
                    prefix="conditioner.embedders.1.model.",
                    a1111=("lora_te2_",),
                    pad="!",
                ),
            },
            repository=REPOSITORIES["sdxl"].name,
            pipeline="StableDiffusionXLPipeline",
            pipeline_settings={"add_watermarker": False},
            addition="text_time",
            file_mark="conditioner.embedders.1.",
            sgm_names=True,
            guidance=5.0,
        ),
    )
}
# the networks that a LoRA of some family adapts
NETWORKS = tuple(dict.fromkeys(network for family in FAMILIES.values() for network in family.networks))


def longer(family: Family, reading: Reading) -> str:
    """Words on the setting by which more of a long prompt is read; none where there is no more."""
    more = (reading.chunks + 1) * family.chunk
    return f"; model.max_tokens={more} reads more of them" if reading.chunks < MOST_CHUNKS else ""


def tokenizer_of(encoder: str) -> str:
    """The name of a text encoder's vocabulary: `tokenizer_2` for `text_encoder_2`."""
    return encoder.replace("text_encoder", "tokenizer")


def family_of_width(width: object) -> FamilyName | None:
    """The family whose cross-attention reads text of that width; None where there is none."""
    return next((family.name for family in FAMILIES.values() if family.width == width), None)


def family_of_unet(config: Mapping[str, Any]) -> FamilyName | None:
    """The family that a UNet's settings belong to; None for a network of a size of its own."""
    for family in FAMILIES.values():
        if family.pooled and family.addition == config.get("addition_embed_type"):
            return family.name
    return family_of_width(config.get("cross_attention_dim"))


def family_of_file(names: Collection[str], width: int) -> FamilyName | None:
    """The family of a single file, by its tensors' names and the width of the text that it reads."""
    for family in FAMILIES.values():
        if family.file_mark is not None and any(name.startswith(family.file_mark) for name in names):
            return family.name
    return family_of_width(width)


def family_of_lora(networks: Collection[str], width: int | None) -> FamilyName | None:
    """The family that a LoRA was made for, by the networks that it adapts and the width of the text that it reads."""
    having: list[FamilyName] = [family.name for family in FAMILIES.values() if set(networks) <= set(family.networks)]
    return having[0] if len(having) == 1 else family_of_width(width)
