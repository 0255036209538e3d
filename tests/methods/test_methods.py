"""Every training method on the random pipeline: where gradients go, invariances, resuming, stopping."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bench.methods.nabla.adjoint import NablaGFNAdjoint
from bench.methods.nabla.base import NablaMethod
from bench.methods.nabla.published import NablaDB, NablaGFNPublished
from bench.methods.nabla.residual import NablaGFN
from bench.methods.policy_gradient.ddpo import DDPO, DDPOConfig
from scaffold import PROMPTS, Brightness, by_family, method_of, perturb, pipeline_model, trainer_of, update
from torch import Tensor

from bench import registry
from bench.core import Core
from bench.errors import NonFiniteError
from bench.options import Config
from bench.sampling.grids import ddim_kernel
from bench.settings import OptimizerConfig, TrainConfig
from bench.training import checkpoint
from bench.training.trainer import Record, Trainer

BUILT_IN = registry.BUILT_IN["methods"]
TRAINING = [name for name in BUILT_IN if registry.load("methods", name).needs.training]


def move_networks(core: Core) -> None:
    """Give the extra networks' zero output layers weights, so that gradients get past them."""
    generator = torch.Generator().manual_seed(0)
    for network in core.networks.values():
        for parameter in network.parameters():
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("name", ["nft", "awm", "adjoint_matching", "rtb"])
def test_losses_may_have_their_own_guidance(name, core, tmp_path):
    """Paths of the sampler's guidance, and on them the loss of a core that has the other."""
    method, rows = method_of(name), []
    perturb(core.model)
    train = TrainConfig(updates=1, prompts_per_round=2, samples_per_prompt=2, updates_per_round=1, guidance=1.0)
    trainer = Trainer(core, method, PROMPTS, train, OptimizerConfig(), tmp_path)
    data = trainer.sample_round(0)
    guided = core.rollout(core.batch(data.samples), weights="old" if "old" in core.copies else None)
    assert torch.allclose(data.latents, guided.latents, atol=1e-5)
    expected, _ = update(replace(core, model=core.model.with_guidance(1.0)), method, data)
    guided_loss, _ = update(core, method, data)
    trainer.run(rows.append)
    assert rows[0]["loss"] == pytest.approx(expected, rel=2e-5)
    assert rows[0]["loss"] != pytest.approx(guided_loss, rel=2e-4)


@pytest.mark.parametrize("name", TRAINING)
def test_gradients_reach_what_trains_and_nothing_else(name, core, tmp_path):
    method = method_of(name)
    trainer = trainer_of(core, method, tmp_path)
    data = trainer.sample_round(0)
    _, start = update(core, method, data)
    adapters = core.model.adapters()
    assert all(start[key].any() for key in adapters if ".lora_B." in key)
    perturb(core.model)
    move_networks(core)
    _, later = update(core, method, data)
    assert all(later[key].any() for key in adapters)
    for network, modules in core.networks.items():
        at_start = {key for key in start if key.startswith(f"{network}.") and start[key].any()}
        assert at_start == {f"{network}.unet.conv_out.weight", f"{network}.unet.conv_out.bias"}
        assert later[f"{network}.unet.conv_in.bias"].any()  # log Z sees no latent, so no weight of this layer
        assert all(parameter.grad is not None for parameter in modules.parameters())
    pipe = core.model.pipeline
    others = [p for part in (pipe.unet, pipe.vae, pipe.text_encoder) for p in part.parameters()]
    trained = {id(p) for p in adapters.values()}
    others = [p for p in others if id(p) not in trained]
    assert len(others) > 100
    assert all(p.grad is None and not p.requires_grad for p in others)


LONG_SUMS = {"tmpo", "res_db"}  # of log-densities that nothing cancels, in float32


