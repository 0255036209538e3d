"""The model card of the embedded prior, from the figures that ``evaluate`` measured."""

from pathlib import Path

TEMPLATE = """# Model card: `emoji`

<!-- written by `python -m bench.recipe.evaluate --write`: edit the template in card.py, not this page -->

A small latent text-to-image pipeline in diffusers' on-disk format, for testing reward finetuning without a GPU:
{concepts} concepts (animals, fruit, vegetables) in three drawing styles, 32 pixels a side, 4×8×8 latents. It draws
emoji and nothing else; it is a test bench, not a picture maker. Prompts are plain names ("tiger"), with or without a
style word ("noto tiger"); a prompt without one has answers in all three styles, on many backgrounds, sizes and
positions.

![Samples; a row each for: {rows}](samples.png)

Figures: {samples} samples, {each} of each concept's plain name, DDIM with 20 steps (η = 0), guidance {guidance:g}.

| measured | value |
|---|---|
| weights, all networks together (float16) | {megabytes:.1f} MB |
| autoencoder, fresh augmentations: mean absolute error (pixels in [0, 1]) | {reconstruction_l1:.4f} |
| autoencoder, fresh augmentations: PSNR | {reconstruction_psnr:.1f} dB |
| styles of prompts without a style word: {style_names} | {style_values} |
| style classifier, accuracy on real images (fresh augmentations) | {style_accuracy_real:.1%} |
| style classifier, accuracy on real images through the autoencoder | {style_accuracy_decoded:.1%} |
| samples of "<style> <name>" in the asked style, says the classifier | {style_accuracy_prompted:.1%} |
| Fréchet distance, samples to real images (n = {frechet_n} each) | {frechet_samples:.1f} |
| Fréchet distance, real images through the autoencoder to real images | {frechet_decoded:.1f} |
| Fréchet distance, a real half to the other half | {frechet_real:.1f} |
| sampling time per image, batch of 32, CPU threads: {threads}, other jobs running | {seconds_per_image:.3f} s |

The share of images whose right concept is among the first *k* of {concepts} (chance: {chance1:.1%}, {chance5:.1%},
{chance10:.1%}; standard error for samples at most {error:.1%}). The judge is a linear discriminant on ImageNet features
(EfficientNet-Lite0) of real art, half of it passed through the autoencoder, and no reward uses it; `emoji_clip` is the
reward network itself, shown for comparison.
"Real" images are augmentations that neither was fitted on, but of the same art.

| images | judge, 1 | judge, 5 | judge, 10 | `emoji_clip`, 1 | `emoji_clip`, 5 | `emoji_clip`, 10 |
|---|---|---|---|---|---|---|
| samples | {judge_samples} | {clip_samples} |
| real, through the autoencoder | {judge_decoded} | – | – | – |
| real | {judge_real} | {clip_real} |

Fréchet distances are in the same feature space; at this n they are biased upward, so only their comparison means
something.

Guidance was chosen by a sweep at four fifths of the training (123 samples each): guidance 2, 3.5, 5 and 7 put the right
concept among the judge's first ten for 56, 63, 64 and 61 %, while the share of fluent fell from 33 to 19, 15 and 14 %.

## Does it copy?

24 samples, each above its nearest neighbour (same features) among {known} augmented training images. The prior saw
three pictures of each concept, so its best samples resemble those pictures; what varies beyond them is background,
size, position and mirroring. To the eye none of the 24 is a copy, which says more about softness than about invention:
the nearest neighbour of a soft sample is often another concept.

![Samples above their nearest training images](neighbours.png)

## Files

`weights/` is a `StableDiffusionPipeline` (float16; load with `torch_dtype=torch.float32` on a CPU). `weights/clip/` is
a `CLIPModel` and `weights/style/` a `ResNetForImageClassification`; both take `[B, 3, 32, 32]` scaled to [-1, 1].
`weights/concepts.json` lists what can be drawn.

The recipe is `python -m bench.recipe.train`. Its autoencoder is newer than the shipped one: `next/vae` (45,000
steps of 16, 100 minutes on one shared CPU thread with `--bfloat16`) reaches 34.2 dB on fresh augmentations. It waits
for a UNet trained on its latents; nothing loads it yet.

The shipped weights took about two hours on two CPU cores that other jobs shared: autoencoder 2,600 steps of 16 (the
first 700 of 32), its decoder 520 more (a stage since removed), UNet and text encoder 5,200 of 32 (the first 300 of 64),
dual encoder 900 and style classifier 800 of 96. All rates fell to zero over the last third, but the losses of
autoencoder and UNet were still falling: more steps, or a GPU (`--device cuda`), give a sharper prior.

## Limits

- Samples are soft. Simple shapes (carrot, strawberry, penguin, avocado) are clear; faces and thin limbs (tiger,
  butterfly, octopus, hoofed animals) smear, and close kin run together: a tiger may pass for a fox.
- A style word steers only in part (see the table; chance is a third), and fluent is drawn least when no style is asked.
- Prompts that combine concepts, colours or counts were never trained. All figures about prompts use trained names.
- The real images of the tables share their art with the training images; there is no other art to hold out.

The art: Noto Emoji (Apache-2.0), Twemoji (CC BY 4.0), Fluent Emoji 3D (MIT). See NOTICE at the repository's root.
"""


def render(figures: dict, weights: Path, rows: tuple[str, ...]) -> str:
    """The card as Markdown; ``rows`` are the prompts of ``samples.png``."""
    shares = {name: value for name, value in figures.items() if isinstance(value, dict)}
    columns = {name: " | ".join(f"{share:.1%}" for share in value.values()) for name, value in shares.items()}
    count = figures["concepts"]
    return TEMPLATE.format(
        **figures | columns,
        each=figures["samples"] // count,
        megabytes=sum(file.stat().st_size for file in weights.rglob("*") if file.is_file()) / 1e6,
        rows=", ".join(rows),
        style_names=", ".join(figures["styles"]),
        style_values=", ".join(f"{share:.1%}" for share in figures["styles"].values()),
        error=0.5 / figures["samples"] ** 0.5,
        chance1=1 / count,
        chance5=5 / count,
        chance10=10 / count,
    )
