"""Copies of the adapter: what they predict, how they follow, that they survive, and that an evaluation may use one."""

from pathlib import Path

import pandas as pd
import pytest
import torch
from scaffold import Brightness, pipeline_model

from bench import Batch, Config, Copy, Core, Loss, Method
from bench.config import resolve
from bench.diagnose.selftest.scaffold import perturb
from bench.models.analytic import GaussianFlowModel, GaussianModel, RingModel
from bench.runs.rows import label
from bench.sampling.grids import ddim_kernel
from bench.settings import OptimizerConfig, TrainConfig
from bench.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.mark.parametrize("options", [{}, {"checkpointing": True}, {"dtype": "bfloat16"}, {"finetune": "full"}])
def test_a_copy_predicts_what_its_values_do(options, pipeline_folder):
    """Alone, merged or in the midst of a policy's graph, whose gradient it leaves as it was."""
    model = pipeline_model(pipeline_folder, **options)
    perturb(model, 0.01)
    copy = {name: p.detach().clone() for name, p in model.adapters().items()}
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t, text = torch.tensor([100, 700]), model.encode(["cat", "dog"])
    expected = model.predict(z, t, text).detach()
    perturb(model, 0.02)
    weights = list(model.adapters().values())
    plain = torch.autograd.grad(model.predict(z, t, text).square().sum(), weights)
    policy = model.predict(z, t, text)
    with model.using(copy):
        found = model.predict(z, t, text)
        with model.merged():
            again = model.predict(z, t, text)
        assert not torch.equal(model.predict(z, t, text, prior=True), found)
    assert torch.equal(found, expected)
    assert torch.equal(again, expected)
    assert not found.requires_grad
    assert not torch.allclose(policy, found)
    assert all(map(torch.equal, torch.autograd.grad(policy.square().sum(), weights), plain))
    moved = z.clone().requires_grad_()
    with model.using(copy):
        through = model.predict(moved, t, text)
    (gradient,) = torch.autograd.grad(through.sum(), moved)  # after the block, also where it is recomputed
    for parameter, value in zip(weights, copy.values(), strict=True):
        parameter.data.copy_(value)
    own = z.clone().requires_grad_()
    assert torch.equal(gradient, torch.autograd.grad(model.predict(own, t, text).sum(), own)[0])


@pytest.mark.parametrize("kind", [GaussianModel, GaussianFlowModel, RingModel])
def test_copies_of_analytic_models(kind):
    model = kind()
    z, t, text = torch.ones(2, 2), torch.tensor([100, 700]), model.encode(["", ""])
    copy = {name: p.detach() + 0.1 for name, p in model.adapters().items()}
    with model.using(copy):
        found, prior = model.predict(z, t, text), model.predict(z, t, text, prior=True)
    assert torch.equal(model.predict(z, t, text), prior)
    for name, parameter in model.adapters().items():
        parameter.data.copy_(copy[name])
    assert torch.equal(model.predict(z, t, text), found)
    assert not torch.equal(found, prior)


class Follower(Method):
    """Learns whatever; keeps three copies."""

    def copies(self) -> dict[str, Copy]:
        return {"old": Copy(lambda n: 0.0, rounds=1), "slow": Copy(lambda n: 0.5), "stage": Copy(lambda n: 0.0, 2, 3)}

    def losses(self, core: Core, data: Batch):
        z = data.latents[:, 1]
        teacher = core.predict(z, 1, data.conditioning, weights="slow")
        yield Loss((core.predict(z, 1, data.conditioning) - teacher - 1).square().sum(1))


def trainer_of(folder: Path, updates: int) -> Trainer:
    model = GaussianModel()
    core = Core(model, ddim_kernel(model.spec.alphas_cumprod, 3), Brightness(Config()), 1.0)
    train = TrainConfig(updates=updates, prompts_per_round=1, samples_per_prompt=4, checkpoint_every=1, ema=0.9)
    return Trainer(core, Follower(Config()), ["a"], train, OptimizerConfig(lr=0.1, weight_decay=0.0), folder)


