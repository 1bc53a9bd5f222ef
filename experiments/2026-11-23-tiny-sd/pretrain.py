"""Trains the shipped tiny Stable Diffusion from nothing, in the stages of the README beside this file.

After the way of latent diffusion (Rombach et al. 2022, arXiv:2112.10752): an AutoencoderKL on pictures of the
shapes world in every style, a UNet with its own CLIP text encoder on latents of captioned pictures in the flat
style, and at last the decoder once more, on noisy latents.
Every batch is a function of (seed, step), so a killed run continues from its last checkpoint to the same weights.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from card import write_card
from torch import nn
from tqdm import tqdm

from dpo_sd.losses import min_snr_weights
from dpo_sd.shapes.captions import random_caption
from dpo_sd.shapes.render import coverage, render_array
from dpo_sd.shapes.scenes import (
    BACKGROUNDS,
    COLOURS,
    KINDS,
    POSITIONS,
    RESOLUTION,
    SHAPES,
    STYLES,
    held_out,
    random_scene,
)

SEEN_KINDS = [kind for kind in KINDS if not held_out(kind)]
CAPTION_DROPOUT = 0.1  # what classifier-free guidance needs (Ho & Salimans 2022, arXiv:2207.12598)
MAX_TOKENS = 32
EMA_DECAY = 0.999
CHUNK = 256  # images that one process renders at a time


class Sizes(NamedTuple):
    """Updates and training images of each stage.

    Args:
        vae, decoder: updates of the autoencoder and of the last stage.
        composition, detail: updates of the UNet with the one weighting of the error and with the other.
        vae_images, unet_images, decoder_images: rendered images that the stages draw their batches from.
        save_every: updates between two checkpoints.
    """

    vae: int = 5000
    composition: int = 12000
    detail: int = 3000
    decoder: int = 10000
    vae_images: int = 16384
    unet_images: int = 32768
    decoder_images: int = 24576
    save_every: int = 250


# ------------------------------------------------------------------------------------------------------------- images


def captioned_image(seed: int, index: int) -> tuple[np.ndarray, str]:
    """Image `index` of the UNet's training set, (64, 64, 3) uint8, and one caption for it."""
    rng = np.random.default_rng((seed, index, 1))
    named = rng.random() < 0.5
    position = rng.choice(list(POSITIONS)) if named else None
    scene = random_scene(rng, SEEN_KINDS[rng.integers(len(SEEN_KINDS))], position)
    return np.rint(render_array(scene)).astype(np.uint8), random_caption(rng, scene, named)


def varied_image(seed: int, index: int) -> np.ndarray:
    """Image `index` of the autoencoder's training set, (64, 64, 3) uint8.

    More varied than the shapes world, so that styles can be learnt later.
    """
    rng = np.random.default_rng((seed, index, 2))
    style = STYLES[0] if rng.random() < 0.5 else STYLES[rng.integers(len(STYLES))]
    image = render_array(random_scene(rng, KINDS[rng.integers(len(KINDS))], None, style))
    if rng.random() < 0.25:  # more shapes, any colours
        colours = np.array([*COLOURS.values(), *BACKGROUNDS.values()], float)
        for _ in range(rng.integers(1, 4)):
            shape, colour = SHAPES[rng.integers(len(SHAPES))], colours[rng.integers(len(colours))]
            x, y = rng.uniform(6, RESOLUTION - 6, size=2)
            alpha = coverage(shape, x, y, rng.uniform(3, 14))[..., None]
            image = image + alpha * (colour - image)
    return np.rint(image).astype(np.uint8)


