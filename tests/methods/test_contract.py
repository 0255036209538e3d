"""What a reward of someone else may do wrong at run time, and the sentence that tells it."""

from dataclasses import replace

import pytest
import torch
from bench.methods.policy_gradient.ddpo import DDPO
from scaffold import Brightness, trainer_of
from torch import Tensor

from bench.config import resolve
from bench.core import Core
from bench.errors import BenchError, NonFiniteError
from bench.evaluation.evaluator import Evaluator
from bench.options import Config
from bench.prompts import split

PROMPTS = split("test", ["cat", "dog", "red bird", "fish", "bear", "apple"])


def fail(images: Tensor) -> Tensor:
    raise KeyError("weights")


BROKEN = {  # what the reward makes of brightness [B], and what is said
    "column": (lambda r: r[:, None], r"returned torch.float32 \[2, 1\] for 2 images"),
    "scalar": (lambda r: r.mean(), r"returned torch.float32 \[\] for 2 images"),
    "short": (lambda r: r[:1], r"returned torch.float32 \[1\] for 2 images"),
    "integer": (lambda r: r.round().long(), r"returned torch.int64 \[2\]"),
    "half": (lambda r: r.half(), r"returned torch.float16"),
    "none": (lambda r: None, "returned NoneType"),
    "list": (lambda r: r.tolist(), "returned list"),
    "array": (lambda r: r.detach().numpy(), "returned ndarray"),
    "raises": (fail, "failed: KeyError: 'weights'"),
}
WITHOUT_GRADIENT = {
    "detached": lambda r: r.detach(),
    "constant": lambda r: torch.ones_like(r),
    "of its own parameter": lambda r: torch.ones_like(r.detach()).requires_grad_() * 2,
}


def reward_of(change) -> Brightness:
    class Own(Brightness):
        def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
            return change(super().__call__(images, prompts))

    return Own(Config())


def latents(core: Core) -> Tensor:
    return torch.zeros(2, *core.model.latent_shape)


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_reward_is_named_in_training_and_evaluation(fault: str, core: Core, tmp_path) -> None:
    change, words = BROKEN[fault]
    core = replace(core, reward_model=reward_of(change), reward_name="mine", micro_batch=2)
    with pytest.raises(BenchError, match=f"the reward 'mine' {words}"), torch.no_grad():
        core.reward(latents(core), ["cat", "dog"])
    config = resolve("prior", reward="colorfulness", assignments=["evaluation.samples_per_prompt=2"])
    evaluator = Evaluator(core, config, PROMPTS, tmp_path)
    evaluator.rewards = {"mine": core.reward_model}
    with pytest.raises(BenchError, match=f"the reward 'mine' {words}"):
        evaluator.prior_set("prior")


@pytest.mark.parametrize("fault", WITHOUT_GRADIENT)
def test_a_reward_without_its_gradient_is_named(fault: str, core: Core) -> None:
    core = replace(core, reward_model=reward_of(WITHOUT_GRADIENT[fault]), reward_name="Brightness")
    with pytest.raises(BenchError, match="the reward 'Brightness' declares a gradient"):
        core.reward_gradient(latents(core), ["cat", "dog"])


def test_a_reward_that_writes_into_its_images_changes_no_other_score(core: Core, tmp_path) -> None:
    class Writing(Brightness):
        def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
            values = super().__call__(images, prompts)
            images.zero_()
            prompts.clear()
            return values

    config = resolve("prior", reward="colorfulness", assignments=["evaluation.samples_per_prompt=2"])
    evaluator = Evaluator(core, config, PROMPTS, tmp_path)
    evaluator.rewards = {"writing": Writing(Config()), "next": Brightness(Config())}
    found = evaluator.prior_set("prior").rewards
    assert found["next"].any()
    assert torch.equal(found["writing"], found["next"])


@pytest.mark.parametrize(
    ("bad", "words"), [("reward", "on the prior's own samples either"), ("prior", "training did not")]
)
def test_what_is_not_finite_without_training_is_not_blamed_on_it(bad: str, words: str, core: Core, tmp_path) -> None:
    if bad == "reward":
        core = replace(core, reward_model=reward_of(lambda r: r * float("nan")))
    else:
        core.model.pipeline.unet.conv_out.bias.data.fill_(float("nan"))
    trainer = trainer_of(core, DDPO(DDPO.Config()), tmp_path)
    with pytest.raises(NonFiniteError, match=words) as caught:
        trainer.run(lambda record: None)
    assert "optimizer.lr" not in str(caught.value)
    config = resolve("prior", reward="colorfulness", assignments=["evaluation.samples_per_prompt=2"])
    evaluator = Evaluator(core, config, PROMPTS, tmp_path)
    evaluator.rewards = {"mine": core.reward_model}
    with pytest.raises(NonFiniteError, match="prior's own samples"):
        evaluator.prior_set("prior")