def test_copies_follow_their_schedules_and_survive_a_restart(tmp_path):
    straight = trainer_of(tmp_path / "straight", 12)
    bias, seen = straight.core.model.adapters()["bias"], []

    def note(record):
        seen.append((bias.detach().clone(), {n: c["bias"].clone() for n, c in straight.core.copies.items()}))

    straight.run(note)
    slow = ema = torch.zeros_like(bias)
    for n, (policy, copies) in enumerate(seen, 1):
        slow, decay = (slow + policy) / 2, min((1 + n) / (10 + n), 0.9)
        ema = decay * ema + (1 - decay) * policy
        torch.testing.assert_close(copies["slow"], slow)
        torch.testing.assert_close(copies["ema"], ema)
        # a round has two updates, and its copies follow with the last of them
        behind = {"old": n // 2 * 2, "stage": min(n // 4 * 4, 8)}
        for name, update in behind.items():
            assert torch.equal(copies[name], seen[update - 1][0] if update else torch.zeros_like(bias)), (n, name)
    trainer_of(tmp_path / "resumed", 4).run(lambda record: None)
    resumed = trainer_of(tmp_path / "resumed", 12)
    assert resumed.resume()
    resumed.run(lambda record: None)
    for name, copy in straight.core.copies.items():
        assert all(torch.equal(value, resumed.core.copies[name][key]) for key, value in copy.items()), name


def test_an_evaluation_of_the_average_on_another_sampler(tiny_run, bench):
    """The row's method says both; `bench eval` of the same run may go back to the policy."""
    settings = ["train.ema=0.9", "evaluation.weights=ema", "evaluation.sampler.steps=2", "evaluation.sampler.eta=0.5"]
    settings += ["sampler.guidance=1", "evaluation.sampler.guidance=3", "model.negative_prompt=dog"]
    folder = tiny_run("draft_1", *[word for setting in settings for word in ("--set", setting)])
    rows = pd.read_parquet(folder / "rows.parquet").set_index("metric")
    assert set(rows["method"]) == {"draft_1 (ema, trained with guidance 1, trained on 3 steps of ddim 1)"}
    status, text = bench("eval", folder, "--set", "evaluation.weights=policy")
    assert status == 0, text
    (other,) = folder.glob("eval-*")
    policy = pd.read_parquet(other / "rows.parquet").set_index("metric")
    assert set(policy["method"]) == {"draft_1 (trained with guidance 1, trained on 3 steps of ddim 1)"}
    assert set(policy["evaluation"]) == set(rows["evaluation"])
    assert rows.loc["reward/train", "prior"] == policy.loc["reward/train", "prior"]
    assert rows.loc["reward/train", "value"] != policy.loc["reward/train", "value"]
    status, text = bench("eval", folder, "--set", "evaluation.weights=old")
    assert (status, "Traceback" in text) == (2, False)
    assert "has policy, ema" in text
    status, text = bench("run", "--method", "draft_1", "--model", "ring", "--set", "evaluation.weights=ema")
    assert status == 2
    assert "train.ema" in text


def test_a_baseline_is_not_said_to_be_trained():
    changed = ["evaluation.sampler.steps=2"]
    assert label(resolve("prior", suite="gaussian", assignments=changed)) == "prior"
    assert label(resolve("draft", suite="gaussian", assignments=changed)).startswith("draft (trained on ")
    assert label(resolve("draft", suite="gaussian")) == "draft"
    guided = resolve("draft", suite="emoji", assignments=["sampler.guidance=1", "evaluation.sampler.guidance=3"])
    assert label(guided) == "draft (trained with guidance 1)"
    apart = resolve("nft", suite="emoji", assignments=["train.guidance=1", "evaluation.weights=policy"])
    assert label(apart) == "nft (losses with guidance 1)"
