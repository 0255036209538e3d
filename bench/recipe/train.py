"""Recipe of the embedded prior: ``python -m bench.recipe.train``.

Stages: ``vae`` (autoencoder), ``bank`` (augmented images and their latents, cached), ``clip`` and ``style`` (reward
networks), ``unet`` (with its text encoder), ``flow`` (the transformer of ``emoji_flow``, on the finished text encoder),
``export`` and ``export-flow``. A killed run continues from its last checkpoint. ``--vae FOLDER`` takes a finished
autoencoder instead of training one.

On a busy CPU set ``OMP_WAIT_POLICY=passive``: waiting threads otherwise spin, and a step takes up to ten times as long.
Where a CPU has AMX, ``--bfloat16`` makes a step of the autoencoder 1.8 times as fast; it slows CPUs without.
"""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from bench.cli.options import with_home
from bench.models.emoji import FLOW, STYLES, WEIGHTS
from bench.recipe.art import augment, caption, load
from bench.recipe.loop import Recipe, fit, restore
from bench.recipe.networks import (
    MAX_TOKENS,
    autoencoder,
    dual_encoder,
    export,
    export_flow,
    noise_schedule,
    style_classifier,
    text_encoder,
    tokenize,
    train_tokenizer,
    transformer,
    unet,
)

VAE_BATCH = 16
LATENT_NOISE = 0.1  # most noise that the decoder learns from, in deviations of the latents
VARIANTS = 64  # augmented images of each picture in the bank
CAPTIONS = 96  # captions kept for each picture
EMPTY_PROMPT = 0.1  # share of training captions dropped, for classifier-free guidance


def train_vae(recipe: Recipe, art: torch.Tensor) -> None:
    """Autoencoder, with a light pull to a normal latent and a decoder that expects slightly wrong latents."""
    vae = autoencoder().to(memory_format=torch.channels_last)  # a tenth faster on a CPU
    hooks = [
        norm.register_forward_pre_hook(_to_float)  # bfloat16 group normalisation is slow on a CPU, backwards above all
        for norm in vae.modules()
        if isinstance(norm, nn.GroupNorm)
    ]
    flat = art.flatten(0, 1)

    def loss(generator: torch.Generator) -> torch.Tensor:
        chosen = torch.randint(len(flat), (VAE_BATCH,), generator=generator)
        images = 2 * augment(flat[chosen], generator).to(recipe.device) - 1
        posterior = vae.encode(images).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        # Posterior noise alone falls to a hundredth of the latents' deviation, and a UNet's samples are not that exact.
        # In units of the latents' own deviation, this noise cannot be outgrown by larger latents.
        level = LATENT_NOISE * torch.rand(len(mean), 1, 1, 1, generator=generator).to(recipe.device)
        deviation = (logvar.exp() + (level * mean.std()) ** 2).sqrt()
        noise = torch.randn(mean.shape, generator=generator).to(recipe.device)
        error = vae.decode(mean + deviation * noise).sample.float() - images
        divergence = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        return _picture_loss(error) + 1e-4 * divergence

    fit(recipe, "vae", {"vae": vae}, loss, lr=2e-3, decay=0.6)
    for hook in hooks:
        hook.remove()


