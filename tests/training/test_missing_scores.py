"""Scores that a reward may not have: whole groups are left out of the round, whatever the method."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scaffold import Brightness, by_family, sample, small_method, trainer_of
from torch import Tensor

from bench import registry
from bench.core import Core
from bench.errors import BenchError, NonFiniteError
from bench.method import Method
from bench.options import Config
from bench.training.rounds import complete_groups
from bench.training.trainer import Trainer

ABLE = [
    name
    for name in registry.BUILT_IN["methods"]
    if (needs := registry.load("methods", name).needs).rewards and not needs.reward_gradient and needs.training
]


class Silent(Brightness):
    """No score for the first sample of each of these prompts."""

    differentiable = False
    may_miss = True
    prompts: tuple[str, ...] = ("cat",)

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        first = [prompt in self.prompts and prompt not in prompts[:row] for row, prompt in enumerate(prompts)]
        return super().__call__(images, prompts).masked_fill(torch.tensor(first), torch.nan)


def silent(core: Core, folder, method: Method, prompts: tuple[str, ...] = ("cat",)) -> Trainer:
    reward = Silent(Config())
    reward.prompts = prompts
    return trainer_of(replace(core, reward_model=reward, unchecked=[]), method, folder, updates=6)


@pytest.mark.parametrize("name", by_family(ABLE))
def test_every_method_trains_on_what_is_left(name, core, tmp_path):
    trainer = silent(core, tmp_path, small_method(name))
    records = []
    trainer.run(records.append)
    assert len(records) == 6
    counts = [record["missing_scores"] for record in records]
    rounds = [{prompt for prompt, _ in trainer.names(number)} for number in range(trainer.round)]
    assert counts[-1] == sum("cat" in prompts for prompts in rounds) > 0
    assert all(torch.isfinite(p).all() for p in core.model.adapters().values())


def test_the_round_has_the_complete_groups_and_their_count_survives_a_resume(core, tmp_path):
    trainer = silent(core, tmp_path, small_method("grpo"))
    number = next(n for n in range(9) if "cat" in dict(trainer.names(n)))
    names = [name for name in trainer.names(number) if name[0] != "cat"]
    data = trainer.sample_round(number)
    assert data.samples == names and data.rewards.isfinite().all() and data.advantages.isfinite().all()
    whole = trainer_of(core, small_method("grpo"), tmp_path / "whole").sample_round(number)
    rows = [whole.samples.index(name) for name in names]
    assert torch.equal(data.latents, whole.latents[rows])
    torch.testing.assert_close(data.rewards, whole.rewards[rows])
    trainer.missing_scores = 7
    trainer._save()
    again = silent(core, tmp_path, small_method("grpo"))
    assert again.resume() and again.missing_scores == 7


def test_too_few_scores_stop_the_run_with_one_sentence(core, tmp_path):
    trainer = silent(core, tmp_path, small_method("grpo"), ("cat", "dog", "fish"))
    with pytest.raises(BenchError, match=r"gave no score for 2 of the 4 samples of round 0.*when the service works"):
        trainer.step()


@pytest.mark.parametrize(("value", "may_miss"), [(torch.nan, False), (torch.inf, True)])
def test_what_is_not_finite_otherwise_is_an_error_as_before(value, may_miss, core, tmp_path):
    class Broken(Brightness):
        differentiable = False

        def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
            return torch.full((len(images),), value)

    Broken.may_miss = may_miss
    trainer = trainer_of(replace(core, reward_model=Broken(Config()), unchecked=[]), small_method("grpo"), tmp_path)
    with pytest.raises(NonFiniteError, match="is not finite for 2 prompt"):
        trainer.step()


@given(st.lists(st.booleans(), min_size=6, max_size=6))
@settings(max_examples=20, deadline=None)
def test_a_group_is_whole_or_gone(data, there):
    prompts = ["a", "a", "b", "b", "c", "c"]
    rewards = torch.where(torch.tensor(there), torch.arange(6.0), torch.nan)
    kept, missing = complete_groups(replace(data, prompts=prompts, rewards=rewards))
    whole = [row for row in range(6) if there[row] and there[row ^ 1]]
    assert missing == there.count(False)
    assert kept.prompts == [prompts[row] for row in whole] and kept.rewards.tolist() == list(map(float, whole))


@pytest.fixture(scope="module")
def data(pipeline_folder):
    from scaffold import pipeline_model

    from bench.sampling.grids import ddim_kernel

    model = pipeline_model(pipeline_folder)
    kernel = ddim_kernel(model.spec.alphas_cumprod, 2, eta=1.0, steps_offset=1, final_alpha=model.spec.final_alpha)
    return sample(Core(model, kernel, Brightness(Config()), beta=1.0), rows=6)
