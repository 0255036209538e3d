"""What is made of a round's rewards, against loops over the samples."""

import pytest
import torch

from bench.training.advantages import (
    Deviation,
    PromptStatistics,
    best_and_worst,
    decoupled_advantages,
    group_baseline,
    group_mean,
    group_normalised,
    group_tilt,
    leave_one_out,
    log_softmax_by_prompt,
)

PROMPTS = ["a", "b", "a", "a", "c", "b"]
REWARDS = torch.tensor([1.0, 5.0, 2.0, 6.0, 7.0, 4.0], dtype=torch.float64)
GROUPS = [[i for i, other in enumerate(PROMPTS) if other == prompt] for prompt in PROMPTS]
OTHERS = [[j for j in group if j != i] for i, group in enumerate(GROUPS)]


@pytest.mark.parametrize("over", ["group", "round"])
@pytest.mark.parametrize("correction", [0, 1])
def test_group_normalised(over, correction):
    deviation = Deviation(over=over, correction=correction, epsilon=0.5)
    advantages = group_normalised(PROMPTS, REWARDS, deviation)
    for i, group in enumerate(GROUPS):
        sample = REWARDS[group] if over == "group" else REWARDS
        std = sample.std(correction=correction) if len(sample) > 1 else 0.0
        assert advantages[i].item() == pytest.approx(float((REWARDS[i] - REWARDS[group].mean()) / (std + 0.5)))


@pytest.mark.parametrize("over", ["group", "round"])
@pytest.mark.parametrize("value", [21.3, 5.55, 0.7])
def test_equal_rewards_have_no_advantage(value, over):
    """Not even that of a mean's rounding error over an ε that is as small."""
    prompts, rewards = ["a"] * 24 + ["b"] * 24, torch.full((48,), value)
    deviation = Deviation(over=over, epsilon=1e-8)
    assert not group_normalised(prompts, rewards, deviation).any()
    assert not PromptStatistics(48, 16).advantages(prompts, rewards).any()
    rewards[0] += 1
    advantages = group_normalised(prompts, rewards, deviation)
    assert advantages[:24].all() and not advantages[24:].any()


def test_group_baseline_and_tilt():
    baseline, tilt = group_baseline(PROMPTS, REWARDS), group_tilt(PROMPTS, REWARDS)
    for i, others in enumerate(OTHERS):
        assert baseline[i].item() == pytest.approx(float(REWARDS[others].mean()) if others else 0.0)
        ratio = float(REWARDS[i].exp() / REWARDS[others].exp().mean()) if others else 1.0
        assert tilt[i].item() == pytest.approx(ratio)


def test_log_softmax_by_prompt():
    values = log_softmax_by_prompt(PROMPTS, REWARDS)
    for i, group in enumerate(GROUPS):
        assert values[i].item() == pytest.approx(REWARDS[group].log_softmax(0)[group.index(i)].item(), abs=1e-12)


def test_best_and_worst():
    best, worst = best_and_worst([*PROMPTS, "c"], torch.cat([REWARDS, torch.tensor([7.0])]))
    assert best.tolist() == [3, 1, 3, 3, 4, 1, 4]
    assert worst.tolist() == [0, 5, 0, 0, 4, 5, 4]


def test_leave_one_out():
    values = torch.stack([REWARDS, REWARDS.flip(0) ** 2], 1)
    for column, advantages in zip(values.T, leave_one_out(values).T, strict=True):
        rest = [[j for j in range(6) if j != i] for i in range(6)]
        centred = torch.stack([column[i] - column[rest[i]].mean() for i in range(6)])
        expected = torch.stack([centred[i] / (centred[rest[i]] ** 2).mean().sqrt() for i in range(6)])
        torch.testing.assert_close(advantages, expected)
    assert leave_one_out(values[:1]).tolist() == [[0.0, 0.0]]


def test_prompt_statistics_are_those_of_the_last_rewards():
    statistics, past = PromptStatistics(buffer=5, minimum=3), {"a": [], "b": [], "c": []}
    for number in range(3):
        rewards = REWARDS + number**2
        for prompt, reward in zip(PROMPTS, rewards.tolist(), strict=True):
            past[prompt].append(reward)
        advantages = statistics.advantages(PROMPTS, rewards)
        for i, prompt in enumerate(PROMPTS):
            sample = torch.tensor(past[prompt][-5:]) if len(past[prompt]) >= 3 else rewards
            expected = float((rewards[i] - sample.mean()) / (sample.std(correction=0) + 1e-6))
            assert advantages[i].item() == pytest.approx(expected, rel=1e-5, abs=1e-6)
        if number == 1:
            resumed = PromptStatistics(buffer=5, minimum=3)
            resumed.load_state_dict(statistics.state_dict())
            statistics = resumed


def test_group_advantages():
    prompts, rewards = ["a", "b", "a", "a", "c"], torch.tensor([1.0, 5.0, 2.0, 6.0, 7.0])
    assert torch.allclose(group_baseline(prompts, rewards), torch.tensor([4.0, 0.0, 3.5, 1.5, 0.0]))
    deviation = (14 / 3) ** 0.5
    expected = torch.tensor([-2 / deviation, 0.0, -1 / deviation, 3 / deviation, 0.0])
    assert torch.allclose(group_normalised(prompts, rewards), expected, atol=1e-5)


def test_group_mean():
    expected = [float(REWARDS[group].mean()) for group in GROUPS]
    assert group_mean(PROMPTS, REWARDS).tolist() == pytest.approx(expected)


def test_decoupled_advantages_see_no_unit_and_no_zero():
    """And values that differ by rounding alone count as equal, where a deviation of 1e-7 would make them large."""
    terms = torch.stack([REWARDS, torch.tensor([3.0, -1, 0.5, 2, 4, 2.5], dtype=torch.float64)], 1)
    ours = decoupled_advantages(PROMPTS, terms, [1.0, 2.0])
    changed = terms * torch.tensor([7.0, 0.1]) + torch.tensor([-3.0, 1.0])
    torch.testing.assert_close(decoupled_advantages(PROMPTS, changed, [1.0, 2.0]), ours)
    summed = [float(sum(w * (t[i] - t[g].mean()) / t[g].std(correction=0).clamp(min=1e-6)
                        for w, t in zip((1.0, 2.0), terms.T, strict=True))) for i, g in enumerate(GROUPS)]  # fmt: skip
    expected = torch.tensor(summed, dtype=torch.float64)
    torch.testing.assert_close(ours, (expected - expected.mean()) / expected.std(correction=0))
    rounding = 10 + 1e-6 * torch.arange(6, dtype=torch.float64)
    flat = decoupled_advantages(PROMPTS, torch.stack([terms[:, 0], rounding], 1), [1.0, 1.0])
    torch.testing.assert_close(flat, decoupled_advantages(PROMPTS, terms[:, :1], [1.0]))
