"""The judge, the preference rewards that learned from it, and the recipe of both."""

import pytest
import torch
from bench.rewards.emoji_gold import EmojiGold
from bench.rewards.emoji_preference import EmojiPreference, EmojiPreferenceConfig

from bench.errors import BenchError
from bench.models.emoji import concepts
from bench.recipe import distil
from bench.recipe.preference import fit_head, fit_judge

NAMES = ["tiger", "octopus", "strawberry", "penguin", "carrot", "bee", "koala", "mushroom"]


@pytest.fixture(scope="module")
def drawn() -> tuple[torch.Tensor, list[str]]:
    """Four pictures of each of `NAMES`, by the student of four steps, with their prompts."""
    prompts = [name for name in NAMES for _ in range(4)]
    names = [(prompt, i % 4) for i, prompt in enumerate(prompts)]
    return distil.draw(*distil.load("emoji_flow_turbo", distil.STUDENTS["emoji_flow"].sampler), names, seed=3), prompts


@pytest.fixture(scope="module")
def gold() -> EmojiGold:
    return EmojiGold(EmojiGold.Config())


def test_the_judge_is_fishers_discriminant() -> None:
    """Its distances differ from Mahalanobis' by what all concepts share, and fresh pictures have one on average."""
    generator = torch.Generator().manual_seed(0)
    mix, centres = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((6, 6), (4, 6)))

    def pictures(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        concept = torch.arange(count) % 4
        return centres[concept] + torch.randn(count, 6, generator=generator, dtype=torch.float64) @ mix, concept

    (known, concept), (fresh, of) = pictures(400), pictures(100)
    judge = fit_judge(known, concept, fresh, of)
    ours = torch.cdist(fresh @ judge["directions"], judge["means"]).square()
    assert judge["means"].shape == (4, 3)
    assert ours.gather(1, of[:, None]).mean() == pytest.approx(1)
    means = torch.stack([known[concept == i].mean(0) for i in range(4)])
    within = torch.cov((known - means[concept]).T, correction=0)
    within += 0.1 * within.diagonal().mean() * torch.eye(6)
    rest = fresh[:, None] - means
    mahalanobis = (rest @ torch.linalg.inv(within) * rest).sum(2)
    ours, mahalanobis = ours - ours[:, :1], mahalanobis - mahalanobis[:, :1]
    torch.testing.assert_close(ours, mahalanobis * (ours[0, 1] / mahalanobis[0, 1]), rtol=1e-6, atol=1e-6)


def test_a_head_learns_the_odds_of_its_pairs() -> None:
    generator = torch.Generator().manual_seed(1)
    pictures = torch.randn(900, 2, 6, generator=generator) * torch.tensor([9.0, 1, 1, 1, 1, 0.1]) + 5
    odds = 20 * (pictures[:, 0] - pictures[:, 1])[:, -1]  # what varies least counts alone
    chosen = torch.bernoulli(odds.sigmoid(), generator=generator)
    head = fit_head(pictures[:800, 0], pictures[:800, 1], chosen[:800])
    learned = (head(pictures[800:, 0]) - head(pictures[800:, 1])).squeeze(1)
    assert torch.corrcoef(torch.stack([learned, odds[800:]]))[0, 1] > 0.95
    swapped = fit_head(pictures[:800, 1], pictures[:800, 0], 1 - chosen[:800])
    torch.testing.assert_close(swapped.weight, head.weight, rtol=1e-3, atol=1e-5)


def test_the_judge_prefers_what_the_prompt_says(drawn: tuple[torch.Tensor, list[str]], gold: EmojiGold) -> None:
    images, prompts = drawn
    right, wrong = gold(images, prompts), gold(images, prompts[4:] + prompts[:4])
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
    assert (right > wrong).double().mean() > 0.9
    assert gold(noise, prompts).mean() < right.mean() - 1
    assert gold(0.4 * images, prompts).mean() < right.mean() - 0.3  # dark pictures are not how the art is


def test_the_judge_reads_the_longest_name(gold: EmojiGold) -> None:
    known = [concept["name"] for concept in concepts()]
    assert [known[gold.concept(text)] for text in ("green apple", "an apple", "noto fox", "carrot, vegetable")] == [
        "green apple", "apple", "fox", "carrot",
    ]  # fmt: skip
    with pytest.raises(BenchError, match=r"'a house' names none"):
        gold.concept("a house")


@pytest.mark.parametrize("pairs", [200, 2000])
def test_a_preference_learned_what_the_judge_likes(pairs: int, drawn: tuple[torch.Tensor, list[str]]) -> None:
    images, prompts = drawn
    reward = EmojiPreference(EmojiPreferenceConfig(pairs=pairs))
    scores = reward(images, prompts)
    assert (scores > reward(images, prompts[4:] + prompts[:4])).double().mean() > 0.75  # what the prompt says
    assert (scores > reward(0.4 * images, prompts)).double().mean() > 0.9  # light pictures