def _to_float(_: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    return (inputs[0].float(),)


def _picture_loss(error: torch.Tensor) -> torch.Tensor:
    """Absolute error of pixels and of their differences (edges), and each picture's root mean square (PSNR)."""
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + edges + error.square().mean(dim=(1, 2, 3)).sqrt().mean()


def make_bank(recipe: Recipe, art: torch.Tensor) -> dict[str, torch.Tensor]:
    """Augmented images, their decoded reconstructions (both uint8) and latents (scaled to unit deviation), cached.

    ``images`` and ``decoded`` are ``[picture, VARIANTS, 3, 32, 32]``, ``latents`` ``[picture, VARIANTS, 4, 8, 8]``.
    """
    file = recipe.out / "bank.safetensors"
    if not file.exists():
        vae = finished_vae(recipe)
        generator = torch.Generator().manual_seed(recipe.seed + 1)
        rows: dict[str, list[torch.Tensor]] = {"images": [], "decoded": [], "latents": []}
        for picture in tqdm(art.flatten(0, 1), desc="bank"):
            images = augment(picture.expand(VARIANTS, -1, -1, -1), generator)
            with torch.no_grad():
                latents = vae.encode(2 * images.to(recipe.device) - 1).latent_dist.mean
                decoded = vae.decode(latents).sample
            rows["images"].append((images * 255).round().byte())
            rows["decoded"].append((decoded * 127.5 + 127.5).round().clamp(0, 255).byte().cpu())
            rows["latents"].append(latents.cpu())
        bank = {name: torch.stack(values).contiguous() for name, values in rows.items()}
        bank["scale"] = 1 / bank["latents"].std()
        bank["latents"] = bank["latents"] * bank["scale"]
        save_file(bank, file.with_suffix(".partial"))
        os.replace(file.with_suffix(".partial"), file)
    return load_file(file)


def caption_table(recipe: Recipe, concepts: list, tokenizer: CLIPTokenizer, category_only: float) -> torch.Tensor:
    """Token ids ``[concept, style, CAPTIONS, MAX_TOKENS]`` of random captions."""
    rng = np.random.default_rng(recipe.seed + 2)
    texts = [caption(c, s, rng, category_only) for c in concepts for s in STYLES for _ in range(CAPTIONS)]
    return tokenize(tokenizer, texts).view(len(concepts), len(STYLES), CAPTIONS, MAX_TOKENS)


def degrade(bank: dict, picture: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Bank images of the given pictures in [-1, 1], as a reward network meets them: half of them decoded from
    latents, a third noisy, a third blurred."""
    variant = torch.randint(VARIANTS, picture.shape, generator=generator)
    source, noisy, blurred = torch.rand(3, len(picture), 1, 1, 1, generator=generator)
    images = torch.where(source < 0.5, bank["images"][picture, variant], bank["decoded"][picture, variant])
    images = images.float() / 127.5 - 1
    smooth = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    images = torch.where(blurred < 1 / 3, smooth, images)
    noise = torch.randn(images.shape, generator=generator) * 0.2 * torch.rand(len(images), 1, 1, 1, generator=generator)
    return (images + torch.where(noisy < 1 / 3, noise, torch.zeros(()))).clamp(-1, 1)


def train_clip(recipe: Recipe, bank: dict, captions: torch.Tensor, tokenizer: CLIPTokenizer) -> None:
    """Dual encoder, contrastively; a batch holds each concept at most once, so every other pair is a true negative."""
    model = dual_encoder(tokenizer)

    def loss(generator: torch.Generator) -> torch.Tensor:
        concept = torch.randperm(len(captions), generator=generator)[:96]
        style = torch.randint(len(STYLES), concept.shape, generator=generator)
        words = captions[concept, style, torch.randint(CAPTIONS, concept.shape, generator=generator)]
        images = degrade(bank, concept * len(STYLES) + style, generator)
        return model(input_ids=words.to(recipe.device), pixel_values=images.to(recipe.device), return_loss=True).loss

    fit(recipe, "clip", {"clip": model}, loss, lr=1e-3)


def train_style(recipe: Recipe, bank: dict) -> None:
    """Style classifier, by cross-entropy with a little smoothing (its log-probabilities are a reward)."""
    model = style_classifier()

    def loss(generator: torch.Generator) -> torch.Tensor:
        picture = torch.randint(len(bank["images"]), (96,), generator=generator)
        logits = model(degrade(bank, picture, generator).to(recipe.device)).logits
        return F.cross_entropy(logits, (picture % len(STYLES)).to(recipe.device), label_smoothing=0.02)

    fit(recipe, "style", {"style": model}, loss, lr=2e-3)


def train_unet(recipe: Recipe, bank: dict, captions: torch.Tensor, tokenizer: CLIPTokenizer) -> None:
    """Noise prediction with min-SNR weights (Hang et al. 2023, gamma 5), jointly with the text encoder if need be."""
    model, text = unet(), finished_text_encoder(recipe, tokenizer) if recipe.text_encoder else text_encoder(tokenizer)
    if recipe.unet:
        model = UNet2DConditionModel.from_pretrained(recipe.unet, torch_dtype=torch.float32)
    model.to(memory_format=torch.channels_last)  # a fifth faster on a CPU
    latents, alphas = bank["latents"].flatten(0, 1), noise_schedule().alphas_cumprod
    empty, flat_captions = tokenize(tokenizer, [""]), captions.flatten(0, 1)
    batch = 32

    def loss(generator: torch.Generator) -> torch.Tensor:
        picture = torch.randint(len(flat_captions), (batch,), generator=generator)
        clean = latents[picture * VARIANTS + torch.randint(VARIANTS, (batch,), generator=generator)]
        words = flat_captions[picture, torch.randint(CAPTIONS, (batch,), generator=generator)]
        words = torch.where(torch.rand(batch, 1, generator=generator) < EMPTY_PROMPT, empty, words)
        # one time in each of `batch` equal bins: distributed like independent times, less noise in the gradient
        t = ((torch.arange(batch) + torch.rand(batch, generator=generator)) * (len(alphas) / batch)).long()
        noise = torch.randn(clean.shape, generator=generator)
        alpha = alphas[t].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        states = text(words.to(recipe.device)).last_hidden_state
        predicted = model(noisy.to(recipe.device), t.to(recipe.device), states).sample
        error = (predicted.float() - noise.to(recipe.device)).square().mean(dim=(1, 2, 3))
        snr = alphas[t] / (1 - alphas[t])
        return (error * (snr.clamp(max=5) / snr).to(recipe.device)).mean()

    networks = {"unet": model} if recipe.text_encoder else {"unet": model, "text_encoder": text}
    fit(recipe, "unet", networks, loss, lr=6e-4)


def train_flow(recipe: Recipe, bank: dict, captions: torch.Tensor, tokenizer: CLIPTokenizer) -> None:
    """Rectified flow: the velocity ``noise - clean`` at ``(1 - s) clean + s noise``, the text encoder held fixed."""
    model, text = transformer(), finished_text_encoder(recipe, tokenizer)
    latents, flat_captions = bank["latents"].flatten(0, 1), captions.flatten(0, 1)
    empty = tokenize(tokenizer, [""])
    batch = 64

    def loss(generator: torch.Generator) -> torch.Tensor:
        picture = torch.randint(len(flat_captions), (batch,), generator=generator)
        clean = latents[picture * VARIANTS + torch.randint(VARIANTS, (batch,), generator=generator)].to(recipe.device)
        words = flat_captions[picture, torch.randint(CAPTIONS, (batch,), generator=generator)]
        words = torch.where(torch.rand(batch, 1, generator=generator) < EMPTY_PROMPT, empty, words)
        # logit-normal times (Esser et al. 2024), one in each of `batch` bins of equal probability
        even = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
        s = torch.special.ndtri(even.clamp(1e-4, 1 - 1e-4)).sigmoid().to(recipe.device)
        noise = torch.randn(clean.shape, generator=generator).to(recipe.device)
        noisy = clean.lerp(noise, s.view(-1, 1, 1, 1))
        with torch.no_grad():
            encoded = text(words.to(recipe.device), output_hidden_states=True)
        # the pipeline takes the last state but one, and both of its encoders are this one
        states, pooled = encoded.hidden_states[-2].repeat(1, 1, 2), encoded.pooler_output.repeat(1, 2)
        velocity = model(noisy, states, pooled, 1000 * s, return_dict=False)[0]
        return (velocity.float() - (noise - clean)).square().mean()

    fit(recipe, "flow", {"transformer": model}, loss, lr=6e-4)


def finished_text_encoder(recipe: Recipe, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """The text encoder of ``recipe.text_encoder``, or the averaged one of stage ``unet``."""
    if recipe.text_encoder:
        return CLIPTextModel.from_pretrained(recipe.text_encoder, torch_dtype=torch.float32).eval().to(recipe.device)
    return restore(recipe, "unet", {"unet": unet(), "text_encoder": text_encoder(tokenizer)})["text_encoder"]


def finished_vae(recipe: Recipe) -> AutoencoderKL:
    """The autoencoder of ``recipe.vae``, or the averaged one of stage ``vae``."""
    if recipe.vae:
        return AutoencoderKL.from_pretrained(recipe.vae, torch_dtype=torch.float32).eval().requires_grad_(False)
    return restore(recipe, "vae", {"vae": autoencoder()})["vae"]


def export_weights(recipe: Recipe, concepts: list, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write the averaged weights of every stage, finished or not, into ``folder``."""
    networks = {"text_encoder": finished_text_encoder(recipe, tokenizer), "vae": finished_vae(recipe)}
    networks |= restore(recipe, "unet", {"unet": unet()})
    networks |= restore(recipe, "clip", {"clip": dual_encoder(tokenizer)})
    networks |= restore(recipe, "style", {"style": style_classifier()})
    scale = load_file(recipe.out / "bank.safetensors")["scale"].item()
    networks["vae"].register_to_config(scaling_factor=round(scale, 6), shift_factor=0.0)  # unit deviation
    export(networks, recipe.out / "tokenizer", [asdict(concept) for concept in concepts], folder)


def main(
    out: Annotated[Path, typer.Option(help="work folder: archives, checkpoints, cached latents")] = Path("runs/emoji"),
    weights: Annotated[Path, typer.Option(help="folder that receives the finished weights")] = WEIGHTS,
    stage: Annotated[str, typer.Option(help="all, vae, bank, clip, style, unet, flow, export or export-flow")] = "all",
    vae: Annotated[Path | None, typer.Option(help="folder of a finished autoencoder, held fixed")] = None,
    text_encoder: Annotated[Path | None, typer.Option(help="folder of a finished text encoder, held fixed")] = None,
    unet: Annotated[Path | None, typer.Option(help="folder of a UNet to begin from")] = None,
    vae_steps: int = 45000,
    clip_steps: int = 900,
    style_steps: int = 800,
    unet_steps: int = 5200,
    flow_steps: int = 10000,
    device: Annotated[str, typer.Option(help="cpu, or cuda (bfloat16 there)")] = "cpu",
    bfloat16: Annotated[bool, typer.Option(help="bfloat16 on a CPU too: faster with AMX, slower without")] = False,
    seed: int = 0,
) -> None:
    """Make the embedded prior: fetch the art, train every network, write the weights."""
    steps = {"vae": vae_steps, "clip": clip_steps, "style": style_steps, "unet": unet_steps, "flow": flow_steps}
    recipe = Recipe(out, device, seed, steps, bfloat16 or device.startswith("cuda"), vae, text_encoder, unet)
    concepts, art = load(out)
    if not (out / "tokenizer" / "vocab.json").exists():
        rng = np.random.default_rng(seed)
        train_tokenizer([caption(c, s, rng) for c in concepts for s in STYLES for _ in range(20)], out / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(out / "tokenizer")
    wanted = ("vae", "bank", "clip", "style", "unet", "flow", "export", "export-flow") if stage == "all" else (stage,)
    with torch.random.fork_rng(devices=[]):  # initial weights are drawn from the global generator
        for name in wanted:
            torch.manual_seed(seed)
            if name == "vae" and not vae:
                train_vae(recipe, art)
            elif name == "bank":
                make_bank(recipe, art)
            elif name == "clip":
                train_clip(recipe, make_bank(recipe, art), caption_table(recipe, concepts, tokenizer, 0.0), tokenizer)
            elif name == "style":
                train_style(recipe, make_bank(recipe, art))
            elif name == "unet":
                train_unet(recipe, make_bank(recipe, art), caption_table(recipe, concepts, tokenizer, 0.05), tokenizer)
            elif name == "flow":
                train_flow(recipe, make_bank(recipe, art), caption_table(recipe, concepts, tokenizer, 0.05), tokenizer)
            elif name == "export-flow":
                export_flow(restore(recipe, "flow", {"transformer": transformer()})["transformer"], FLOW)
            elif name == "export":
                export_weights(recipe, concepts, tokenizer, weights)


if __name__ == "__main__":
    typer.run(with_home(main))