def rendered(function: Callable[[int, int], Any], seed: int, n: int, description: str) -> list:
    """`function(seed, index)` for the first n indices, in as many processes as there are cores."""
    if n <= CHUNK:
        return [function(seed, index) for index in range(n)]
    with ProcessPoolExecutor() as pool:
        jobs = pool.map(function, [seed] * n, range(n), chunksize=CHUNK)
        return list(tqdm(jobs, total=n, desc=description))


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """uint8 (n, H, W, 3) to float (n, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


# ----------------------------------------------------------------------------------------------------------- training


class Stage:
    """One stage of the training: an optimiser with warm-up and cosine decay, averaged weights, exact resume.

    Args:
        name: name of its checkpoint and of its metrics in the folder.
        model: trained in place; a checkpoint in the folder is loaded into it.
        steps: updates.
        lr: highest learning rate.
        save_every: updates between two checkpoints.
    """

    def __init__(self, name: str, model: nn.Module, folder: Path, steps: int, lr: float, save_every: int):
        self.name, self.model, self.steps, self.save_every = name, model, steps, save_every
        self.file, self.metrics = folder / f"{name}.ckpt", folder / f"{name}.csv"
        self.optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.999), weight_decay=0.01, fused=True)
        warm_up = min(200, steps // 10 + 1)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda step: min((step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * step / steps)) + 1e-3,
        )
        self.average = {name: value.clone() for name, value in model.state_dict().items()}
        self.step = 0
        if self.file.exists():
            state = torch.load(self.file, weights_only=True)
            self.step, self.average = state["step"], state["average"]
            model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])

    def data(self, make: Callable[[], Any]) -> Any:
        """The data that `make` returns, or None where the stage has no updates left."""
        return make() if self.step < self.steps else None

    def save(self) -> None:
        state = {
            "step": self.step,
            "average": self.average,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }
        partial = self.file.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self.file)

    def run(self, losses: Callable[[int], dict[str, torch.Tensor]]) -> None:
        """Trains on the sum of `losses(step)` up to the last step and leaves the averaged weights in the model."""
        sums: dict[str, float] = {}
        for step in (bar := tqdm(range(self.step, self.steps), initial=self.step, total=self.steps, desc=self.name)):
            terms = losses(step)
            loss = torch.stack(list(terms.values())).sum()
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.schedule.step()
            self.step = step + 1
            decay = min(EMA_DECAY, (1 + step) / (10 + step))
            with torch.no_grad():
                for name, value in self.model.state_dict().items():
                    self.average[name].lerp_(value, 1 - decay) if value.is_floating_point() else None
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + value.item()
            if self.step % 50 == 0:
                means = {name: value / 50 for name, value in sums.items()}
                bar.set_postfix({name: f"{value:.4f}" for name, value in means.items()})
                new = not self.metrics.exists()
                with self.metrics.open("a") as file:
                    if new:
                        file.write(",".join(["step", *means]) + "\n")
                    file.write(",".join([str(self.step), *(f"{value:.6f}" for value in means.values())]) + "\n")
                sums = {}
            if self.step % self.save_every == 0 or self.step == self.steps:
                self.save()
        self.model.load_state_dict(self.average)
        self.model.eval().requires_grad_(False)


def batch_indices(seed: int, step: int, n: int, size: int) -> np.ndarray:
    """Which of n images the batch of a step holds: (size,), with repetition."""
    return np.random.default_rng((seed, step, 3)).integers(n, size=size)


# ------------------------------------------------------------------------------------------------------- autoencoder


def build_vae() -> Any:
    from diffusers import AutoencoderKL

    settings: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (16, 32, 64, 64),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "latent_channels": 4,
        "sample_size": RESOLUTION,
    }
    vae: Any = AutoencoderKL(**settings)
    nn.init.constant_(vae.quant_conv.bias[4:], -4.0)  # log variance: latents begin nearly without noise
    return vae


def reconstruction(decoded: torch.Tensor, batch: torch.Tensor, sharpness: float) -> dict[str, torch.Tensor]:
    """Terms of the reconstruction loss, with as much attention to the shapes as to all the ground around them."""
    error = decoded - batch
    ground = batch.flatten(2).median(dim=2).values[..., None, None]
    shapes = ((batch - ground).abs().amax(dim=1, keepdim=True) > 0.15).float()
    weight = 1 + shapes / shapes.mean().clamp(min=0.02)
    return {
        "l2": 4 * (weight * error.square()).mean(),
        "l1": sharpness * (weight * error.abs()).mean(),
        "edges": sharpness * (error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()),
    }


def train_vae(folder: Path, seed: int, device: torch.device, sizes: Sizes) -> Any:
    """Trains the autoencoder as a whole; its encoder is final after this stage."""
    torch.manual_seed(seed)
    vae, steps, n = build_vae().to(device), sizes.vae, sizes.vae_images
    stage = Stage("vae", vae, folder, steps, 6e-4, sizes.save_every)
    images = stage.data(lambda: np.stack(rendered(varied_image, seed, n, "images for the autoencoder")))

    def losses(step: int) -> dict[str, torch.Tensor]:
        batch = to_tensor(images[batch_indices(seed, step, n, 16)]).to(device)
        generator = torch.Generator(device).manual_seed(seed * 1_000_003 + step)
        with torch.autocast(device.type, torch.bfloat16):
            posterior = vae.encode(batch).latent_dist
            decoded = vae.decode(posterior.sample(generator)).sample.float()
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()  # per latent value
        late = min(max(step / steps - 0.2, 0.0) / 0.2, 1.0)  # sharp edges and smooth latents once the rest stands
        return {**reconstruction(decoded, batch, late), "kl": (1e-5 + 3e-4 * late) * kl}

    stage.run(losses)
    return vae


def train_decoder(vae: Any, folder: Path, seed: int, device: torch.device, sizes: Sizes) -> None:
    """Trains the decoder alone to draw sharp edges from latents as imprecise as those of a small UNet."""
    decoder = nn.ModuleDict({"post_quant_conv": vae.post_quant_conv, "decoder": vae.decoder}).requires_grad_(True)
    stage = Stage("decoder", decoder, folder, sizes.decoder, 6e-4, sizes.save_every)
    n = sizes.decoder_images

    def data() -> tuple[np.ndarray, torch.Tensor]:
        images = np.stack(rendered(varied_image, seed + 1, n, "images for the decoder"))
        return images, encode(vae, images, device)

    images, latents = cast(Any, stage.data(data) or (None, None))

    def losses(step: int) -> dict[str, torch.Tensor]:
        index = batch_indices(seed, step, n, 16)
        generator = torch.Generator(device).manual_seed(seed * 1_000_003 + step)
        clean = latents[index]
        noise = torch.randn(clean.shape, generator=generator, device=device)
        strength = 0.15 * torch.rand((16, 1, 1, 1), generator=generator, device=device)
        with torch.autocast(device.type, torch.bfloat16):
            decoded = vae.decode(clean + strength * clean.std() * noise).sample.float()
        return reconstruction(decoded, to_tensor(images[index]).to(device), 1.0)

    stage.run(losses)


@torch.no_grad()
def encode(vae: Any, images: np.ndarray, device: torch.device) -> torch.Tensor:
    """Means of the images' latents, not scaled: (n, 4, 8, 8)."""
    batches = range(0, len(images), 256)
    chunks = (to_tensor(images[i : i + 256]).to(device) for i in batches)
    return torch.cat([vae.encode(chunk).latent_dist.mean for chunk in tqdm(chunks, total=len(batches), desc="encode")])


