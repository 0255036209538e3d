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

Guidance by 246 samples each: at 2, 2.5 and 3 the right concept is among the judge's first ten for 87, 90 and 92 %, the
asked style is seen in 69, 77 and 76 %, and fluent has a share of 27, 20 and 17 %.

## Does it copy?

24 samples, each above its nearest neighbour (same features) among {known} augmented training images. The prior saw
three pictures of each concept, so its best samples resemble those pictures; what varies beyond them is background,
size, position and mirroring. Look at the pairs: a sample shares its neighbour's drawing where concept and style
agree, on another background.

![Samples above their nearest training images](neighbours.png)

## Files

`weights/` is a `StableDiffusionPipeline` (float16; load with `torch_dtype=torch.float32` on a CPU). `weights/clip/` is
a `CLIPModel` and `weights/style/` a `ResNetForImageClassification`; both take `[B, 3, 32, 32]` scaled to [-1, 1].
`weights/concepts.json` lists what can be drawn.

`turbo/` has [their students of 4 steps](turbo/README.md).

`flow/` is the transformer of `emoji_flow` (14.7 MB), a `StableDiffusion3Pipeline` without T5 whose autoencoder,
tokenizer and text encoder are those of `weights/`; `bench.models.emoji.shared` gives them to `from_pretrained`:

    from diffusers import StableDiffusion3Pipeline
    from bench.models.emoji import FLOW, shared
    pipe = StableDiffusion3Pipeline.from_pretrained(FLOW, **shared(FLOW))
    pipe("tiger", guidance_scale=3, num_inference_steps=20, max_sequence_length=0).images[0].show()

The recipe is `python -m bench.recipe.train`. The shipped weights are of several trainings on CPUs that other jobs
shared: the autoencoder 45,000 steps of 16 (100 minutes on one thread); the text encoder kept from an earlier prior,
trained with its UNet for 5,200 steps of 32; from that prior's UNet on, 6,000 steps of 32 on the new autoencoder's
latents (two hours on one busy thread, `--vae`, `--text-encoder`, `--unet`); the transformer of `emoji_flow` 5,000
steps of 64, as long; dual encoder 900 and style classifier 800 of 96. All rates fell to zero over the last third, but
the losses were still falling: more steps, or a GPU (`--device cuda`), give sharper priors.

## `emoji_flow`

![Samples of `emoji_flow`, the same rows](samples-flow.png)

The same prompts by the flow prior: 20 steps of Euler, guidance 3. It draws the same things, less firmly: wings and
arms are doubled or lost more often. Measured the same way, {samples} samples: the judge's first, first five and first
ten {flow_judge_samples}; styles of prompts without a style word {flow_style_values}; asked style obeyed
{flow_style_accuracy_prompted:.1%}; Fréchet distance to real images {flow_frechet_samples:.1f};
{flow_seconds_per_image:.3f} s an image. The pairs of `neighbours-flow.png` are its samples above their nearest
training images.

## Limits

- Small faces and thin limbs still smear (hoofed animals, insects), and the number of legs or arms is not kept.
- A style word steers only in part (see the table; chance is a third), and fluent is drawn least when no style is asked.
- Prompts that combine concepts, colours or counts were never trained. All figures about prompts use trained names.
- The real images of the tables share their art with the training images; there is no other art to hold out.

The art: Noto Emoji (Apache-2.0), Twemoji (CC BY 4.0), Fluent Emoji 3D (MIT). See NOTICE at the repository's root.
"""


def render(figures: dict, of_flow: dict, weights: Path, rows: tuple[str, ...]) -> str:
    """The card as Markdown, of both priors' figures; ``rows`` are the prompts of ``samples.png``."""
    shares = {name: value for name, value in figures.items() if isinstance(value, dict)}
    columns = {name: " | ".join(f"{share:.1%}" for share in value.values()) for name, value in shares.items()}
    count = figures["concepts"]
    return TEMPLATE.format(
        **figures | columns,
        each=figures["samples"] // count,
        megabytes=sum(file.stat().st_size for file in weights.rglob("*") if file.is_file()) / 1e6,
        rows=", ".join(rows),
        flow_judge_samples=", ".join(f"{share:.1%}" for share in of_flow["judge_samples"].values()),
        flow_style_values=", ".join(f"{name} {share:.1%}" for name, share in of_flow["styles"].items()),
        **{f"flow_{name}": value for name, value in of_flow.items() if isinstance(value, float)},
        style_names=", ".join(figures["styles"]),
        style_values=", ".join(f"{share:.1%}" for share in figures["styles"].values()),
        error=0.5 / figures["samples"] ** 0.5,
        chance1=1 / count,
        chance5=5 / count,
        chance10=10 / count,
    )
