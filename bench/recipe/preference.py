"""A preference reward and the judge behind it: ``python -m bench.recipe.preference``.

The judge (`emoji_gold`) is fitted to real art alone. It labels pairs of pictures of both embedded priors, and linear
heads (`emoji_preference`) learn from 200 and from 2,000 of the labels, as reward models learn from what people
prefer. Training on such a reward can be compared with what the judge says, which no training sees. The art is fetched
once; the pictures of the pairs are kept in the work folder, and a killed run continues.
"""

from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from scipy.linalg import eigh
from torch import nn

from bench.cli.options import with_home
from bench.evaluation.features import EfficientNetLite0
from bench.evaluation.scores import load_reward
from bench.models.emoji import GUIDANCE, PREFERENCE, WEIGHTS, concepts
from bench.models.encoders import Clip
from bench.recipe.art import load
from bench.recipe.evaluate import discriminant, open_pipeline, real_images, reconstruct, sample

PRIORS = ("emoji_flow", "emoji")
PAIRS = 1200  # of each prior; of both together the last 400 are kept apart, to measure with
APART = 400
LABELS = (200, 2000)
CERTAINTY = 2.0  # a pair's log-odds per unit of the judge's score: people are not sure either
PENALTY = 3.0  # on the squared weights of a head, for standardised inputs

CARD = """# Model card: `emoji_preference` and `emoji_gold`

<!-- written by `python -m bench.recipe.preference`: edit the template there, not this page -->

A reward that looks like human preference and can be exploited, and the judge that shows when it is.

- `emoji_gold`: minus the squared distance of a picture to the real art of its prompt's concept, in a linear
  discriminant of the {concepts} concepts on ImageNet features (EfficientNet-Lite0), in units of what fresh
  augmentations of real art have. Fitted to {known:,} augmentations, half of them through the autoencoder; it finds the
  concept of {accuracy:.1%} of fresh ones. Fresh art scores −1 ± {fresh_spread:.2f}, pictures of the priors
  {prior} ± {prior_spread:.2f}, the same pictures with another concept's name {wrong} ± {wrong_spread:.2f}.
- `emoji_preference`: a linear head on what `emoji_clip`'s encoder sees, fitted by maximum likelihood (Bradley
  and Terry) to pairs of pictures of one prompt, {each:,} pairs from each of `emoji` and `emoji_flow`. The
  judge's choice in a pair is drawn with log-odds of {certainty:g} times the difference of its scores; so the better
  one by score is chosen in {consistent:.0%} of the pairs.

| `pairs` | agrees with the better of a pair it has not seen | correlation with `emoji_gold` within a prompt |
|---|---|---|
{table}

Over {apart} pairs that no head has seen; the standard error of an agreement is {error:.1%}.

## Limits

- The judge is no person. It sees what ImageNet features see of a picture, and no two concepts in one.
- Backgrounds and styles count: a linear model of a few colour statistics alone agrees with the judge nearly as often.
- It shares its features with `kid_prior`, `diversity`, `vendi` and `coverage`; no shipped reward uses them.

The art: Noto Emoji (Apache-2.0), Twemoji (CC BY 4.0), Fluent Emoji 3D (MIT). See NOTICE at the repository's root.
"""


def fit_judge(known: torch.Tensor, concept: torch.Tensor, fresh: torch.Tensor, of: torch.Tensor) -> dict:
    """The discriminant's `directions` [d, C − 1] and its `means` [C, C − 1], of features of real images.

    known: features [N, d] of images of the concepts `concept` [N]. fresh, of: others, whose mean squared distance to
    the mean of their concept is one.
    """
    centres, within = discriminant(known, concept)
    between = centres - centres.mean(0)
    count, d = len(centres) - 1, len(within)
    _, found = eigh((between.T @ between).numpy(), within.numpy(), subset_by_index=[d - count, d - 1])
    directions = torch.from_numpy(found)
    distance = (fresh.double() @ directions - (centres @ directions)[of]).square().sum(1).mean()
    directions = directions / distance.sqrt()
    return {"directions": directions, "means": centres @ directions}


