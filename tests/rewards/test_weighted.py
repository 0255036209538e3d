"""A weighted sum's terms, normalised apart: then a reward's number in the sum counts, and its unit does not."""

import pytest
import torch

from bench import registry
from bench.config import resolve
from bench.core import Core
from bench.errors import BenchError
from bench.models.analytic import GaussianModel
from bench.runs.preflight import check
from bench.sampling.grids import ddim_kernel
from bench.training.trainer import Trainer

EXPRESSION = "linear+2*quadratic"


def round_of(method: str, expression: str, tmp_path, *options: str):
    """A first round of trajectories, advantages added."""
    config = resolve(method, reward=expression, suite="gaussian", assignments=["train.samples_per_prompt=6", *options])
    check(config)
    reward = registry.load("rewards", expression)
    reward = reward(reward.Config(**config.reward.model_dump(exclude={"name", "beta"})))
    model = GaussianModel()
    core = Core(model, ddim_kernel(model.spec.alphas_cumprod, 4), reward, beta=1.0)
    cls = registry.load("methods", method)
    made = cls(cls.Config(**config.method.model_dump(exclude={"name"})))
    return Trainer(core, made, ["a", "b"], config.train, config.optimizer, tmp_path).sample_round(0)


@pytest.mark.parametrize("method", ["grpo", "flow_grpo", "nft"])
def test_terms_are_normalised_apart(method, tmp_path):
    apart = "reward.combine=advantages"
    options = ["method.advantage_clip=20"]  # beyond every advantage here
    wide = [*options, apart, "reward.quadratic.width=1.0"]
    data = round_of(method, EXPRESSION, tmp_path, *options, apart)
    other = round_of(method, EXPRESSION, tmp_path, *wide)
    assert torch.equal(data.terms[:, 0], other.terms[:, 0])
    ratio = data.terms[:, 1] / other.terms[:, 1]
    assert ratio.std() < 1e-4 and abs(ratio.mean() - 1) > 0.5  # the same reward in another unit
    torch.testing.assert_close(data.advantages, other.advantages, rtol=1e-3, atol=1e-3)
    one = round_of(method, "linear", tmp_path, *options)
    two = round_of(method, "quadratic", tmp_path, *options)
    torch.testing.assert_close(data.advantages, one.advantages + 2 * two.advantages)
    torch.testing.assert_close(data.rewards, one.rewards + 2 * two.rewards)
    summed = round_of(method, EXPRESSION, tmp_path, *options)
    assert summed.terms is None and not torch.allclose(summed.advantages, data.advantages, rtol=0.05)


@pytest.mark.parametrize("method", ["draft_1", "nabla_gfn", "rtb", "ddpo", "dpok", "tilt_matching"])
def test_others_are_refused_with_the_reason(method):
    config = resolve(method, reward=EXPRESSION, suite="gaussian", assignments=["reward.combine=advantages"])
    with pytest.raises(BenchError, match="rewards themselves or their gradient"):
        check(config)