@pytest.mark.parametrize(
    "name",
    by_family(TRAINING, "nabla_gfn_published", "nabla_gfn_adjoint", "rtb", "dag_kl", "tmpo", "refl", "flow_grpo"),
)
def test_losses_do_not_depend_on_the_micro_batch_or_the_call(name, core, tmp_path):
    method = method_of(name)
    data = trainer_of(core, method, tmp_path).sample_round(0)[:3]
    perturb(core.model)  # after sampling, so that ratios and the trust region are not trivial
    move_networks(core)
    found = {}
    for size in (2, 5, 64):
        found[size] = update(replace(core, micro_batch=size), method, data)
    reference = found[64]
    again, gradients = update(replace(core, micro_batch=64), method, data)
    assert again == reference[0]
    assert all(torch.equal(gradients[key], value) for key, value in reference[1].items())
    for size in (2, 5):
        loss, gradients = found[size]
        assert loss == pytest.approx(reference[0], rel=5e-3 if name in LONG_SUMS else 1e-4)
        for group in ("policy", *core.networks):
            keys = [k for k in gradients if k.startswith(f"{group}.") or (group == "policy" and ".lora_" in k)]
            ours, theirs = (torch.cat([g[k].flatten() for k in keys]) for g in (gradients, reference[1]))
            assert theirs.any()
            assert (ours - theirs).norm() < (5e-3 if name in LONG_SUMS else 1e-4) * theirs.norm(), (size, group)


@pytest.mark.parametrize("method_class", [NablaGFN, NablaGFNAdjoint, NablaGFNPublished, NablaDB])
def test_reverse_loss_trains_the_flow_alone(method_class, core, tmp_path):
    found = []
    for weight in (0.0, 1.0):
        method = method_class(method_class.Config(fraction=1, channels=[16, 16], reverse_weight=weight))
        trainer = trainer_of(core, method, tmp_path)
        if not found:
            perturb(core.model)
            data = trainer.sample_round(0)
        move_networks(core)
        found.append(update(core, method, data))
    (without, a), (with_reverse, b) = found
    assert with_reverse > without
    adapters = core.model.adapters()
    assert all(torch.equal(a[key], b[key]) for key in adapters)
    assert any(not torch.equal(a[key], b[key]) for key in a if key not in adapters)


def forward_alone(method_class: type[NablaMethod], **options) -> NablaMethod:
    """The method with its forward loss as the only one."""

    class ForwardAlone(method_class):
        def micro_loss(self, part, steps, losses, rewards):
            return super().micro_loss(part, steps, {"forward": losses["forward"]}, rewards)

    return ForwardAlone(method_class.Config(channels=[16, 16], fraction=1, **options))


@pytest.mark.parametrize("method_class", [NablaGFN, NablaGFNAdjoint, NablaDB, NablaGFNPublished])
def test_the_forward_loss_trains_the_flow_in_the_published_setting_alone(method_class, core, tmp_path):
    method = forward_alone(method_class)
    data = trainer_of(core, method, tmp_path).sample_round(0)
    perturb(core.model)
    move_networks(core)
    _, gradients = update(core, method, data)
    assert any(g.any() for key, g in gradients.items() if key.startswith("flow.")) == (
        method_class is NablaGFNPublished
    )


def test_a_detached_target_changes_no_loss_and_no_gradient_of_the_policy(core, tmp_path):
    methods = [forward_alone(NablaGFNPublished, detach_target=detach) for detach in (True, False)]
    data = trainer_of(core, methods[0], tmp_path).sample_round(0)
    perturb(core.model)
    move_networks(core)
    (loss, detached), (again, attached) = (update(core, method, data) for method in methods)
    assert loss == again
    assert all(torch.equal(detached[key], attached[key]) for key in core.model.adapters())


# The trainer ------------------------------------------------------------------------------------------------------


def test_schedules_of_beta_and_learning_rate(core, tmp_path):
    """β rises linearly over the first half of eight updates, the learning rate falls over the last half."""
    method = method_of("draft_1")
    train = TrainConfig(updates=8, prompts_per_round=2, samples_per_prompt=1, beta_warmup=0.5, checkpoint_every=1)
    seen = []

    def note(record: Record) -> None:
        rate = trainer.optimizers["policy"].param_groups[0]["lr"]
        seen.append((record["update"], trainer.beta / 10, rate / 1e-2))
        if record["update"] == 4 and not resumed:
            raise Interrupted

    for resumed in (False, True):
        trainer = Trainer(core, method, PROMPTS, train, OptimizerConfig(lr=1e-2, decay=0.5), tmp_path)
        assert trainer.resume() == resumed
        if resumed:
            trainer.run(note)
        else:
            with pytest.raises(Interrupted):
                trainer.run(note)
    assert [number for number, _, _ in seen] == [1, 2, 3, 4, 3, 4, 5, 6, 7, 8]
    for number, next_beta, rate in seen:
        assert next_beta == pytest.approx(min(1, number / 4))
        assert rate == pytest.approx(min(1, 2 * (1 - (number - 1) / 8)))


