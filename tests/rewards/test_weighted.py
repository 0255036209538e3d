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


def test_gdpo_normalises_the_sum_of_normalised_terms(tmp_path):
    """Neither a term's unit nor its zero counts; the round's advantages have mean 0 and deviation 1."""
    options = ["method.advantage_clip=20", "reward.combine=gdpo"]
    data = round_of("grpo", EXPRESSION, tmp_path, *options)
    other = round_of("grpo", EXPRESSION, tmp_path, *options, "reward.quadratic.width=1.0")
    torch.testing.assert_close(data.advantages, other.advantages, rtol=1e-3, atol=1e-3)
    assert float(data.advantages.mean()) == pytest.approx(0, abs=1e-5)
    assert float(data.advantages.std(correction=0)) == pytest.approx(1, rel=1e-4)
    apart = round_of("grpo", EXPRESSION, tmp_path, options[0], "reward.combine=advantages").advantages
    torch.testing.assert_close(data.advantages, apart / apart.std(correction=0), rtol=1e-4, atol=1e-4)


def test_what_a_method_would_ignore_is_refused():
    def of(method: str, reward: str, combine: str) -> None:
        check(resolve(method, reward=reward, suite="gaussian", assignments=[f"reward.combine={combine}"]))

    with pytest.raises(BenchError, match=r"'gardo' computes its own advantages: use advantages"):
        of("gardo", EXPRESSION, "gdpo")
    of("gardo", "linear+0*quadratic", "advantages")
    for method in ("gardo", "ddpo"):
        with pytest.raises(BenchError, match=r"has quadratic with weight 0, which changes nothing"):
            of(method, "linear+0*quadratic", "rewards")


@pytest.mark.parametrize("combine", ["advantages", "gdpo"])
@pytest.mark.parametrize("method", ["draft_1", "nabla_gfn", "rtb", "ddpo", "dpok", "tilt_matching"])
def test_others_are_refused_with_the_reason(method, combine):
    config = resolve(method, reward=EXPRESSION, suite="gaussian", assignments=[f"reward.combine={combine}"])
    with pytest.raises(BenchError, match=f"reward.combine = {combine} .* rewards themselves or their gradient"):
        check(config)