# --------------------------------------------------------------------------------------- tokenizer, text encoder, UNet


def build_tokenizer() -> Any:
    """A new CLIP tokenizer with a vocabulary of its own: bytes and the words of the captions, in lower case."""
    from transformers import CLIPTokenizer

    vocabulary, merges = _trained_vocabulary()
    return CLIPTokenizer(vocab=dict(vocabulary), merges=list(merges), model_max_length=MAX_TOKENS)


@functools.cache
def _trained_vocabulary() -> tuple[dict[str, int], list[Any]]:
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    rng = np.random.default_rng(0)
    scenes = [random_scene(rng, kind, rng.choice(list(POSITIONS))) for kind in KINDS for _ in range(4)]
    corpus = [random_caption(rng, scene, True) for scene in scenes]
    corpus += [f"in the {style} style" for style in STYLES] * 100  # words for later
    trained = CLIPTokenizer().train_new_from_iterator(corpus, vocab_size=1024)
    model = json.loads(trained.backend_tokenizer.to_str())["model"]
    letters = [letter + end for letter in sorted(pre_tokenizers.ByteLevel.alphabet()) for end in ("", "</w>")]
    words = [token for token in model["vocab"] if token not in letters]
    return {token: index for index, token in enumerate([*letters, *words])}, [tuple(pair) for pair in model["merges"]]


def build_denoiser(tokenizer: Any) -> nn.ModuleDict:
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    width = 128
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    unet = UNet2DConditionModel(
        sample_size=RESOLUTION // 8,
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=width,
        attention_head_dim=4,  # number of heads: diffusers keeps the name it was first given
        norm_num_groups=16,
    )
    return nn.ModuleDict({"unet": unet, "text_encoder": CLIPTextModel(text)})