class Interrupted(Exception):
    """Stands for a kill at an arbitrary update."""


def fresh(name: str, pipeline: Path, folder: Path, reward: Brightness | None = None, updates: int = 6) -> Trainer:
    """New objects throughout, as in a new process."""
    model = pipeline_model(pipeline)
    kernel = ddim_kernel(model.spec.alphas_cumprod, 3, eta=1.0, steps_offset=1, final_alpha=model.spec.final_alpha)
    method = DDPO(DDPOConfig(buffer=6, minimum=2)) if name == "ddpo" else method_of(name)
    core = Core(model, kernel, reward or Brightness(Config()), beta=10.0, micro_batch=4, sample_batch=4)
    return trainer_of(core, method, folder, updates)


def comparable(record: Record) -> Record:
    return {key: v for key, v in record.items() if not key.startswith("seconds") and key != "peak_memory"}


def all_tensors(state: object) -> list[Tensor]:
    if isinstance(state, Tensor):
        return [state]
    values = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else []
    return [tensor for value in values for tensor in all_tensors(value)]


@pytest.mark.parametrize("name", ["nabla_gfn", "ddpo"])
def test_a_killed_run_resumes_bitwise(name, pipeline_folder, tmp_path):
    straight, records = fresh(name, pipeline_folder, tmp_path / "straight"), []
    straight.run(records.append)
    assert [record["update"] for record in records] == [1, 2, 3, 4, 5, 6]

    def killed(record: Record) -> None:
        if record["update"] == 3:  # in the middle of round 1
            raise Interrupted

    torch.rand(7)  # global random state is nothing to either run
    with pytest.raises(Interrupted):
        fresh(name, pipeline_folder, tmp_path / "killed").run(killed)
    resumed, later = fresh(name, pipeline_folder, tmp_path / "killed"), []
    assert resumed.resume()
    assert (resumed.update, resumed.round, len(resumed.queue)) == (2, 1, straight.config.data_lag)
    resumed.run(later.append)
    assert [comparable(record) for record in later] == [comparable(record) for record in records[2:]]
    ours, theirs = resumed.state_dict(), straight.state_dict()
    assert str(ours["method"]) == str(theirs["method"])  # names and counts; its tensors follow
    assert bool(ours["method"]) == (name == "ddpo")
    for part in ("parameters", "optimizers", "queue", "method"):
        pairs = list(zip(all_tensors(ours[part]), all_tensors(theirs[part]), strict=True))
        assert all(torch.equal(x, y) for x, y in pairs)
        assert pairs or (part == "queue" and not straight.config.data_lag) or (part, name) == ("method", "nabla_gfn")


def test_a_truncated_checkpoint_is_passed_over(pipeline_folder, tmp_path, caplog):
    fresh("draft_1", pipeline_folder, tmp_path, updates=4).run(lambda record: None)
    newest = checkpoint.newest(tmp_path / "checkpoints")
    assert newest.name.startswith("update-0000004")
    newest.write_bytes(newest.read_bytes()[:-1000])
    resumed = fresh("draft_1", pipeline_folder, tmp_path)
    assert resumed.resume()
    assert resumed.update == 2
    assert newest.name in caplog.text
    assert "damaged" in caplog.text


class Failing(Brightness):
    """Not a number for one prompt."""

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        bad = torch.tensor([prompt == "dog" for prompt in prompts])
        return super().__call__(images, prompts).masked_fill(bad, float("nan"))


@pytest.mark.parametrize("name", ["nabla_gfn", "ddpo"])
def test_a_reward_that_is_not_a_number_stops_the_run(name, pipeline_folder, tmp_path):
    fresh(name, pipeline_folder, tmp_path, updates=2).run(lambda record: None)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    trainer = fresh(name, pipeline_folder, tmp_path, reward=Failing(Config()))
    assert trainer.resume()
    with pytest.raises(NonFiniteError) as caught:
        trainer.run(lambda record: None)
    message = str(caught.value)
    assert "'dog'" in message
    assert f"update {trainer.update + 1} stopped" in message
    assert trainer.update >= 2
    assert str(checkpoint.newest(tmp_path / "checkpoints")) in message
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert after.items() >= before.items()
    weights = all_tensors(checkpoint.load(tmp_path / "checkpoints")["parameters"])
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights)