def make_judge(art_folder: Path, file: Path) -> dict[str, float]:
    """Fit the judge to real art, write it, and return what the card says of it."""
    _, art = load(art_folder)
    features, vae = EfficientNetLite0(), AutoencoderKL.from_pretrained(WEIGHTS / "vae", torch_dtype=torch.float32)

    def both(each: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Features of augmentations and of these through the autoencoder, whose softness is no fault of a sample."""
        images, concept, _ = real_images(art, each, seed)
        return torch.cat([features(images), features(reconstruct(vae, images))]), concept.repeat(2)

    (known, concept), (fresh, of) = both(6, 11), both(2, 12)
    judge = {name: tensor.half() for name, tensor in fit_judge(known, concept, fresh, of).items()}
    save_file({name: tensor.contiguous() for name, tensor in judge.items()}, file)
    distances = torch.cdist(fresh @ judge["directions"].float(), judge["means"].float()).square()
    own = distances.gather(1, of[:, None]).squeeze(1)
    return {
        "known": len(known),
        "accuracy": (distances.argmin(1) == of).double().mean().item(),
        "fresh_spread": own.std().item(),
    }


def make_pairs(out: Path, prior: str, seed: int) -> tuple[torch.Tensor, list[str]]:
    """Pictures [PAIRS, 2, 3, 32, 32] in [0, 1] of a prior, and the prompt of each pair; read if they were drawn."""
    file, names = out / f"pairs-{prior}.safetensors", [concept["name"] for concept in concepts()]
    if not file.exists():
        label = torch.randint(len(names), (PAIRS,), generator=torch.Generator().manual_seed(100 + seed))
        prompts = [names[i] for i in label for _ in range(2)]
        pipeline = open_pipeline(WEIGHTS, flow=prior == "emoji_flow")
        images = sample(pipeline, prompts, seed=200 + seed, guidance=GUIDANCE)
        save_file({"images": (images * 255).round().byte(), "label": label}, file)
    drawn = load_file(file)
    return drawn["images"].float().div(255).unflatten(0, (-1, 2)), [names[i] for i in drawn["label"]]


def fit_head(first: torch.Tensor, second: torch.Tensor, chosen: torch.Tensor) -> nn.Linear:
    """A layer whose score of `first` [N, d] less that of `second` is the log-odds of `chosen` [N], 1 for the first.

    Logistic regression on standardised differences, with an L2 penalty.
    """
    deviation = torch.cat([first, second]).std(0) + 1e-4
    head = nn.utils.skip_init(nn.Linear, first.shape[1], 1)
    nn.init.zeros_(head.bias)  # which preferences say nothing of
    weight = nn.init.zeros_(head.weight)
    optimizer = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")
    differences = (first - second) / deviation

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        odds = (differences @ weight.T).squeeze(1)
        value = F.binary_cross_entropy_with_logits(odds, chosen) + PENALTY / 2 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    head.requires_grad_(False)
    head.weight /= deviation
    return head


def minus(value: torch.Tensor) -> str:
    """Two digits, with the sign that numbers have in prose."""
    return f"{value:.2f}".replace("-", "−")


def main(
    out: Annotated[Path, typer.Option(help="work folder: the art and the pairs")] = Path("runs/emoji"),
    seed: int = 0,
) -> None:
    """Fit the judge and the preference rewards that ship, and write their model card."""
    PREFERENCE.mkdir(exist_ok=True)
    figures = make_judge(out, PREFERENCE / "judge.safetensors")
    drawn = [make_pairs(out, prior, seed + k) for k, prior in enumerate(PRIORS)]
    images, prompts = torch.cat([images for images, _ in drawn]), [prompt for _, own in drawn for prompt in own]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    images, prompts = images[order], [prompts[i] for i in order]
    gold, clip = load_reward("emoji_gold"), Clip(WEIGHTS / "clip")
    scores = torch.stack([gold(side, prompts) for side in images.unbind(1)], 1)
    with torch.no_grad():
        inputs = torch.stack([clip.states(side, prompts) for side in images.unbind(1)], 1)
    odds = CERTAINTY * (scores[:, 0] - scores[:, 1])
    chosen = torch.bernoulli(odds.sigmoid(), generator=torch.Generator().manual_seed(seed))
    better, apart, table = (odds > 0).float(), slice(len(images) - APART, None), []
    for count in LABELS:
        head = fit_head(inputs[:count, 0], inputs[:count, 1], chosen[:count])
        save_file(head.state_dict(), PREFERENCE / f"{count}.safetensors")
        learned = head(inputs[apart]).squeeze(2)
        agrees = ((learned[:, 0] > learned[:, 1]).float() == better[apart]).double().mean()
        both = torch.stack([learned[:, 0] - learned[:, 1], scores[apart, 0] - scores[apart, 1]])
        table.append(f"| {count:,} | {agrees:.1%} | {torch.corrcoef(both)[0, 1]:.2f} |")
    wrong = gold(images[:, 0], prompts[1:] + prompts[:1])
    text = CARD.format(
        concepts=len(concepts()),
        prior=minus(scores.mean()),
        prior_spread=scores.std(),
        wrong=minus(wrong.mean()),
        wrong_spread=wrong.std(),
        each=PAIRS,
        certainty=CERTAINTY,
        consistent=(chosen == better).double().mean(),
        table="\n".join(table),
        apart=APART,
        error=0.5 / APART**0.5,
        **figures,
    )
    (PREFERENCE / "README.md").write_text(text, encoding="utf8")
    typer.echo(text)


if __name__ == "__main__":
    typer.run(with_home(main))