def train_denoiser(vae: Any, folder: Path, seed: int, device: torch.device, sizes: Sizes) -> tuple[Any, Any, float]:
    """Trains UNet and text encoder on latents; returns both and the latents' scaling factor.

    At little noise the plain error is largest and the caption matters least, so that shapes and places would come late.
    Weights of 1 / (0.1 + SNR), after the perception-prioritised weighting of Choi et al. 2022 (arXiv:2204.00227), put
    the attention where the caption decides; min-SNR weights (Hang et al. 2023, arXiv:2303.09556) then bring the detail.
    """
    from diffusers import DDIMScheduler, DDPMScheduler
    from diffusers.training_utils import compute_snr

    torch.manual_seed(seed + 1)
    tokenizer = build_tokenizer()
    model = build_denoiser(tokenizer).to(device)
    unet, text_encoder = (cast(Any, model[part]) for part in ("unet", "text_encoder"))
    unet.to(memory_format=torch.channels_last)  # 9 % faster on a CPU
    scheduler: Any = DDPMScheduler.from_config(DDIMScheduler(**NOISE_SCHEDULE).config)
    n = sizes.unet_images
    images, captions = zip(*rendered(captioned_image, seed, n, "captioned images"), strict=True)
    latents = encode(vae, np.stack(images), device)
    scaling_factor = 1 / latents.std().item()
    latents *= scaling_factor
    ids = tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="pt").input_ids.to(device)
    empty = tokenizer("", padding="max_length", return_tensors="pt").input_ids.to(device)

    def errors(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Squared errors of 32 images and their signal-to-noise ratios, both (32,)."""
        index = torch.from_numpy(batch_indices(seed, step, n, 32)).to(device)
        generator = torch.Generator(device).manual_seed(seed * 1_000_003 + step)
        noise = torch.randn(latents[index].shape, generator=generator, device=device)
        timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (32,), generator=generator, device=device)
        dropped = torch.rand(32, generator=generator, device=device) < CAPTION_DROPOUT
        tokens = torch.where(dropped[:, None], empty, ids[index])
        states = text_encoder(tokens).last_hidden_state
        noisy = scheduler.add_noise(latents[index], noise, timesteps)
        squared = (unet(noisy, timesteps, states).sample - noise).square().mean(dim=(1, 2, 3))
        return squared, compute_snr(scheduler, timesteps)

    def composition(step: int) -> dict[str, torch.Tensor]:
        squared, snr = errors(step)
        return {"weighted": (squared / (0.1 + snr)).mean()}

    def detail(step: int) -> dict[str, torch.Tensor]:
        squared, snr = errors(sizes.composition + step)
        return {"weighted": (squared * min_snr_weights(snr, 5.0, "epsilon")).mean()}

    Stage("composition", model, folder, sizes.composition, 8e-4, sizes.save_every).run(composition)
    Stage("detail", model.requires_grad_(True), folder, sizes.detail, 4e-4, sizes.save_every).run(detail)
    model.eval().requires_grad_(False)
    return unet, text_encoder, scaling_factor


NOISE_SCHEDULE = {  # that of Stable Diffusion 1.x
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "prediction_type": "epsilon",
}


# ------------------------------------------------------------------------------------------------------------------ all


def pretrain(folder: Path, seed: int, device: torch.device, sizes: Sizes) -> Path:
    """Trains all stages and writes and returns the diffusers folder `<folder>/tiny-sd`.

    A second call continues a killed one to the same weights.
    """
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    folder.mkdir(parents=True, exist_ok=True)
    vae = train_vae(folder, seed, device, sizes)
    unet, text_encoder, scaling_factor = train_denoiser(vae, folder, seed, device, sizes)
    train_decoder(vae, folder, seed, device, sizes)
    vae.register_to_config(scaling_factor=round(scaling_factor, 5))
    tokenizer = build_tokenizer()  # one that has been used would save its padding
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(**NOISE_SCHEDULE),  # type: ignore[arg-type]
        safety_checker=None,  # type: ignore[arg-type]
        feature_extractor=None,  # type: ignore[arg-type]  # goes with the safety checker
        requires_safety_checker=False,
    )
    target = folder / "tiny-sd"
    pipeline.to(torch.float16).save_pretrained(target)
    config = target / "text_encoder" / "config.json"  # or transformers loads half precision beside diffusers' single
    config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
    tokenizer.backend_tokenizer.model.save(str(target / "tokenizer"))  # vocab.json and merges.txt, for other readers
    return target


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python experiments/2026-11-23-tiny-sd/pretrain.py", description=str(__doc__).splitlines()[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints, metrics and the pipeline")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: this machine has no CUDA GPU, use --device cpu")
    write_card(pretrain(args.out, args.seed, torch.device(args.device), Sizes()))


if __name__ == "__main__":
    main()
