"""The contract of a reward, on noise."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from bench import registry
from bench.config import load_suite
from bench.diagnose.listing import names
from bench.diagnose.selftest.checking import Skipped, derivative_error, require
from bench.diagnose.selftest.device import device as pretended_device
from bench.diagnose.selftest.device import recording
from bench.errors import BenchError
from bench.evaluation.scores import load_reward
from bench.prompts import load_prompts
from bench.reward import Reward
from bench.sampling.noise import Noise

PROMPTS = ["red apple", "dog", "cat", "lion"]


def _loaded(name: str, device: torch.device | str = "cpu") -> tuple[Reward, list[str]]:
    """The reward, and prompts for it: of its own suite if it reads what a prompt file says of them.

    Raises Skipped for one whose service does not answer, or whose extra is not installed.
    """
    try:
        reward, prompts = load_reward(name, device=device), PROMPTS
    except BenchError as error:
        if isinstance(error.__cause__, ImportError):
            raise Skipped(str(error)) from None
        raise
    if reward.columns:
        known = load_prompts(load_suite(reward.suite)["prompts"]["name"])
        reward.set_metadata(known.metadata)
        prompts = known.train[: len(PROMPTS)]
    if reward.may_miss and not _answers(name):
        raise Skipped(f"it gave no score: it needs {reward.setup or 'its service'}")
    return reward, prompts


@cache
def _answers(name: str) -> bool:
    """Whether a reward that may give no score gives one; asked once, as a service that is not there takes long."""
    reward = load_reward(name, device="cpu")
    return not bool(reward(_inputs(reward)[:1], PROMPTS[:1]).isnan())


def _inputs(reward: Reward) -> Tensor:
    shape = ((2,) * reward.frames + (3, 32, 32)) if reward.inputs == "images" else (2,)
    noise = Noise(0, "evaluate", [(prompt, 0) for prompt in PROMPTS])(0, shape)
    return torch.sigmoid(noise) if reward.inputs == "images" else noise


def says_its_scale_and_source(name: str) -> None:
    """docstring, scale, source, and a suite that exists"""
    reward = registry.load("rewards", name)
    for field in ("__doc__", "scale", "source"):
        require((getattr(reward, field, None) or "").strip(), f"the class has no {field}.")
    require(reward.suite in names("suites"), f"the suite {reward.suite!r} does not exist; see bench ls suites.")


def scores_are_well_formed(name: str) -> None:
    """finite float32 [B] for noise, black and white, the same twice, inputs and random state untouched"""
    reward, prompts = _loaded(name)
    x = _inputs(reward)
    for images in (x, x[:1], torch.zeros_like(x), torch.ones_like(x)):
        before, state = images.clone(), torch.get_rng_state()
        scores = reward(images, prompts[: len(images)])
        good = scores.dtype == torch.float32 and scores.shape == (len(images),)
        require(good, f"the scores are {scores.dtype} {list(scores.shape)}; return float32 [B].")
        require(torch.isfinite(scores).all(), "a score is not finite.")
        require(torch.equal(images, before), "the images were changed in place.")
        require(torch.equal(scores, reward(images, prompts[: len(images)])), "the same images score differently.")
        require(torch.equal(state, torch.get_rng_state()), "global random state was used.")


def neighbours_do_not_matter(name: str) -> None:
    """an image's score does not depend on the rest of its batch"""
    reward, prompts = _loaded(name)
    x = _inputs(reward)
    alone = torch.cat([reward(x[i : i + 1], prompts[i : i + 1]) for i in range(len(x))])
    good = torch.allclose(reward(x, prompts), alone, rtol=1e-4, atol=1e-5)
    require(good, "an image alone scores differently than in a batch: no statistics over the batch.")


def the_gradient_is_the_derivative(name: str) -> None:
    """a differentiable reward agrees with central differences; any other gives no gradient"""
    reward, prompts = _loaded(name)
    x = _inputs(reward).requires_grad_()
    scores = reward(x, prompts)
    if not reward.differentiable:
        require(not scores.requires_grad, "the reward declares no gradient and gives one: set differentiable = True.")
        raise Skipped("the reward declares no gradient")
    require(scores.requires_grad, "the reward declares a gradient and gives none: set differentiable = False.")
    error = derivative_error(lambda x: reward(x, prompts), x)
    require(error < 0.03, f"the gradient is {error:.0%} from central differences at the best of four steps.")


def it_runs_on_a_device(name: str) -> None:
    """on a pretended GPU no operation mixes devices, and scores and gradients are those of the CPU"""
    x, pretended = _inputs(_loaded(name)[0]), pretended_device()
    results = []
    for place in (torch.device("cpu"), pretended):
        with recording():
            (reward, prompts), images = _loaded(name, place), x.to(place).requires_grad_()
            scores = reward(images, prompts)
            require(scores.device == place, f"images on {place} give scores on {scores.device}.")
            gradient = torch.autograd.grad(scores.sum(), images)[0] if reward.differentiable else scores
            results.append((scores.detach().cpu(), gradient.detach().cpu()))
    same = all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*results, strict=True))
    require(same, "scores or gradients differ from those on the CPU.")


CHECKS: list[Callable[[str], None]] = [
    says_its_scale_and_source,
    scores_are_well_formed,
    neighbours_do_not_matter,
    the_gradient_is_the_derivative,
    it_runs_on_a_device,
]
